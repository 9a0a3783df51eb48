"""open_clip without what it brings along, and with timm as soon as an architecture needs it."""

import subprocess
import sys

import pytest

FIRST = {"ours": "import harma_ray.models.clip", "the user's": "import open_clip"}


@pytest.mark.parametrize("first", FIRST)
def test_an_image_tower_of_timms_is_made_whoever_imports_open_clip_first(first):
    code = f"""
import sys
{FIRST[first]}
from harma_ray.models.architectures import outline_clip
from open_clip.timm_model import TimmModel
class Own(TimmModel):
    pass
assert ("timm" in sys.modules) is ({first!r} == "the user's")
for _ in range(2):
    tower = outline_clip("convnext_base").visual
    assert type(tower) is sys.modules["open_clip.timm_model"].TimmModel
    assert type(tower.trunk).__module__.startswith("timm.")
import open_clip, pickle
assert type(tower) is TimmModel is open_clip.model.TimmModel
assert Own("resnet18", 8, pool="rot_attn", proj="mlp").image_size == (224, 224)
assert type(pickle.loads(pickle.dumps(TimmModel("resnet18", 8, pool="abs_attn")))) is TimmModel
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_a_tower_of_timms_that_was_pickled_is_whole(tmp_path):
    code = """
import pickle, sys
{first}
from pathlib import Path
path = Path({path!r})
if path.exists():
    tower = pickle.loads(path.read_bytes())
    tower.set_input_size(64)
    assert tower.image_size == (64, 64)
else:
    from open_clip.timm_model import TimmModel
    path.write_bytes(pickle.dumps(TimmModel("vit_tiny_patch16_224", 8)))
"""
    for first in (FIRST["the user's"], FIRST["ours"]):
        filled = code.format(first=first, path=str(tmp_path / "tower.pickle"))
        subprocess.run([sys.executable, "-c", filled], check=True, timeout=300)


def test_nothing_that_only_other_architectures_need_is_imported():
    code = """
import sys
import harma_ray.models.clip
from harma_ray.models.architectures import outline_clip
outline_clip("ViT-B-32")
assert not {"timm", "transformers", "wandb", "torch._inductor"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", "from harma_ray.compiler import defer_compiler; defer_compiler()" + code],
                   check=True, timeout=300)  # fmt: skip
