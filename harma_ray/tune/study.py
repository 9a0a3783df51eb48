"""The trials of a search in an Optuna study: the one record of what was proposed and what came of it.

Everything that a search needs to go on after an interruption is in the study and in the folders of its trials. A trial
that is marked as running when a search starts is one that was interrupted, and goes on first.
"""

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from harma_ray.errors import UserError
from harma_ray.runs import Run
from harma_ray.settings import build_config, config_hash
from harma_ray.tune.results import State
from harma_ray.tune.space.definition import SearchDefinition
from harma_ray.tune.storage import open_study

TRIALS_FOLDER = "trials"
RESULT, REASON, DUPLICATE, POINT = "result", "reason", "duplicate_of", "first_point"
"""Names of what is kept with a trial: its last result, why it failed, which earlier trial it repeats, its place among
the settings that are tried first."""
FIRST_FAILURES, MANY_FAILURES = 3, 10
"""So many trials that fail one after another end a search: before any has worked, and later."""
STATES: dict[State, TrialState] = {
    "complete": TrialState.COMPLETE,
    "stopped": TrialState.PRUNED,
    "failed": TrialState.FAIL,
    "running": TrialState.RUNNING,
}
"""What Optuna calls the states of trials."""
SECONDS = "seconds"
"""Name of what is kept with the study: the time spent, over all sessions."""
DATA = "data"
"""Name of what is kept with the study: the content of its data sets, see `harma_ray.data.identity.data_identity`."""
_IDENTITY = "identity"
_MOST_DUPLICATES = 30


@dataclass(frozen=True)
class Assignment:
    """A trial that is to be run."""

    number: int
    params: dict[str, Any]
    """The searched settings, by dotted name."""
    runs: tuple[Run, ...]
    """A training for each seed."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a trial has reached so far."""

    progress: float
    """Epochs or steps of the first seed's training, see `harma_ray.tune.space.definition.SearchDefinition.unit`."""
    value: float
    """The first objective: the best over the evaluations so far, the mean over the seeds so far."""
    values: tuple[float, ...] = ()
    """All objectives."""
    trained: float = 0
    """Epochs or steps trained, over all seeds."""
    seconds: float = 0
    """Time spent."""
    finished: bool = False
    """Whether the trainings of all seeds are done."""
    failed: str | None = None
    """Why it failed, in one line."""


@dataclass(frozen=True)
class Event:
    """Something happened to a trial."""

    number: int
    state: str
    """``running``, ``complete``, ``stopped`` or ``failed``."""
    params: dict[str, Any]
    report: Report | None
    """What it has reached; None: nothing yet."""
    reason: str | None = None
    """Why it failed."""


@dataclass
class _Open:
    trial: optuna.trial.Trial
    reported: set[int] = field(default_factory=set)
    trained: float = 0


class SearchStudy:
    """Proposes settings, records results."""

    def __init__(self, folder: Path, definition: SearchDefinition, failures: Sequence[str] = ()):
        """Opens the study of a search's folder, or of the definition's storage, or makes it.

        Args:
            folder: The search's folder.
            definition: The search.
            failures: Of this session so far, see `failures`.

        Raises:
            UserError: If the storage cannot be reached.
        """
        self.folder, self.definition = folder, definition
        self.listener: Callable[[Event], None] = lambda event: None
        self._started = time.monotonic()
        self._first = definition.first_points
        self.study = open_study(folder, definition)
        self._check_identity()
        done = [trial for trial in self.study.get_trials(deepcopy=False) if DUPLICATE not in trial.user_attrs]
        # Optuna has no public way to go on with a trial of another process
        self._unfinished = [optuna.trial.Trial(self.study, t._trial_id) for t in done if t.state == TrialState.RUNNING]
        self._counted = {trial.number for trial in done if trial.state != TrialState.WAITING}
        self._trained = {trial.number: _result(trial).get("trained", 0) for trial in done}
        self._earlier_seconds = float(self.study.user_attrs.get(SECONDS, 0))
        self._seen: dict[tuple, int] = {}
        for trial in done:
            self._seen.setdefault(_key(definition.read(trial.params)), trial.number)
        self._open: dict[int, _Open] = {}
        self.failures = list(failures)
        """Why trials failed in this session, since the last one that did not."""
        self._anything_worked = any(_result(trial).get("values") for trial in done)

    def _check_identity(self) -> None:
        found = identity(self.definition)
        if self.study.user_attrs.get(_IDENTITY, found) != found:
            raise UserError(
                f"the search of {self.folder} began with another space, objective, seeds or fixed settings; its trials "
                "cannot be compared with new ones: start a new search"
            )
        self.study.set_user_attr(_IDENTITY, found)

    def next(self) -> Assignment | None:
        """Returns the next trial: an interrupted one, one of those that are tried first, or what the sampler proposes.

        None: the limit is reached, or there is nothing left to try.
        """
        attempt = 0
        while not self.is_over() and self.failure_reason() is None:
            trial = self._unfinished.pop(0) if self._unfinished else self._propose(attempt)
            if trial is None:
                return None
            params = self.definition.suggest(trial)
            earlier = self._seen.setdefault(_key(params), trial.number)
            if earlier != trial.number:
                trial.set_user_attr(DUPLICATE, earlier)
                self.study.tell(trial, state=TrialState.FAIL)
                self._counted.discard(trial.number)
                attempt += 1
                continue
            self._counted.add(trial.number)
            assignment = self._assign(trial, params)
            if assignment is not None:
                return assignment
            attempt = 0
        return None

    def _propose(self, attempt: int) -> optuna.trial.Trial | None:
        """Asks for a new trial, after so many that repeated earlier ones; None: there is nothing left to try."""
        limit = self.definition.limits.trials
        if attempt > _MOST_DUPLICATES or (limit and len(self._counted) >= limit) or not self._enqueue(attempt):
            return None
        return self.study.ask()

    def report(self, number: int, report: Report) -> None:
        """Records what a running trial has reached."""
        self._record(number, report)
        self.listener(Event(number, "running", self._open[number].trial.params, report))

    def _record(self, number: int, report: Report) -> None:
        running = self._open[number]
        running.trained = report.trained
        self._anything_worked = True
        if report.trained < self._trained.get(number, 0):
            return  # an earlier session has recorded it
        self._trained[number] = report.trained
        running.trial.set_user_attr(RESULT, {
            "values": list(report.values), "trained": report.trained, "seconds": round(report.seconds, 3),
        })  # fmt: skip
        self.save_time()
        step = math.floor(report.progress)
        if len(self.definition.objectives) == 1 and step not in running.reported:
            running.trial.report(report.value, step=step)  # once a step: Optuna warns of a second value
            running.reported.add(step)

    def close_open(self, reason: str) -> None:
        """Gives up the trials that are running."""
        for number in list(self._open):
            self.close(number, None, crashed=reason)

    def close(self, number: int, report: Report | None, *, crashed: str | None = None) -> None:
        """Records that a trial has ended: completed, stopped, or failed.

        Args:
            number: Which.
            report: Its last report, if there was one.
            crashed: Why its process is gone, if it is.
        """
        if report is not None and report.values:
            self._record(number, report)
        running = self._open.pop(number)
        trial = running.trial
        self.save_time()
        reason = crashed or (report.failed if report else "it ended without a result")
        if reason:
            trial.set_user_attr(REASON, reason)
        values = list(report.values) if report is not None and report.finished and not reason else None
        state = "failed" if reason else "stopped" if values is None else "complete"
        self.failures = [*self.failures, reason] if reason else []
        self.study.tell(trial, values, STATES[state])
        self.listener(Event(number, state, trial.params, report, reason))

    def save_time(self) -> None:
        """Keeps the time spent so far for later sessions."""
        self.study.set_user_attr(SECONDS, self.seconds)

    @property
    def trained(self) -> float:
        """Epochs or steps trained so far, over all trials."""
        return sum(self._trained.values())

    @property
    def seconds(self) -> float:
        """Time spent so far, over all sessions."""
        return self._earlier_seconds + time.monotonic() - self._started

    def is_over(self) -> bool:
        """Whether the limit of epochs, of steps or of hours is reached, all sessions together.

        A trial that has trained to its end is given the moment that it needs to end.
        """
        definition, whole = self.definition, self.definition.trial_length
        if any(running.trained >= whole for running in self._open.values()):
            return False
        late = bool(definition.limits.hours and self.seconds >= 3600 * definition.limits.hours)
        return late or bool(definition.budget and self.trained >= definition.budget)

    def failure_reason(self) -> str | None:
        """Returns the last failure's reason if, in this session, trial after trial fails; None if not.

        A few are enough as long as no trial has ever had a result; later many settings in a row may be bad.
        """
        most = MANY_FAILURES if self._anything_worked else FIRST_FAILURES
        return self.failures[-1] if len(self.failures) >= most else None

    def _enqueue(self, attempt: int) -> bool:
        """Prepares what `ask` will give; returns False if there is nothing left.

        That is the next of the settings that come first, else what the sampler proposes, or, after it has given nothing
        new several times, one of those that are left.
        """
        definition = self.definition
        known = self.study.get_trials(deepcopy=False)
        if any(trial.state == TrialState.WAITING for trial in known):
            return True
        tried = sum(POINT in trial.user_attrs for trial in known)
        if tried < len(self._first):
            self.study.enqueue_trial(self._first[tried], user_attrs={POINT: tried})
            return True
        if definition.sampler.name == "grid":
            return False
        if definition.size is None:
            return attempt < _MOST_DUPLICATES
        left = [point for point in definition.grid() if _key(point) not in self._seen]
        if left and attempt >= _MOST_DUPLICATES // 2:
            self.study.enqueue_trial(left[np.random.default_rng(len(known)).integers(len(left))])
        return bool(left)

    def _assign(self, trial: optuna.trial.Trial, params: dict[str, Any]) -> Assignment | None:
        """Makes a trial ready to run; None if its settings do not fit together, which counts as its failure."""
        running = _Open(trial, set(self.study.get_trials(deepcopy=False)[trial.number].intermediate_values))
        self._open[trial.number] = running
        try:
            config = self.definition.settings(params)
        except UserError as error:
            self.close(trial.number, None, crashed=str(error))
            return None
        self.listener(Event(trial.number, "running", params, None))
        return Assignment(trial.number, params, tuple(
            Run(trial_folder(self.folder, trial.number, seed), build_config(config, {"seed": config.seed + seed}))
            for seed in range(self.definition.seeds)
        ))  # fmt: skip


def identity(definition: SearchDefinition) -> str:
    """Returns a hash of what makes trials comparable: all but how they are chosen, stopped and limited."""
    described = [config_hash(definition.config), definition.parameters, definition.objectives, definition.seeds]
    return hashlib.sha256(repr(described).encode()).hexdigest()


def trial_folder(folder: Path, number: int, seed: int = 0) -> Path:
    """Returns the run folder of a trial; `seed` counts its trainings."""
    return folder / TRIALS_FOLDER / (f"{number:05d}" + (f"-seed{seed}" if seed else ""))


def _result(trial: FrozenTrial) -> Mapping[str, Any]:
    return trial.user_attrs.get(RESULT, {})


def _key(params: Mapping[str, Any]) -> tuple:
    """Returns what is equal for equal settings, whether a number was written as 1 or as 1.0."""
    plain = {name: value if isinstance(value, bool) or value is None else str(value) for name, value in params.items()}
    numbers = {name: float(value) for name, value in params.items() if type(value) in (int, float)}
    return tuple(sorted((name, repr(value)) for name, value in {**plain, **numbers}.items()))
