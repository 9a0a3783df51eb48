"""Trials of several workers: Ray Train inside Ray Tune."""

from dataclasses import replace

import pytest

from harma_ray.checkpoint import list_checkpoints
from harma_ray.cluster import plan_trials
from harma_ray.cluster import ray_cluster as start_cluster
from harma_ray.config import build_config
from harma_ray.recipes import recipe_config
from harma_ray.tune.definition import Limits, Sampler, Scheduler, SearchDefinition
from harma_ray.tune.parameters import Range
from harma_ray.tune.search import prepare_trials, run_search

RATE = Range(name="optim.learning_rate", kind="float", low=1e-9, high=1e-2, log=True)


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_two_workers_give_the_figures_of_one_and_a_stopped_trial_leaves_its_place_to_the_next(scenes, tmp_path):
    """The second trial is stopped while its workers run; the third needs their CPUs."""
    config = build_config(recipe_config("harma-scenes"), {
        "data.path": str(scenes), "train.epochs": 2, "train.global_batch_size": 20, "adapter.width": 16,
        "adapter.shared_width": 8, "optim.learning_rate": 6e-3,
    })  # fmt: skip
    space = SearchDefinition(
        config=config, parameters=(RATE,), sampler=Sampler(name="random"),
        scheduler=Scheduler(name="asha", reduction_factor=2),
        starts=({"optim.learning_rate": 1e-3}, {"optim.learning_rate": 1e-9}), limits=Limits(trials=3),
    )  # fmt: skip
    found = []
    with start_cluster(num_cpus=2, dashboard=True) as cluster:
        for workers in (2, 1):
            wanted = replace(space, config=build_config(config, {"scaling.num_workers": workers}), concurrent=1)
            folder = tmp_path / str(workers)
            folder.mkdir()
            plan = plan_trials(wanted.config, cluster, 1)
            assert plan.workers.num_workers == workers
            found.append(run_search(folder, wanted, plan, prepare_trials(wanted, plan), lambda event: None))
    for results in found:
        assert [trial.state for trial in results.trials] == ["complete", "stopped", "complete"]
        assert [len(trial.curve) for trial in results.trials][::2] == [2, 2]
        assert list_checkpoints(results.best_trial.folder)
    for left, right in zip(found[0].trials, found[1].trials, strict=True):
        assert left.curve[0] == right.curve[0]
        assert left.values == pytest.approx(right.values, abs=1e-6)
