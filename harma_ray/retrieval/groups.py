"""Sets of gallery items, one a query: what is right, left out, or all that a query is ranked among.

Shapes: Q queries, P (query, item) pairs.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from harma_ray.errors import UserError


@dataclass(frozen=True)
class Groups:
    """A set of gallery items for each query; queries of equal sets may share one.

    Attributes:
        firsts: int64 [Q], on the CPU; the items of query q are `indices[firsts[q]:firsts[q] + sizes[q]]`.
        sizes: int64 [Q], on the CPU; number of items of each query.
        indices: int64 [P], on the CPU; 0-based gallery positions, strictly increasing within a query.
    """

    firsts: Tensor
    sizes: Tensor
    indices: Tensor

    def __post_init__(self) -> None:
        assert self.firsts.dtype == self.sizes.dtype == self.indices.dtype == torch.int64
        firsts, ends = (part[self.sizes > 0] for part in (self.firsts, self.firsts + self.sizes))
        assert not len(ends) or (firsts.min() >= 0 and ends.max() <= len(self.indices))
        assert (self.sizes >= 0).all()
        follows = torch.zeros(len(self.indices) + 1, dtype=torch.int64)  # above 0 where the item before is of the set
        follows.index_add_(0, firsts + 1, torch.ones_like(firsts)).index_add_(0, ends, torch.full_like(ends, -1))
        assert (follows.cumsum(0)[1:-1].eq(0) | (self.indices.diff() > 0)).all(), "the items of a query must increase"

    @classmethod
    def from_pairs(cls, query_indices: Tensor, item_indices: Tensor, *, num_queries: int) -> "Groups":
        """Collects (query, item) pairs, int64 [P] each, in any order; repeated pairs count once."""
        if not len(query_indices):
            return cls(*(torch.zeros(length, dtype=torch.int64) for length in (num_queries, num_queries, 0)))
        width = int(item_indices.max()) + 1
        if query_indices.min() < 0 or query_indices.max() >= num_queries or item_indices.min() < 0:
            raise UserError(f"query indices must lie in 0..{num_queries - 1} and item indices must not be negative")
        flat = torch.unique(query_indices.cpu() * width + item_indices.cpu())
        queries = torch.div(flat, width, rounding_mode="floor")
        sizes = torch.bincount(queries, minlength=num_queries)
        return cls(_firsts(sizes), sizes, flat - queries * width)

    @classmethod
    def one_each(cls, items: Tensor) -> "Groups":
        """Gives each query one item, int64 [Q]."""
        return cls(torch.arange(len(items)), torch.ones_like(items), items)

    @classmethod
    def from_lists(cls, lists: Iterable[Iterable[int]]) -> "Groups":
        """Takes one list of gallery positions for each query, in any order."""
        rows = [list(items) for items in lists]
        query_indices = torch.tensor([query for query, items in enumerate(rows) for _ in items], dtype=torch.int64)
        item_indices = torch.tensor([item for items in rows for item in items], dtype=torch.int64)
        return cls.from_pairs(query_indices, item_indices, num_queries=len(rows))

    @classmethod
    def from_keys(cls, query_keys: Sequence[Hashable] | Tensor, gallery_keys: Sequence[Hashable] | Tensor) -> "Groups":
        """Gives each query the gallery items of an equal key: a caption, a class, the index of an image.

        Args:
            query_keys: one key a query, hashable values or a one-dimensional tensor.
            gallery_keys: one key a gallery item, the same.
        """
        number_of: dict[Hashable, int] = {}
        numbers_of_items = [number_of.setdefault(key, len(number_of)) for key in hashable_keys(gallery_keys)]
        item_numbers = torch.tensor(numbers_of_items, dtype=torch.int64)
        unknown = len(number_of)
        query_numbers = torch.tensor(
            [number_of.get(key, unknown) for key in hashable_keys(query_keys)], dtype=torch.int64
        )
        items_by_number = torch.argsort(item_numbers, stable=True)  # stable: increasing within a key
        items_per_number = torch.bincount(item_numbers, minlength=unknown + 1)
        return cls(_firsts(items_per_number)[query_numbers], items_per_number[query_numbers], items_by_number)

    def chosen(self, queries: Tensor) -> "Groups":
        """The sets of some queries, int64, in their order."""
        return Groups(self.firsts[queries], self.sizes[queries], self.indices)

    def pairs(self, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """All pairs of queries start..stop-1: query index minus `start`, and item index; int64 [P] each."""
        firsts, sizes = self.firsts[start:stop], self.sizes[start:stop]
        query = torch.repeat_interleave(sizes)
        return query, self.indices[(firsts - _firsts(sizes))[query] + torch.arange(len(query))]


def _firsts(sizes: Tensor) -> Tensor:
    return sizes.cumsum(0) - sizes


def hashable_keys(keys: Sequence[Hashable] | Tensor) -> Sequence[Hashable]:
    """Returns keys as a sequence, whose items are equal where those of a tensor are."""
    return keys.tolist() if isinstance(keys, Tensor) else keys
