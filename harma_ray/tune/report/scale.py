"""Where the values of a searched parameter lie between the ends of its range, and which trials count."""

import math
from collections.abc import Sequence
from typing import Any

from harma_ray.tune.results import TrialResult
from harma_ray.tune.space.parameters import Choices, Parameter, same

_MARGIN = 0.02
_GAP = 0.16
"""Marks inside a range keep this distance from those at its ends."""
_MAX_POWERS = 5


def position(parameter: Parameter, value: Any) -> float:
    """Returns where a value lies, from 0 to 1: by its logarithm, by itself, or evenly spaced choices."""
    if isinstance(parameter, Choices):
        index = next(i for i, choice in enumerate(parameter.choices) if same(choice, value))
        return (index + 0.5) / len(parameter.choices)
    if parameter.high <= parameter.low:
        return 0.5
    low, high, here = (math.log(x) if parameter.log else x for x in (parameter.low, parameter.high, value))
    return min(1.0, max(0.0, (here - low) / (high - low)))


def place_of(parameter: Parameter, trial: TrialResult) -> float | None:
    """Returns where a trial lies on a parameter; None if it lacks the parameter."""
    return position(parameter, trial.params[parameter.name]) if parameter.name in trial.params else None


def end_of_range(parameter: Parameter, value: Any) -> str | None:
    """Tells at which end of its range a number lies, ``lower`` or ``upper``; None if at neither, or of a choice."""
    if isinstance(parameter, Choices) or parameter.low == parameter.high:
        return None
    place = position(parameter, value)
    return "lower" if place <= _MARGIN else "upper" if place >= 1 - _MARGIN else None


def ticks(parameter: Parameter) -> list[tuple[float, str]]:
    """Returns positions and labels of the values worth a mark: every choice; the ends and round numbers between."""
    if isinstance(parameter, Choices):
        return [(position(parameter, choice), show(choice)) for choice in parameter.choices]
    low, high = parameter.low, parameter.high
    if high <= low:
        return [(0.5, show(low))]
    steps = [step for step in (_powers(low, high) if parameter.log else _steps(low, high)) if low < step < high]
    places = {step: position(parameter, step) for step in steps}
    inner = [(place, show(step)) for step, place in places.items() if _GAP <= place <= 1 - _GAP]
    return [(0.0, show(low)), *inner, (1.0, show(high))]


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Returns for each dotted name its last parts, as few as tell it from the others."""
    shorts = {}
    for name in names:
        parts = name.split(".")
        tails = [".".join(parts[-count:]) for count in range(1, len(parts))]
        others = [f".{other}" for other in names if other != name]
        clear = (tail for tail in tails if not any(other.endswith(f".{tail}") for other in others))
        shorts[name] = next(clear, name)
    return shorts


def show(value: Any) -> str:
    """Returns a value of a parameter as text; numbers with four digits."""
    if not isinstance(value, float):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}"
    mantissa, power = f"{value:.3e}".split("e")
    return f"{float(mantissa):g}e{int(power)}"


def _steps(low: float, high: float) -> list[float]:
    """Returns a few round numbers, evenly spaced; integers between integers."""
    from matplotlib.ticker import MaxNLocator

    integer = isinstance(low, int) and isinstance(high, int)
    # the product of an integer and a step misses the round number by the last bit
    locator = MaxNLocator(4, steps=[1, 2, 5, 10], integer=integer)
    return [float(f"{step:.10g}") for step in locator.tick_values(low, high)]


def _powers(low: float, high: float) -> list[float]:
    """Returns a few round numbers for a logarithmic scale: powers of ten, with 2 and 5 times them on a short one."""
    decades = math.log10(high / low)
    if decades < 0.7:
        return _steps(low, high)
    digits = (1, 2, 5) if decades < 2 else (1,)
    stride = max(1, math.ceil(decades / _MAX_POWERS))
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [float(f"{digit}e{power}") for power in powers if power % stride == 0 for digit in digits]
