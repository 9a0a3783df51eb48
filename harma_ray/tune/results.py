"""What a search has found so far, read from its folder; plain values, for tables, figures and the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from harma_ray.shell import launch_command
from harma_ray.tune.space.definition import Target

State = Literal["complete", "stopped", "failed", "running"]
"""A trial ran all its epochs; the scheduler stopped it; it failed; it runs, or the search was interrupted meanwhile."""


@dataclass(frozen=True)
class Axis:
    """A searched parameter."""

    name: str
    """Dotted name of the setting, such as ``optim.learning_rate``."""
    log: bool
    """Whether it is searched on a logarithmic scale."""
    choices: tuple[Any, ...] | None
    """The values of a categorical parameter (str, bool, int, float or None), in their order; None for numbers."""
    low: float | None = None
    """Lower end of a number's range."""
    high: float | None = None
    """Upper end of a number's range."""


@dataclass(frozen=True)
class TrialResult:
    """One trial."""

    number: int
    """0 is the published setting."""
    state: State
    params: Mapping[str, Any]
    """Searched parameters that this trial has (conditional ones may be missing), by dotted name."""
    curve: tuple[tuple[float, float], ...]
    """(epoch, first objective on val) of every evaluation of the trial's first seed, in order; may be empty."""
    values: tuple[float, ...] | None
    """One value an objective: the best over the epochs so far, the mean over the seeds; None before the first."""
    epochs: float
    """Epochs trained, over all its seeds."""
    planned_epochs: int
    """Epochs that it would have trained if nothing had stopped it, over all its seeds."""
    seconds: float
    """Time spent in training steps, over all seeds."""
    reason: str | None
    """Why it failed, in one line."""
    folder: Path
    """Its run folder (of the first seed)."""


@dataclass(frozen=True)
class Confirmation:
    """A setting trained anew with seeds that the search had not seen."""

    title: str
    """Such as ``trial 17 (best)`` or ``trial 0 (published)``."""
    number: int
    """The trial whose setting it is."""
    metrics: Mapping[str, tuple[float, ...]]
    """Values by split and metric, such as ``test r_mean``: one a seed."""


@dataclass(frozen=True)
class SearchResults:
    """A search."""

    folder: Path
    """The search's folder; its last part is its name."""
    recipe: str
    data: str
    """Folder of the data set."""
    axes: tuple[Axis, ...]
    """The searched parameters, in the order of the file."""
    objectives: tuple[Target, ...]
    """One or two; the first decides about stopping."""
    sampler: str
    """Such as ``tpe-multivariate``."""
    scheduler: str
    """Such as ``asha (grace 1 epoch, reduction 3)``."""
    trials: tuple[TrialResult, ...]
    """In the order of their numbers."""
    best: int | None
    """Number of the best trial by the first objective among those complete or stopped; None before there is one."""
    front: tuple[int, ...]
    """Numbers of the trials that no other one beats in all objectives (complete ones); empty with one objective."""
    untrained: Mapping[str, float]
    """Metrics of the model before any training, on the split that the best epoch is picked on; empty before the end."""
    final: Mapping[str, Mapping[str, float]]
    """The best trial's metrics by split after the end: the split it was picked on, and test; empty before that."""
    confirmations: tuple[Confirmation, ...]
    """The best trial and the published setting with several fresh seeds; empty if not asked for."""
    seeds: int = 1
    """Trainings of each trial."""
    seconds: float = 0
    """Time spent, over all sessions."""

    @property
    def resume_command(self) -> str:
        """What goes on with the search, as it is typed."""
        return launch_command("tune", "--resume", self.folder)

    @property
    def final_title(self) -> str:
        """Whose the final metrics are."""
        return f"trial {self.best}" + (f" (the first of {self.seeds} seeds)" if self.seeds > 1 else "")

    @property
    def best_trial(self) -> TrialResult | None:
        """The best trial, if there is one."""
        return next((trial for trial in self.trials if trial.number == self.best), None)

    @property
    def ended_epochs(self) -> tuple[float, int]:
        """Epochs that complete and stopped trials trained, and would have trained if nothing had stopped them."""
        ended = [trial for trial in self.trials if trial.state in ("complete", "stopped")]
        return sum(trial.epochs for trial in ended), sum(trial.planned_epochs for trial in ended)
