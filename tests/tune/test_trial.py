"""What a trial's process does around its training."""

import os
from dataclasses import replace

from harma_ray.resources import WorkerPlan
from harma_ray.tune import trial


def test_a_trial_has_the_variables_of_the_command(monkeypatch, random_run):
    monkeypatch.setenv("WANDB_PROJECT", "of the cluster")
    setting = trial.TrialSetting((), "epoch", WorkerPlan(1, 1, 0), None, "{}", (), {"WANDB_PROJECT": "mine"})
    config = replace(random_run.config, train=replace(random_run.config.train, threads=1))
    folder = random_run.path

    def read(*arguments, **more):
        return os.environ["WANDB_PROJECT"]

    assert trial._alone(read, folder, config, setting) == "mine"
