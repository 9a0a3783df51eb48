"""What the command line says about how a search is run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harma_ray.errors import UserError, count

if TYPE_CHECKING:
    from harma_ray.tune.space.definition import SearchDefinition


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """What the command line says about how a search is run; None = as its file says."""

    trials: int | None = None
    hours: float | None = None
    epochs: int | None = None
    steps: int | None = None
    concurrent: int | None = None
    confirm: int | None = None
    """Fresh seeds that the best setting and trial 0's are trained with at the end; None = they are not."""
    address: str | None = None
    dashboard: bool = True
    started: float = 0
    """When the command started (``time.perf_counter``)."""


def with_limits(definition: SearchDefinition, options: SearchOptions) -> SearchDefinition:
    """Returns a search with the limits that the command line gives.

    Raises:
        UserError: If they are in the other unit, or too small for one trial.
    """
    given = {name: getattr(options, name) for name in ("trials", "hours", "epochs", "steps")}
    given = {name: value for name, value in given.items() if value is not None}
    units, other = ("steps", "epochs") if definition.unit == "step" else ("epochs", "steps")
    if other in given:
        raise UserError(f"this search counts {units}, got `--{other}`; give `--{units}`")
    concurrent = definition.concurrent if options.concurrent is None else options.concurrent
    limits = dataclasses.replace(definition.limits, **given)
    definition = dataclasses.replace(definition, limits=limits, concurrent=concurrent)
    if 0 < definition.budget < definition.trial_length:
        least = count(definition.trial_length, definition.unit)
        raise UserError(f"`--{units}` must be enough for one trial, {least}, got {definition.budget}")
    return definition
