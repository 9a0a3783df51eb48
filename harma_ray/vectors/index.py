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
from harma_ray.retrieval.ranking import Groups

IndexKind = Literal["flat", "hnsw", "ivfpq"]
INDEX_KINDS: tuple[IndexKind, ...] = get_args(IndexKind)

_QUERIES_AT_ONCE = 1024
_HNSW_LINKS = 32
_HNSW_BUILD = 200
_HNSW_SEARCH = 128
"""Candidates that a search in the graph keeps; at least twice the neighbours asked for."""
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
    size: int
    """G."""
    width: int
    """E."""
    built: Any
    """FAISS's own."""
    note: str = ""
    """How it was built, in words."""

    @property
    def is_exact(self) -> bool:
        """Whether it finds the nearest themselves."""
        return self.kind == "flat"

    def search(self, queries: Tensor, k: int, *, excluded: Groups | None = None) -> tuple[Tensor, Tensor]:
        """Finds neighbours of queries.

        Products are float32 and may differ in the last digit from those of `harma_ray.retrieval.ranking`; those of an
        IVF-PQ index are approximate. Of vectors that score the same, those that come first in the gallery come first,
        among those that were found.

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
        more = int(excluded.sizes.max()) if excluded is not None and len(queries) else 0
        if not 1 <= k <= self.size - more:
            raise UserError(f"`k` must lie in 1..{self.size - more}, the images that a query may find, but got {k}")
        if queries.ndim != 2 or queries.shape[1] != self.width:
            raise UserError(f"queries must have width {self.width}, as the index, got {list(queries.shape)}")
        array = np.ascontiguousarray(queries.detach().cpu().float().numpy())
        scores, items = np.empty((len(array), k), np.float32), np.empty((len(array), k), np.int64)
        with _threads():
            for part in iterate_slices(len(array), _QUERIES_AT_ONCE):
                near, places = self.built.search(array[part], k + more)
                left_out = _pairs(excluded, part) if excluded is not None else None
                scores[part], items[part] = _first(near, places, k, left_out)
        return torch.from_numpy(scores), torch.from_numpy(items)


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
    array = np.ascontiguousarray(gallery.detach().cpu().float().numpy())
    size, width = array.shape
    product, note = faiss.METRIC_INNER_PRODUCT, ""
    with _threads():
        if kind == "flat":
            built = faiss.IndexFlatIP(width)
        elif kind == "hnsw":
            built = faiss.IndexHNSWFlat(width, _HNSW_LINKS, product)
            built.hnsw.efConstruction, built.hnsw.efSearch = _HNSW_BUILD, _HNSW_SEARCH
            note = f"{_HNSW_LINKS} links a vector, {_HNSW_SEARCH} candidates a search"
        else:
            built, note = _train_ivfpq(faiss, array, seed)
        built.add(array)
    return Index(kind, size, width, built, note)


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


def _train_ivfpq(faiss: ModuleType, array: np.ndarray, seed: int) -> tuple[Any, str]:
    size, width = array.shape
    if size < _CODES:
        raise UserError(f"an ivfpq index needs at least {_CODES} vectors, got {size}; use flat")
    lists = max(1, min(round(size**0.5), size // _POINTS_A_LIST))
    pieces = max(count for count in range(1, min(width, _CODE_BYTES) + 1) if width % count == 0)
    built = faiss.IndexIVFPQ(faiss.IndexFlatIP(width), width, lists, pieces, 8, faiss.METRIC_INNER_PRODUCT)
    built.nprobe = max(1, round(lists * _PROBED))
    built.cp.seed = built.pq.cp.seed = seed
    built.cp.min_points_per_centroid = built.pq.cp.min_points_per_centroid = 1  # FAISS prints a warning below 39
    built.train(array)
    return built, f"{pieces} bytes a vector, {built.nprobe} of {lists} lists a search"


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


def _pairs(excluded: Groups, part: slice) -> np.ndarray:
    """Returns which (query of the part, gallery position) must not be found, as int64 [pairs, 2]."""
    return torch.stack(excluded.pairs(part.start, part.stop), dim=1).numpy()


def _first(scores: np.ndarray, items: np.ndarray, k: int, left_out: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first k neighbours, those left out taken away, of equal ones the first of the gallery first."""
    missing = items < 0
    if left_out is not None and len(left_out):
        size = max(int(items.max()), int(left_out[:, 1].max())) + 1
        flat = np.arange(len(items))[:, None] * size + items
        missing |= np.isin(flat, left_out[:, 0] * size + left_out[:, 1])
    scores = np.where(missing, -np.inf, scores)
    items = np.where(missing, -1, items)
    order = np.lexsort((np.where(missing, np.iinfo(np.int64).max, items), -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(items, order, axis=1)
