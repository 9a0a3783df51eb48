"""What needs a GPU: the same training there, in bf16, resumed; figures as on the CPU."""

from dataclasses import replace

import pytest
import torch

from harma_ray.checkpoint import list_checkpoints
from harma_ray.config import build_config
from harma_ray.data.stream import Place, local_batches
from harma_ray.engine import evaluate_split
from harma_ray.exchange import load_model
from harma_ray.loop import run_training
from harma_ray.recipes import make_task, recipe_config
from harma_ray.tracking import read_records

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def config(scenes):
    small = {"train.global_batch_size": 20, "train.epochs": 2, "train.log_every_steps": 1, "data.path": str(scenes),
             "optim.learning_rate": 1e-3}  # fmt: skip
    return build_config(recipe_config("harma-scenes"), small)


def train(config, path, device, reporter=lambda metrics: None):
    place = Place(device=device)
    return run_training(make_task(config), config, path, place=place, reader=local_batches, reporter=reporter)


def losses(path):
    return [record["loss"] for record in read_records(path) if record["kind"] == "step"]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-2), ("auto", 5e-2)])
def test_a_gpu_trains_as_the_cpu_does(config, tmp_path, precision, tolerance):
    there = replace(config, train=replace(config.train, precision=precision))
    train(config, tmp_path / "cpu", "cpu")
    train(there, tmp_path / "gpu", "cuda")
    assert losses(tmp_path / "gpu")[:5] == pytest.approx(losses(tmp_path / "cpu")[:5], rel=tolerance)
    assert all(record["gpu_memory_mb"] > 0 for record in read_records(tmp_path / "gpu") if record["kind"] == "step")


def test_a_run_resumes_on_a_gpu(config, tmp_path):
    def stop(metrics):
        if metrics["epoch"] == 1:
            raise Stop

    train(config, tmp_path / "whole", "cuda")
    with pytest.raises(Stop):
        train(config, tmp_path / "parts", "cuda", stop)
    train(config, tmp_path / "parts", "cuda")
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-2)


def test_weights_from_a_gpu_give_the_same_figures_on_the_cpu(config, tmp_path):
    exact = replace(config, train=replace(config.train, precision="fp32"))
    train(exact, tmp_path, "cuda")
    weights = list_checkpoints(tmp_path)[-1]
    metrics = [
        evaluate_split(
            make_task(exact), exact, load_model(weights, exact), "val", place=Place(device=device), reader=local_batches
        ).metrics["r_mean"]
        for device in ("cpu", "cuda")
    ]
    assert metrics[1] == pytest.approx(metrics[0], abs=2.0)


@pytest.mark.ray
def test_two_trials_of_a_search_share_a_gpu(config, tmp_path):
    from harma_ray.cluster import ray_cluster
    from harma_ray.plans import plan_trials
    from harma_ray.tune.definition import Limits, SearchDefinition
    from harma_ray.tune.folder import read_search
    from harma_ray.tune.parameters import Range
    from harma_ray.tune.search import finish_best, prepare_trials, run_search

    shared = build_config(config, {"scaling.gpus_per_worker": 0.5, "scaling.cpus_per_worker": 0.5})
    rate = Range(name="optim.learning_rate", kind="float", low=1e-4, high=1e-2, log=True)
    space = SearchDefinition(config=shared, parameters=(rate,), limits=Limits(trials=4), concurrent=2)
    with ray_cluster() as cluster:
        plan = plan_trials(shared, cluster, 2)
        assert plan.workers.gpus_per_worker == 0.5
        setting = prepare_trials(space, plan)
        results = run_search(tmp_path, space, plan, setting, lambda event: None)
        assert {trial.state for trial in results.trials} <= {"complete", "stopped"}
        steps = [record for record in read_records(results.trials[0].folder) if record["kind"] == "step"]
        assert all(record["gpu_memory_mb"] > 0 for record in steps)
        best = space.settings(dict(results.trials[results.best].params))
        finish_best(tmp_path, results, setting, best)
        assert set(read_search(tmp_path, space).final) == {"val", "test"}
