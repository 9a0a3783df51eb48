"""Queries of one store compared with the gallery of another, in several ways, and measured by class.

Shapes: Q queries, G gallery images, E embedding width.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from harma_ray.errors import UserError
from harma_ray.retrieval.by_class import ByClassResult, ByClassRetrieval, judge_neighbours, rank_by_class
from harma_ray.retrieval.classes import Classes, same_images
from harma_ray.retrieval.groups import Groups
from harma_ray.retrieval.ranking import Search, top_k
from harma_ray.retrieval.spaces import Space, expand_queries, fit_pca, fit_standardisation, fit_whitening
from harma_ray.vectors.index import Index, IndexKind, build_index, recall_against
from harma_ray.vectors.store import QUERY, Store, image_keys, require_comparable

_MAX_CHECKED = 1000
"""Queries whose neighbours by an approximate index are compared with the exact ones."""


@dataclass(frozen=True)
class Wanted:
    """What was asked for, beside the plain comparison."""

    ks: tuple[int, ...] = (1, 3, 5)
    """Cut-offs of Top-k."""
    pca: int | None = None
    """Components."""
    whiten: bool = False
    standardise: bool = False
    expand: int | None = None
    """Neighbours by which queries are expanded."""
    alpha: float | None = None
    """Exponent of their weights."""
    index: IndexKind | Literal["exact"] = "exact"
    """How neighbours are found."""

    def __post_init__(self) -> None:
        if self.alpha is not None and self.expand is None:
            raise UserError("`--alpha` weights the images of an expansion; give --expand K too")
        if self.alpha is not None and self.alpha < 0:
            raise UserError(f"`--alpha` must be at least 0, got {self.alpha:g}")
        if len(set(self.ks)) < len(self.ks) or min(self.ks) < 1:
            raise UserError(f"`--top` must be different numbers from 1, got {' '.join(map(str, self.ks))}")
        object.__setattr__(self, "ks", tuple(sorted(self.ks)))


@dataclass(frozen=True)
class Method:
    """A way to compare queries with a gallery."""

    name: str
    space: Space | None = None
    """Where they are compared; None: as they are."""
    expand: int = 0
    """Neighbours by which queries are expanded."""
    alpha: float = 0.0
    """Exponent of their weights."""


@dataclass(frozen=True)
class Problem:
    """Unit vectors of queries and gallery, and what is right."""

    queries: Tensor
    gallery: Tensor
    classes: Classes
    excluded: Groups
    rows: Tensor
    """int64[Q], the queries' rows in their store."""
    left_out: Sequence[str]
    """Images that are no queries, because the gallery has none of their class but themselves."""

    @staticmethod
    def of(query: Store, gallery: Store) -> Problem:
        """Compares two stores, or one with itself.

        Raises:
            UserError: If they cannot be compared, or measured by class.
        """
        if QUERY in query.manifest:
            raise UserError(
                f"{query.path} holds queries of composed retrieval, each of which asks for one image and not for its "
                "class; measure them with `launch.py evaluate`, or compare their vectors with those of images yourself"
            )
        if query is not gallery:
            require_comparable(query, gallery)
        classes = Classes.of(query.labels, gallery.labels)
        keys, gallery_keys = image_keys(query, gallery)
        excluded = same_images(keys, gallery_keys)
        has_right = classes.sizes(excluded)[0] > 0
        rows, without = has_right.nonzero()[:, 0], (~has_right).nonzero()[:, 0].tolist()
        if not len(rows):
            raise UserError(f"no query of {query.path} has another image of its class in the gallery {gallery.path}")
        left_out = [query.ids[row] for row in without]
        vectors = query.vectors
        if left_out:
            classes, excluded, vectors = classes.chosen(rows), excluded.chosen(rows), vectors[rows]
        return Problem(vectors, gallery.vectors, classes, excluded, rows, left_out)


def choose_methods(problem: Problem, wanted: Wanted) -> list[Method]:
    """Returns the plain comparison and those asked for, with their spaces fitted on the gallery.

    Raises:
        UserError: If there are more components or neighbours than the gallery allows.
    """
    smallest = int(problem.classes.sizes(problem.excluded)[1].min())
    for name, count in (("--top", max(wanted.ks)), ("--expand", 1 if wanted.expand is None else wanted.expand)):
        if not 1 <= count <= smallest:
            raise UserError(f"`{name}` must lie in 1..{smallest}, the images that a query may find, but got {count}")
    methods, gallery = [Method("plain")], problem.gallery
    if wanted.pca is not None:
        methods.append(Method(f"PCA {wanted.pca}", fit_pca(gallery, wanted.pca)))
    if wanted.whiten:
        space = fit_whitening(gallery, wanted.pca)
        methods.append(Method(f"whitened {space.width}", space))
    if wanted.standardise:
        methods.append(Method("standardised", fit_standardisation(gallery)))
    if wanted.expand:
        methods.append(Method(f"expanded {wanted.expand}", expand=wanted.expand))
        if wanted.alpha is not None:
            name = f"expanded {wanted.expand}, alpha {wanted.alpha:g}"
            methods.append(Method(name, expand=wanted.expand, alpha=wanted.alpha))
    return methods


def measure(problem: Problem, method: Method, wanted: Wanted) -> tuple[ByClassRetrieval, list[str]]:
    """Searches in the way of a method; also returns what is to be said of its index.

    Raises:
        UserError: If no index can be built.
    """
    queries, gallery, notes = problem.queries, problem.gallery, []
    if method.space:
        same = queries is gallery
        gallery = method.space(gallery)
        queries = gallery if same else method.space(queries)
    started = time.perf_counter()
    index = None if wanted.index == "exact" else build_index(wanted.index, gallery)
    built = time.perf_counter() - started
    search = _search_by(index, max(wanted.ks))
    if method.expand:
        queries = expand_queries(
            queries, gallery, method.expand, alpha=method.alpha, excluded=problem.excluded, search=search
        )
    if index is None:
        result = rank_by_class(queries, gallery, problem.classes, excluded=problem.excluded, ks=wanted.ks)
    else:
        started = time.perf_counter()
        result, items = _judge(index, queries, gallery, problem, wanted.ks)
        seconds = time.perf_counter() - started
        each = f"{1000 * seconds / len(queries):.2g} ms a query"
        notes = [f"index {index.kind}{f' ({index.note})' if index.note else ''}, built in {built:.1f} s, {each}"]
        if not index.is_exact:
            notes.append(_tell_recall(problem, queries, gallery, items))
    return ByClassRetrieval(queries, gallery, problem.excluded, result, problem.rows, search), notes


def _judge(
    index: Index, queries: Tensor, gallery: Tensor, problem: Problem, ks: Sequence[int]
) -> tuple[ByClassResult, Tensor]:
    """Returns the Top-k of what an index finds, and what that is: int64 [Q, k], for the largest k.

    Where more images than k score the same, an exact index must give the exact figures: those queries are ranked anew.
    """
    k, classes, excluded = max(ks), problem.classes, problem.excluded
    more = min(k + index.is_exact, int(classes.sizes(excluded)[1].min()))
    scores, items = index.search(queries, more, excluded=excluded)
    result = judge_neighbours(scores[:, :k], items[:, :k], classes, excluded=excluded, ks=ks)
    if index.is_exact:
        tied = (scores[:, k:] == scores[:, k - 1 : k]).any(dim=1) if more > k else torch.ones(len(queries)).bool()
        rows = tied.nonzero()[:, 0]
        if len(rows):
            own = classes.chosen(rows), excluded.chosen(rows)
            exact = rank_by_class(queries[rows], gallery, own[0], excluded=own[1], ks=ks)
            result.ranks[rows], result.nearest[rows] = exact.ranks, exact.nearest
    return result, items[:, :k]


def _search_by(index: Index | None, least: int) -> Search:
    """Returns a search by an index for at least so many, as finding more may take other ways through its graph."""
    if index is None:
        return top_k

    def search(queries: Tensor, gallery: Tensor, k: int, *, excluded: Groups | None = None) -> tuple[Tensor, Tensor]:
        scores, items = index.search(queries, max(k, least), excluded=excluded)
        return scores[:, :k], items[:, :k]

    return search


def _tell_recall(problem: Problem, queries: Tensor, gallery: Tensor, items: Tensor) -> str:
    """Compares what an approximate index found with what a flat one does, for some of the queries."""
    count, k = min(len(queries), _MAX_CHECKED), items.shape[1]
    rows = torch.linspace(0, len(queries) - 1, count).round().long()
    excluded = problem.excluded.chosen(rows)
    exact = build_index("flat", gallery).search(queries[rows], k, excluded=excluded)[1]
    return f"recall@{k} against flat {recall_against(items[rows], exact):.1f} %, of {count:,} queries"
