"""Folders for the hub: read back from another place they give the same vectors, and tell nothing of this machine."""

import json
import re
import shutil

import pytest
import torch
from command_line import done, refused
from huggingface_hub import ModelCard
from PIL import Image
from random_runs import make_random_run

from harma_ray.api import load_run
from harma_ray.errors import UserError
from harma_ray.exports.checkpoint import export_checkpoint
from harma_ray.exports.hub import HubOptions, _carry_clip
from harma_ray.models.backbones import build_clip
from harma_ray.models.weights import save_clip
from harma_ray.recipes import recipe_config
from harma_ray.runs import Run, open_run
from harma_ray.settings import build_config
from harma_ray.training.run_files import read_meta

PICTURES = [Image.effect_noise((70, 64), 90).convert("RGB"), Image.new("RGB", (64, 64), "green")]
TEXTS = ["a plane beside a runway", "two cars"]
SMALL = {"combiner.projection_dim": 32, "combiner.hidden_dim": 32}


def moved(made, tmp_path):
    """Moves an export and takes away what it was made of; returns its folder, in which no path of here may be."""
    for file in made.path.rglob("*"):
        assert not file.is_file() or str(tmp_path).encode() not in file.read_bytes(), file
    place = tmp_path / "elsewhere" / "model"
    shutil.move(made.path, place)
    shutil.rmtree(tmp_path / "here")
    return place


def features(run):
    """Returns what a run's model makes of images and texts, and of both."""
    model, task = run.load_model(), run.task
    pixels = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    with torch.no_grad():
        images, texts = model.image_features(pixels), model.text_features(task.backbone.tokenizer()(TEXTS))
        return images, texts, model.compose(images, texts)


def write_report(run, metrics):
    report = {"best_step": 0, "selected_on": "val", "metrics": metrics, "checkpoint": "checkpoints/step_00000000"}
    report["started_from"] = {"run": str(run.path)}
    (run.path / "report.json").write_text(json.dumps(report))


@pytest.fixture
def adapted(tmp_path):
    """A run on a backbone of a file."""
    (tmp_path / "here").mkdir()
    save_clip(build_clip("scenes-tiny", "random", seed=5), tmp_path / "here" / "base.safetensors")
    changes = {
        "data.path": str(tmp_path / "here" / "ucm"),
        "model.pretrained": str(tmp_path / "here/base.safetensors"),
        "started_from.run": str(tmp_path / "here" / "earlier"),
    }
    return make_random_run(tmp_path / "here", "town", build_config(recipe_config("harma-scenes"), changes))


def test_an_adapted_run_is_read_back_from_elsewhere_with_its_backbone(adapted, tmp_path):
    own = load_run(adapted.path, "cpu")
    images, texts = own.encode_images(PICTURES), own.encode_texts(TEXTS)
    write_report(adapted, {"val": {"r_mean": 50.0}, "test": {"r_mean": 41.5}})
    place = moved(export_checkpoint(adapted, "huggingface", tmp_path / "here" / "hub"), tmp_path)
    again = load_run(place, "cpu")
    assert torch.equal(again.encode_images(PICTURES), images)
    assert torch.equal(again.encode_texts(TEXTS), texts)
    assert {file.suffix for file in place.rglob("*") if file.is_file()} == {".md", ".yaml", ".json", ".safetensors"}
    assert open_run(place).best_finished().parent.parent == place


def test_a_card_tells_data_figures_with_intervals_and_the_licence(adapted, tmp_path):
    write_report(adapted, {"val": {"r_mean": 50.0}, "test": {"r_mean": 41.5}})
    figures = {
        "split": "test", "data": "/data/ucm/test", "fingerprint": "f" * 64, "rows": 210, "weights": str(adapted.path),
        "metrics": {"r_mean": 41.5, "r_mean_text": 42.0}, "interval_95": {"r_mean": [38.25, 44.5]},
    }  # fmt: skip
    (tmp_path / "figures.json").write_text(json.dumps(figures))
    made = export_checkpoint(
        adapted, "huggingface", tmp_path / "hub", hub=HubOptions(figures=[tmp_path / "figures.json"])
    )
    card = ModelCard.load(made.path / "README.md")
    assert (card.data.library_name, card.data.license, card.data.datasets) == ("harma-ray", "other", ["ucm"])
    found = {(each.dataset_split, each.metric_type): each for each in card.data.eval_results}
    values = {key: each.metric_value for key, each in found.items()}
    assert values == {("val", "r_mean"): 50.0, ("test", "r_mean"): 41.5, ("test", "r_mean_text"): 42.0}
    assert found["test", "r_mean_text"].metric_name == "mean of the six, equal captions"
    assert found["test", "r_mean"].dataset_revision == "f" * 64
    assert "`test` of ucm, 210 rows (fingerprint ffffffffffff):" in card.text
    assert re.search(r"\| r_mean +\|.*\| 41\.50 +\| 38\.25-44\.50 +\|", card.text)
    assert "the card has figures without intervals" in made.describe()  # those of val
    assert "learning_rate: 0.004" in card.text
    assert "The name `base.safetensors` does not tell under which licence" in card.text


def test_figures_of_other_weights_are_refused(adapted, tmp_path, capsys):
    other = {"split": "test", "data": "ucm", "weights": str(tmp_path), "metrics": {}, "interval_95": {}}
    (tmp_path / "other.json").write_text(json.dumps(other))
    (tmp_path / "odd.json").write_text("[]")
    line = ("checkpoint", "export", "--run", adapted.path, "--out", tmp_path / "x", "--format")
    assert f"holds figures of {tmp_path}, but" in refused(
        capsys, *line, "huggingface", "--figures", tmp_path / "other.json"
    )
    assert "must be what `evaluate --run" in refused(capsys, *line, "huggingface", "--figures", tmp_path / "odd.json")
    assert "are for --format huggingface" in refused(capsys, *line, "adapter", "--backbone", "name")
    assert not (tmp_path / "x").exists()


def test_a_backbone_that_is_only_named_is_looked_for_in_the_folder(adapted, tmp_path, capsys):
    line = ("checkpoint", "export", "--run", adapted.path, "--format", "huggingface", "--backbone", "name")
    assert "put this file into this folder" in done(capsys, *line, "--out", tmp_path / "hub")
    assert refused(capsys, "evaluate", "--run", tmp_path / "hub", "--data", tmp_path)
    shutil.copy(tmp_path / "here" / "base.safetensors", tmp_path / "hub")
    own = load_run(adapted.path, "cpu").encode_texts(TEXTS)
    assert torch.equal(load_run(tmp_path / "hub", "cpu").encode_texts(TEXTS), own)


@pytest.mark.parametrize("second", [False, True])
def test_both_stages_of_composed_retrieval_are_read_back(tmp_path, second):
    run = make_random_run(tmp_path / "here", "first", build_config(recipe_config("scenes-cir-finetune"), {"seed": 4}))
    if second:
        write_report(run, {"val": {"r_mean": 1.0}})
        config = build_config(recipe_config("scenes-cir-combiner"), SMALL)
        config = build_config(config, config.after(run))
        run = make_random_run(tmp_path / "here", "second", config)
    own = features(run)
    made = export_checkpoint(run, "huggingface", tmp_path / "here" / "hub")
    assert (made.path / "backbone.safetensors").is_file() == second
    again = features(open_run(moved(made, tmp_path)))
    assert all(torch.equal(found, expected) for found, expected in zip(again, own, strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_vision_language_model_is_read_back_whole(tmp_path):
    run = make_random_run(tmp_path / "here", "vitp", recipe_config("scenes-vitp"))
    own = load_run(run.path, "cpu")
    vectors, answer = own.encode_images(PICTURES), own.ask(PICTURES[1], "What is it?", 5)
    again = load_run(moved(export_checkpoint(run, "huggingface", tmp_path / "here" / "hub"), tmp_path), "cpu")
    assert torch.equal(again.encode_images(PICTURES), vectors)
    assert again.ask(PICTURES[1], "What is it?", 5) == answer


def test_a_clip_that_only_a_folder_of_this_machine_describes_is_not_exported(random_run, tmp_path):
    place = f"local-dir:{tmp_path / 'clip'}"
    config = build_config(random_run.config, {"model.architecture": place, "model.pretrained": place})
    meta = read_meta(random_run.best_checkpoint())
    with pytest.raises(UserError, match=r"known by a folder of this machine alone.*hf-hub:ORG/NAME"):
        _carry_clip(Run(random_run.path, config), meta, tmp_path, None)
    assert not any(tmp_path.iterdir())
