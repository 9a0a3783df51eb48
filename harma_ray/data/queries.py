"""The queries of composed retrieval that go with a gallery, as positions in it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from harma_ray.data.splits import Split
from harma_ray.errors import UserError, count


@dataclass(frozen=True)
class ComposedQueries:
    """Q queries over a gallery of G rows."""

    pair_ids: list[int]
    """The data set's own numbers."""
    captions: list[list[str]]
    """One or two of each query, as annotated."""
    reference: Tensor
    """int64[Q], rows of the reference images."""
    target: Tensor
    """int64[Q], rows of the target images; -1 = not known."""
    members: list[list[int]] | None
    """Rows of the images of each query's subset; None = there are no subsets (FashionIQ)."""
    categories: list[str] | None
    """Category of each query; None = there are none."""
    gallery_categories: list[str] | None
    """Category of each row of the gallery; None = there are none."""
    names: list[str]
    """G names of images."""
    text_vectors: Tensor | None
    """fp32[Q, F], if the split holds vectors."""
    origin: str
    """The split, for messages."""

    @classmethod
    def of(cls, split: Split) -> Self:
        """Reads the queries of a split.

        Raises:
            UserError: If there are none, or they name images that the gallery has not.
        """
        table = split.queries()
        gallery = split.read(["source", "label_name"])
        columns = {name: table.column(name).to_pylist() for name in table.column_names}
        names, labels = (gallery.column(name).to_pylist() for name in ("source", "label_name"))
        categories = None if None in columns["category"] else columns["category"]
        labels = labels if categories else [None] * len(names)
        rows: dict[tuple[str | None, str], int] = {key: row for row, key in enumerate(zip(labels, names, strict=True))}

        def row_of(name: str | None, category: str | None = None) -> int:
            return -1 if name is None else rows.get((category, name), -2)

        own = categories or [None] * len(table)
        reference, target = (list(map(row_of, columns[side], own)) for side in ("reference", "target"))
        members = [list(map(row_of, names)) for names in columns["members"]]
        unknown = [
            source
            for source, changed, answer, others in zip(columns["source"], reference, target, members, strict=True)
            if changed < 0 or -2 in (answer, *others)
        ]
        if unknown:
            raise UserError(
                f"{split.path} has {count(len(unknown), 'query')} with images that its gallery has not, such as "
                f"{', '.join(unknown[:5])}; convert the split again"
            )
        vectors = columns.get("text_vectors")
        return cls(
            pair_ids=columns["pair_id"],
            captions=columns["captions"],
            reference=torch.tensor(reference),
            target=torch.tensor(target),
            members=members if any(members) else None,
            categories=categories,
            gallery_categories=[label or "" for label in labels] if categories else None,
            names=names,
            text_vectors=vectors and torch.from_numpy(np.stack([np.frombuffer(row[0], np.float32) for row in vectors])),
            origin=str(split.path),
        )

    def require_targets(self) -> Tensor:
        """Returns the targets.

        Raises:
            UserError: If some are not known.
        """
        unknown = int((self.target < 0).sum())
        if unknown:
            raise UserError(
                f"{unknown} of {len(self.target)} queries of {self.origin} have no target, so nothing can be measured "
                "there; name splits with answers (data.val_split, data.test_split), or make a submission with "
                "`launch.py predict`"
            )
        return self.target

    def texts(self) -> Sequence[str]:
        """Returns the captions of each query in one line, for people."""
        return [" / ".join(captions) for captions in self.captions]
