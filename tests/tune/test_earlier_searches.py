"""A search as version 0.1.0 left it, its study written by Optuna alone: it opens, tells what was, and goes on."""

import json

import optuna
import pytest
from ray.tune.schedulers import TrialScheduler

from harma_ray.tune.folder import open_search, read_search
from harma_ray.tune.scheduling import make_scheduler
from harma_ray.tune.study import Report, SearchStudy

SEARCH = """\
recipe: harma-scenes
fixed: {train.epochs: 9, model.pretrained: random}
space:
  optim.learning_rate: {type: float, low: 0.0001, high: 0.1, log: true}
  adapter.width: {type: int, low: 16, high: 128, step: 16}
start: []
sampler: {name: random, seed: 0, startup_trials: 10}
scheduler: {name: asha, grace_epochs: 1, reduction_factor: 3, brackets: 3}
objective: [{metric: r_mean, direction: maximize}]
limits: {trials: 20, epochs: 30}
seeds: 1
concurrent: 0
"""
IDENTITY = "27ccd4f5282c70c2e11ff84fc68f4bfbb5bda941347feb23f6fa99719dfb4ebb"
"""What that version kept of the search."""
POINTS = [(4e-3, 128), (1e-3, 64), (2e-3, 32)]
CURVES = [[30.0, 31, 32, 33, 34, 35, 36, 37, 38], [20.0], [32.0, 31.0]]
ENDED = [optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED, None]


@pytest.fixture
def earlier(tmp_path):
    (tmp_path / "search.yaml").write_text(SEARCH)
    study = optuna.create_study(storage=f"sqlite:///{tmp_path}/optuna.db", study_name="search", directions=["maximize"])
    study.set_user_attr("identity", IDENTITY)
    study.set_user_attr("seconds", 12.5)
    for number, ((rate, width), curve, state) in enumerate(zip(POINTS, CURVES, ENDED, strict=True)):
        attributes = {"first_point": 0} if number == 0 else None
        study.enqueue_trial({"optim.learning_rate": rate, "adapter.width": width}, user_attrs=attributes)
        trial = study.ask()
        trial.suggest_float("optim.learning_rate", 1e-4, 1e-1, log=True)
        trial.suggest_int("adapter.width", 16, 128, step=16)
        (tmp_path / "trials" / f"{number:05d}").mkdir(parents=True)
        with (tmp_path / "trials" / f"{number:05d}" / "metrics.jsonl").open("w") as file:
            for epoch, value in enumerate(curve, start=1):
                trial.report(max(curve[:epoch]), step=epoch)
                line = {"kind": "evaluation", "step": 5 * epoch, "epoch": epoch, "split": "val", "r_mean": value}
                file.write(json.dumps(line) + "\n")
        trial.set_user_attr("result", {"values": [max(curve)], "trained": len(curve), "seconds": 1.5})
        if state is not None:
            study.tell(trial, max(curve) if state == ENDED[0] else None, state)
    return tmp_path


def test_it_tells_what_was(earlier):
    results = read_search(*open_search(earlier))
    assert [trial.state for trial in results.trials] == ["complete", "stopped", "running"]
    assert [trial.trained for trial in results.trials] == [9, 1, 2]
    assert [trial.curve for trial in results.trials] == [tuple(enumerate(curve, start=1)) for curve in CURVES]
    assert results.ended_training == (10, 18)
    assert results.seconds == 12.5


def test_it_goes_on_within_its_budget_with_what_was_interrupted(earlier):
    study = SearchStudy(*open_search(earlier))
    assignment = study.next()
    assert (assignment.number, assignment.params) == (2, {"optim.learning_rate": 2e-3, "adapter.width": 32})
    study.report(2, Report(progress=9, value=33.0, values=(33.0,), trained=9))
    study.close(2, Report(progress=9, value=33.0, values=(33.0,), trained=9, finished=True))
    assert (study.trained, study.is_over()) == (19, False)
    number = study.next().number
    study.report(number, Report(progress=9, value=1.0, values=(1.0,), trained=9))
    study.close(number, Report(progress=9, value=1.0, values=(1.0,), trained=9, finished=True))
    number = study.next().number
    study.report(number, Report(progress=2, value=1.0, values=(1.0,), trained=2))
    assert (study.trained, study.is_over()) == (30, True)


@pytest.mark.parametrize(("value", "decision"), [(31.5, TrialScheduler.STOP), (32.5, TrialScheduler.CONTINUE)])
def test_its_trials_are_compared_with_those_of_before(earlier, value, decision):
    """After one epoch there were 30, 20 and 32; of four, only the best goes on."""
    folder, definition = open_search(earlier)
    scheduler = make_scheduler(definition, read_search(folder, definition).trials)
    trial = type("Trial", (), {"config": {"number": 3}})()
    assert scheduler.on_trial_result(None, trial, {"progress": 1, "value": value}) == decision
