"""Study, searcher and scheduler together, driven as Ray Tune drives them, with made-up trials and without Ray."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from harma_ray.config import build_config
from harma_ray.recipes import recipe_config
from harma_ray.tracking import METRICS_NAME
from harma_ray.tune.definition import Limits, Sampler, Scheduler, SearchDefinition
from harma_ray.tune.folder import read_search
from harma_ray.tune.parameters import Range
from harma_ray.tune.results import TrialResult
from harma_ray.tune.scheduling import StudySearcher, make_scheduler
from harma_ray.tune.study import SearchStudy

WIDTH = Range(name="adapter.width", kind="int", low=16, high=128, step=16)


def definition(epochs=4, **changes):
    config = build_config(recipe_config("harma-scenes"), {"train.epochs": epochs})
    found = SearchDefinition(config=config, parameters=(WIDTH,), sampler=Sampler(name="random"))
    return replace(found, **{"limits": Limits(trials=4), **changes})


class Stub:
    def __init__(self, number):
        self.trial_id, self.config = str(number), {"number": number}


def drive(folder, space, value_of):
    """Runs one trial after another until the search is over, each from its first epoch."""
    study = SearchStudy(folder, space)
    searcher = StudySearcher(study, 1, lambda trial_id: "")
    scheduler = make_scheduler(space, read_search(folder, space, study.study).trials)
    while True:
        number = len(study.study.trials)
        suggested = searcher.suggest(str(number))
        if suggested == Searcher.FINISHED:
            assert searcher.error is None
            return read_search(folder, space, study.study)
        trial = Stub(suggested["number"])
        scheduler.on_trial_add(None, trial)
        run = Path(suggested["runs"][0]["folder"])
        run.mkdir(parents=True, exist_ok=True)
        (run / METRICS_NAME).write_text("")
        epochs, best = space.config.train.epochs, 0.0
        for epoch in range(1, epochs + 1):
            value = value_of(suggested["params"], epoch)
            best = max(best, value)
            line = {"kind": "evaluation", "step": epoch, "epoch": epoch, "split": "val", "r_mean": value}
            with (run / METRICS_NAME).open("a") as file:
                file.write(json.dumps(line) + "\n")
            result = {"epoch": epoch, "value": best, "values": [best], "trained": epoch, "finished": epoch == epochs}
            searcher.on_trial_result(str(number), result)
            if study.is_over():
                return read_search(folder, space, study.study)
            if scheduler.on_trial_result(None, trial, result) == TrialScheduler.STOP:
                break
        scheduler.on_trial_complete(None, trial, result)
        searcher.on_trial_complete(str(number), result)


def narrower_is_better(params, epoch):
    return 100 - params["adapter.width"] / 2 + epoch


def starts(*widths):
    return tuple({"adapter.width": width} for width in widths)


def states(results):
    return [trial.state for trial in results.trials]


@pytest.mark.parametrize("name", ["asha", "hyperband", "median"])
def test_a_search_in_two_sessions_knows_what_the_first_has_seen(tmp_path, name):
    """Without its past, a scheduler lets the first trials of a session pass."""
    space = definition(scheduler=Scheduler(name=name, brackets=1), starts=starts(16, 32, 48))
    first = drive(tmp_path, space, narrower_is_better)
    assert [trial.params["adapter.width"] for trial in first.trials] == [128, 16, 32, 48]
    again = drive(tmp_path, replace(space, limits=Limits(trials=6)), narrower_is_better)
    assert states(again)[:4] == states(first)
    assert states(again)[4:] == ["stopped", "stopped"]


@pytest.mark.parametrize("name", ["asha", "hyperband", "median"])
def test_a_past_that_would_be_stopped_today_is_no_trouble(tmp_path, name):
    """The second trial was complete before better ones came."""
    space = definition(scheduler=Scheduler(name=name, brackets=1), starts=starts(112, 16, 32))
    first = drive(tmp_path, space, narrower_is_better)
    assert states(first)[1] == "complete"
    again = drive(tmp_path, replace(space, limits=Limits(trials=5)), narrower_is_better)
    assert states(again)[:4] == states(first)
    assert states(again)[4] == "stopped"


@pytest.mark.parametrize("name", ["asha", "hyperband", "median"])
def test_a_trial_that_has_trained_all_its_epochs_is_complete(tmp_path, name):
    """Each is worse than all before it, but only in the last epoch."""
    space = definition(scheduler=Scheduler(name=name, brackets=1), starts=starts(16, 32, 48))
    good = {128: 60.0, 16: 50.0, 32: 40.0, 48: 30.0}

    def late(params, epoch):
        return good[params["adapter.width"]] + 10 * epoch if epoch == 4 else 20.0 + epoch

    assert states(drive(tmp_path, space, late)) == ["complete"] * 4


def test_trials_that_a_limit_cuts_off_go_on_when_it_is_raised(tmp_path):
    space = definition(limits=Limits(epochs=6), scheduler=Scheduler(name="none"))
    assert states(drive(tmp_path, space, narrower_is_better)) == ["complete", "running"]
    space = replace(space, limits=Limits(epochs=8))
    assert states(drive(tmp_path, space, narrower_is_better)) == ["complete", "complete"]


def test_what_goes_wrong_in_a_proposal_ends_the_search_and_is_kept(tmp_path, monkeypatch):
    study = SearchStudy(tmp_path, definition())
    searcher = StudySearcher(study, 1, lambda trial_id: "")
    monkeypatch.setattr(study.study, "ask", lambda: 1 / 0)
    assert searcher.suggest("0") == Searcher.FINISHED
    assert isinstance(searcher.error, ZeroDivisionError)


@pytest.mark.parametrize("name", ["asha", "hyperband", "median"])
def test_a_trial_that_tells_its_past_again_is_not_judged_there(tmp_path, name):
    """Three better ones have ended meanwhile; it stands at epoch 8 of 9 and is compared only from there on."""
    space = definition(9, scheduler=Scheduler(name=name, brackets=1))
    trials = [
        TrialResult(number, "complete", {}, tuple((epoch, 50.0) for epoch in range(1, 10)), (50.0,), 9, 9, 1.0, None,
                    tmp_path)
        for number in range(1, 5)
    ]  # fmt: skip
    for replayed in (True, False):
        scheduler, again = make_scheduler(space, trials), Stub(7)
        scheduler.on_trial_add(None, again)
        results = [{"epoch": epoch, "value": 10.0, "replayed": replayed} for epoch in range(1, 9)]
        decisions = (scheduler.on_trial_result(None, again, result) for result in results)
        assert ("STOP" in decisions) != replayed  # looks no further than the first
