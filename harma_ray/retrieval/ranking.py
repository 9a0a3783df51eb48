"""Exact ranking of a gallery by inner product, in chunks: the one ranking function, and the top k.

Shapes: Q queries, G gallery items, E embedding width, C queries of one chunk.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from harma_ray.data.order import iterate_slices, worker_rows
from harma_ray.distributed import gather_rows, rank, world_size
from harma_ray.errors import UserError
from harma_ray.retrieval.groups import Groups

_SCORES_PER_CHUNK = 2**22  # of the part of the score matrix that is worked on: at up to 40 bytes a score
_SCORES_PER_PASS = 2**25  # that a large gallery is read for once: at 4 bytes a score
_NUMBERS_KEPT = 2**25  # of a gallery in fixed point, at 8 bytes; more are made for each pass anew, a block at a time
_NUMBERS_PER_BLOCK = 2**20
_FRACTION_BITS = 26  # see _fixed_point
_MAX_NORM = 2.0**63  # the product of two such norms still fits float32


def _listing(indices: Tensor) -> str:
    shown = ", ".join(map(str, indices[:5].tolist()))
    return shown if len(indices) <= 5 else f"{shown}, ... ({len(indices)} in all)"


def _fixed_point(embeddings: Tensor, name: str, first: int = 0) -> Tensor:
    """Rounds each row to multiples of 2^-26 of (a power of two just above) its norm, as float64 [rows, E].

    The product of two such rows is an integer below 2^53 times a power of two, and so is every partial sum of it
    (Cauchy-Schwarz). A float64 matrix product of them therefore has no rounding error in whatever order a library
    sums: a score is the same in any chunk, tile, number of threads or device, and equal rows score exactly equal.
    In float32 a score depends on where in the matrix it stands, and ties come and go with the chunk size. The error
    of the rounding, about 1e-8 of the norm, is that of a float32 product or less. Messages count rows from `first`.
    """
    rows = embeddings.detach().to(torch.float64, copy=True)
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    unusable = first + (~(norms[:, 0] < _MAX_NORM)).nonzero()[:, 0]  # not a number fails the comparison too
    if len(unusable):
        raise UserError(
            f"`{name}` must be finite with norms below {_MAX_NORM:.1e}, but rows {_listing(unusable)} are not"
        )
    norms = norms.clamp(min=torch.finfo(torch.float32).tiny)
    power_of_two = norms / torch.frexp(norms).mantissa  # exact, unlike exp2 or ldexp on some devices
    step = power_of_two * 2.0**-_FRACTION_BITS
    return rows.div_(step).round_().mul_(step)


def score_chunks(
    queries: Tensor,
    gallery: Tensor,
    excluded: Groups | None,
    candidates: Groups | None,
    relevants: Sequence[Groups] = (),
    rows: range | None = None,
) -> Iterator[tuple[int, int, Tensor]]:
    """Yields (start, stop, scores float32 [C, G]) of all queries, or those at `rows`, in their order.

    Scores are minus infinity where an item is excluded or no candidate.
    """
    if queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1]:
        shapes = f"{list(queries.shape)} and {list(gallery.shape)}"
        raise UserError(f"`queries` [Q, E] and `gallery` [G, E] must have the same width, but have shapes {shapes}")
    num_queries, num_items = len(queries), len(gallery)
    for groups in (excluded, candidates, *relevants):
        if groups is not None:
            _check_fit(groups, num_queries, num_items)
    chunk_size = max(1, _SCORES_PER_CHUNK // max(1, num_items))
    for first, found in _exact_scores(queries, gallery, range(num_queries) if rows is None else rows, chunk_size):
        for part in iterate_slices(len(found), chunk_size):
            start, stop, scores = first + part.start, first + part.stop, found[part]
            if candidates is not None:
                pairs = _on_device(scores.device, candidates.pairs(start, stop))
                every_score, scores = scores, torch.full_like(scores, -torch.inf)
                scores[pairs] = every_score[pairs]
            if excluded is not None:
                scores[_on_device(scores.device, excluded.pairs(start, stop))] = -torch.inf
            yield start, stop, scores


def _exact_scores(queries: Tensor, gallery: Tensor, rows: range, num_queries: int) -> Iterator[tuple[int, Tensor]]:
    """Yields the first of some queries, and their scores, float32 [some, G]; of a large gallery for more at a time.

    Args:
        queries: [Q, E].
        gallery: [G, E], of which no more than a block is in memory in fixed point, unless it is small.
        rows: Which of the queries.
        num_queries: How many come at a time if it is.
    """
    num_items, width = gallery.shape
    device = torch.device("cpu") if gallery.device.type == "mps" else gallery.device  # MPS has no float64
    whole = _fixed_point(gallery.to(device), "gallery") if gallery.numel() <= _NUMBERS_KEPT else None
    if whole is None:
        num_queries = max(num_queries, _SCORES_PER_PASS // num_items)
    block = num_items if whole is not None else max(1, _NUMBERS_PER_BLOCK // width)
    for part_of_rows in iterate_slices(len(rows), num_queries):
        some = rows[part_of_rows]
        lines = _fixed_point(queries[some.start : some.stop].to(device), "queries", some.start)
        scores = torch.empty(len(lines), num_items, device=device)
        for part in iterate_slices(num_items, max(1, block)):
            columns = whole if whole is not None else _fixed_point(gallery[part].to(device), "gallery", part.start)
            scores[:, part] = lines @ columns.T
        yield some.start, scores


def score_pairs(queries: Tensor, gallery: Tensor, items: Tensor) -> Tensor:
    """Returns the scores, as in all rankings here, of some gallery items of each query.

    Args:
        queries: [Q, E].
        gallery: [G, E], on the same device.
        items: int64 [Q, n], gallery positions.

    Returns:
        float32 [Q, n].
    """
    scores = torch.empty(items.shape, device=queries.device)
    for part in iterate_slices(len(items), max(1, _NUMBERS_PER_BLOCK // max(1, items.shape[1] * gallery.shape[1]))):
        rows = _fixed_point(queries[part], "queries", part.start)
        columns = _fixed_point(gallery[items[part].flatten()], "gallery").view(*items[part].shape, -1)
        scores[part] = (columns @ rows[:, :, None])[:, :, 0]
    return scores


def _check_fit(groups: Groups, num_queries: int, num_items: int) -> None:
    if len(groups.sizes) != num_queries:
        raise UserError(f"groups must have one row a query, but got {len(groups.sizes)} for {num_queries} queries")
    outside = groups.indices[(groups.indices < 0) | (groups.indices >= num_items)]
    if len(outside):
        raise UserError(f"groups must hold gallery positions 0..{num_items - 1}, but hold {_listing(outside)}")


def _on_device(device: torch.device, pairs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return pairs[0].to(device), pairs[1].to(device)


def rank_first_relevant(
    queries: Tensor,
    gallery: Tensor,
    relevants: Sequence[Groups],
    *,
    excluded: Groups | None = None,
    candidates: Groups | None = None,
    rows: range | None = None,
) -> list[Tensor]:
    """Ranks the gallery for each query by inner product and finds the best-placed relevant item.

    Ties count against the model: the rank is the number of items, neither relevant nor excluded, that score at least
    as high as the best relevant item. Scores are float32 and depend on the two embeddings alone, so ranks do not
    depend on the chunk size, the order of the gallery or the device, and equal gallery rows always tie.

    Args:
        queries: [Q, E], any floating dtype and device; normalise for cosine similarity.
        gallery: [G, E]; the work is done on its device, in float64 (on the CPU if that device is MPS).
        relevants: for each of some notions of relevance, which share the scores, the right answers of each query; at
            least one must be neither excluded nor outside the candidates.
        excluded: items taken out of a query's ranking, such as the query's own image; they may be relevant ones.
        candidates: if given, a query is ranked among these items alone.
        rows: if given, these queries alone are ranked, consecutive ones.

    Returns:
        For each notion of relevance 0-based ranks, int64 [Q], or one for each of `rows`, on the CPU.

    Raises:
        UserError: a query without a usable relevant item, embeddings that are not finite, shapes that do not fit.
    """
    rows = range(len(queries)) if rows is None else rows
    ranks = _ranks(queries, gallery, relevants, rows, excluded, candidates)
    return _require_ranked(ranks, rows.start)


def rank_together(queries: Tensor, gallery: Tensor, relevants: Sequence[Groups]) -> list[Tensor]:
    """Does as `rank_first_relevant`, each worker for its share of the queries. A collective; all give the same.

    Where a GPU has no room for it beside a model, the work is done on the CPU.
    """
    own = worker_rows(len(queries), rank(), world_size())
    rows = range(int(own[0]), int(own[-1]) + 1) if len(own) else range(0)
    try:
        found = _ranks(queries, gallery, relevants, rows)
    except torch.OutOfMemoryError:
        found = _ranks(queries.cpu(), gallery.cpu(), relevants, rows)
    return _require_ranked(gather_rows(found), 0)


def _ranks(
    queries: Tensor,
    gallery: Tensor,
    relevants: Sequence[Groups],
    rows: range,
    excluded: Groups | None = None,
    candidates: Groups | None = None,
) -> Tensor:
    """Returns int64 [rows, notions of relevance], on the CPU; -1 where a query has no usable relevant item."""
    ranks = torch.empty(len(rows), len(relevants), dtype=torch.int64)
    for start, stop, scores in score_chunks(queries, gallery, excluded, candidates, relevants, rows):
        for notion, relevant in enumerate(relevants):
            pairs = _on_device(scores.device, relevant.pairs(start, stop))
            relevant_scores = scores[pairs]
            best = scores.new_full((stop - start,), -torch.inf).scatter_reduce_(0, pairs[0], relevant_scores, "amax")
            relevant_ahead = pairs[0][relevant_scores >= best[pairs[0]]]
            counts = torch.count_nonzero(scores >= best[:, None], dim=1)
            counts -= torch.bincount(relevant_ahead, minlength=stop - start)
            ranks[start - rows.start : stop - rows.start, notion] = counts.masked_fill(best == -torch.inf, -1).cpu()
    return ranks


def _require_ranked(ranks: Tensor, first: int) -> list[Tensor]:
    """Returns the ranks of each notion of relevance; `first` is the number of the first query."""
    for column in ranks.unbind(1):
        without = first + (column < 0).nonzero()[:, 0]
        if len(without):
            rule = "every query needs a relevant gallery item that is not excluded and, if candidates are given, is one"
            raise UserError(f"{rule}, but queries {_listing(without)} have none; leave them out or correct the groups")
    return [column.contiguous() for column in ranks.unbind(1)]


class Search(Protocol):
    """Finds the k gallery vectors of highest inner product for each query; `top_k` does."""

    def __call__(
        self, queries: Tensor, gallery: Tensor, k: int, *, excluded: Groups | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns scores, float32 [Q, k], highest first, and gallery positions, int64 [Q, k] (-1: fewer found)."""
        ...


def top_k(
    queries: Tensor,
    gallery: Tensor,
    k: int,
    *,
    excluded: Groups | None = None,
    candidates: Groups | None = None,
) -> tuple[Tensor, Tensor]:
    """Finds the k items with the highest inner product for each query; equal scores in the order of the gallery.

    Takes the arguments of `rank_first_relevant` and has the same scores.

    Returns:
        Scores, float32 [Q, k], highest first, and gallery positions, int64 [Q, k]; both on the CPU.

    Raises:
        UserError: a query that has fewer than k items to choose from, and as `rank_first_relevant`.
    """
    if not 1 <= k <= len(gallery):
        raise UserError(f"`k` must lie in 1..{len(gallery)}, the size of the gallery, but got {k}")
    top_scores = torch.empty(len(queries), k)
    top_items = torch.empty(len(queries), k, dtype=torch.int64)
    descending_position = None
    for start, stop, scores in score_chunks(queries, gallery, excluded, candidates):
        if descending_position is None:
            descending_position = torch.arange(len(gallery) - 1, -1, -1, device=scores.device)
        # torch.topk picks among equal values at will, so it gets distinct integers: the score's bits, made to increase
        # with the score (negative floats order backwards; adding 0 removes minus zero), above the reversed position.
        bits = (scores + 0.0).view(torch.int32)
        keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long().mul_(2**32).add_(descending_position)
        items = len(gallery) - 1 - (torch.topk(keys, k, dim=1).values & 0xFFFFFFFF)
        top_items[start:stop] = items.cpu()
        top_scores[start:stop] = scores.gather(1, items).cpu()
    short = (top_scores[:, -1] == -torch.inf).nonzero()[:, 0]
    if len(short):
        raise UserError(f"`k` = {k} exceeds the items that queries {_listing(short)} may choose from; use a smaller k")
    return top_scores, top_items
