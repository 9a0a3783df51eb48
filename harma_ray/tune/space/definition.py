"""What a search is: its parameters, how values are proposed and trials stopped, and what they are judged by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from harma_ray.config import RunConfig
from harma_ray.evaluation import merit, show_figure
from harma_ray.recipes import PUBLISHED, recipe_config
from harma_ray.settings import build_config, config_hash, flat_settings, to_dict
from harma_ray.tune.space.parameters import Choices, Parameter, Range, parents_first
from harma_ray.tune.space.urls import require_lasting

if TYPE_CHECKING:
    import optuna

__all__ = ["Choices", "Limits", "Parameter", "Range", "Sampler", "Scheduler", "SearchDefinition", "Target"]

COSTS = ("trainable_parameters", "seconds")
"""What a trial costs; an objective as well, but a second one."""
ORIGIN = "a setting of the space"
"""Names in errors where refused settings come from."""
MAX_COUNTED = 100_000
"""Settings of a space that are counted; above, its size is unknown."""

_FROM_FILE = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How values are proposed."""

    __pydantic_config__ = _FROM_FILE

    name: Literal["tpe", "tpe-multivariate", "random", "grid", "cmaes"] = "tpe-multivariate"
    """Optuna's sampler; tpe-multivariate is TPE that looks at all parameters together."""
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**32)] = 0
    """Seed of the proposals."""
    startup_trials: Annotated[int, Field(strict=True, ge=0)] = 10
    """Random trials before the sampler learns from earlier ones."""


@dataclass(frozen=True, kw_only=True)
class Scheduler:
    """How trials that fall behind are stopped."""

    __pydantic_config__ = _FROM_FILE

    name: Literal["asha", "hyperband", "median", "none"] = "asha"
    """Successive halving, several of them with other grace, the median of complete trials, or nothing."""
    grace_epochs: Annotated[int, Field(strict=True, ge=1)] = 1
    """Epochs that every trial is granted, where epochs are counted (see `SearchDefinition.unit`)."""
    grace_steps: Annotated[int, Field(strict=True, ge=0)] = 0
    """Steps that every trial is granted, where steps are counted; 0 = up to the first evaluation."""
    reduction_factor: Annotated[int, Field(strict=True, ge=2)] = 2
    """One trial in this many goes on at each decision."""
    brackets: Annotated[int, Field(strict=True, ge=1)] = 3
    """Halvings of hyperband, each granting `reduction_factor` times the grace of the one before."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is searched for."""

    __pydantic_config__ = _FROM_FILE

    metric: str
    """Metric of the val split, or ``trainable_parameters``, or ``seconds``."""
    direction: Literal["maximize", "minimize"] = "maximize"
    """Which way is better."""

    @property
    def maximize(self) -> bool:
        """Whether more is better."""
        return self.direction == "maximize"

    def merit(self, value: float) -> float:
        """Returns what is higher the better a value is; NaN is the worst."""
        return merit(value, maximize=self.maximize)

    def show(self, value: float, *, sign: bool = False) -> str:
        """Returns a value, or a difference with its sign, as text."""
        text = f"{value:,.0f}" if self.metric in COSTS else show_figure(value, percent=self.maximize)
        return f"+{text}" if sign and value >= 0 else text


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When the search ends: at the first limit that is reached; 0 = no limit."""

    __pydantic_config__ = _FROM_FILE

    trials: Annotated[int, Field(strict=True, ge=1)] = 0
    """Trials."""
    hours: Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)] = 0.0
    """Time."""
    epochs: Annotated[int, Field(strict=True, ge=1)] = 0
    """Epochs of all trials together, where epochs are counted (see `SearchDefinition.unit`)."""
    steps: Annotated[int, Field(strict=True, ge=1)] = 0
    """Steps of all trials together, where steps are counted."""


@dataclass(frozen=True, kw_only=True)
class SearchDefinition:
    """A search; `harma_ray.tune.space.file.load_search` makes one whose parts fit together."""

    config: RunConfig
    """The published settings: the recipe's, with what the file and the command line change for all trials."""
    parameters: tuple[Parameter, ...]
    """What is searched, in the order of the file."""
    enqueued: tuple[dict[str, Any], ...] = ()
    """Settings to try after the published one; what they leave out is published."""
    sampler: Sampler = field(default_factory=Sampler)
    """How values are proposed."""
    scheduler: Scheduler = field(default_factory=Scheduler)
    """How trials that fall behind are stopped."""
    objectives: tuple[Target, ...] = (Target(metric="r_mean"),)
    """One or two; the first decides about stopping."""
    limits: Limits = field(default_factory=Limits)
    """When the search ends."""
    seeds: Annotated[int, Field(strict=True, ge=1)] = 1
    """Trainings of each setting, with different seeds; its value is their mean."""
    concurrent: Annotated[int, Field(strict=True, ge=0)] = 0
    """Trials at a time; 0 = as many as the cluster holds."""
    storage: Annotated[str | None, BeforeValidator(require_lasting)] = None
    """URL of a shared Optuna database."""
    study: Annotated[str | None, Field(strict=True)] = None
    """Name of the search's study in it, which a new search is given; None = that of its folder."""

    @property
    def unit(self) -> Literal["epoch", "step"]:
        """What trainings are counted in, wherever trials are compared, stopped, limited and told of."""
        return "step" if self.config.train.steps else "epoch"

    @property
    def length(self) -> int:
        """Epochs or steps of a training that nothing stops."""
        return self.config.train.steps or self.config.train.epochs

    @property
    def trial_length(self) -> int:
        """Epochs or steps of a trial that nothing stops, over all its seeds."""
        return self.length * self.seeds

    @property
    def grace(self) -> int:
        """Epochs or steps that every trial is granted."""
        if self.unit == "epoch":
            return self.scheduler.grace_epochs
        return self.scheduler.grace_steps or self.config.train.eval_every_steps

    @property
    def budget(self) -> int:
        """Epochs or steps of all trials together at which the search ends; 0 = no limit."""
        return self.limits.epochs if self.unit == "epoch" else self.limits.steps

    @property
    def published(self) -> dict[str, Any]:
        """The searched parameters' values in `config`, of those that exist there."""
        return self.complete({})

    @property
    def first_name(self) -> str:
        """What trial 0's setting is called: ``published`` if a paper trained a model so, else ``default``."""
        recipe = self.config.recipe
        as_published = recipe in PUBLISHED and config_hash(self.config) == config_hash(recipe_config(recipe))
        return "published" if as_published else "default"

    @property
    def first_points(self) -> list[dict[str, Any]]:
        """What is tried first: the published setting, the enqueued ones, and for the grid sampler the whole grid."""
        points = [self.published, *map(self.complete, self.enqueued)]
        if self.sampler.name == "grid":
            points += self.grid()
        return list({frozenset(point.items()): point for point in points}.values())

    @cached_property
    def size(self) -> int | None:
        """Number of different settings; None if there is no end of them, or more than `MAX_COUNTED`."""
        of_grid = self.sampler.name == "grid"
        if not of_grid and not all(parameter.is_finite for parameter in self.parameters):
            return None
        counted = sum(1 for _ in islice(self.combinations(of_grid=of_grid), MAX_COUNTED + 1))
        return counted if counted <= MAX_COUNTED else None

    def grid(self) -> list[dict[str, Any]]:
        """Returns every combination of values, in a fixed order.

        Raises:
            UserError: If a range has neither `step` nor `points`.
        """
        return list(self.combinations(of_grid=True))

    def combinations(self, *, of_grid: bool) -> Iterator[dict[str, Any]]:
        """Yields every combination of all values, or of the grid sampler's."""

        def extend(point: dict[str, Any], rest: Sequence[Parameter]) -> Iterator[dict[str, Any]]:
            if not rest:
                yield point
            elif rest[0].is_active(point):
                for value in rest[0].values(of_grid=of_grid):
                    yield from extend({**point, rest[0].name: value}, rest[1:])
            else:
                yield from extend(point, rest[1:])

        return extend({}, self._ordered)

    def suggest(self, trial: optuna.trial.Trial) -> dict[str, Any]:
        """Returns the trial's values of the parameters that exist in it, by dotted name."""
        point: dict[str, Any] = {}
        for parameter in self._ordered:
            if parameter.is_active(point):
                point[parameter.name] = parameter.suggest(trial)
        return point

    def read(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a trial's values in the parameters' own form, as `suggest` gives them, of what Optuna keeps."""
        return {p.name: p.find(raw[p.name]) for p in self.parameters if p.name in raw}

    def settings(self, params: Mapping[str, Any]) -> RunConfig:
        """Returns `config` with searched values.

        Raises:
            UserError: If they do not fit.
        """
        return build_config(self.config, params, origin=ORIGIN)

    def complete(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a point that has these values where their parameters exist, and else the published ones."""
        point: dict[str, Any] = {}
        for parameter in self._ordered:
            if parameter.is_active(point):
                value = parameter.find(values.get(parameter.name, self.configured[parameter.name]))
                point[parameter.name] = parameter.ends[0] if value is None else value
        return point

    @cached_property
    def configured(self) -> dict[str, Any]:
        """All settings of `config` by dotted name."""
        return flat_settings(to_dict(self.config))

    @cached_property
    def _ordered(self) -> list[Parameter]:
        return parents_first(self.parameters)
