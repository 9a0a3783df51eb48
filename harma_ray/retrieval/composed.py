"""Recalls of composed retrieval, where a reference image and a caption ask for a target image; chance and intervals.

Two protocols (as in CLIP4Cir, Baldrati et al., CVPR 2022), told apart by whether each query comes with `members`, a
small subset of the gallery that holds its reference and its target:

* without members, FashionIQ's: a query is ranked in the gallery of its category, and its reference stays in there;
* with members, CIRR's: the reference is taken out, and a query is ranked twice, in the gallery and among its members.

Images are positions in the gallery. Shapes: Q queries, G gallery images, E embedding width, S bootstrap samples.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from harma_ray.data.queries import ComposedQueries
from harma_ray.errors import UserError
from harma_ray.retrieval.groups import Groups
from harma_ray.retrieval.image_text import (
    chance_recall_at,
    percentile_intervals,
    recall_at,
    resampled_sums,
)
from harma_ray.retrieval.ranking import rank_first_relevant

CATEGORY_KS: tuple[int, ...] = (10, 50)
GALLERY_KS: tuple[int, ...] = (1, 5, 10, 50)
MEMBER_KS: tuple[int, ...] = (1, 2, 3)
LABELS: Mapping[str, str] = {
    **{f"recall_at{k}": f"R@{k}" for k in GALLERY_KS},
    **{f"group_recall_at{k}": f"R_subset@{k}" for k in MEMBER_KS},
    **{f"average_recall_at{k}": f"R@{k}, mean of the categories" for k in CATEGORY_KS},
    "average_recall": "mean of R@10 and R@50",
    "arithmetic_mean": "of the seven",
    "r_mean": "the mean that the split is judged by",
}
"""What metrics stand for."""
_NOT_LINEAR = ("harmonic_mean", "geometric_mean")


@dataclass(frozen=True)
class ComposedResult:
    """Ranks of the targets, 0-based, int64 [Q], on the CPU.

    Attributes:
        ranks: in the query's gallery.
        subset_ranks: among the query's members; None without members.
        categories: of each query; None with members.
    """

    ranks: Tensor
    subset_ranks: Tensor | None = None
    categories: list[str] | None = None

    def __post_init__(self) -> None:
        assert (self.subset_ranks is None) != (self.categories is None), "a result has members or categories"

    @property
    def metrics(self) -> dict[str, float]:
        """Recalls and their means, in percent; `r_mean` is the one that a split is judged by.

        Without members: `{category}_recall_at10`, `{category}_recall_at50`, their means over the categories,
        `average_recall_at10` and `average_recall_at50`, and the mean of these two, `average_recall` and `r_mean`.

        With members: `recall_at1 recall_at5 recall_at10 recall_at50` in the gallery, `group_recall_at1 group_recall_at2
        group_recall_at3` among the members; `arithmetic_mean` (also `r_mean`), `harmonic_mean` and `geometric_mean` of
        these seven, the latter two 0 if one of the seven is; `mean(R@5+R_s@1)`, that of `recall_at5` and
        `group_recall_at1`.
        """
        if self.subset_ranks is not None:
            named = _named_with_members(recall_at(self.ranks, GALLERY_KS), recall_at(self.subset_ranks, MEMBER_KS))
        else:
            rows_of = _positions_by_key(self.categories or [])
            named = _named_by_category({name: recall_at(self.ranks[at], CATEGORY_KS) for name, at in rows_of.items()})
        return {name: float(value) for name, value in named.items()}


def _named_by_category(recalls: Mapping[str, Mapping[int, Any]]) -> dict[str, Any]:
    """Names the recalls (numbers, or arrays of samples) of each category and their means."""
    named = {f"{category}_recall_at{k}": value for category, by_k in recalls.items() for k, value in by_k.items()}
    averages = {f"average_recall_at{k}": sum(by_k[k] for by_k in recalls.values()) / len(recalls) for k in CATEGORY_KS}
    mean = sum(averages.values()) / len(averages)
    return named | averages | {"average_recall": mean, "r_mean": mean}


def _named_with_members(in_gallery: Mapping[int, Any], among_members: Mapping[int, Any]) -> dict[str, Any]:
    """Names the recalls (numbers, or arrays of samples) in the gallery and among the members, and their means."""
    named = {f"recall_at{k}": value for k, value in in_gallery.items()}
    named |= {f"group_recall_at{k}": value for k, value in among_members.items()}
    seven = np.stack([np.asarray(value, np.float64) for value in named.values()])
    mean = seven.mean(axis=0)
    with np.errstate(divide="ignore"):  # at a recall of 0 the formulas tend to 0, and so do 7 / inf and exp(-inf)
        harmonic, geometric = len(seven) / (1 / seven).sum(axis=0), np.exp(np.log(seven).mean(axis=0))
    named["mean(R@5+R_s@1)"] = (named["recall_at5"] + named["group_recall_at1"]) / 2
    return named | {"arithmetic_mean": mean, "harmonic_mean": harmonic, "geometric_mean": geometric, "r_mean": mean}


def composed_recalls(vectors: Tensor, gallery: Tensor, queries: ComposedQueries) -> ComposedResult:
    """Ranks the gallery for every query; `.metrics` of the result holds the recalls.

    Ties count against the model, as in `rank_first_relevant`; so does another gallery image equal to the target.

    Args:
        vectors: [Q, E], composed of reference and caption, L2-normalised.
        gallery: [G, E], L2-normalised.
        queries: what is asked; those with members are ranked by the protocol with members. Without categories all are
            of one, "all".

    Raises:
        UserError: a reference or target outside the gallery or of another category; with members, a target that is
            its own reference, or members without reference or target; lengths that do not fit; no queries; embeddings
            that are not finite. Offending queries are listed.
    """
    if len(vectors) != len(queries.target):
        raise UserError(
            f"every query needs one target, but got {len(vectors)} queries and {len(queries.target)} targets"
        )
    split = _split(queries, len(gallery))
    if split.members is not None:
        answers, removed = [Groups.one_each(split.target)], Groups.one_each(split.reference)
        in_gallery, among_members = (
            rank_first_relevant(vectors, gallery, answers, excluded=removed, candidates=candidates)[0]
            for candidates in (None, split.members)
        )
        return ComposedResult(in_gallery, among_members)
    ranks = torch.empty_like(split.target)
    items_of = _positions_by_key(split.gallery_categories)
    for category, rows in _positions_by_key(split.categories).items():
        items = items_of[category]
        answers = [Groups.one_each(torch.searchsorted(items, split.target[rows]))]
        (ranks[rows],) = rank_first_relevant(vectors[rows], gallery[items], answers)
    return ComposedResult(ranks, categories=list(split.categories))


def chance_composed_recalls(queries: ComposedQueries) -> dict[str, float]:
    """Expected `ComposedResult.metrics` of rankings drawn at random; raises as `composed_recalls` does.

    `harmonic_mean` and `geometric_mean` are left out: those of expected recalls are not the expected ones.
    """
    gallery_size = len(queries.names)
    split = _split(queries, gallery_size)
    if split.members is not None:
        in_gallery = chance_recall_at(torch.ones(1), gallery_size - 1, GALLERY_KS)
        sizes, num_queries = (split.members.sizes - 1).unique(return_counts=True)
        shares = (num_queries / num_queries.sum()).tolist()
        by_size = [chance_recall_at(torch.ones(1), size, MEMBER_KS) for size in sizes.tolist()]
        among = {k: sum(share * by_k[k] for share, by_k in zip(shares, by_size, strict=True)) for k in MEMBER_KS}
        named = _named_with_members(in_gallery, among)
    else:
        items_of = _positions_by_key(split.gallery_categories)
        present = dict.fromkeys(split.categories)
        named = _named_by_category(
            {name: chance_recall_at(torch.ones(1), len(items_of[name]), CATEGORY_KS) for name in present}
        )
    return {name: float(value) for name, value in named.items() if name not in _NOT_LINEAR}


def bootstrap_composed(
    result: ComposedResult, num_samples: int = 1000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """95 % percentile bootstrap interval of each of `result.metrics`: the spread over test sets of the same size."""
    return percentile_intervals(composed_samples(result, num_samples, seed))


def composed_samples(result: ComposedResult, num_samples: int = 1000, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns `result.metrics` of bootstrap samples, each float64 [S].

    Queries are resampled one by one, within their categories and with both of their ranks, although some share an
    image. The galleries are not resampled: ranks stay as they are. The spread over training seeds is not in it.

    Args:
        result: ranks to resample.
        num_samples: S.
        seed: of the resampling; the same seed draws the same queries, whatever the model.
    """
    generator = np.random.default_rng(seed)
    if result.subset_ranks is not None:
        rankings = [(result.ranks, GALLERY_KS), (result.subset_ranks, MEMBER_KS)]
        return _named_with_members(*_resampled_recalls(rankings, num_samples, generator))
    by_category = {
        category: _resampled_recalls([(result.ranks[rows], CATEGORY_KS)], num_samples, generator)[0]
        for category, rows in _positions_by_key(result.categories or []).items()
    }
    return _named_by_category(by_category)


def _resampled_recalls(
    rankings: Sequence[tuple[Tensor, Sequence[int]]], num_samples: int, generator: np.random.Generator
) -> list[dict[int, np.ndarray]]:
    """Recalls in percent, float64 [S], for each pair of ranks and cut-offs; a sample has the same queries in all."""
    hits = np.stack([ranks.numpy() < k for ranks, ks in rankings for k in ks], axis=1)
    columns = iter(100.0 * resampled_sums(hits, num_samples, generator).T / len(hits))
    return [{k: next(columns) for k in ks} for _, ks in rankings]


@dataclass(frozen=True)
class _Split:
    """The checked arguments that say what is ranked where; positions are int64 [Q], on the CPU."""

    reference: Tensor
    target: Tensor
    categories: Sequence[str]
    gallery_categories: Sequence[str]
    members: Groups | None


def _split(queries: ComposedQueries, gallery_size: int) -> _Split:
    """Checks what `composed_recalls` ranks."""
    num_queries, reference, target, members = len(queries.target), queries.reference, queries.target, queries.members
    categories, gallery_categories = queries.categories, queries.gallery_categories
    if (categories is None) != (gallery_categories is None):
        raise UserError("`categories` and `gallery_categories` must be given together")
    if categories is None or gallery_categories is None or members is not None:
        categories, gallery_categories = ["all"] * num_queries, ["all"] * gallery_size
    lengths = [("reference", reference, num_queries), ("categories", categories, num_queries)]
    lengths += [("gallery_categories", gallery_categories, gallery_size)]
    lengths += [] if members is None else [("members", members, num_queries)]
    for name, values, wanted in lengths:
        if len(values) != wanted:
            raise UserError(f"`{name}` must have {wanted} entries, but has {len(values)}")
    if not num_queries:
        raise UserError("recalls need at least one query")
    reference, target = reference.to("cpu", torch.int64), target.to("cpu", torch.int64)
    for name, positions in (("reference", reference), ("target", target)):
        outside = (positions < 0) | (positions >= gallery_size)
        _refuse(f"a {name} must lie in the gallery, 0..{gallery_size - 1}", outside)
        found = [gallery_categories[position] for position in positions.tolist()]
        other = [wanted != category for wanted, category in zip(categories, found, strict=True)]
        _refuse(f"a {name} must be of its query's category", torch.tensor(other))
    groups = None if members is None else _checked_members(members, reference, target, gallery_size)
    return _Split(reference, target, categories, gallery_categories, groups)


def _checked_members(members: Sequence[Sequence[int]], reference: Tensor, target: Tensor, gallery_size: int) -> Groups:
    _refuse("a target must not be its query's reference, which is taken out of the ranking", target == reference)
    sets = [set(map(int, positions)) for positions in members]
    outside = [not all(0 <= position < gallery_size for position in positions) for positions in sets]
    _refuse(f"members must lie in the gallery, 0..{gallery_size - 1}", torch.tensor(outside))
    for name, own in (("reference", reference), ("target", target)):
        lacking = [position not in positions for position, positions in zip(own.tolist(), sets, strict=True)]
        _refuse(f"a query's {name} must be one of its members", torch.tensor(lacking))
    return Groups.from_lists(sets)


def _refuse(rule: str, offending: Tensor) -> None:
    """Raises UserError with the queries where `offending`, bool [Q], is true, if there are any."""
    queries = offending.nonzero()[:, 0].tolist()
    if queries:
        raise UserError(f"{rule}; this fails for queries {queries[:5]} ({len(queries)} in all)")


def _positions_by_key(keys: Sequence[str]) -> dict[str, Tensor]:
    """Where each key stands, increasing, int64; keys in the order in which they appear first."""
    positions = defaultdict(list)
    for position, key in enumerate(keys):
        positions[key].append(position)
    return {key: torch.tensor(found) for key, found in positions.items()}


@dataclass(frozen=True)
class ComposedRetrieval:
    """Embeddings of a gallery and of queries to it, and how the gallery is ranked."""

    gallery_embeddings: Tensor
    """fp32[G, F], L2-normalised, in row order."""
    query_embeddings: Tensor
    """fp32[Q, F], L2-normalised."""
    queries: ComposedQueries
    """Texts, and the rows of references, targets and members."""
    result: ComposedResult
    """Ranks of the targets."""

    @classmethod
    def of(cls, gallery: Tensor, vectors: Tensor, queries: ComposedQueries) -> Self:
        """Measures the queries' vectors by the split's protocol; takes what the fields say."""
        queries.require_targets()
        return cls(gallery, vectors, queries, composed_recalls(vectors, gallery, queries))

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Returns 95 % bootstrap intervals of the metrics."""
        return bootstrap_composed(self.result)

    def resampled(self) -> dict[str, np.ndarray]:
        """Returns the metrics of bootstrap samples, from which the intervals follow."""
        return composed_samples(self.result)

    def chance(self) -> dict[str, float]:
        """Returns the metrics that rankings drawn at random are expected to have."""
        return chance_composed_recalls(self.queries)
