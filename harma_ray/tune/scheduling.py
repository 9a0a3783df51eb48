"""Between Ray Tune and a search's study: who is tried next, and who is stopped early."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from typing import Any

import optuna
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from harma_ray.on_ray.quirks import Unpickled
from harma_ray.settings import to_dict
from harma_ray.tune.results import TrialResult
from harma_ray.tune.space.definition import SearchDefinition
from harma_ray.tune.study import Report, SearchStudy

PROGRESS, VALUE = "progress", "value"
"""What schedulers look at: how far the first seed's training is, and the best of the first objective so far."""


class StudySearcher(Unpickled, Searcher):
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
            "runs": [{"folder": str(run.path), "config": to_dict(run.config)} for run in assignment.runs],
        }

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Records an evaluation."""
        report = report_of(result)
        if report is not None and not report.failed:
            with self._keeping_errors():
                self._study.report(self._numbers[trial_id], report)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Records the end of a trial; `error`: its process died, and was restarted as often as is allowed."""
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


class EarlyStopping(Unpickled, FIFOScheduler):
    """Stops trials that fall behind, as one of Optuna's pruners says.

    The pruner judges a study in memory, which holds the first objective alone and is filled from the trials' records:
    so it knows what it knew before an interruption, and a search of two objectives, whose study takes no pruner, is
    stopped early too. A trial has the same number in both studies, for hyperband's bracket goes by it.
    """

    def __init__(self, definition: SearchDefinition, past: Iterable[TrialResult] = ()):
        """Takes the search, and its trials of earlier sessions in the order of their numbers."""
        super().__init__()
        self._length = definition.length
        objective = definition.objectives[0]
        self._judged = optuna.create_study(
            study_name="search", direction=objective.direction, pruner=make_pruner(definition),
            sampler=optuna.samplers.RandomSampler(),
        )  # fmt: skip
        self._trials: list[optuna.trial.Trial] = []
        self._seen: set[tuple[int, int]] = set()
        for trial in past:
            best = accumulate((value for _, value in trial.curve), max if objective.maximize else min)
            for (progress, _), value in zip(trial.curve, best, strict=True):
                if progress <= trial.trained:  # what was evaluated later was not judged before the interruption
                    self._falls_behind(trial.number, progress, value)
            if trial.state == "complete":
                self._complete(trial.number, trial.value)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decides whether a trial goes on: the published setting always, for all others are compared with it."""
        number, progress = trial.config["number"], result[PROGRESS]
        behind = self._falls_behind(number, progress, result[VALUE])
        return TrialScheduler.STOP if behind and number != 0 and progress < self._length else TrialScheduler.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Takes in the end of a trial: the median is that of the complete ones."""
        if result.get("finished"):
            self._complete(trial.config["number"], result[VALUE])

    def _falls_behind(self, number: int, progress: float, value: float) -> bool:
        """Takes in a result; a trial that was interrupted repeats what was judged before, and is not judged again."""
        while len(self._trials) <= number:
            self._trials.append(self._judged.ask())
        step = math.floor(progress)
        if (number, step) in self._seen:
            return False
        self._seen.add((number, step))
        self._trials[number].report(value, step)
        return self._trials[number].should_prune()

    def _complete(self, number: int, value: float) -> None:
        if number < len(self._trials):
            self._judged.tell(self._trials[number], value)


def make_scheduler(definition: SearchDefinition, past: Iterable[TrialResult] = ()) -> TrialScheduler:
    """Returns the scheduler, which has seen what trials of earlier sessions reported then."""
    if definition.scheduler.name == "none" or definition.length <= definition.grace:
        return FIFOScheduler()
    return EarlyStopping(definition, past)


def make_pruner(definition: SearchDefinition) -> optuna.pruners.BasePruner:
    """Returns Optuna's pruner of the scheduler's name."""
    settings, grace = definition.scheduler, definition.grace
    factor = settings.reduction_factor
    if settings.name == "median":
        return optuna.pruners.MedianPruner(n_warmup_steps=grace)
    if settings.name == "asha":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=grace, reduction_factor=factor)
    # Optuna has as many brackets as powers of the factor lie between both resources; a half more keeps off rounding
    most = grace * factor ** (settings.brackets - 1) * 3 // 2
    return optuna.pruners.HyperbandPruner(min_resource=grace, max_resource=most, reduction_factor=factor)
