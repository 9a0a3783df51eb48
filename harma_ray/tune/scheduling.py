"""Between Ray Tune and a search's study: who is tried next, and who is stopped early."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher

from harma_ray.config import to_dict
from harma_ray.tune.definition import SearchDefinition
from harma_ray.tune.results import TrialResult
from harma_ray.tune.study import Report, SearchStudy

EPOCH, VALUE = "epoch", "value"
"""What schedulers look at: epochs of the first seed's training, and the best of the first objective so far."""


class StudySearcher(Searcher):
    """Lets Ray Tune take trials from a study.

    Ray's own `OptunaSearch` tells Optuna that a stopped trial is complete, leaves a trial that failed running for
    ever, and can go on after an interruption only from a pickle; a study goes on from what it holds.
    """

    def __init__(self, study: SearchStudy, concurrent: int, read_trace: Callable[[str], str]):
        """Takes the study, the number of trials at a time, and what gives the trace of a crash by the trial's id."""
        super().__init__(metric=VALUE, mode="max")
        self._study, self._concurrent, self._read_trace = study, concurrent, read_trace
        self._numbers: dict[str, int] = {}
        self.error: Exception | None = None
        """What kept the study from hearing of a trial: Ray Tune would take it for the trial's own failure."""

    def suggest(self, trial_id: str) -> Any:
        """Returns the next trial's configuration: its number, its settings, its trainings."""
        if len(self._numbers) >= self._concurrent:
            return None
        assignment = None
        with self._keeping_errors():
            assignment = self._study.next()
        if assignment is None:
            return Searcher.FINISHED
        self._numbers[trial_id] = assignment.number
        return {
            "number": assignment.number,
            "params": assignment.params,
            "runs": [{"folder": str(run.folder), "config": to_dict(run.config)} for run in assignment.runs],
        }

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Hears of an epoch."""
        report = report_of(result)
        if report is not None and not report.failed:
            with self._keeping_errors():
                self._study.report(self._numbers[trial_id], report)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Hears of the end of a trial; `error`: its process died, and was restarted as often as is allowed."""
        if trial_id not in self._numbers:
            return
        with self._keeping_errors():
            crashed = describe_crash(self._read_trace(trial_id)) if error else None
            self._study.close(self._numbers.pop(trial_id), report_of(result), crashed=crashed)

    @contextlib.contextmanager
    def _keeping_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.error = self.error or error

    def save(self, checkpoint_path: str) -> None:
        """Saves nothing: the study is on disk."""

    def restore(self, checkpoint_path: str) -> None:
        """Restores nothing."""

    def __getstate__(self) -> dict[str, Any]:
        """Keeps the study out of the pickles that Ray Tune writes and nobody reads."""
        return {}


def describe_crash(trace: str) -> str:
    """Returns in one line why a trial's process ended, from the trace that Ray gives."""
    if "ActorDiedError" in trace or "died" in trace:
        return "its process died again and again: killed from outside, by a crash, or with its machine"
    return (trace.strip().splitlines() or ["its process could not be used"])[-1]


def report_of(result: dict[str, Any] | None) -> Report | None:
    """Reads a report back from what Ray Tune hands on; None if there is none in it."""
    if not result or VALUE not in result:
        return None
    fields = {name: result[name] for name in Report.__dataclass_fields__ if name in result}
    return Report(**{**fields, "values": tuple(fields["values"])})


@dataclass(frozen=True)
class _Ended:
    """What a scheduler needs to know of a trial of an earlier session."""

    trial_id: str
    number: int

    @property
    def config(self) -> dict[str, int]:
        """What the trial was given."""
        return {"number": self.number}


class _Asha(ASHAScheduler):
    """ASHA with the exceptions of `_is_spared`."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        action = super().on_trial_result(tune_controller, trial, result)
        return TrialScheduler.CONTINUE if _is_spared(trial, result) else action


class _Median(MedianStoppingRule):
    """The median rule with the exceptions of `_is_spared`, and no decision after the last epoch."""

    def __init__(self, epochs: int, **options: Any):
        super().__init__(**options)
        self._epochs = epochs

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if _is_spared(trial, result) or result[EPOCH] >= self._epochs:
            self.on_trial_complete(tune_controller, trial, result)  # which takes a result, and decides nothing
            return TrialScheduler.CONTINUE
        return super().on_trial_result(tune_controller, trial, result)


def _is_spared(trial: Any, result: dict[str, Any]) -> bool:
    """Tells whether a result may not stop its trial.

    The published setting is what all others are compared with in the end; and an interrupted trial that tells its past
    again was let pass there before.
    """
    return trial.config["number"] == 0 or result.get("replayed", False)


def make_scheduler(definition: SearchDefinition, past: Iterable[TrialResult] = ()) -> TrialScheduler:
    """Returns the scheduler, as if it had seen the trials that ended in earlier sessions.

    Args:
        definition: The search.
        past: Its trials; those that are running are left out, for they report their past again.
    """
    settings, epochs = definition.scheduler, definition.config.train.epochs
    about: Any = {"time_attr": EPOCH, "metric": VALUE, "mode": "max", "grace_period": settings.grace_epochs}
    if settings.name == "none" or epochs <= settings.grace_epochs:
        return FIFOScheduler()
    if settings.name == "median":
        # an infinite slice: a trial is never paused for others, as Ray would without enough to compare with
        scheduler: TrialScheduler = _Median(epochs, **about, min_time_slice=float("inf"))
    else:
        scheduler = _Asha(
            **about,
            max_t=epochs - 1,  # no decision after the last epoch
            reduction_factor=settings.reduction_factor,
            brackets=settings.brackets if settings.name == "hyperband" else 1,
            stop_last_trials=False,
        )
    for trial in past:
        if trial.state in ("complete", "stopped") and trial.curve:
            ended: Any = _Ended(f"earlier-{trial.number}", trial.number)
            nobody: Any = None
            scheduler.on_trial_add(nobody, ended)
            best = accumulate((value for _, value in trial.curve), max)
            results = [
                {EPOCH: epoch, VALUE: value, "replayed": True}
                for (epoch, _), value in zip(trial.curve, best, strict=True)
            ]
            for result in results:
                scheduler.on_trial_result(nobody, ended, result)
            scheduler.on_trial_complete(nobody, ended, results[-1])
    return scheduler
