"""Retrieval of images by images, where those of the query's class are right: Top-k, mAP, chance, intervals, confusion.

Shapes: Q queries, G gallery images, E embedding width, K cut-offs, C queries of one chunk, N classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from harma_ray.errors import UserError, first_few
from harma_ray.retrieval.classes import Classes
from harma_ray.retrieval.groups import Groups
from harma_ray.retrieval.image_text import chance_recall_at, percentile_intervals, recall_at, resampled_sums
from harma_ray.retrieval.ranking import Search, score_chunks, top_k

TOP_KS = (1, 3, 5)


@dataclass(frozen=True)
class ClassFigures:
    """What was found for the queries of one class."""

    name: str
    num_queries: int
    metrics: dict[str, float]
    """As `ByClassResult.metrics`."""
    taken_for: tuple[tuple[str, int], ...]
    """Other classes that the first neighbour was of and how often, the most frequent first."""


@dataclass(frozen=True)
class ByClassResult:
    """How the gallery was ranked for each query; all on the CPU.

    Attributes:
        classes: of queries and gallery.
        ranks: int64 [Q], 0-based, of the first image of the query's class.
        precisions: float64 [Q], average precision over the whole gallery; None if only its first images are known.
        nearest: int64 [Q], class of the first neighbour, of equally near ones a wrong one; -1: an index found none.
        num_right: int64 [Q], gallery images of the query's class.
        num_items: int64 [Q], gallery images that it is ranked among.
        ks: cut-offs of Top-k.
    """

    classes: Classes
    ranks: Tensor
    precisions: Tensor | None
    nearest: Tensor
    num_right: Tensor
    num_items: Tensor
    ks: tuple[int, ...] = TOP_KS

    METRICS: ClassVar[tuple[str, ...]] = (*(f"top_{k}" for k in TOP_KS), "map")
    """Names of `metrics`, in their order, with the usual cut-offs."""
    LABELS: ClassVar[dict[str, str]] = {
        **{f"top_{k}": f"an image of the class among the first {k}" for k in TOP_KS},
        "map": "mean average precision by class",
    }
    """What they stand for."""

    @property
    def metrics(self) -> dict[str, float]:
        """`top_k` for each cut-off and, where the whole ranking is known, `map`; means over the queries, in percent."""
        return self._metrics_of(torch.arange(len(self.ranks)))

    def _metrics_of(self, queries: Tensor) -> dict[str, float]:
        found = {f"top_{k}": value for k, value in recall_at(self.ranks[queries], self.ks).items()}
        return found if self.precisions is None else {**found, "map": 100 * float(self.precisions[queries].mean())}

    def intervals(self, num_samples: int = 1000, seed: int = 0) -> dict[str, tuple[float, float]]:
        """95 % percentile bootstrap interval of each metric: the spread over sets of queries of the same size."""
        return percentile_intervals(self.resampled(num_samples, seed))

    def resampled(self, num_samples: int = 1000, seed: int = 0) -> dict[str, np.ndarray]:
        """Returns the metrics of bootstrap samples, each float64 [num_samples].

        The gallery is not resampled: ranks stay as they are. The spread over training seeds is not in it.

        Args:
            num_samples: bootstrap samples.
            seed: of the resampling; the same seed draws the same queries, whatever the model.
        """
        columns = [(self.ranks < k).double() for k in self.ks]
        columns += [] if self.precisions is None else [self.precisions]
        sums = resampled_sums(torch.stack(columns, dim=1).numpy(), num_samples, np.random.default_rng(seed))
        return dict(zip(self.metrics, 100.0 * sums.T / len(self.ranks), strict=True))

    def chance(self) -> dict[str, float]:
        """Returns the metrics that rankings drawn at random are expected to have, in percent."""
        expected = dict.fromkeys(self.metrics, 0.0)
        for size in self.num_items.unique().tolist():
            right = self.num_right[self.num_items == size]
            found = {f"top_{k}": value for k, value in chance_recall_at(right, size, self.ks).items()}
            found["map"] = 100 * float(expected_precision(right, size).mean())
            expected = {name: value + found[name] * len(right) for name, value in expected.items()}
        return {name: value / len(self.ranks) for name, value in expected.items()}

    def confusion(self) -> Tensor:
        """Returns how many queries of each class (rows) had a first neighbour of each class: int64 [N, N]."""
        count, found = len(self.classes.names), self.nearest >= 0
        pairs = self.classes.queries[found] * count + self.nearest[found]
        return torch.bincount(pairs, minlength=count**2).reshape(count, count)

    def by_class(self) -> list[ClassFigures]:
        """Returns the figures of each class that has queries: the worst first, by the first cut-off, then the mean."""
        found, names = [], self.classes.names
        for number, counts in enumerate(self.confusion().tolist()):
            own = (self.classes.queries == number).nonzero()[:, 0]
            if len(own):
                wrong = [(names[other], n) for other, n in enumerate(counts) if n and other != number]
                taken_for = tuple(sorted(wrong, key=lambda pair: -pair[1]))
                found.append(ClassFigures(names[number], len(own), self._metrics_of(own), taken_for))
        return sorted(found, key=lambda row: (row.metrics[f"top_{self.ks[0]}"], sum(row.metrics.values())))


def expected_precision(num_right: Tensor, size: int) -> Tensor:
    """Average precision that a ranking of G items drawn at random is expected to have, for r right ones.

    The item at place i is right with probability r / G, and each of the i - 1 before it, if it is, with (r-1) / (G-1):
    E[AP] = (1/r) sum_i (r/G) (1 + (i-1) (r-1) / (G-1)) / i = (H_G + (G - H_G) (r-1) / (G-1)) / G, H_G the sum of 1/i.

    Args:
        num_right: r of each query, int64 [Q], at least 1.
        size: G.

    Returns:
        float64 [Q].
    """
    harmonic = float((1 / torch.arange(1, size + 1, dtype=torch.float64)).sum())
    others = (num_right.double() - 1) / max(1, size - 1)
    return (harmonic + (size - harmonic) * others) / size


def rank_by_class(
    queries: Tensor,
    gallery: Tensor,
    classes: Classes,
    *,
    excluded: Groups | None = None,
    ks: Sequence[int] = TOP_KS,
) -> ByClassResult:
    """Ranks the whole gallery for each query by inner product, a part of the queries at a time.

    Scores and ties are those of `harma_ray.retrieval.ranking`: a wrong image that scores as high as a right one stands
    before it, so that figures depend neither on the order of the gallery nor on how it is cut.

    Args:
        queries: [Q, E]; normalise for cosine similarity.
        gallery: [G, E].
        classes: Theirs.
        excluded: Images taken out of a query's ranking: those that are the query itself, see
                `harma_ray.retrieval.classes.same_images`.
        ks: Cut-offs of Top-k.

    Raises:
        UserError: A cut-off beyond the gallery, a query without a right image, embeddings that are not finite, shapes
            that do not fit.
    """
    num_right, num_items = _checked_sizes(queries, gallery, classes, excluded, ks)
    ranks, precisions = torch.empty(len(queries), dtype=torch.int64), torch.empty(len(queries), dtype=torch.float64)
    nearest = torch.empty_like(ranks)
    gallery_classes = classes.gallery
    for start, stop, chunk in score_chunks(queries, gallery, excluded, None):
        scores, own = chunk.cpu(), classes.queries[start:stop]
        right = (gallery_classes == own[:, None]) & (scores > -torch.inf)
        ranks[start:stop], precisions[start:stop] = _order(scores, right)
        is_wrong_and_first = (scores == scores.max(dim=1).values[:, None]) & ~right
        query, item = is_wrong_and_first.nonzero(as_tuple=True)
        first = torch.full_like(own, len(classes.names)).scatter_reduce_(0, query, gallery_classes[item], "amin")
        nearest[start:stop] = torch.where(ranks[start:stop] == 0, own, first)
    return ByClassResult(classes, ranks, precisions, nearest, num_right, num_items, tuple(ks))


def _order(scores: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Returns place of the first right item, int64 [C], and average precision, float64 [C]; both [C, G] are given."""
    # A sort of integers without their places is several times as fast: the score's bits, made to increase with the
    # score (negative floats order backwards; adding 0 removes minus zero), and below them whether the item is right.
    bits = (scores + 0.0).view(torch.int32)
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long().mul_(-2).add_(right)
    query, place = np.nonzero(np.sort(keys.numpy(), axis=1) & 1)
    counts = np.bincount(query, minlength=len(scores))
    first = np.cumsum(counts) - counts
    precision = (np.arange(len(query)) - first[query] + 1) / (place + 1)
    mean = np.bincount(query, precision, minlength=len(scores)) / counts
    return torch.from_numpy(place[first]), torch.from_numpy(mean)


def judge_neighbours(
    scores: Tensor,
    items: Tensor,
    classes: Classes,
    *,
    excluded: Groups | None = None,
    ks: Sequence[int] = TOP_KS,
) -> ByClassResult:
    """Returns the Top-k of what an index found, whose scores may be approximate; there is no mAP of it.

    Of neighbours that score the same the wrong ones come first, as in `rank_by_class`, as far as the index found them.

    Args:
        scores: float32 [Q, n], highest first.
        items: int64 [Q, n], gallery positions; -1 where an index found fewer.
        classes: Of queries and gallery.
        excluded: What was taken out of a query's neighbours.
        ks: Cut-offs, at most n.

    Raises:
        UserError: As `rank_by_class`.
    """
    num_right, num_items = _checked_sizes(scores, classes.gallery, classes, excluded, ks)
    found, own = classes.gallery[items.clamp(min=0)], classes.queries[:, None]
    right, wrong = (found == own) & (items >= 0), (found != own) & (items >= 0)
    best = scores.masked_fill(~right, -torch.inf).max(dim=1).values
    ranks = (wrong & (scores >= best[:, None])).sum(dim=1)
    ranks = torch.where(right.any(dim=1), ranks, len(classes.gallery))
    first = torch.where(wrong & (scores == scores[:, :1]), found, len(classes.names)).min(dim=1).values
    nearest = torch.where(ranks == 0, classes.queries, torch.where(first == len(classes.names), -1, first))
    return ByClassResult(classes, ranks, None, nearest, num_right, num_items, tuple(ks))


def _checked_sizes(
    queries: Tensor, gallery: Tensor, classes: Classes, excluded: Groups | None, ks: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Returns `Classes.sizes` of a retrieval that can be measured; raises UserError if it cannot."""
    wanted = (len(classes.queries), len(classes.gallery))
    if (len(queries), len(gallery)) != wanted:
        raise UserError(f"classes are of {wanted} queries and gallery images, vectors of {len(queries), len(gallery)}")
    num_right, num_items = classes.sizes(excluded)
    smallest = int(num_items.min())
    if not ks or not 1 <= min(ks) <= max(ks) <= smallest:
        raise UserError(f"Top-k needs 1 <= k <= {smallest}, the images that a query may find, got {list(ks)}")
    without = [str(query) for query in (num_right == 0).nonzero()[:, 0].tolist()]
    if without:
        raise UserError(
            "every query needs an image of its class in the gallery, other than itself, but "
            f"{len(without)} of {len(num_right)} have none (rows {first_few(without)}); leave them out"
        )
    return num_right, num_items


@dataclass(frozen=True)
class ByClassRetrieval:
    """Embeddings of queries and of a gallery, and how the queries rank it."""

    queries: Tensor
    """fp32[Q, E], L2-normalised."""
    gallery: Tensor
    """fp32[G, E], L2-normalised."""
    excluded: Groups | None
    """Gallery images that are the query itself."""
    result: ByClassResult
    """Ranks, from which metrics, intervals and chance follow."""
    rows: Tensor
    """int64[Q], where the queries stand among all images that they were chosen of."""
    search: Search = top_k
    """How their neighbours are found."""

    def neighbours(self, chosen: Sequence[int], k: int) -> tuple[Tensor, Tensor]:
        """Returns scores, float32, and gallery positions, int64, of the k first images of some queries, the best first.

        Positions are -1 where an approximate index found fewer.

        Raises:
            UserError: If a query may find fewer.
        """
        rows = torch.tensor(list(chosen), dtype=torch.int64)
        excluded = self.excluded.chosen(rows) if self.excluded is not None else None
        return self.search(self.queries[rows], self.gallery, k, excluded=excluded)
