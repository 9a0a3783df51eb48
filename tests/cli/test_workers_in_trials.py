"""A search whose trials have two workers each, Ray Train inside Ray Tune, as a user types it and disturbs it."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys

import pytest
from command_line import alone, ray_warns
from interrupted import (
    HARMA,
    assert_saved,
    at_step,
    done,
    ended,
    kill_worker,
    started,
    train_undisturbed,
    wait_until,
    without_times,
)

from harma_ray.training.checkpoint import WEIGHTS_NAME, list_checkpoints
from harma_ray.training.tracking import read_records
from harma_ray.tune.folder import open_search, read_search
from harma_ray.tune.study import trial_folder

SETTINGS = {**HARMA, "train.epochs": 2}
SPACE = """
recipe: harma-scenes
fixed: {fixed}
space: {{optim.learning_rate: {{choices: [0.004, 0.1]}}}}
sampler: grid
scheduler: {{name: asha, reduction_factor: 2}}
limits: {{trials: 2}}
concurrent: 1
"""
"""The second trial collapses, and is stopped while its workers are at work; what comes then needs their CPUs."""


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
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, env=alone(),
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "up\n"
        yield
        process.communicate("\n", timeout=60)


def steps_and_epochs(run):
    """What the record of a training says of them."""
    kinds = ("step", "monitor", "evaluation")
    return [without_times(record) for record in read_records(run) if record["kind"] in kinds and record["step"]]


@pytest.mark.ray
@pytest.mark.timeout(1500)
@ray_warns
def test_trials_of_two_workers_end_as_runs_of_their_settings(scenes, tmp_path):
    """A worker of the first is killed, then the search is interrupted, and resumed."""
    runs = tmp_path / "it's runs"
    runs.mkdir()
    (runs / "space.yaml").write_text(SPACE.format(fixed=json.dumps(SETTINGS)))
    folder, quiet = runs / "search", runs / "quiet"
    first = trial_folder(folder, 0)
    options = ["--data", scenes, "--runs", runs, "--name", "search", "--workers", 2]
    with started(["tune", runs / "space.yaml", *options], alone()) as process:
        wait_until(process, at_step(first, 5))
        kill_worker(first, 1)
        wait_until(process, at_step(first, 7, starts=2))
        os.killpg(process.pid, signal.SIGINT)
        result = ended(process)
    assert (result.status, len(result.error.splitlines())) == (2, 1), result.error
    assert shlex.split(result.error.partition("continue with: ")[2])[-2:] == ["--resume", str(folder)]
    assert_saved(first)
    with another_cluster():
        done(["tune", "--resume", folder], alone())
    results = read_search(*open_search(folder))
    assert [(trial.state, len(trial.curve)) for trial in results.trials] == [("complete", 2), ("stopped", 1)]
    train_undisturbed("harma-scenes", scenes, quiet, SETTINGS)
    assert steps_and_epochs(first) == steps_and_epochs(quiet)
    kept = list_checkpoints(first)
    assert [path.name for path in kept] == [path.name for path in list_checkpoints(quiet)]
    for left, right in zip(kept, list_checkpoints(quiet), strict=True):
        assert (left / WEIGHTS_NAME).read_bytes() == (right / WEIGHTS_NAME).read_bytes()
