"""What plain open_clip makes of a folder: the run's own vectors."""

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from random_runs import make_random_run
from torchvision.transforms.functional import pil_to_tensor

from harma_ray.api import load_run
from harma_ray.data.padding import padded_transform
from harma_ray.errors import UserError
from harma_ray.exports.checkpoint import export_checkpoint
from harma_ray.exports.clip_folder import CONFIG_NAME, write_clip_folder
from harma_ray.exports.request import LIST_NAME
from harma_ray.models.architectures import configuration
from harma_ray.models.towers import Preparation
from harma_ray.recipes import recipe_config
from harma_ray.runs import Run
from harma_ray.settings import build_config

TEXTS = ["a plane beside a runway", "two cars"]


def pictures():
    noise = np.random.default_rng(0)
    return [Image.fromarray(noise.integers(0, 256, (h, w, 3), np.uint8)) for h, w in ((80, 90), (64, 64), (120, 40))]


def opened(folder):
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}", device="cpu")
    return model.eval(), transform, open_clip.get_tokenizer(f"local-dir:{folder}")


@torch.no_grad()
def encoded(folder, images, texts):
    model, transform, tokenizer = opened(folder)
    vectors = model.encode_image(torch.stack([transform(image) for image in images]), normalize=True)
    return vectors, model.encode_text(tokenizer(texts), normalize=True)


@pytest.mark.parametrize("changes", [{"model.tuning": "full"}, {"model.tuning": "none", "model.text_tokens": "full"}])
def test_open_clip_gives_the_vectors_of_a_run_without_adapters(tmp_path, changes):
    config = build_config(recipe_config("harma-scenes"), {"model.pretrained": "random", **changes})
    run = make_random_run(tmp_path, "run", config)
    made = export_checkpoint(run, "open_clip", tmp_path / "clip")
    folder = made.path
    assert f'create_model_and_transforms("local-dir:{folder}")' in made.describe()
    images = pictures()
    own = load_run(run.path, "cpu")
    vectors, texts = encoded(folder, images, TEXTS)
    torch.testing.assert_close(vectors, own.encode_images(images), atol=1e-5, rtol=0)
    torch.testing.assert_close(texts, own.encode_texts(TEXTS), atol=1e-5, rtol=0)


def test_open_clip_gives_the_vectors_of_a_tuned_clip_but_does_not_pad(tmp_path):
    config = build_config(recipe_config("scenes-cir-finetune"), {"seed": 3})
    run = make_random_run(tmp_path, "run", config)
    made = export_checkpoint(run, "open_clip", tmp_path / "clip")
    assert "leaves out a step of this run: the shorter side is padded with black" in made.describe()
    images, model = pictures()[:2], run.load_model().encoder
    with torch.no_grad():
        own = model.encode_image(torch.stack([padded_transform(image, 64) for image in images]))
    vectors, _ = encoded(made.path, images, TEXTS)  # their ratio is too small for a margin
    torch.testing.assert_close(vectors, own, atol=1e-5, rtol=0)


def test_a_folder_says_which_activation_its_weights_need(tmp_path):
    settings = configuration("scenes-tiny")
    quick = open_clip.CLIP(settings["embed_dim"], settings["vision_cfg"], settings["text_cfg"], quick_gelu=True).eval()
    write_clip_folder(quick, "scenes-tiny", Preparation(64, (0.5,) * 3, (0.25,) * 3, "bilinear"), tmp_path / "clip")
    model, transform, _ = opened(tmp_path / "clip")
    pixels = transform(pictures()[0])[None]
    with torch.no_grad():
        assert torch.equal(model.encode_image(pixels), quick.encode_image(pixels))
    squashed = pil_to_tensor(pictures()[0].resize((64, 64), Image.Resampling.BILINEAR)) / 255
    torch.testing.assert_close(pixels[0], (squashed - 0.5) / 0.25)


def test_what_is_no_plain_clip_is_refused_with_what_else_there_is(random_run, tmp_path):
    with pytest.raises(
        UserError, match="GELU and attention no weight of a plain CLIP can stand for; export it as `onn"
    ):
        export_checkpoint(random_run, "open_clip", tmp_path / "clip")
    zero_shot = make_random_run(tmp_path, "none", build_config(random_run.config, {"model.tuning": "none"}))
    with pytest.raises(UserError, match=r"written as \.safetensors, or as a folder, got `clip\.pt`"):
        export_checkpoint(zero_shot, "open_clip", tmp_path / "clip.pt")


def test_only_what_an_export_made_is_replaced(random_run, tmp_path, monkeypatch):
    run = make_random_run(tmp_path, "none", build_config(random_run.config, {"model.tuning": "none"}))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match="no export made"):
        export_checkpoint(run, "open_clip", tmp_path / "mine", overwrite=True)
    made = export_checkpoint(run, "open_clip", tmp_path / "clip").path
    monkeypatch.delattr(Run, "load_checkpoint")  # is not worked for in vain
    for other in ("thesis.tex", f"notes/{CONFIG_NAME}", "open_clip_model.safetensors.d/x"):
        (made / other).parent.mkdir(exist_ok=True)
        (made / other).write_text("years")
        with pytest.raises(UserError, match=rf"no export wrote there \({other}\) and is not replaced"):
            export_checkpoint(run, "open_clip", made, overwrite=True)
        (made / other).unlink()
    monkeypatch.undo()
    (made / "open_clip_model.safetensors").write_text("broken")
    export_checkpoint(run, "open_clip", made, overwrite=True)
    assert (made / "open_clip_model.safetensors").stat().st_size > 1e6
    assert sorted(file.name for file in made.iterdir()) == [LIST_NAME, CONFIG_NAME, "open_clip_model.safetensors"]
    (tmp_path / "file").write_text("")
    export_checkpoint(run, "open_clip", tmp_path / "file", overwrite=True)
    assert (tmp_path / "file" / "open_clip_config.json").is_file()


def test_what_comes_to_the_place_of_an_export_while_it_is_made_stays(random_run, tmp_path, monkeypatch):
    run = make_random_run(tmp_path, "none", build_config(random_run.config, {"model.tuning": "none"}))
    load = Run.load_checkpoint

    def meanwhile(self, checkpoint):
        (tmp_path / "clip").mkdir()
        (tmp_path / "clip" / "thesis.tex").write_text("years")
        return load(self, checkpoint)

    monkeypatch.setattr(Run, "load_checkpoint", meanwhile)
    with pytest.raises(UserError, match="a folder that no export made"):
        export_checkpoint(run, "open_clip", tmp_path / "clip", overwrite=True)
    assert (tmp_path / "clip" / "thesis.tex").read_text() == "years"
