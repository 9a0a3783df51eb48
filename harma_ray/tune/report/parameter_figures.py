"""Figures of a search over its parameters: importance, parallel coordinates, slices; None where there is too little.

matplotlib is imported where it is used, and without pyplot, so that nothing stays behind in the process.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from harma_ray.report.figures import new_figure, to_png
from harma_ray.tune.report import drawing
from harma_ray.tune.report.scale import place_of, short_names, ticks
from harma_ray.tune.results import SearchResults, TrialResult
from harma_ray.tune.space.parameters import Choices, Parameter, Range

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure

_UNUSED = -0.2
"""Where on an axis from 0 to 1 the trials lie that lack the parameter."""
_UNUSED_LABEL = "unused"
_WORST_SHARE = 0.1
"""Share of the trials, the worst, that share the palest colour: a few that came to nothing would take most of it."""
_MAX_COLUMNS = 4
_ROOM = 34
"""Characters that fit under a panel."""


def draw_importance(shares: Mapping[str, float] | None) -> bytes | None:
    """Draws the shares that `importance` returns as bars; fewer than two parameters have nothing to compare."""
    if shares is None or len(shares) < 2:
        return None
    figure = new_figure(7.6, 0.9 + 0.3 * len(shares))
    axes = figure.add_subplot()
    shorts = short_names(list(shares))
    percent = [100 * share for share in shares.values()]
    bars = axes.barh(range(len(shares)), percent, color=drawing.COMPLETE, height=0.68)
    axes.bar_label(bars, fmt="%.0f", padding=4, fontsize=8, color=drawing.INK)
    axes.set_yticks(range(len(shares)), [drawing.plain(shorts[name], 40) for name in shares])
    axes.invert_yaxis()
    drawing.dress(axes, "share of the explained variance (%)", "")
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.08)
    return to_png(figure)


def draw_parallel(results: SearchResults) -> bytes | None:
    """Draws every trial as a line over the searched parameters, darker the better; the best ones lie on top."""
    first, searched = results.objective, results.definition.parameters
    trials = sorted(results.measured, key=lambda trial: (first.merit(trial.value), -trial.number))
    values = [trial.value for trial in trials]
    if not searched or len(set(values)) < 2:
        return None
    import matplotlib
    from matplotlib.colors import Normalize

    objective = Range(name="", kind="float", low=min(values), high=max(values))
    low, high = sorted((values[int(_WORST_SHARE * len(values))], values[-1]))
    norm = Normalize(low, high, clip=True)
    colours = matplotlib.colormaps["viridis_r" if first.maximize else "viridis"]
    figure = new_figure(min(drawing.WIDTH, 4 + 1.6 * len(searched)), 4.6)
    axes = figure.add_subplot()
    num_best = max(1, min(5, len(trials) // 5))
    for rank, (trial, value) in enumerate(zip(trials, values, strict=True)):
        is_best = rank >= len(trials) - num_best
        places = [place_of(parameter, trial) for parameter in searched]
        line = [*(_UNUSED if place is None else place for place in places), (value - min(values)) / np.ptp(values)]
        axes.plot(line, color=colours(norm(value)), linewidth=2.4 if is_best else 0.9, zorder=3 if is_best else 2,
                  alpha=1.0 if is_best else drawing.strength(len(trials)), solid_joinstyle="round")  # fmt: skip
    for index, parameter in enumerate(searched):
        _draw_axis(axes, index, _marks(parameter, trials, 14))
    _draw_axis(axes, len(searched), ticks(objective), side="right")
    shorts = short_names([parameter.name for parameter in searched])
    titles = [*map(drawing.wrap, shorts.values()), drawing.wrap(drawing.label(first), " ")]
    axes.set_xticks(range(len(titles)), titles, fontsize=8.5)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set(yticks=[], xlim=(-0.06 * len(titles), 1.04 * len(titles) - 1))
    axes.spines[:].set_visible(False)
    extend = "neither" if low == min(values) and high == max(values) else "min" if first.maximize else "max"
    _draw_colours(figure, axes, norm, colours, drawing.label(first), extend=extend)
    return to_png(figure)


def draw_slices(results: SearchResults) -> bytes | None:
    """Draws the value of every trial against each searched parameter, later trials darker."""
    trials, searched = results.measured, results.definition.parameters
    if len(trials) < 2 or not searched:
        return None
    import matplotlib
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.ticker import MaxNLocator

    num_rows = math.ceil(len(searched) / _MAX_COLUMNS)
    num_columns = math.ceil(len(searched) / num_rows)
    figure = new_figure(min(drawing.WIDTH, 1.2 + 3.8 * num_columns), 0.4 + 2.6 * num_rows)
    grid = figure.subplots(num_rows, num_columns, sharey=True, squeeze=False)
    colours = ListedColormap(matplotlib.colormaps["Blues"](np.linspace(0.25, 1, 256)))
    norm = Normalize(0, max(1, trials[-1].number))
    shorts = short_names([parameter.name for parameter in searched])
    values, numbers = [trial.value for trial in trials], [trial.number for trial in trials]
    for parameter, axes in zip(searched, grid.flat, strict=False):
        places = [_spread(parameter, trial) for trial in trials]
        dots = {"s": 20, "linewidths": 0.4, "edgecolors": "white", "zorder": 3}
        axes.scatter(places, values, c=numbers, cmap=colours, norm=norm, **dots)
        for place, value, number in zip(places, values, numbers, strict=True):
            if number == results.best:
                axes.scatter(place, value, s=120, marker="*", c=drawing.BEST, zorder=4, linewidths=0, label="best")
            if number == 0:
                ring = {"facecolors": "none", "edgecolors": drawing.PUBLISHED, "linewidths": 1.3}
                axes.scatter(place, value, s=80, zorder=5, label=results.definition.first_name, **ring)
        room = _ROOM // (len(parameter.choices) + 1) if isinstance(parameter, Choices) else _ROOM
        marks = _marks(parameter, trials, max(10, room))
        axes.set_xticks([place for place, _ in marks], [text for _, text in marks])
        axes.set_xlim(min(0.0, marks[0][0]) - 0.07, 1.07)
        axes.margins(y=0.1)
        y_label = drawing.label(results.objective) if axes in grid[:, 0] else ""
        drawing.dress(axes, drawing.plain(shorts[parameter.name], _ROOM), y_label)
        if sum(len(text) + 1 for _, text in marks) > _ROOM:
            axes.tick_params(axis="x", labelrotation=30)
    for axes in grid.flat[len(searched) :]:
        axes.set_visible(False)
    _draw_colours(figure, grid, norm, colours, "trial", ticks=MaxNLocator(8, integer=True))
    handles, names = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper left", ncols=2, fontsize=8, frameon=False)
    return to_png(figure)


def _marks(parameter: Parameter, trials: list[TrialResult], room: int) -> list[tuple[float, str]]:
    """Returns the marks of a parameter, and one for trials that lack it if there are any."""
    places, texts = zip(*ticks(parameter), strict=True)
    marks = list(zip(places, drawing.shorten(texts, room), strict=True))
    lacking = any(parameter.name not in trial.params for trial in trials)
    return [(_UNUSED, _UNUSED_LABEL), *marks] if lacking else marks


def _draw_axis(axes: Axes, index: int, marks: list[tuple[float, str]], side: str = "left") -> None:
    """Draws a vertical axis of parallel coordinates with its marks on one side."""
    offset, align = ((5, 0), "left") if side == "right" else ((-5, 0), "right")
    axes.vlines(index, 0, 1, color=drawing.INK, linewidth=1, zorder=4)
    for place, text in marks:
        axes.plot(index, place, "_", color=drawing.INK, markersize=7, zorder=4)
        drawing.note(axes, text, (index, place), offset, ha=align, va="center", fontsize=7.5)


def _draw_colours(figure: Figure, axes: Any, norm: Normalize, colours: Colormap, title: str, **style: Any) -> None:
    from matplotlib.cm import ScalarMappable

    bar = figure.colorbar(ScalarMappable(norm, colours), ax=axes, fraction=0.02, pad=0.01, aspect=35, **style)
    bar.set_label(title, fontsize=9)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    bar.ax.tick_params(labelsize=8)


def _spread(parameter: Parameter, trial: TrialResult) -> float:
    """Returns where a trial lies, moved a little aside where many share the place."""
    place = place_of(parameter, trial)
    golden = 0.618034 * trial.number % 1 - 0.5  # spreads evenly, however many there are
    if place is None:
        return _UNUSED + 0.05 * golden
    return place + 0.4 * golden / len(parameter.choices) if isinstance(parameter, Choices) else place
