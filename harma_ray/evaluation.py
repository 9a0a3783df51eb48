"""What an evaluation found, as a value: its figures, how sure they are, and how it shows itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self, TypeVar

if TYPE_CHECKING:  # metrics are read without torch
    import numpy as np
    from PIL import Image
    from torch import Tensor

    from harma_ray.data.splits import Split

ItemT = TypeVar("ItemT")
FIGURES = ("metrics", "interval_95", "chance", "ceiling")
"""Keys of `Evaluation.figures`."""


def show_figure(value: float, decimals: int = 2, *, percent: bool) -> str:
    """Returns a percentage with so many decimals, anything else (a loss) with four significant digits."""
    return f"{value:.{decimals}f}" if percent else f"{value:.4g}"


def merit(value: float, *, maximize: bool) -> float:
    """Returns what is higher the better a value is; NaN is the worst."""
    return -math.inf if math.isnan(value) else value if maximize else -value


@dataclass(frozen=True)
class Metrics:
    """The figures of a task's evaluations on which choices rest, and which way is better."""

    names: Sequence[str]
    """Those that a search may have as objectives."""
    objective: str
    """The one that selects the best epoch."""
    also_keep: Sequence[str] = ()
    """Those whose best checkpoints are kept too."""
    lower_is_better: Sequence[str] = ()
    """Those that are losses, without a unit; all others are percentages, and more is better."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """What names stand for, for tables, such as ``image to text R@1``."""

    @property
    def kept(self) -> tuple[str, ...]:
        """The metrics whose best checkpoints are kept."""
        return (self.objective, *self.also_keep)

    def label(self, metric: str) -> str:
        """Returns what a metric stands for, of a duplicate-aware variant too; empty if nobody said."""
        base = self.labels.get(metric.removesuffix("_text"), "")
        return f"{base}, equal captions" if base and metric not in self.labels else base

    def title(self, metric: str) -> str:
        """Returns a metric's name with its unit."""
        return metric if metric in self.lower_is_better else f"{metric} (%)"

    def show(self, metric: str, value: float, decimals: int = 2) -> str:
        """Returns a value of a metric as text."""
        return show_figure(value, decimals, percent=metric not in self.lower_is_better)

    def merit(self, metric: str, value: float) -> float:
        """Returns `merit` of a value of a metric."""
        return merit(value, maximize=metric not in self.lower_is_better)

    def is_better(self, metric: str, value: float, other: float) -> bool:
        """Tells whether a value of a metric is better than another."""
        return self.merit(metric, value) > self.merit(metric, other)

    def ranked(
        self, metric: str, items: Iterable[ItemT], figures_of: Callable[[ItemT], Mapping[str, float]]
    ) -> list[ItemT]:
        """Returns items by what their figures have under a metric, the best first, equal ones in their order."""
        return sorted(items, key=lambda item: self.merit(metric, figures_of(item)[metric]), reverse=True)


@dataclass(frozen=True)
class Section:
    """A part of a page about an evaluation."""

    name: str
    """Short name, for links."""
    title: str
    html: str
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    """PNG files that go beside the page, by name."""


@dataclass(frozen=True)
class Projection:
    """Points for TensorBoard's projector."""

    vectors: Tensor
    """fp32[N, E]."""
    labels: list[str]
    """N texts."""
    thumbnails: Tensor | None
    """fp32[N, 3, S, S] in [0, 1]."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found, on worker 0; the others get its metrics alone."""

    metrics: dict[str, float]
    """Metric names and values, such as ``r_mean`` in percent; worker 0's are taken on all."""
    query: str = ""
    """How queries were made, where a task knows several ways, such as ``sum``; see `others`."""
    note: str = ""
    """The same in words."""
    others: Mapping[str, Self] = field(default_factory=dict)
    """What the other ways find with the same model, by name: baselines."""

    @property
    def by_query(self) -> dict[str, Self]:
        """Returns this evaluation and the others by their queries' names; nothing if there is one way alone."""
        return {self.query: self, **self.others} if self.query else {}

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Returns 95 % bootstrap intervals of metrics."""
        return {}

    def resampled(self) -> Mapping[str, np.ndarray]:
        """Returns metrics of bootstrap samples of the queries, float64 [S]: other models' are of the same queries."""
        return {}

    def first_right(self) -> Mapping[str, Tensor]:
        """Returns the 0-based rank of the first right answer to each query, int64[Q], by kind of query."""
        return {}

    def show_queries(self, split: Split, kind: str, queries: Sequence[int], most: int) -> str:
        """Returns HTML of some queries of a kind of `first_right` with what was found for them, as on a page.

        Args:
            split: What was evaluated.
            kind: Which kind of queries.
            queries: Their numbers; of those that are alike the first is shown.
            most: How many are shown.

        Raises:
            UserError: If an image cannot be read.
        """
        return ""

    def chance(self) -> dict[str, float]:
        """Returns what metrics are expected to be for rankings drawn at random."""
        return {}

    def ceiling(self) -> dict[str, float]:
        """Returns what metrics are expected to be where no mistake is made, if that is not 100."""
        return {}

    def figures(self) -> dict[str, dict[str, Any]]:
        """Returns the metrics with what they are read beside, as JSON holds them, by the names in `FIGURES`."""
        intervals = {name: list(bounds) for name, bounds in self.intervals().items()}
        return dict(zip(FIGURES, (self.metrics, intervals, self.chance(), self.ceiling()), strict=True))

    def picture(self, split: Split) -> Image.Image | None:
        """Draws some results, or nothing.

        Args:
            split: What was evaluated.
        """
        return None

    def projection(self, split: Split) -> Projection | None:
        """Returns points for TensorBoard's projector, or nothing."""
        return None

    def sections(self, split: Split) -> list[Section]:
        """Returns what a page shows beside the table of metrics."""
        return []


@dataclass(frozen=True, kw_only=True)
class PublishedFigures:
    """What a paper says that a recipe reaches: quoted, not measured here."""

    data: str
    """Name of the data set."""
    split: str
    """Split that they were measured on."""
    num_texts: int
    """Captions, or queries, of this split, by which it is recognised."""
    figures: Mapping[str, float]
    """By metric, in percent."""
    source: str
    """Where they stand."""
