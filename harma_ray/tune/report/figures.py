"""Figures of a search over its trials: history, learning curves, two objectives; None where there is too little.

matplotlib is imported where it is used, and without pyplot, so that nothing stays behind in the process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from harma_ray.report.figures import new_figure, to_png
from harma_ray.tune.report import drawing
from harma_ray.tune.results import SearchResults, TrialResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FILLED = {"linewidths": 0}
_HOLLOW = {"facecolors": "white", "edgecolors": drawing.STOPPED, "linewidths": 1.0}
_LINES: dict[str, dict[str, Any]] = {
    "stopped": {"color": drawing.STOPPED, "marker": "o", "markerfacecolor": "white", "markersize": 4},
    "complete": {"color": drawing.COMPLETE, "marker": "o", "markersize": 3.5},
    "failed": {"color": drawing.FAILED, "marker": "x", "markersize": 6},
    "running": {"color": drawing.COMPLETE, "linestyle": ":"},
}


def draw_history(results: SearchResults) -> bytes | None:
    """Draws the value of every trial, the best so far, and the first setting's value."""
    trials = results.measured
    if not trials:
        return None
    figure = new_figure(drawing.WIDTH, 3.8)
    axes = figure.add_subplot()
    last = results.trials[-1].number
    better = np.maximum if results.objective.maximize else np.minimum
    ranked = [trial for trial in trials if trial.state == "complete"] or trials  # as the best trial is chosen
    best_so_far = better.accumulate([trial.value for trial in ranked])
    steps = [*(trial.number for trial in ranked), last], [*best_so_far, best_so_far[-1]]
    axes.step(*steps, where="post", color=drawing.BEST, linewidth=1.3, label="best so far")
    for state, style in (("complete", {"s": 30, "c": drawing.COMPLETE, **_FILLED}), ("stopped", {"s": 16, **_HOLLOW})):
        points = [(trial.number, trial.value) for trial in trials if trial.state == state]
        if points:
            axes.scatter(*zip(*points, strict=True), zorder=3, label=state, **style)
    failed = [trial.number for trial in results.trials if trial.state == "failed"]
    if failed:
        axes.plot(failed, [0.0] * len(failed), "x", color=drawing.FAILED, markersize=6, clip_on=False, label="failed",
                  transform=axes.get_xaxis_transform(), zorder=4)  # fmt: skip
    for trial in trials:
        value, shown = trial.value, results.objective.show(trial.value)
        if trial.number == results.best:
            axes.scatter(trial.number, value, s=130, marker="*", c=drawing.BEST, zorder=5, linewidths=0)
            side = "right" if trial.number > 0.75 * last > 0 else "left"
            text = f"{_name(trial, results)}: {shown}"
            drawing.note(axes, text, (trial.number, value), (0, 8), ha=side, va="bottom")
        elif trial.number == 0:
            axes.axhline(value, color=drawing.PUBLISHED, linewidth=1, linestyle=(0, (5, 3)), zorder=1)
            text, edge = f"trial 0\n({results.definition.first_name})\n{shown}", axes.get_yaxis_transform()
            drawing.note(axes, text, (1, value), (5, 0), ha="left", va="center", xycoords=edge)
    axes.margins(x=0.02, y=0.12)
    drawing.dress(axes, "trial", drawing.label(results.objective), whole=True)
    figure.legend(loc="outside upper right", ncols=4, fontsize=8, frameon=False)
    return to_png(figure)


def draw_curves(results: SearchResults) -> bytes | None:
    """Draws how every trial learned, with a mark where it ended; the first and the best one stand out."""
    trials = [trial for trial in results.trials if trial.curve]
    if not trials:
        return None
    figure = new_figure(drawing.WIDTH, 4.2)
    axes = figure.add_subplot()
    special, titled = (0, results.best), set()
    for trial in sorted(trials, key=lambda trial: (trial.number in special, list(_LINES).index(trial.state))):
        style = {**_LINES[trial.state], "linewidth": 1.0, "alpha": drawing.strength(len(trials))}
        title = None if trial.state in titled else trial.state
        if trial.number in special:
            colour = drawing.BEST if trial.number == results.best else drawing.PUBLISHED
            style = {"color": colour, "linewidth": 2.2, "marker": "o", "markersize": 4.5, "zorder": 4}
            title = _name(trial, results)
        else:
            titled.add(trial.state)
        axes.plot(*zip(*trial.curve, strict=True), label=title, markevery=[len(trial.curve) - 1], **style)
    drawing.dress(axes, results.definition.unit, drawing.label(results.objective), whole=True)
    axes.margins(x=0.02)
    figure.legend(loc="outside upper right", ncols=6, fontsize=8, frameon=False)
    return to_png(figure)


def draw_pareto(results: SearchResults) -> bytes | None:
    """Draws the two objectives of every trial, and the front: the trials that no other one beats in both."""
    if len(results.definition.objectives) != 2 or not results.measured:
        return None
    first, second = results.definition.objectives
    trials = {trial.number: trial for trial in results.measured}
    points = {number: (trial.values[1], trial.values[0]) for number, trial in trials.items() if trial.values}
    front = [number for number in results.front if number in points]
    figure = new_figure(7.6, 4.8)
    axes = figure.add_subplot()
    if front:
        # between two trials of the front, only what the lesser one reaches has been shown to be possible
        corners = zip(*sorted(points[number] for number in front), strict=True)
        side = "pre" if second.maximize else "post"
        axes.step(*corners, color=drawing.BEST, linewidth=1.2, zorder=3, where=side)
    complete, stopped = (
        [number for number, trial in trials.items() if trial.state == state] for state in ("complete", "stopped")
    )
    ring = {"s": 110, "facecolors": "none", "edgecolors": drawing.PUBLISHED, "linewidths": 1.4, "zorder": 5}
    for title, numbers, style in (
        ("complete", sorted({*complete} - {*front}), {"s": 26, "c": drawing.STOPPED, **_FILLED}),
        ("stopped", stopped, {"s": 16, **_HOLLOW}),
        ("front", front, {"s": 42, "c": drawing.BEST, "zorder": 4, **_FILLED}),
        (results.definition.first_name, [0] if 0 in points else [], ring),
    ):
        if numbers:
            axes.scatter(*zip(*(points[number] for number in numbers), strict=True), label=title, **style)
    xs = [x for x, _ in points.values()]
    if min(xs) > 0 and max(xs) / min(xs) > 30:
        axes.set_xscale("log")
    elif max(xs) >= 10_000:
        from matplotlib.ticker import EngFormatter

        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    drawing.dress(axes, drawing.label(second), drawing.label(first))
    figure.legend(loc="outside upper right", ncols=4, fontsize=8, frameon=False)
    _number(axes, {number: points[number] for number in dict.fromkeys((*front, 0)) if number in points})
    return to_png(figure)


def _name(trial: TrialResult, results: SearchResults) -> str:
    first = results.definition.first_name
    kinds = [*([first] if trial.number == 0 else []), *(["best"] if trial.number == results.best else [])]
    return f"trial {trial.number} ({' and '.join(kinds)})"


def _number(axes: Axes, points: Mapping[int, tuple[float, float]]) -> None:
    """Writes numbers beside points, but for those that would lie on another number."""
    axes.figure.draw_without_rendering()  # pyright: ignore[reportAttributeAccessIssue]
    taken: list[np.ndarray] = []
    for number, point in points.items():
        place = axes.transData.transform(point)
        if all(np.any(np.abs(place - other) > (26, 15)) for other in taken):
            taken.append(place)
            drawing.note(axes, str(number), point, (6, -6), ha="left", va="top")
