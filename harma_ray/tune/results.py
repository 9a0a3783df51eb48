"""What a search has found so far, read from its folder; plain values, for tables, figures and the report."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from harma_ray.evaluation import Metrics
from harma_ray.recipes import make_task
from harma_ray.shell import launch_command
from harma_ray.tune.space.definition import SearchDefinition, Target

State = Literal["complete", "stopped", "failed", "running"]
"""A trial ran to its end; the scheduler stopped it; it failed; it runs, or the search was interrupted meanwhile."""
ENDED = ("complete", "stopped")
"""States of the trials that count."""


@dataclass(frozen=True)
class TrialResult:
    """One trial."""

    number: int
    """0 is the setting that the others are compared with, see `SearchDefinition.first_name`."""
    state: State
    params: Mapping[str, Any]
    """Searched parameters that this trial has (conditional ones may be missing), by dotted name."""
    curve: tuple[tuple[float, float], ...]
    """(epoch or step, first objective on val) of every evaluation of the trial's first seed, in order; may be empty."""
    values: tuple[float, ...] | None
    """One value an objective: the best over the evaluations so far, the mean over the seeds; None before the first."""
    trained: float
    """Epochs or steps trained, over all its seeds, see `SearchDefinition.unit`."""
    seconds: float
    """Time spent in training steps, over all seeds."""
    reason: str | None
    """Why it failed, in one line."""
    folder: Path
    """Its run folder (of the first seed)."""

    @property
    def value(self) -> float:
        """The first objective of a trial that has been evaluated."""
        assert self.values
        return self.values[0]


@dataclass(frozen=True)
class Confirmation:
    """A setting trained anew with seeds that the search had not seen."""

    title: str
    """Such as ``trial 17 (best)`` or ``trial 0 (default)``."""
    number: int
    """The trial whose setting it is."""
    metrics: Mapping[str, tuple[float, ...]]
    """Values by split and metric, such as ``test r_mean``: one a seed."""


@dataclass(frozen=True)
class SearchResults:
    """A search."""

    folder: Path
    """The search's folder; its last part is its name."""
    definition: SearchDefinition
    """What is searched."""
    trials: tuple[TrialResult, ...]
    """In the order of their numbers."""
    front: tuple[int, ...] = ()
    """Numbers of the trials that no other one beats in all objectives (complete ones); empty with one objective."""
    baseline: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the model before any training, on the split that the best epoch is picked on; empty before the end."""
    final: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """The best trial's metrics by split after the end: the split it was picked on, and test; empty before that."""
    beside: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What they are read beside, by the other names in `harma_ray.evaluation.FIGURES`, by split."""
    confirmations: tuple[Confirmation, ...] = ()
    """The best trial and the published setting with several fresh seeds; empty if not asked for."""
    seconds: float = 0
    """Time spent, over all sessions."""

    @property
    def objective(self) -> Target:
        """The first objective, which decides."""
        return self.definition.objectives[0]

    @property
    def metrics(self) -> Metrics:
        """What the recipe measures."""
        return make_task(self.definition.config).metrics

    @cached_property
    def measured(self) -> list[TrialResult]:
        """The trials that count, complete or stopped and evaluated, in the order of their numbers."""
        return [trial for trial in self.trials if trial.state in ENDED and trial.values]

    @cached_property
    def best_trial(self) -> TrialResult | None:
        """The trial with the best first objective among the complete ones, or, without any, the stopped ones."""
        complete = [trial for trial in self.measured if trial.state == "complete"]
        return max(complete or self.measured, key=lambda trial: self.objective.merit(trial.value), default=None)

    @property
    def best(self) -> int | None:
        """Number of the best trial; None before there is one."""
        return None if self.best_trial is None else self.best_trial.number

    @property
    def published(self) -> TrialResult | None:
        """The trial of the published setting, if it has begun."""
        return next((trial for trial in self.trials if trial.number == 0), None)

    @property
    def counts(self) -> str:
        """How many trials there are of each state, in words."""
        counts = Counter(trial.state for trial in self.trials)
        return ", ".join(f"{counts[state]} {state}" for state in get_args(State) if counts[state])

    @property
    def resume_command(self) -> str:
        """What goes on with the search, as it is typed."""
        return launch_command("tune", "--resume", self.folder)

    @property
    def final_title(self) -> str:
        """Whose the final metrics are."""
        seeds = self.definition.seeds
        return f"trial {self.best}" + (f" (the first of {seeds} seeds)" if seeds > 1 else "")

    @property
    def ended_training(self) -> tuple[float, int]:
        """Epochs or steps of complete and stopped trials, and how many they would be if nothing had stopped them."""
        ended = [trial for trial in self.trials if trial.state in ENDED]
        return sum(trial.trained for trial in ended), len(ended) * self.definition.trial_length
