"""Study, searcher and scheduler together, driven as Ray Tune drives them, with made-up trials and without Ray."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from harma_ray.recipes import recipe_config
from harma_ray.settings import build_config
from harma_ray.training.tracking import METRICS_NAME
from harma_ray.tune.folder import read_search
from harma_ray.tune.results import TrialResult
from harma_ray.tune.scheduling import StudySearcher, make_scheduler
from harma_ray.tune.space.definition import Limits, Sampler, Scheduler, SearchDefinition
from harma_ray.tune.space.parameters import Range
from harma_ray.tune.study import SearchStudy

RATE = Range(name="optim.learning_rate", kind="float", low=1e-4, high=1e-1, log=True)
WIDTH = Range(name="adapter.width", kind="int", low=16, high=128, step=16)


def definition(epochs=4, *, every=0, **changes):
    """A search that counts epochs, or steps, of which `every` take the place of an epoch."""
    lengths = {"train.steps": epochs * every, "train.eval_every_steps": every} if every else {"train.epochs": epochs}
    config = build_config(recipe_config("harma-scenes"), lengths)
    found = SearchDefinition(config=config, parameters=(WIDTH,), sampler=Sampler(name="random"))
    return replace(found, **{"limits": Limits(trials=4), **changes})


class Stub:
    def __init__(self, number):
        self.trial_id, self.config = str(number), {"number": number}


def drive(folder, space, value_of, num_reports=None):
    """Runs one trial after another, each from its first epoch, until the search is over or so many reports came."""
    folder.mkdir(exist_ok=True)
    left = itertools.count() if num_reports is None else iter(range(num_reports))
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
        every, best = space.config.train.eval_every_steps, 0.0
        epochs = space.length // (every or 1)
        for epoch in range(1, epochs + 1):
            value = value_of(suggested["params"], epoch)
            best = max(best, value)
            line = {"kind": "evaluation", "step": epoch * (every or 7), "epoch": epoch / 3 if every else epoch}
            with (run / METRICS_NAME).open("a") as file:
                file.write(json.dumps({**line, "split": "val", "r_mean": value}) + "\n")
            told = epoch * (every or 1)
            result = {"progress": told, "value": best, "values": [best], "trained": told, "finished": epoch == epochs}
            stops = scheduler.on_trial_result(None, trial, result) == TrialScheduler.STOP
            if stops:
                break
            searcher.on_trial_result(str(number), result)  # as Ray Tune does, only then
            if study.is_over() or next(left, None) is None:
                return read_search(folder, space, study.study)
        scheduler.on_trial_complete(None, trial, result)
        searcher.on_trial_complete(str(number), result)


def narrower_is_better(params, epoch):
    return 100 - params["adapter.width"] / 2 + epoch


def points(*widths):
    return tuple({"adapter.width": width} for width in widths)


def states(results):
    return [trial.state for trial in results.trials]


@pytest.mark.parametrize("name", ["asha", "hyperband", "median"])
def test_a_search_in_two_sessions_knows_what_the_first_has_seen(tmp_path, name):
    """Without its past, a scheduler lets the first trials of a session pass."""
    space = definition(scheduler=Scheduler(name=name, brackets=1), enqueued=points(16, 32, 48, 64))
    first = drive(tmp_path, replace(space, limits=Limits(trials=5)), narrower_is_better)
    assert [trial.params["adapter.width"] for trial in first.trials] == [128, 16, 32, 48, 64]
    again = drive(tmp_path, replace(space, limits=Limits(trials=7)), narrower_is_better)
    assert states(again)[:5] == states(first)
    assert states(again)[5:] == ["stopped", "stopped"]


@pytest.mark.parametrize("name", ["asha", "hyperband", "median"])
def test_a_past_that_would_be_stopped_today_is_no_trouble(tmp_path, name):
    """The second trial was complete before better ones came."""
    space = definition(scheduler=Scheduler(name=name, brackets=1), enqueued=points(112, 16, 32, 48))
    first = drive(tmp_path, replace(space, limits=Limits(trials=5)), narrower_is_better)
    assert states(first)[1] == "complete"
    again = drive(tmp_path, replace(space, limits=Limits(trials=6)), narrower_is_better)
    assert states(again)[:5] == states(first)
    assert states(again)[5] == "stopped"


@pytest.mark.parametrize("name", ["asha", "hyperband", "median"])
def test_a_trial_that_has_trained_all_its_epochs_is_complete(tmp_path, name):
    """Each is worse than all before it, but only in the last epoch."""
    space = definition(scheduler=Scheduler(name=name, brackets=1), enqueued=points(16, 32, 48))
    good = {128: 60.0, 16: 50.0, 32: 40.0, 48: 30.0}

    def late(params, epoch):
        return good[params["adapter.width"]] + 10 * epoch if epoch == 4 else 20.0 + epoch

    assert states(drive(tmp_path, space, late)) == ["complete"] * 4


@pytest.mark.parametrize(("every", "limits"), [(0, (Limits(epochs=6), Limits(epochs=8))),
                                               (50, (Limits(steps=300), Limits(steps=400)))])  # fmt: skip
def test_trials_that_a_limit_cuts_off_go_on_when_it_is_raised(tmp_path, every, limits):
    space = definition(every=every, limits=limits[0], scheduler=Scheduler(name="none"))
    assert states(drive(tmp_path, space, narrower_is_better)) == ["complete", "running"]
    space = replace(space, limits=limits[1])
    assert states(drive(tmp_path, space, narrower_is_better)) == ["complete", "complete"]


def test_what_goes_wrong_in_a_proposal_ends_the_search_and_is_kept(tmp_path, monkeypatch):
    study = SearchStudy(tmp_path, definition())
    searcher = StudySearcher(study, 1, lambda trial_id: "")
    monkeypatch.setattr(study.study, "ask", lambda: 1 / 0)
    assert searcher.suggest("0") == Searcher.FINISHED
    assert isinstance(searcher.error, ZeroDivisionError)


@pytest.mark.parametrize("name", ["asha", "hyperband", "median"])
def test_what_was_judged_before_an_interruption_is_not_judged_again(tmp_path, name):
    """Better ones ended meanwhile; it stood at epoch 8 of 9, tells its past again, and is compared only from there."""
    space = definition(9, scheduler=Scheduler(name=name, reduction_factor=2, brackets=1))
    curves = {number: [50.0] * 9 for number in range(1, 6)} | {7: [10.0] * 8}
    past = [made_trial(number, curve, tmp_path) for number, curve in curves.items()]
    results = [{"progress": epoch, "value": 10.0} for epoch in range(1, 9)]
    decided = decisions(make_scheduler(space, past), 7, results)
    assert decided == [TrialScheduler.CONTINUE] * 8
    assert TrialScheduler.STOP in decisions(make_scheduler(space, past[:-1]), 7, results)


def made_trial(number, curve, folder):
    points = tuple(enumerate(curve, start=1))
    state = "complete" if len(curve) == 9 else "running"
    return TrialResult(number, state, {}, points, (max(curve),), len(curve), 1.0, None, folder)


def decisions(scheduler, number, results):
    trial = Stub(number)
    scheduler.on_trial_add(None, trial)
    return [scheduler.on_trial_result(None, trial, result) for result in results]


def test_halving_lets_the_best_half_go_on():
    """Worked out by hand: of n results so far, the n // 2 best go on, and always the best."""
    scheduler = make_scheduler(definition(scheduler=Scheduler(name="asha", reduction_factor=2)))
    goes_on = {1: (50.0, True), 2: (40.0, False), 3: (60.0, True), 4: (55.0, True), 5: (54.0, False), 6: (55.5, True)}
    for number, (value, expected) in goes_on.items():
        (decided,) = decisions(scheduler, number, [{"progress": 1, "value": value}])
        assert (decided == TrialScheduler.CONTINUE) == expected, number


@pytest.mark.parametrize("brackets", [1, 2, 3, 6])
def test_each_of_hyperbands_brackets_grants_more_epochs_than_the_one_before(brackets):
    """Each trial is worse than all before it, so that it is stopped when it is first judged."""
    space = definition(100, scheduler=Scheduler(name="hyperband", reduction_factor=2, brackets=brackets))
    scheduler, stopped_at = make_scheduler(space), set()
    for number in range(1, 80):
        results = [{"progress": epoch, "value": 1000.0 - number} for epoch in range(1, 65)]
        decided = decisions(scheduler, number, results)
        if TrialScheduler.STOP in decided:
            stopped_at.add(1 + decided.index(TrialScheduler.STOP))
    assert stopped_at == {2**bracket for bracket in range(brackets)}


def uneven(params, epoch):
    return 50 + 20 * math.sin(1e6 * params["optim.learning_rate"]) + epoch


def search_of_rates(epochs, **changes):
    rates = [1e-4 * 1.2**index for index in range(14)]
    enqueued = tuple({"optim.learning_rate": rate} for rate in rates)
    return definition(epochs, parameters=(RATE,), enqueued=enqueued, limits=Limits(trials=14), **changes)


@pytest.mark.parametrize(
    ("name", "grace", "grace_steps"), [("asha", 1, 0), ("hyperband", 1, 0), ("median", 1, 0), ("asha", 2, 100)]
)
def test_a_search_that_counts_steps_decides_as_one_that_counts_epochs(tmp_path, name, grace, grace_steps):
    """50 steps lie between two evaluations; it is interrupted once."""
    scheduler = Scheduler(name=name, grace_epochs=grace, reduction_factor=2, brackets=2)
    epochs = drive(tmp_path / "epochs", search_of_rates(9, scheduler=scheduler), uneven)
    space = search_of_rates(9, every=50, scheduler=replace(scheduler, grace_epochs=1, grace_steps=grace_steps))
    drive(tmp_path / "steps", space, uneven, num_reports=20)
    steps = drive(tmp_path / "steps", space, uneven)
    assert states(steps) == states(epochs)
    assert states(steps).count("stopped") >= 2
    assert [trial.trained for trial in steps.trials] == [50 * trial.trained for trial in epochs.trials]
    assert [trial.curve for trial in steps.trials] == [
        tuple((50 * epoch, value) for epoch, value in trial.curve) for trial in epochs.trials
    ]


@pytest.mark.parametrize("name", ["hyperband", "median"])
def test_a_search_that_is_interrupted_again_and_again_decides_as_one_that_is_not(tmp_path, name):
    """With three brackets; it is cut off after any number of reports, also in the middle of a trial."""
    space = search_of_rates(5, scheduler=Scheduler(name=name, reduction_factor=2, brackets=3))
    whole = drive(tmp_path / "whole", space, uneven)
    for num_reports in (7, 12, None):
        parts = drive(tmp_path / "parts", space, uneven, num_reports=num_reports)
    told = [[(trial.state, trial.trained, trial.values) for trial in found.trials] for found in (whole, parts)]
    assert told[0] == told[1]
    assert states(whole).count("stopped") >= 2
    assert states(whole).count("complete") > 2
