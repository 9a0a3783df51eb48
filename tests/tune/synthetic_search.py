"""Searches that never ran: trials whose value hangs on one parameter."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from harma_ray.tune.report.scale import position
from harma_ray.tune.results import Axis, SearchResults, TrialResult
from harma_ray.tune.space.definition import Target

RATE = Axis("optim.learning_rate", log=True, choices=None, low=1e-5, high=1e-2)
MARGIN = Axis("losses.margin", log=False, choices=None, low=0.0, high=1.0)
KIND = Axis("model.kind", log=False, choices=("plain", True, None, 1, "a very long choice of thirty letters"))
RANK = Axis("model.rank", log=True, choices=None, low=2, high=64)
R_MEAN, SIZE = Target(metric="r_mean"), Target(metric="trainable_parameters", direction="minimize")


def make_trial(number, state="complete", value=30.0, params=None, epochs=4.0, **changes):
    curve = () if value is None else tuple((float(e + 1), value * (1 - 0.5 ** (e + 1))) for e in range(int(epochs)))
    trial = TrialResult(
        number, state, params or {}, curve, None if value is None else (value,), epochs, planned_epochs=10,
        seconds=90.0, reason="the loss is not finite" if state == "failed" else None, folder=Path(f"trials/{number}"),
    )  # fmt: skip
    return replace(trial, **changes)


def draw_point(random, axes):
    point = {}
    for axis in axes:
        if axis.choices is not None:
            point[axis.name] = axis.choices[random.integers(len(axis.choices))]
        elif axis.log:
            point[axis.name] = float(np.exp(random.uniform(np.log(axis.low), np.log(axis.high))))
        else:
            point[axis.name] = float(random.uniform(axis.low, axis.high))
    return point


def make_trials(count, axes=(RATE, MARGIN, KIND), seed=0):
    """Trials whose value hangs on the first parameter alone; every third one is stopped."""
    random = np.random.default_rng(seed)
    points = [draw_point(random, axes) for _ in range(count)]
    values = [40 - 30 * (position(axes[0], point[axes[0].name]) - 0.5) ** 2 for point in points]
    return tuple(
        make_trial(number, "stopped" if number % 3 == 2 else "complete", value, point, 2.0 if number % 3 == 2 else 10.0)
        for number, (point, value) in enumerate(zip(points, values, strict=True))
    )


def make_results(trials, **changes):
    counted = [trial for trial in trials if trial.state in ("complete", "stopped") and trial.values]
    best = max(counted, key=lambda trial: trial.values[0]).number if counted else None
    results = SearchResults(
        Path("runs/find"), "harma-scenes", "data/scenes", (RATE, MARGIN, KIND), (R_MEAN,), "tpe-multivariate",
        "asha (grace 1 epoch, reduction 3)", tuple(trials), best, (), {}, {}, (),
    )  # fmt: skip
    return replace(results, **changes)


def with_sizes(trials):
    return tuple(replace(t, values=(t.values[0], 1e6 + 1000.0 * t.number)) if t.values else t for t in trials)
