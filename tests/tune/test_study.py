"""The study of a search: what is proposed, what is remembered, what an interruption leaves."""

import itertools
import time
from dataclasses import replace

import optuna
import pytest
from optuna.trial import TrialState

from harma_ray.errors import UserError
from harma_ray.recipes import recipe_config
from harma_ray.settings import build_config
from harma_ray.tune.folder import create_search, open_search, read_search
from harma_ray.tune.space.definition import Limits, Sampler, SearchDefinition, Target
from harma_ray.tune.space.parameters import Choices, Range
from harma_ray.tune.space.urls import show_url
from harma_ray.tune.storage import make_sampler
from harma_ray.tune.study import DUPLICATE, FIRST_FAILURES, MANY_FAILURES, REASON, Report, SearchStudy, trial_folder

RATE = Range(name="optim.learning_rate", kind="float", low=1e-4, high=1e-1, log=True)
MARGIN = Range(name="loss.margin", kind="float", low=0.1, high=0.4, step=0.1)
WIDTH = Range(name="adapter.width", kind="int", low=64, high=128, step=64)


def definition(*parameters, **changes):
    found = SearchDefinition(config=recipe_config("harma-scenes"), parameters=parameters or (RATE, MARGIN))
    return replace(found, **{"limits": Limits(trials=50), **changes})


def reached(value, epoch=1.0, *, finished=False, failed=None):
    return Report(progress=epoch, value=value, values=(value,), trained=epoch, finished=finished, failed=failed)


def run(study, assignment, value):
    study.report(assignment.number, reached(value))
    study.close(assignment.number, reached(value, 3.0, finished=True))


def test_trial_0_is_the_published_setting_then_come_those_of_the_file(tmp_path):
    study = SearchStudy(tmp_path, definition(enqueued=({"loss.margin": 0.4},)))
    first, second = study.next(), study.next()
    assert (first.number, first.params) == (0, {"optim.learning_rate": 4e-3, "loss.margin": 0.2})
    assert second.params == {"optim.learning_rate": 4e-3, "loss.margin": 0.4}
    assert first.runs[0].config == recipe_config("harma-scenes")
    assert second.runs[0].config.loss.margin == 0.4


def test_each_seed_of_a_trial_has_its_own_folder_and_seed(tmp_path):
    runs = SearchStudy(tmp_path, definition(seeds=3)).next().runs
    assert [run.config.seed for run in runs] == [0, 1, 2]
    assert len({run.path for run in runs}) == 3
    assert runs[0].path == trial_folder(tmp_path, 0)


@pytest.mark.parametrize("sampler", ["tpe", "tpe-multivariate", "random", "cmaes"])
def test_no_setting_is_tried_twice_and_a_finite_space_is_exhausted(tmp_path, sampler):
    study = SearchStudy(tmp_path, definition(MARGIN, WIDTH, sampler=Sampler(name=sampler)))
    seen = []
    while (assignment := study.next()) is not None:
        seen.append((assignment.params["loss.margin"], assignment.params["adapter.width"]))
        run(study, assignment, float(len(seen)))
    assert sorted(seen) == sorted(itertools.product((0.1, 0.2, 0.3, 0.4), (64, 128)))


def test_the_grid_is_tried_whole_the_published_setting_first(tmp_path):
    study = SearchStudy(tmp_path, definition(MARGIN, WIDTH, sampler=Sampler(name="grid"), limits=Limits()))
    seen = []
    while (assignment := study.next()) is not None:
        seen.append(tuple(assignment.params.values()))
        run(study, assignment, 1.0)
    assert seen[0] == (0.2, 128)
    assert sorted(seen) == sorted(itertools.product((0.1, 0.2, 0.3, 0.4), (64, 128)))


def test_the_number_of_trials_is_limited_failed_ones_counted(tmp_path):
    study = SearchStudy(tmp_path, definition(limits=Limits(trials=3)))
    for value in range(3):
        assignment = study.next()
        study.close(assignment.number, reached(float(value), failed="no" if value == 1 else None, finished=True))
    assert study.next() is None


def test_the_epochs_of_all_trials_are_limited(tmp_path):
    study = SearchStudy(tmp_path, definition(limits=Limits(epochs=5)))
    one, two = study.next(), study.next()
    study.close(one.number, reached(1.0, 3.0, finished=True))
    assert not study.is_over()
    study.report(two.number, reached(1.0, 2.0))
    assert study.trained == 5
    assert study.is_over()
    assert study.next() is None


def test_states_are_told_to_optuna_as_they_are(tmp_path):
    study = SearchStudy(tmp_path, definition())
    events = []
    study.listener = lambda event: events.append((event.number, event.state, event.reason))
    trials = [study.next() for _ in range(4)]
    study.report(0, reached(10.0))
    study.close(0, reached(20.0, 3.0, finished=True))
    study.close(1, reached(5.0))
    study.close(2, replace(reached(0.0), values=(), failed="the loss is not finite"))
    study.close(3, None, crashed="killed")
    found = study.study.get_trials()
    assert [trial.state.name for trial in found] == ["COMPLETE", "PRUNED", "FAIL", "FAIL"]
    assert found[0].value == 20.0
    assert found[0].intermediate_values == {1: 10.0, 3: 20.0}
    assert found[1].intermediate_values == {1: 5.0}
    assert [trial.user_attrs.get(REASON) for trial in found[2:]] == ["the loss is not finite", "killed"]
    assert events[-4:] == [
        (0, "complete", None),
        (1, "stopped", None),
        (2, "failed", "the loss is not finite"),
        (3, "failed", "killed"),
    ]
    assert len(trials) == 4


@pytest.mark.filterwarnings("error")
def test_a_trial_that_reports_its_past_again_is_no_trouble(tmp_path):
    study = SearchStudy(tmp_path, definition())
    study.next()
    for epoch in (1, 2, 1, 2, 3):
        study.report(0, reached(float(epoch), epoch))
    study.close(0, reached(3.0, 3.0, finished=True))
    assert study.study.trials[0].intermediate_values == {1: 1.0, 2: 2.0, 3: 3.0}


def test_failures_are_hopeless_only_while_nothing_succeeds(tmp_path):
    study = SearchStudy(tmp_path, definition())
    for number in range(FIRST_FAILURES):
        assert study.failure_reason() is None
        study.next()
        study.close(number, None, crashed=f"failure {number}")
    assert study.failure_reason() == f"failure {FIRST_FAILURES - 1}"
    again = SearchStudy(tmp_path, definition())
    assert again.failure_reason() is None  # what was wrong may be mended
    number = again.next().number
    again.close(number, reached(1.0))
    for _ in range(MANY_FAILURES):
        assert again.failure_reason() is None
        again.close(again.next().number, None, crashed="later")
    assert again.failure_reason() == "later"


def test_epochs_of_all_sessions_count(tmp_path):
    before = SearchStudy(tmp_path, definition(limits=Limits(epochs=6)))
    before.next(), before.next()
    before.report(0, reached(1.0, 2.0))
    before.close(1, reached(1.0, 3.0, finished=True))
    after = SearchStudy(tmp_path, definition(limits=Limits(epochs=6)))
    assert after.trained == 5
    after.next()
    after.report(0, reached(1.0, 1.0))
    assert after.trained == 5
    after.report(0, reached(1.0, 2.0))
    assert not after.is_over()
    after.report(0, reached(1.0, 3.0))
    assert after.trained == 6
    after.close(0, reached(1.0, 3.0, finished=True))


def test_hours_of_all_sessions_count_up_to_the_last_report(tmp_path, monkeypatch):
    """The driver is killed while its only trial runs, half an hour after it began."""
    space = definition(limits=Limits(hours=1))
    now = time.monotonic()
    before = SearchStudy(tmp_path, space)
    before.next()
    monkeypatch.setattr(time, "monotonic", lambda: now + 1801)
    before.report(0, reached(1.0))
    after = SearchStudy(tmp_path, space)
    assert not after.is_over()
    monkeypatch.setattr(time, "monotonic", lambda: now + 1801 + 1790)
    assert not after.is_over()
    monkeypatch.setattr(time, "monotonic", lambda: now + 1801 + 1801)
    assert after.is_over()


def test_what_was_tried_before_an_interruption_is_not_tried_again(tmp_path):
    """Optuna keeps 0.30000000000000004 where the space has 0.3."""
    space = definition(MARGIN, sampler=Sampler(name="random"))
    before = SearchStudy(tmp_path, space)
    tried = []
    for _ in range(3):
        assignment = before.next()
        tried.append(assignment.params["loss.margin"])
        run(before, assignment, 1.0)
    after = SearchStudy(tmp_path, space)
    while (assignment := after.next()) is not None:
        tried.append(assignment.params["loss.margin"])
        run(after, assignment, 1.0)
    assert sorted(tried) == [0.1, 0.2, 0.3, 0.4]


def test_a_repetition_that_was_just_drawn_when_the_driver_was_killed_is_not_trained(tmp_path):
    space = definition(limits=Limits(trials=2))
    before = SearchStudy(tmp_path, space)
    published = before.next()
    run(before, published, 1.0)
    before.study.enqueue_trial(published.params)
    before.definition.suggest(before.study.ask())
    after = SearchStudy(tmp_path, space)
    assert after.next().number == 2  # the repetition counts for nothing
    assert after.study.trials[1].user_attrs[DUPLICATE] == 0


def test_early_failures_end_no_search_in_which_a_trial_gets_on(tmp_path):
    study = SearchStudy(tmp_path, definition())
    study.next()
    study.report(0, reached(30.0))
    for _ in range(FIRST_FAILURES):
        study.close(study.next().number, None, crashed="diverged")
    assert study.failure_reason() is None


@pytest.mark.parametrize(
    "changes",
    [
        {"parameters": (replace(RATE, high=1.0), MARGIN)},
        {"seeds": 2},
        {"config": build_config(recipe_config("harma-scenes"), {"train.epochs": 9})},
    ],
)
def test_a_search_whose_trials_could_not_be_compared_is_refused(tmp_path, changes):
    SearchStudy(tmp_path, definition()).next()
    with pytest.raises(UserError, match="cannot be compared"):
        SearchStudy(tmp_path, replace(definition(), **changes))
    SearchStudy(tmp_path, definition(limits=Limits(trials=99), sampler=Sampler(name="random")))


def test_a_search_can_be_moved(tmp_path):
    (tmp_path / "a").mkdir()
    run(study := SearchStudy(tmp_path / "a", definition()), study.next(), 1.0)
    (tmp_path / "a").rename(tmp_path / "b")
    assert len(read_search(tmp_path / "b", definition()).trials) == 1


def test_the_password_of_a_storage_is_not_shown():
    assert show_url("postgresql://me:secret@host/db") == "postgresql://me:***@host/db"


def test_interrupted_trials_go_on_first_as_themselves(tmp_path):
    before = SearchStudy(tmp_path, definition())
    params = {}
    for _ in range(4):
        assignment = before.next()
        params[assignment.number] = assignment.params
        before.report(assignment.number, reached(1.0))
    before.close(1, reached(7.0, 3.0, finished=True))
    after = SearchStudy(tmp_path, definition())
    again = [after.next() for _ in range(4)]
    assert [assignment.number for assignment in again] == [0, 2, 3, 4]
    assert all(assignment.params == params[assignment.number] for assignment in again[:3])
    for assignment in again:
        after.report(assignment.number, reached(2.0, 2.0))
        after.close(assignment.number, reached(3.0, 3.0, finished=True))
    assert [trial.state for trial in after.study.trials] == [TrialState.COMPLETE] * 5


def test_an_interruption_in_the_middle_of_a_proposal_loses_nothing(tmp_path):
    """The process dies after Optuna has made the trial, before all its values are drawn."""
    before = SearchStudy(tmp_path, definition())
    run(before, before.next(), 1.0)
    RATE.suggest(before.study.ask())
    drawn = before.study.trials[1].params["optim.learning_rate"]
    assignment = SearchStudy(tmp_path, definition()).next()
    assert assignment.number == 1
    assert assignment.params["optim.learning_rate"] == drawn
    assert 0.1 <= assignment.params["loss.margin"] <= 0.4


def test_after_an_interruption_the_sampler_knows_and_does_not_repeat_itself(tmp_path):
    space = definition(RATE, sampler=Sampler(name="random"))
    before = SearchStudy(tmp_path, space)
    for _ in range(5):
        run(before, before.next(), 1.0)
    after = SearchStudy(tmp_path, space)
    for _ in range(5):
        run(after, after.next(), 1.0)
    values = [trial.params["optim.learning_rate"] for trial in after.study.trials]
    assert len(set(values)) == len(values) == 10
    assert after.trained == 30


@pytest.mark.parametrize("name", ["tpe-multivariate", "cmaes"])
def test_the_sampler_learns_though_most_trials_are_stopped(tmp_path, name):
    """Most proposals after the random ones are better than most random ones."""
    target = 1e-2
    space = definition(RATE, WIDTH, limits=Limits(trials=40), sampler=Sampler(name=name))
    study = SearchStudy(tmp_path, space)
    distances = []
    while (assignment := study.next()) is not None:
        ratio = assignment.params["optim.learning_rate"] / target
        distances.append(max(ratio, 1 / ratio))
        study.report(assignment.number, reached(-distances[-1]))
        study.close(assignment.number, reached(-distances[-1], finished=assignment.number == 0))
    assert sorted(distances[-15:])[7] < sorted(distances[1:11])[5] / 2


def test_two_objectives_give_a_front(tmp_path):
    targets = (Target(metric="r_mean"), Target(metric="trainable_parameters", direction="minimize"))
    space = definition(objectives=targets)
    study = SearchStudy(tmp_path, space)
    for values in ((10.0, 100.0), (20.0, 300.0), (15.0, 400.0), (5.0, 50.0)):
        assignment = study.next()
        report = Report(progress=3, value=values[0], values=values, trained=3, finished=True)
        study.report(assignment.number, report)
        study.close(assignment.number, report)
    results = read_search(tmp_path, space, study.study)
    assert results.front == (0, 1, 3)
    assert results.best == 1


def test_a_storage_that_cannot_be_used_is_refused(tmp_path):
    with pytest.raises(UserError, match="check `storage`"):
        SearchStudy(tmp_path, definition(storage="nosuchdb://here"))


def test_a_new_search_does_not_join_one_of_its_name_in_a_shared_storage(tmp_path):
    space = definition(storage=f"sqlite:///{tmp_path / 'shared.db'}")
    first = create_search(tmp_path / "a", "one", space)
    SearchStudy(first, space)
    with pytest.raises(UserError, match="has a study `one`"):
        create_search(tmp_path / "b", "one", space)
    assert not (tmp_path / "b").exists()
    two = create_search(tmp_path / "b", "two", space)
    run(study := SearchStudy(*open_search(two)), study.next(), 1.0)
    create_search(tmp_path / "b", "three", open_search(two)[1])  # begins anew, under its own name
    two.rename(tmp_path / "renamed")
    assert len(read_search(*open_search(tmp_path / "renamed")).trials) == 1


def test_a_study_of_other_objectives_is_refused(tmp_path):
    SearchStudy(tmp_path, definition())
    with pytest.raises(UserError, match="other objectives"):
        SearchStudy(tmp_path, definition(objectives=(Target(metric="r_mean"), Target(metric="txt_r1"))))


def test_settings_that_do_not_fit_together_are_a_failure_with_its_reason(tmp_path):
    heads = Choices(name="adapter.num_heads", choices=(8, 48))
    study = SearchStudy(tmp_path, definition(heads, enqueued=({"adapter.num_heads": 48},)))
    assert study.next().number == 0
    assert study.next() is None
    failed = study.study.trials[1]
    assert failed.state == TrialState.FAIL
    assert "`num_heads`" in failed.user_attrs[REASON]


def test_the_best_is_a_complete_trial_if_there_is_one(tmp_path):
    space = definition()
    study = SearchStudy(tmp_path, space)
    study.next(), study.next()
    study.close(0, reached(30.0))
    assert read_search(tmp_path, space, study.study).best == 0
    study.close(1, reached(20.0, 3.0, finished=True))
    assert read_search(tmp_path, space, study.study).best == 1


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("tpe", optuna.samplers.TPESampler),
        ("tpe-multivariate", optuna.samplers.TPESampler),
        ("random", optuna.samplers.RandomSampler),
        ("cmaes", optuna.samplers.CmaEsSampler),
    ],
)
def test_a_name_stands_for_optunas_sampler(name, kind):
    assert isinstance(make_sampler(definition(sampler=Sampler(name=name))), kind)


def test_repeated_proposals_are_marked(tmp_path):
    study = SearchStudy(tmp_path, definition(WIDTH, sampler=Sampler(name="random")))
    while (assignment := study.next()) is not None:
        run(study, assignment, 1.0)
    repeated = [trial for trial in study.study.trials if trial.state == TrialState.FAIL]
    assert repeated
    for trial in repeated:
        assert study.study.trials[trial.user_attrs[DUPLICATE]].params == trial.params
