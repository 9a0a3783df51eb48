"""Figures are measured in fp32, whatever training steps compute in; bf16 if it is asked for, and then it is said."""

import contextlib
import json
import re

import pytest
import torch
from command_line import done
from random_runs import make_random_run

from harma_ray.api import load_run
from harma_ray.config import TrainConfig
from harma_ray.data.convert.commands import convert_scenes_cir
from harma_ray.data.stream import Worker, local_batches
from harma_ray.models.precision import evaluating
from harma_ray.recipes import make_task, recipe_config
from harma_ray.runs import open_run
from harma_ray.settings import build_config
from harma_ray.training.loop import run_training
from harma_ray.training.step import autocast_of, evaluate_split
from harma_ray.training.tracking import read_records

RECIPES = ["harma-scenes", "scenes-cir-finetune", "scenes-cir-combiner"]
SIZES = {"combiner.projection_dim": 32, "combiner.hidden_dim": 16}


@pytest.fixture(scope="module")
def run_of(scenes, composed, tmp_path_factory):
    """Makes a run of a recipe with random weights that was trained in bf16."""
    made = {}

    def make(recipe):
        if recipe not in made:
            data = scenes if recipe.startswith("harma") else composed
            sizes = SIZES if recipe.endswith("combiner") else {}
            changes = {"data.path": str(data), "train.precision": "bf16", **sizes}
            config = build_config(recipe_config(recipe), changes)
            made[recipe] = make_random_run(tmp_path_factory.mktemp("runs"), recipe, config)
        return made[recipe]

    return make


def embeddings(run, **changes):
    config = build_config(run.config, {name.replace("__", "."): value for name, value in changes.items()})
    details = evaluate_split(
        make_task(config), config, run.load_model(), "val", worker=Worker(), loader=local_batches
    ).retrieval
    return details.text_embeddings if hasattr(details, "text_embeddings") else details.query_embeddings


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_trained_in_bf16_is_evaluated_in_fp32_unless_bf16_is_asked_for(run_of, recipe):
    run = run_of(recipe)
    exact = embeddings(run, train__precision="fp32")
    assert torch.equal(embeddings(run), exact)
    rough = embeddings(run, train__eval_precision="bf16", train__precision="fp32")
    assert not torch.equal(rough, exact)
    torch.testing.assert_close(rough, exact, rtol=0, atol=0.05)


def test_evaluate_says_the_precision_of_its_figures(capsys, run_of, tmp_path):
    run, found = run_of("scenes-cir-combiner"), {}
    for name, options in {
        "default": (),
        "fp32": ("--set", "train.precision=fp32"),
        "bf16": ("--precision", "bf16"),
    }.items():
        printed = done(capsys, "evaluate", "--run", run.path, "--split", "val", "--json", tmp_path / name, "--report",
                       tmp_path / f"{name}-page", *options)  # fmt: skip
        precision = "bf16" if name == "bf16" else "fp32"
        assert f", {precision}, " in printed.splitlines()[0]
        page = (tmp_path / f"{name}-page" / "index.html").read_text()
        assert re.search(rf"measured(<[^>]*>\s*)+in {precision}", page)
        found[name] = json.loads((tmp_path / name).read_text())
        assert found[name].pop("precision") == precision
    assert found["default"] == found["fp32"]


class Watched:
    """A task that notes in what its model computes."""

    def __init__(self, task):
        self.task, self.seen = task, {"losses": set(), "evaluate": set()}

    def __getattr__(self, name):
        found = getattr(self.task, name)
        if name not in self.seen:
            return found

        def noted(*arguments):
            self.seen[name].add(torch.is_autocast_enabled("cpu"))
            return found(*arguments)

        return noted


@pytest.mark.parametrize("asked", ["fp32", "bf16"])
def test_training_in_bf16_picks_its_best_epoch_by_figures_in_what_was_asked_for(scenes, tmp_path, asked):
    small = {"data.path": str(scenes), "train.global_batch_size": 20, "train.epochs": 1, "train.captions": "one"}
    config = build_config(
        recipe_config("harma-scenes"), {**small, "train.precision": "bf16", "train.eval_precision": asked}
    )
    task = Watched(make_task(config))
    report = run_training(task, config, tmp_path, worker=Worker(), loader=local_batches)
    assert task.seen == {"losses": {True}, "evaluate": {asked == "bf16"}}
    assert report["eval_precision"] == asked
    records = [record for record in read_records(tmp_path) if record["kind"] == "evaluation"]
    best = max(record["r_mean"] for record in records)
    assert report["metrics"]["val"]["r_mean"] == best


def test_vectors_from_python_are_fp32_whatever_a_run_was_trained_in(run_of, tmp_path):
    run = run_of("harma-scenes")
    retriever, texts = load_run(run.path, "cpu"), ["a bridge over a river", "green fields"]
    vectors = retriever.encode_texts(texts)
    config = build_config(run.config, {"train.precision": "fp32"})
    exact = make_random_run(tmp_path, "exact", config)
    assert torch.equal(load_run(exact.path, "cpu").encode_texts(texts), vectors)
    rough = make_random_run(tmp_path, "rough", build_config(config, {"train.eval_precision": "bf16"}))
    assert not torch.equal(load_run(rough.path, "cpu").encode_texts(texts), vectors)


def test_a_submission_is_in_fp32_unless_bf16_is_asked_for(capsys, run_of, tmp_path):
    data = tmp_path / "gallery"
    convert_scenes_cir(data, {"test": 10}, style="summer", size=64)
    run = run_of("scenes-cir-combiner")
    exact = make_random_run(tmp_path, "exact", build_config(run.config, {"train.precision": "fp32"}))
    files = {}
    for name, made, options in (("own", run, ()), ("exact", exact, ()), ("rough", run, ("--precision", "bf16"))):
        printed = done(capsys, "predict", "cirr-test", "--run", made.path, "--data", data, "--split", "test", "--out",
                       tmp_path, "--name", name, *options)  # fmt: skip
        assert printed.splitlines()[0] == f"queries: the Combiner's; {'bf16' if name == 'rough' else 'fp32'}"
        files[name] = (tmp_path / f"recall_submission_{name}.json").read_text()
    assert files["own"] == files["exact"]
    assert files["rough"] != files["own"]
    assert open_run(run.path).config.train.eval_precision == "fp32"


def test_a_gpu_that_only_emulates_bf16_trains_in_fp32(monkeypatch):
    """As torch tells of a T4 or an RTX 20: supported, but not without emulation."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert autocast_of(TrainConfig(), torch.device("cuda")) is contextlib.nullcontext


@pytest.mark.parametrize("use", ["training", "evaluation"])
def test_attention_on_a_gpu_plans_nothing_for_a_length(use):
    gpu = torch.device("cuda")
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        if use == "training":
            autocast_of(TrainConfig(precision="fp32"), gpu)
        else:
            with evaluating("fp32", gpu):
                assert not torch.backends.cuda.cudnn_sdp_enabled()
                assert torch.backends.cuda.flash_sdp_enabled()
        # a training has its process; whoever evaluates has the caller's
        assert torch.backends.cuda.cudnn_sdp_enabled() == (use == "evaluation")
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
