"""Indices over a gallery's vectors, by FAISS: exact, or approximate for millions.

Shapes: Q queries, G gallery images, E embedding width, k neighbours.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from harma_ray.data.order import iterate_slices
from harma_ray.errors import UserError
from harma_ray.retrieval.groups import Groups
from harma_ray.retrieval.ranking import score_pairs, top_k

IndexKind = Literal["flat", "hnsw", "ivfpq"]
INDEX_KINDS: tuple[IndexKind, ...] = get_args(IndexKind)

_QUERIES_AT_ONCE = 1024
_FOUND_AT_ONCE = 2**22
_SPARE = 32
"""Neighbours beyond those wanted that a flat search looks at: ties are settled by exact scores, and go on beyond."""
_MOST_LEFT_OUT = 256
"""A query of more copies is compared with the whole gallery at once."""
_HNSW_LINKS = 32
_HNSW_BUILD = 200
_HNSW_SEARCH = 128
"""Candidates that a search in the graph keeps, at least; twice the neighbours asked for if that is more."""
_PROBED = 1 / 16
"""Share of the lists of an IVF-PQ index that a search looks into."""
_CODE_BYTES = 64
"""Of a vector in an IVF-PQ index, at most."""
_CODES = 256
"""Values of a byte of them; each is learnt from as many vectors at least."""
_POINTS_A_LIST = 39
"""FAISS's own rule for how many vectors the centre of a list should be learnt from, at least."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Index:
    """An index over G vectors; `search` finds those of the highest inner product."""

    kind: IndexKind
    vectors: Tensor
    """fp32[G, E], on the CPU; those of the gallery, no copy."""
    built: Any
    """FAISS's own; None of a flat one, which needs none."""
    note: str = ""
    """How it was built, in words."""

    @property
    def size(self) -> int:
        """G."""
        return len(self.vectors)

    @property
    def is_exact(self) -> bool:
        """Whether it finds the nearest themselves."""
        return self.kind == "flat"

    def search(self, queries: Tensor, k: int, *, excluded: Groups | None = None) -> tuple[Tensor, Tensor]:
        """Finds neighbours of queries.

        A flat index gives what `harma_ray.retrieval.ranking.top_k` does: FAISS's float32 products choose, exact scores
        decide. Those of other indices are FAISS's, IVF-PQ's approximate; of equal ones the first of the gallery come
        first, among those that were found.

        Args:
            queries: [Q, E].
            k: Neighbours.
            excluded: Gallery positions that a query must not find; as many more are looked for.

        Returns:
            Scores, float32 [Q, k], highest first, and gallery positions, int64 [Q, k]; minus infinity and -1 where an
            approximate index found fewer.

        Raises:
            UserError: If k is larger than what a query may find, or the widths differ.
        """
        width, sizes = self.vectors.shape[1], excluded.sizes if excluded is not None else torch.zeros(len(queries))
        more = int(sizes.max()) if len(queries) else 0
        if not 1 <= k <= self.size - more:
            raise UserError(f"`k` must lie in 1..{self.size - more}, the images that a query may find, but got {k}")
        if queries.ndim != 2 or queries.shape[1] != width:
            raise UserError(f"queries must have width {width}, as the index, got {list(queries.shape)}")
        scores, items = torch.empty(len(queries), k), torch.empty(len(queries), k, dtype=torch.int64)
        order = sizes.argsort(stable=True)  # so that many copies of one image do not make every search a long one
        with _threads():
            for part in iterate_slices(len(queries), max(1, min(_QUERIES_AT_ONCE, _FOUND_AT_ONCE // (k + more)))):
                rows = order[part]
                own, left_out = queries[rows].detach().cpu().float(), excluded.chosen(rows) if excluded else None
                scores[rows], items[rows] = (self._exact if self.is_exact else self._near)(own, k, left_out)
        return scores, items

    def _near(self, queries: Tensor, k: int, excluded: Groups | None) -> tuple[Tensor, Tensor]:
        faiss, count = import_faiss(), k + (int(excluded.sizes.max()) if excluded is not None else 0)
        params = faiss.SearchParametersHNSW(efSearch=max(_HNSW_SEARCH, 2 * count)) if self.kind == "hnsw" else None
        near, places = self.built.search(_padded(queries.numpy(), self.built.d), count, params=params)
        return _first(torch.from_numpy(near), torch.from_numpy(places), k, excluded)

    def _exact(self, queries: Tensor, k: int, excluded: Groups | None) -> tuple[Tensor, Tensor]:
        faiss = import_faiss()
        more = int(excluded.sizes.max()) if excluded is not None else 0
        count = min(self.size, k + more + _SPARE)
        if more > _MOST_LEFT_OUT:
            return top_k(queries, self.vectors, k, excluded=excluded)
        near, places = map(
            torch.from_numpy, faiss.knn(queries.numpy(), self.vectors.numpy(), count, faiss.METRIC_INNER_PRODUCT)
        )
        scores, items = _first(score_pairs(queries, self.vectors, places), places, k, excluded)
        # No sum of E float32 products is further from the exact one than this: what FAISS left out scores less.
        error = (queries.shape[1] + 4) * 2.0**-23 * queries.norm(dim=1) * self.vectors.norm(dim=1).max()
        unsure = (scores[:, -1] <= near[:, -1] + error).nonzero()[:, 0] if count < self.size else torch.arange(0)
        if len(unsure):
            left_out = excluded.chosen(unsure) if excluded is not None else None
            scores[unsure], items[unsure] = top_k(queries[unsure], self.vectors, k, excluded=left_out)
        return scores, items


def build_index(kind: IndexKind, gallery: Tensor, seed: int = 0) -> Index:
    """Builds an index over vectors, with torch's number of threads.

    HNSW (Malkov and Yashunin, TPAMI 2020) keeps all vectors and a graph; IVF-PQ (Jegou et al., TPAMI 2011) keeps up to
    64 bytes a vector, in about sqrt(G) lists of which a search looks into one of 16.

    Args:
        kind: Which.
        gallery: [G, E], finite; normalise for cosines.
        seed: Of what IVF-PQ learns.

    Raises:
        UserError: If FAISS is missing, or the gallery is too small for IVF-PQ.
    """
    if kind not in INDEX_KINDS:
        raise UserError(f"an index must be one of {', '.join(INDEX_KINDS)}, got {kind}")
    faiss = import_faiss()
    vectors = gallery.detach().cpu().float().contiguous()
    built, note = None, ""
    with _threads():
        if kind == "hnsw":
            built = faiss.IndexHNSWFlat(vectors.shape[1], _HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
            built.hnsw.efConstruction = _HNSW_BUILD
            built.add(vectors.numpy())
            note = f"{_HNSW_LINKS} links a vector, at least {_HNSW_SEARCH} candidates a search"
        elif kind == "ivfpq":
            built, note = _build_ivfpq(faiss, vectors.numpy(), seed)
    return Index(kind, vectors, built, note)


def import_faiss() -> ModuleType:
    """Returns FAISS.

    Raises:
        UserError: If it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise UserError('an index needs FAISS, which is not installed; pip install "harma-ray[vitp]"') from error
    return faiss


def recall_against(found: Tensor, exact: Tensor) -> float:
    """Returns how many of the exact neighbours an index found, in percent: recall@k, mean over the queries.

    Args:
        found: int64 [Q, k], gallery positions.
        exact: int64 [Q, k], those of the flat index.
    """
    hits = (found[:, :, None] == exact[:, None, :]).any(dim=1)
    return 100 * float(hits.double().mean())


def _build_ivfpq(faiss: ModuleType, array: np.ndarray, seed: int) -> tuple[Any, str]:
    size, width = array.shape
    if size < _CODES:
        raise UserError(f"an ivfpq index needs at least {_CODES} vectors, got {size}; use flat")
    lists = max(1, min(round(size**0.5), size // _POINTS_A_LIST))
    piece = -(-width // _CODE_BYTES)  # numbers that a byte stands for
    pieces = -(-width // piece)
    width = pieces * piece  # zeros fill the last one, which change no product
    built = faiss.IndexIVFPQ(faiss.IndexFlatIP(width), width, lists, pieces, 8, faiss.METRIC_INNER_PRODUCT)
    built.nprobe = max(1, round(lists * _PROBED))
    built.cp.seed = built.pq.cp.seed = seed
    built.cp.min_points_per_centroid = built.pq.cp.min_points_per_centroid = 1  # FAISS prints a warning below 39
    padded = _padded(array, width)
    built.train(padded)
    built.add(padded)
    return built, f"{pieces} bytes a vector, {built.nprobe} of {lists} lists a search"


def _padded(array: np.ndarray, width: int) -> np.ndarray:
    missing = width - array.shape[1]
    return np.pad(array, ((0, 0), (0, missing))) if missing else np.ascontiguousarray(array)


@contextmanager
def _threads() -> Iterator[None]:
    """Gives FAISS the threads that torch has, as `harma_ray.training.threads` decides."""
    faiss = import_faiss()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(torch.get_num_threads())
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _first(scores: Tensor, items: Tensor, k: int, excluded: Groups | None) -> tuple[Tensor, Tensor]:
    """Returns the first k neighbours, those left out taken away, of equal ones the first of the gallery first."""
    missing = items < 0
    if excluded is not None and len(excluded.indices):
        size = max(int(items.max()), int(excluded.indices.max())) + 1
        query, item = excluded.pairs()
        missing |= torch.isin(torch.arange(len(items))[:, None] * size + items, query * size + item)
    scores = scores.masked_fill(missing, -torch.inf)
    place = items.masked_fill(missing, torch.iinfo(torch.int64).max).argsort(dim=1, stable=True)
    order = place.gather(1, scores.gather(1, place).argsort(dim=1, descending=True, stable=True))[:, :k]
    return scores.gather(1, order), items.masked_fill(missing, -1).gather(1, order)
