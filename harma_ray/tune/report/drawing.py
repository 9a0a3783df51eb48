"""What the figures of a search share: colours, and text that is legible and cannot be taken for a formula."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from harma_ray.tune.space.definition import Target

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PUBLISHED, BEST, COMPLETE, STOPPED, FAILED = "#1b1e22", "#d1743a", "#3b6fb6", "#9aa2ac", "#b03a48"
INK, RULE = "#3a3f46", "#c9cdd2"
WIDTH = 11.5
"""Inches of a figure as wide as the page."""
_CUT = "\N{HORIZONTAL ELLIPSIS}"


def label(objective: Target) -> str:
    """Returns the title of an objective, with its unit."""
    known = {"trainable_parameters": "trainable parameters", "seconds": "seconds of training"}
    unit = " (%)" if objective.maximize else ""  # what is minimised is a loss
    return known.get(objective.metric, f"val {objective.metric}{unit}")


def strength(num_lines: int) -> float:
    """Returns how opaque each of so many lines may be for the others to show."""
    return min(1.0, max(0.15, 60 / max(1, num_lines)))


def note(axes: Axes, text: str, place: tuple[float, float], offset: tuple[float, float], **style: Any) -> None:
    """Writes text some points beside a place, legible on whatever lies under it."""
    from matplotlib.patheffects import withStroke

    axes.annotate(text, place, xytext=offset, textcoords="offset points", zorder=6, color=INK,
                  path_effects=[withStroke(linewidth=2.5, foreground="white")], **{"fontsize": 8, **style})  # fmt: skip


def dress(axes: Axes, x: str, y: str, *, whole: bool = False) -> None:
    """Sets labels and grid; `whole` keeps marks of the horizontal axis at whole numbers."""
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8, color=RULE)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(RULE)
    if whole:
        from matplotlib.ticker import MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))


def plain(text: str, room: int) -> str:
    """Returns text in at most so many characters that the font has, none of which starts a formula."""
    known = (c if c == _CUT or (c.isprintable() and c < "\u0100") else "?" for c in " ".join(text.split()))
    text = "".join(known)
    return (text if len(text) <= room else text[: room - 1] + _CUT).replace("$", r"\$")


def shorten(texts: Sequence[str], room: int) -> list[str]:
    """Returns texts in at most so many characters each, without their common beginning where one is too long."""
    is_long = len(texts) > 1 and max(map(len, texts)) > room
    columns = zip(*texts, strict=False) if is_long else ()
    shared = sum(1 for _ in takewhile(lambda letters: len(set(letters)) == 1, columns))
    return [plain(f"{_CUT}{text[shared:]}" if shared > 1 else text, room) for text in texts]


def wrap(text: str, separator: str = "_", room: int = 12) -> str:
    """Breaks a name behind its separators into lines of about so many characters."""
    lines = [""]
    for part in re.findall(rf"[^{separator}.]+[{separator}.]?|.", text):
        if lines[-1] and len(lines[-1]) + len(part) > room:
            lines.append("")
        lines[-1] += part
    return "\n".join(plain(line, 2 * room) for line in lines[:4])
