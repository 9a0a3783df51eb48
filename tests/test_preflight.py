"""Where a run starts: at another's weights, if they are of the same model."""

import json
import shutil

import pytest
import torch
from random_runs import make_random_run

from harma_ray.config import RunConfig
from harma_ray.data.stream import Worker, local_batches
from harma_ray.errors import UserError
from harma_ray.preflight import prepare, require_start, starting_from
from harma_ray.recipes import make_task, recipe_config
from harma_ray.runs import Run, create_run
from harma_ray.settings import build_config, config_hash
from harma_ray.training.checkpoint import load_weights
from harma_ray.training.loop import run_training
from harma_ray.training.run_files import list_checkpoints, read_records

SMALL = {
    "model.pretrained": "random",
    "train.global_batch_size": 20,
    "train.captions": "one",
    "train.epochs": 1,
    "adapter.width": 16,
    "adapter.shared_width": 8,
    "adapter.num_heads": 4,
}
SMALL_COMBINER = {"combiner.projection_dim": 32, "combiner.hidden_dim": 16, "model.pretrained": "random"}


def start(run, recipe, changes=None, *, adopts=True, metric=None):
    """The settings of `train --recipe RECIPE --from RUN --set ...`."""
    base = recipe_config(recipe)
    begun = build_config(base, starting_from(run, base, metric, adopts=adopts), origin="--from")
    return build_config(begun, changes or {})


def train(run, config=None):
    config = config or run.config
    return run_training(make_task(config), config, run.path, worker=Worker(), loader=local_batches)


@pytest.fixture(scope="module")
def origin(scenes, tmp_path_factory):
    config = build_config(recipe_config("harma-scenes"), {**SMALL, "data.path": str(scenes)})
    run = create_run(tmp_path_factory.mktemp("runs"), "origin", config)
    train(run)
    return run


def test_a_run_starts_from_the_best_weights_of_another_and_says_so_and_does_without_it_afterwards(
    origin, scenes, tmp_path
):
    gone = Run(shutil.copytree(origin.path, tmp_path / "gone"), origin.config)
    own = {"data.path": str(scenes), "train.global_batch_size": 20, "train.captions": "one", "train.epochs": 2}
    config = start(gone, "harma-scenes", own)
    assert config.adapter == origin.config.adapter
    require_start(config)
    run = create_run(tmp_path, "further", config)
    started, first = {}, make_task(config).new_model()
    load_weights(gone.best_checkpoint(), first, backbone=make_task(config).backbone.fingerprint(first))

    class Stop(Exception):
        pass

    def stop(metrics):
        shutil.rmtree(gone.path, ignore_errors=True)
        started[metrics["step"]] = metrics
        if metrics["step"]:
            raise Stop

    with pytest.raises(Stop):
        run_training(make_task(config), config, run.path, worker=Worker(), loader=local_batches, callback=stop)
    begun = run.task.new_model()
    load_weights(list_checkpoints(run.path)[0], begun, backbone=run.task.backbone.fingerprint(begun))
    kept = {name: tensor for name, tensor in first.state_dict().items() if "adapter" in name}
    assert kept
    best = origin.report["metrics"]["val"]  # the first evaluation is that of the origin's best weights
    assert {name: started[0][name] for name in best} == pytest.approx(best, abs=1e-9)
    report = train(run)
    assert report["steps"] == 4
    assert report["started_from"] == {
        "run": str(gone.path),
        "checkpoint": f"step_{origin.report['best_step']:08d}",
        "weights": config.started_from.weights,
    }
    assert json.loads((run.path / "report.json").read_text())["started_from"] == report["started_from"]
    with pytest.raises(UserError, match="is not the folder of a run"):
        require_start(config)


def test_the_optimiser_starts_anew_and_the_place_of_the_origin_is_no_part_of_the_run(origin, scenes, tmp_path):
    config = start(origin, "harma-scenes", {"data.path": str(scenes)})
    moved = build_config(config, {"started_from.run": "/elsewhere", "started_from.checkpoint": "step_1"})
    assert config_hash(moved) == config_hash(config)
    assert config_hash(build_config(config, {"started_from.weights": "other"})) != config_hash(config)
    with pytest.raises(UserError, match=r"the weights that this run starts from are not there: /elsewhere/"):
        train(create_run(tmp_path, "moved", moved))
    damaged = build_config(config, {"started_from.weights": "other"})
    with pytest.raises(UserError, match="holds other weights than those"):
        train(create_run(tmp_path, "damaged", damaged))


@pytest.mark.parametrize(
    ("recipe", "changes", "why"),
    [
        ("harma-scenes", {"adapter.width": 32}, r"`adapter\.width` must be 16, as there, got 32$"),
        ("harma-scenes", {"model.tuning": "full"}, r"`model\.tuning` must be adapters, as there, got full$"),
        ("harma-scenes", {"seed": 1}, r"frozen must be scenes-tiny, random of seed 0, as there, got .* of seed 1$"),
        ("harma-scenes", {"loss.center_factor": 1.0}, r"other weights are trained there \(affiliation_temperature\)$"),
        ("harma-rsitmd-vit", {}, r"`model\.architecture` must be scenes-tiny, as there, got ViT-B-32; .*`adapter\.w"),
        ("scenes-pretrain", {}, r"`model\.tuning` must be adapters, as there, got full; "),
    ],
)
def test_another_model_is_refused_with_the_setting_that_differs(origin, recipe, changes, why):
    with pytest.raises(UserError, match=why) as refused:
        require_start(start(origin, recipe, changes))
    assert "\n" not in str(refused.value)


def test_settings_that_are_given_in_a_file_stay_and_must_fit(origin):
    with pytest.raises(UserError, match=r"`adapter\.width` must be 16, as there, got 128"):
        require_start(start(origin, "harma-scenes", adopts=False))
    require_start(
        start(origin, "harma-scenes", {name: SMALL[name] for name in SMALL if "adapter" in name}, adopts=False)
    )


def test_a_model_that_is_trained_whole_goes_on_from_any_seed(scenes, tmp_path):
    own = {"data.path": str(scenes), "train.global_batch_size": 20, "train.captions": "one", "train.epochs": 0}
    first = make_random_run(tmp_path, "first", build_config(recipe_config("scenes-pretrain"), own))
    config = start(first, "scenes-pretrain", {**own, "seed": 5})
    require_start(config)
    run = create_run(tmp_path, "second", config)
    train(run)
    expected, got = first.load_model().state_dict(), run.load_model().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in got.items())


@pytest.mark.parametrize("recipe", ["scenes-cir-finetune", "scenes-cir-combiner", "scenes-vitp"])
def test_each_kind_of_run_is_what_its_own_recipe_starts_from(recipe, tmp_path):
    """An import, which has no record, and a run that is not finished, which is refused."""
    changes = {**(SMALL_COMBINER if "combiner" in recipe else {}), "seed": 2}
    run = make_random_run(tmp_path, "run", build_config(recipe_config(recipe), changes))
    config = start(run, recipe, {"seed": 2})
    assert isinstance(config, RunConfig)
    assert config.after(run) == {}
    require_start(config)
    (run.path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="is not finished; finish it first"):
        start(run, recipe)
    assert not list(read_records(run.path))


def test_a_first_stage_tells_that_the_next_one_has_larger_batches_than_there_are_triplets(composed):
    own = {"data.path": str(composed), "train.global_batch_size": 20}
    (notice,) = prepare(build_config(recipe_config("scenes-cir-finetune"), own)).notices
    assert "scenes-cir-combiner, has batches of 256" in notice
    assert "has 40 triplets an epoch: give it --set train.global_batch_size=40" in notice
