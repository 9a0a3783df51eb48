"""Parameters of a search: ranges and choices, some of which exist only beside certain values of others."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field, StrictBool

from harma_ray.errors import UserError

if TYPE_CHECKING:
    import optuna

_FROM_FILE = ConfigDict(extra="forbid")
_Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Keeps Optuna from telling of trials for the length of a block."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def same(first: Any, second: Any) -> bool:
    """Tells whether two values of a setting are the same; true is not 1."""
    return first == second and isinstance(first, bool) == isinstance(second, bool)


@dataclass(frozen=True, kw_only=True)
class _Searched:
    """What ranges and choices share."""

    name: str
    """Dotted name of the setting."""
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Values that other parameters must have for this one to exist; all of them must agree."""

    def is_active(self, point: Mapping[str, Any]) -> bool:
        """Tells whether the parameter exists beside these values of the ones it depends on."""
        return all(
            parent in point and any(same(point[parent], value) for value in values)
            for parent, values in self.when.items()
        )


@dataclass(frozen=True, kw_only=True)
class Range(_Searched):
    """Numbers from `low` to `high`, both included."""

    __pydantic_config__ = _FROM_FILE

    kind: Annotated[Literal["float", "int"], Field(alias="type")]
    """What the numbers are."""
    low: _Number
    """The smallest."""
    high: _Number
    """The largest."""
    step: _Number | None = None
    """Distance between neighbours; None = any number, or any integer."""
    log: StrictBool = False
    """Whether the search takes the number's logarithm."""
    points: Annotated[int, Field(strict=True, ge=2)] | None = None
    """Values that the grid sampler takes where there is no `step`, evenly spaced."""

    def __post_init__(self) -> None:
        """Refuses a range that cannot be searched; an integer range keeps its numbers as integers."""
        if self.kind == "int":
            for name in ("low", "high", "step"):
                value = getattr(self, name)
                if value is not None and value != int(value):
                    raise ValueError(f"`{name}` of a range of type int must be an integer, got {value}; use type float")
                object.__setattr__(self, name, None if value is None else int(value))
        if self.low > self.high:
            raise ValueError(f"`low` must not be above `high`, got {self.low} and {self.high}; swap them")
        if self.log and self.low <= 0:
            raise ValueError(f"`low` must be above 0 where `log` is true, got {self.low}; raise it or drop `log`")
        if self.step is None:
            return
        if self.log or self.points:
            other = "log" if self.log else "points"
            raise ValueError(f"`step` does not go with `{other}`, got both; drop one of them")
        if self.step <= 0:
            raise ValueError(f"`step` must be above 0, got {self.step}")
        if self.find(self.high) is None:
            last = self._at(int((self.high - self.low) / self.step))
            raise ValueError(
                f"`step` must lead from `low` to `high`, got {self.step} from {self.low} to {self.high}; "
                f"use high: {last}"
            )

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values that are the first not to fit."""
        return (self.low,) if self.low == self.high else (self.low, self.high)

    @property
    def is_finite(self) -> bool:
        """Whether the numbers can be counted."""
        return self._spacing is not None

    def __str__(self) -> str:
        """Returns what the range allows, in words."""
        steps = f" in steps of {self.step}" if self.step else ""
        return f"{self.low} to {self.high}{steps}"

    def find(self, value: Any) -> Any:
        """Returns the range's own form of a value; None if the range does not hold it."""
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not self.low <= value <= self.high:
            return None
        if self._spacing is None:
            return float(value)
        index = (value - self.low) / self._spacing
        return self._at(round(index)) if abs(index - round(index)) < 1e-8 else None

    def values(self, *, of_grid: bool = False) -> Iterator[Any]:
        """Yields all numbers in order, or those that the grid sampler tries.

        Raises:
            UserError: If there is no end of them.
        """
        if of_grid and self.points:
            spread = (self._between(index / (self.points - 1)) for index in range(self.points))
            return iter(dict.fromkeys(spread))  # close integers meet
        if self._spacing is None:
            raise UserError(f"a grid needs `step` or `points` for every range of type float, `{self.name}` has neither")
        return (self._at(index) for index in range(1 + round((self.high - self.low) / self._spacing)))

    def suggest(self, trial: optuna.trial.Trial) -> Any:
        """Returns the trial's value."""
        if self.kind == "int":
            step = int(self.step or 1)
            return trial.suggest_int(self.name, int(self.low), int(self.high), step=step, log=self.log)
        return self.find(trial.suggest_float(self.name, self.low, self.high, step=self.step, log=self.log))

    @property
    def _spacing(self) -> float | None:
        return 1 if self.kind == "int" and self.step is None else self.step

    def _at(self, index: int) -> Any:
        exact = Decimal(str(self.low)) + index * Decimal(str(self._spacing))  # 0.15, not 0.15000000000000002
        return int(exact) if self.kind == "int" else float(exact)

    def _between(self, share: float) -> Any:
        if share in (0, 1):
            return self.high if share else self.low
        if self.log:
            value = self.low * math.exp(share * math.log(self.high / self.low))
        else:
            value = self.low + share * (self.high - self.low)
        return round(value) if self.kind == "int" else float(f"{value:.6g}")


@dataclass(frozen=True, kw_only=True)
class Choices(_Searched):
    """A few values without an order."""

    __pydantic_config__ = _FROM_FILE

    choices: tuple[Any, ...]
    """The values: text, numbers, true or false."""

    def __post_init__(self) -> None:
        if not self.choices:
            raise ValueError("`choices` must hold at least one value, got none")
        for index, choice in enumerate(self.choices):
            if not isinstance(choice, (str, int, float, bool)):
                raise ValueError(f"`choices` must be text, numbers, true or false, got {choice!r}")
            if any(same(choice, earlier) for earlier in self.choices[:index]):
                raise ValueError(f"`choices` must name each value once, got {choice!r} twice")

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values that are the first not to fit: any of them."""
        return self.choices

    @property
    def is_finite(self) -> bool:
        """Whether the choices can be counted."""
        return True

    def __str__(self) -> str:
        """Returns the choices, in words."""
        return ", ".join(map(str, self.choices))

    def find(self, value: Any) -> Any:
        """Returns the choice that equals a value; None if there is none."""
        return next((choice for choice in self.choices if same(choice, value)), None)

    def values(self, *, of_grid: bool = False) -> Iterator[Any]:
        """Yields the choices, in order."""
        return iter(self.choices)

    def suggest(self, trial: optuna.trial.Trial) -> Any:
        """Returns the trial's value."""
        return trial.suggest_categorical(self.name, self.choices)


Parameter = Range | Choices


def parents_first(parameters: Sequence[Parameter]) -> list[Parameter]:
    """Returns parameters in their order, but after those they depend on; without those that depend in a circle."""
    ordered, waiting = [], list(parameters)
    while waiting:
        names = {parameter.name for parameter in waiting}
        free = next((parameter for parameter in waiting if names.isdisjoint(parameter.when)), None)
        if free is None:
            break
        ordered.append(free)
        waiting.remove(free)
    return ordered
