"""What every recipe must keep, shown on each with a tiny backbone."""

import shutil
from dataclasses import replace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from harma_ray.data.convert.commands import convert_scenes_talk
from harma_ray.data.order import planned_order
from harma_ray.data.splits import open_split
from harma_ray.data.stream import TrainingStream, Worker, local_batches
from harma_ray.errors import UserError
from harma_ray.import_export import load_model
from harma_ray.recipes import PUBLISHED, RECIPES, make_task, recipe_config
from harma_ray.recipes.clip4cir.config import Clip4CirConfig, CombinerConfig
from harma_ray.recipes.vitp.config import VitpConfig
from harma_ray.settings import build_config, config_hash
from harma_ray.training.checkpoint import list_checkpoints, load_weights
from harma_ray.training.loop import run_training
from harma_ray.training.step import parameters_without_gradient
from harma_ray.training.tensorboard import EVENTS_FOLDER
from harma_ray.training.tracking import read_records

TINY = {
    "model.architecture": "scenes-tiny",
    "model.pretrained": "random",
    "train.global_batch_size": 40,
    "train.epochs": 2,
    "optim.learning_rate": 1e-3,
    "train.log_every_steps": 1,
}
SMALL_COMBINER = {"combiner.projection_dim": 64, "combiner.hidden_dim": 32}
SHORT_TALKS = {"train.steps": 0, "train.eval_every_steps": 0, "train.accumulation": 1, "selection.answers": 0}


def tiny_config(name, **changes):
    base = recipe_config(name)
    small = {CombinerConfig: SMALL_COMBINER, VitpConfig: SHORT_TALKS}.get(type(base), {})
    return build_config(base, {**TINY, **small, **changes})


def distinct_recipes():
    """One recipe of those that differ in nothing but what is made tiny here."""
    tiny = {name: replace(tiny_config(name), recipe="any") for name in RECIPES}
    return {config_hash(config): name for name, config in reversed(tiny.items())}.values()


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    out = tmp_path_factory.mktemp("talks")
    convert_scenes_talk(out, {"train": 30, "val": 5, "test": 4}, style="summer", size=64)
    return out


@pytest.fixture(scope="module", params=distinct_recipes())
def config(request, scenes, composed, talks):
    kinds = {Clip4CirConfig: composed, VitpConfig: talks}
    found = (folder for kind, folder in kinds.items() if isinstance(recipe_config(request.param), kind))
    return tiny_config(request.param, **{"data.path": str(next(found, scenes))})


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """The folder and report of a run; beside it stands what there was of it after its first epoch."""
    folder = tmp_path_factory.mktemp("finished")
    path = folder / "run"
    path.mkdir()

    def keep(metrics):
        if metrics["epoch"] == 1:
            shutil.copytree(path, folder / "stopped")

    return path, train(config, path, keep)


def train(config, path, callback=lambda metrics: None):
    return run_training(make_task(config), config, path, worker=Worker(), loader=local_batches, callback=callback)


def last_model(config, path):
    task = make_task(config)
    model = task.new_model()
    load_weights(list_checkpoints(path)[-1], model, backbone=task.backbone.fingerprint(model))
    return model.eval()


def first_batch(config):
    transform = make_task(config).transform(training=True)
    stream = TrainingStream(planned_order(config), transform, config.data, Worker(), local_batches)
    return next(stream.steps(0, 1))


def outputs_of(config, model, batch):
    """What the task asks of the model, and the inputs it gives."""
    asked = []

    def forward(*inputs):
        asked.append(inputs)
        return model(*inputs)

    with torch.no_grad():
        make_task(config).losses(forward, batch)
        (inputs,) = asked
        return model(*inputs), inputs


def test_training_moves_what_is_declared_and_nothing_else(config, finished):
    declared = make_task(config).new_model()
    trained = dict(last_model(config, finished[0]).named_parameters())
    assert any(parameter.requires_grad for parameter in declared.parameters())
    for name, parameter in declared.named_parameters():
        assert torch.equal(parameter, trained[name]) != parameter.requires_grad, name


def test_every_declared_parameter_gets_a_gradient(config):
    assert parameters_without_gradient(make_task(config), planned_order(config), config, Worker(), local_batches) == []


def test_the_same_seed_builds_the_same_model(config):
    first, second = (make_task(config).new_model().state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_is_saved_computes_the_same_when_loaded(config, finished):
    path, report = finished
    model, batch = last_model(config, path), first_batch(config)
    again = last_model(config, path)
    (outputs, _), (repeated, _) = outputs_of(config, model, batch), outputs_of(config, again, batch)
    assert all(torch.equal(outputs[name], repeated[name]) for name in outputs)
    assert report["metrics"].keys() == {"val", "test"}


def test_tensorboard_opens_on_what_is_looked_at_first_and_has_nothing_twice(config, finished):
    path, _ = finished
    events = EventAccumulator(str(path / EVENTS_FOLDER), size_guidance={"scalars": 0}).Reload()
    curves = {
        tag: tuple((event.step, event.value) for event in events.Scalars(tag)) for tag in events.Tags()["scalars"]
    }
    records, kept = list(read_records(path)), make_task(config).metrics.kept
    assert {tag for tag in curves if tag.startswith("main/")} == {
        "main/loss", "main/learning_rate", f"main/best_val_{kept[0]}",
        *(f"main/{split}_{name}" for split in ("val", "test") for name in kept),
    }  # fmt: skip
    of_steps, of_val, of_test = (
        {len(points) for tag, points in curves.items() if tag.startswith(groups)}
        for groups in (("main/l", "train/", "weights/"), ("main/val_", "main/best_", "val/"), "main/test_")
    )
    assert of_steps == {sum(record["kind"] == "step" for record in records)}
    assert of_val == {sum(record["kind"] == "evaluation" for record in records)}
    assert of_test == {1}
    measured = [points for tag, points in curves.items() if tag.startswith(("main/l", "train/"))]
    assert len(set(measured)) == len(measured)


def test_items_of_a_batch_do_not_touch_each_other(config, finished):
    if make_task(config).accumulation == "summed":
        pytest.skip("its model gives losses, no outputs of single items; see the recipe's own tests")
    model, batch = last_model(config, finished[0]), first_batch(config)
    whole, inputs = outputs_of(config, model, batch)
    names = [name for name, output in whole.items() if output.ndim]
    assert len(names) == 2
    with torch.no_grad():
        for item in (0, 7):
            alone = model(*(tensor[item : item + 1] for tensor in inputs))
            for name in names:
                torch.testing.assert_close(alone[name], whole[name][item : item + 1], rtol=1e-4, atol=1e-5)


def test_a_stopped_run_resumes_to_the_bit(config, finished, tmp_path):
    path, report = finished
    stopped = shutil.copytree(path.with_name("stopped"), tmp_path / "stopped")
    assert train(config, stopped)["metrics"] == report["metrics"]
    assert [record["kind"] for record in read_records(stopped)].count("start") == 2
    expected = last_model(config, path).state_dict()
    resumed = last_model(config, stopped).state_dict()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("recipe", "kind", "changes"),
    [
        ("harma-scenes", "scenes", {}),
        ("harma-scenes", "scenes", {"model.tuning": "none"}),
        ("scenes-cir-combiner", "composed", {}),
        ("scenes-cir-finetune", "composed", {"model.pretrained": "", "tuning.encoder": "text"}),
    ],
)
def test_a_frozen_backbone_is_random_only_by_name(request, recipe, kind, changes):
    folder = request.getfixturevalue(kind)
    config = build_config(recipe_config(recipe), {"data.path": str(folder), **changes})
    training = open_split(folder, "train")
    with pytest.raises(UserError, match=r"must be named; give .*--set model\.pretrained=random"):
        make_task(config).check(training)
    with pytest.raises(UserError, match="must be named"):
        load_model(None, config)
    make_task(build_config(config, {"model.pretrained": "random"})).check(training)


@pytest.mark.parametrize("changes", [{}, {"model.pretrained": ""}])
def test_a_model_that_is_trained_whole_may_start_from_nothing(scenes, changes):
    config = build_config(recipe_config("scenes-pretrain"), changes)
    make_task(config).check(open_split(scenes, "train"))
    assert make_task(config).backbone.name == "scenes-tiny, random of seed 0"


def test_published_figures_are_of_metrics_that_are_measured_and_agree_with_each_other():
    assert PUBLISHED.keys() <= RECIPES.keys()
    for name, published in PUBLISHED.items():
        known = make_task(recipe_config(name)).metrics.names
        for quoted in published:
            figures = dict(quoted.figures)
            assert figures.keys() <= set(known)
            assert all(0 < value < 100 for value in figures.values())
            mean = figures.pop("r_mean", None)
            assert mean is None or round(sum(figures.values()) / 6 + 1e-9, 2) == mean, (name, quoted)
