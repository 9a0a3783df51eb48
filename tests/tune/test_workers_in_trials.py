"""Trials of several workers: Ray Train inside Ray Tune."""

import contextlib
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from harma_ray.data.stream import Worker, local_batches
from harma_ray.on_ray.cluster import ray_cluster as start_cluster
from harma_ray.recipes import make_task, recipe_config
from harma_ray.resources import plan_trials
from harma_ray.settings import build_config
from harma_ray.training.checkpoint import list_checkpoints
from harma_ray.training.loop import run_trial
from harma_ray.training.tracking import read_records
from harma_ray.tune.search import prepare_trials, run_search
from harma_ray.tune.space.definition import Limits, Sampler, Scheduler, SearchDefinition
from harma_ray.tune.space.parameters import Range

RATE = Range(name="optim.learning_rate", kind="float", low=1e-9, high=1e-2, log=True)


@contextlib.contextmanager
def another_cluster():
    """Another cluster on this machine, as of another user: Ray Train must not take it for its own."""
    code = """
from harma_ray.on_ray.cluster import ray_cluster
with ray_cluster(num_cpus=1):
    print("up", flush=True)
    input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout.readline() == "up\n"
        yield
        process.communicate("\n", timeout=60)


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_two_workers_give_the_figures_of_one_and_a_stopped_trial_leaves_its_place_to_the_next(scenes, tmp_path):
    """The second trial is stopped while its workers run; the third needs their CPUs."""
    config = build_config(recipe_config("harma-scenes"), {
        "model.pretrained": "random",
        "data.path": str(scenes), "train.epochs": 2, "train.global_batch_size": 20, "adapter.width": 16,
        "adapter.shared_width": 8, "optim.learning_rate": 6e-3,
    })  # fmt: skip
    space = SearchDefinition(
        config=config,
        parameters=(RATE,),
        sampler=Sampler(name="random"),
        scheduler=Scheduler(name="asha", reduction_factor=2),
        enqueued=({"optim.learning_rate": 1e-3}, {"optim.learning_rate": 1e-9}),
        limits=Limits(trials=3),
    )
    wanted = replace(space, config=build_config(config, {"scaling.num_workers": 2}), concurrent=1)
    with another_cluster(), start_cluster(num_cpus=2, dashboard=True) as cluster:
        assert os.environ["RAY_API_SERVER_ADDRESS"] == f"http://{cluster.dashboard}"
        plan = plan_trials(wanted.config, cluster, 1)
        assert plan.workers.num_workers == 2
        results = run_search(tmp_path, wanted, plan, prepare_trials(wanted, plan), lambda event: None)
    assert "RAY_API_SERVER_ADDRESS" not in os.environ
    assert [trial.state for trial in results.trials[:2]] == ["complete", "stopped"]
    assert results.trials[2].state in ("complete", "stopped")  # it had its place, and was judged as any other
    assert list_checkpoints(results.best_trial.folder)
    for trial in results.trials:
        alone = tmp_path / f"alone-{trial.number}"
        own = space.settings(dict(trial.params))
        run_trial(make_task(own), own, alone, worker=Worker(), loader=local_batches, callback=lambda metrics: None)
        curve = [record["r_mean"] for record in read_records(alone) if record["kind"] == "evaluation"]
        assert [value for _, value in trial.curve] == pytest.approx(curve[: len(trial.curve)], abs=1e-6)
        assert len(trial.curve) == (2 if trial.state == "complete" else 1)
