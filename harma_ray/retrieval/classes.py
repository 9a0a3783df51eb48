"""Classes of queries and of a gallery, by number, and which of the gallery's images are a query itself.

Shapes: Q queries, G gallery images, N classes.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from harma_ray.errors import UserError, first_few
from harma_ray.retrieval.groups import Groups


@dataclass(frozen=True)
class Classes:
    """The classes of queries and of a gallery.

    Attributes:
        names: N, sorted.
        queries: int64 [Q], numbers of the queries' classes.
        gallery: int64 [G], those of the gallery.
    """

    names: tuple[str, ...]
    queries: Tensor
    gallery: Tensor

    @classmethod
    def of(cls, queries: Sequence[str | None], gallery: Sequence[str | None]) -> Classes:
        """Numbers the classes of Q queries and G gallery images by name.

        Raises:
            UserError: There are no queries, an image has no class, or all of the gallery are of one.
        """
        if not queries:
            raise UserError("retrieval by class needs at least one query")
        for name, labels in (("query", queries), ("gallery", gallery)):
            without = [str(place) for place, label in enumerate(labels) if not label]
            if without:
                raise UserError(
                    f"every {name} image needs a class, but {len(without)} of {len(labels)} have none (rows "
                    f"{first_few(without)}); embed class folders, or a data set whose images have labels"
                )
        if len(set(gallery)) < 2:
            shown = f"all {len(gallery)} images are of class `{gallery[0]}`" if gallery else "it is empty"
            raise UserError(f"retrieval by class needs a gallery of at least two classes, but {shown}")
        names = sorted({*map(str, queries), *map(str, gallery)})
        number = {name: place for place, name in enumerate(names)}
        numbered = [torch.tensor([number[str(label)] for label in labels]) for labels in (queries, gallery)]
        return cls(tuple(names), *numbered)

    def sizes(self, excluded: Groups | None = None) -> tuple[Tensor, Tensor]:
        """Returns of each query how many gallery images are of its class, and how many there are; both int64 [Q].

        Args:
            excluded: Images that are taken out of a query's ranking.
        """
        right = torch.bincount(self.gallery, minlength=len(self.names))[self.queries]
        total = torch.full_like(right, len(self.gallery))
        if excluded is not None:
            # Queries of one class that share a set are counted once: there may be many copies of an image.
            shared = torch.where(excluded.sizes > 0, excluded.firsts * len(self.names) + self.queries, -1)
            distinct, place = shared.unique(return_inverse=True)
            one = torch.empty_like(distinct).scatter_(0, place, torch.arange(len(place)))
            query, item = excluded.chosen(one).pairs()
            same = query[self.queries[one][query] == self.gallery[item]]
            right = right - torch.bincount(same, minlength=len(one))[place]
            total = total - excluded.sizes
        return right, total

    def chosen(self, queries: Tensor) -> Classes:
        """Returns the classes for some of the queries alone, int64."""
        return Classes(self.names, self.queries[queries], self.gallery)


def same_images(queries: Sequence[Hashable], gallery: Sequence[Hashable]) -> Groups:
    """Gives each query the gallery images that are the same one, by what tells images apart, such as their hashes."""
    return Groups.from_keys(queries, gallery)
