"""open_clip without what it brings along, and with timm as soon as an architecture needs it."""

import subprocess
import sys

FIRST = {
    "the user's": """
import open_clip
from open_clip.timm_model import TimmModel
path.write_bytes(pickle.dumps(TimmModel("vit_tiny_patch16_224", 8)))
""",
    "ours": """
import harma_ray.models.clip
if not (process := os.fork()):
    tower = pickle.loads(path.read_bytes())
    tower.set_input_size(64)
    os._exit(tower.image_size != (64, 64))
assert os.waitpid(process, 0)[1] == 0
""",
}
"""Who imports open_clip first; a tower that was pickled by the first is whole in a process of the second."""


def test_an_image_tower_of_timms_is_made_whoever_imports_open_clip_first_and_whole_where_it_was_pickled(tmp_path):
    for whose, first in FIRST.items():
        code = f"""
import os, pickle, sys
from pathlib import Path
path = Path({str(tmp_path / "tower.pickle")!r})
{first}
from harma_ray.models.architectures import outline_clip
from open_clip.timm_model import TimmModel
class Own(TimmModel):
    pass
assert ("timm" in sys.modules) is ({whose!r} == "the user's")
for _ in range(2):
    tower = outline_clip("convnext_base").visual
    assert type(tower) is sys.modules["open_clip.timm_model"].TimmModel
    assert type(tower.trunk).__module__.startswith("timm.")
import open_clip
assert type(tower) is TimmModel is open_clip.model.TimmModel
assert Own("resnet18", 8, pool="rot_attn", proj="mlp").image_size == (224, 224)
assert type(pickle.loads(pickle.dumps(TimmModel("resnet18", 8, pool="abs_attn")))) is TimmModel
"""
        subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


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
