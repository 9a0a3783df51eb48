"""What samples and batches are to those who make them, hand them on and train on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from torch import Tensor

Batch = dict[str, Tensor]
"""A batch: tensors whose first dimension is the batch; always with ``row`` and ``caption`` (int64[B])."""

Array = np.ndarray | np.generic | Tensor
"""What a transform may return for a sample: an array, a number, a tensor."""


class RowTransform(Protocol):
    """Turns one row of a shard into the arrays of one sample; runs inside Ray Data, so it must pickle."""

    def __call__(self, row: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Array]:
        """Transforms a row.

        Args:
            row: The columns of the schema, and ``row`` and ``caption``, the sample.
            rng: Seeded by (seed, epoch, row, caption) alone; the only source of randomness.

        Returns:
            Arrays of equal shapes over all rows.

        Raises:
            UserError: If the row cannot be used; the stream adds the row's source.
        """
        ...
