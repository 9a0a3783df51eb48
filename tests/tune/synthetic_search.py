"""Searches that never ran: trials whose value hangs on one parameter."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from harma_ray.recipes import recipe_config
from harma_ray.settings import build_config
from harma_ray.tune.report.scale import position
from harma_ray.tune.results import SearchResults, TrialResult
from harma_ray.tune.space.definition import SearchDefinition, Target
from harma_ray.tune.space.parameters import Choices, Range

RATE = Range(name="optim.learning_rate", kind="float", log=True, low=1e-5, high=1e-2)
MARGIN = Range(name="losses.margin", kind="float", low=0.0, high=1.0)
KIND = Choices(name="model.kind", choices=("plain", True, 2.5, 1, "a very long choice of thirty letters"))
RANK = Range(name="model.rank", kind="int", log=True, low=2, high=64)
CONFIG = build_config(recipe_config("harma-scenes"), {"train.epochs": 10, "data.path": "data/scenes"})
SEARCH = SearchDefinition(config=CONFIG, parameters=(RATE, MARGIN, KIND))
R_MEAN, SIZE = Target(metric="r_mean"), Target(metric="trainable_parameters", direction="minimize")


def make_trial(number, state="complete", value=30.0, params=None, epochs=4.0, **changes):
    curve = () if value is None else tuple((float(e + 1), value * (1 - 0.5 ** (e + 1))) for e in range(int(epochs)))
    trial = TrialResult(
        number, state, params or {}, curve, None if value is None else (value,), epochs, seconds=90.0,
        reason="the loss is not finite" if state == "failed" else None, folder=Path(f"trials/{number}"),
    )  # fmt: skip
    return replace(trial, **changes)


def draw_point(random, parameters):
    point = {}
    for parameter in parameters:
        if isinstance(parameter, Choices):
            point[parameter.name] = parameter.choices[random.integers(len(parameter.choices))]
        elif parameter.log:
            point[parameter.name] = float(np.exp(random.uniform(np.log(parameter.low), np.log(parameter.high))))
        else:
            point[parameter.name] = float(random.uniform(parameter.low, parameter.high))
    return point


def make_trials(count, parameters=(RATE, MARGIN, KIND), seed=0):
    """Trials whose value hangs on the first parameter alone; every third one is stopped."""
    random = np.random.default_rng(seed)
    points = [draw_point(random, parameters) for _ in range(count)]
    values = [40 - 30 * (position(parameters[0], point[parameters[0].name]) - 0.5) ** 2 for point in points]
    return tuple(
        make_trial(number, "stopped" if number % 3 == 2 else "complete", value, point, 2.0 if number % 3 == 2 else 10.0)
        for number, (point, value) in enumerate(zip(points, values, strict=True))
    )


def make_results(trials, *, search=SEARCH, **changes):
    """What a search found; `changes` are of its definition or of what it found."""
    own = {name: changes.pop(name) for name in ("parameters", "objectives", "sampler", "scheduler") if name in changes}
    results = SearchResults(Path("runs/find"), replace(search, **own), tuple(trials))
    return replace(results, **changes)


def with_sizes(trials):
    return tuple(replace(t, values=(t.values[0], 1e6 + 1000.0 * t.number)) if t.values else t for t in trials)
