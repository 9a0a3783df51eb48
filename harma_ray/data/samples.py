"""What samples and batches are to those who make them, hand them on and train on them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeAlias

import numpy as np

if TYPE_CHECKING:  # read tasks and converters hand samples on without torch: a third of the memory and of the start
    from torch import Tensor

Batch: TypeAlias = "dict[str, Tensor]"
"""A batch: tensors, as `RowTransform.collate` makes them; always with ``row`` and ``caption`` (int64[B])."""

Send: TypeAlias = "Callable[[Tensor], Tensor]"
"""Brings a tensor from the CPU to a model's device, without waiting for it."""

Array: TypeAlias = "np.ndarray | np.generic | Tensor"
"""What a transform may return for a sample: an array, a number, a tensor."""


class RowTransform(ABC):
    """Turns one row of a shard into the arrays of one sample; runs inside Ray Data, so it must pickle."""

    on_cpu: ClassVar[frozenset[str]] = frozenset()
    """Names of what stays on the CPU, as ``row`` and ``caption`` do, when a batch goes to a model's device."""

    @abstractmethod
    def __call__(self, row: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Array]:
        """Transforms a row.

        Args:
            row: The columns of the schema, and ``row`` and ``caption``, the sample.
            rng: Seeded by (seed, epoch, row, caption) alone; the only source of randomness.

        Returns:
            Arrays, of the same names and types in all rows, and by default of equal shapes; see `collate`.

        Raises:
            UserError: If the row cannot be used; the stream adds the row's source.
        """

    def collate(self, samples: Sequence[dict[str, Array]]) -> dict[str, Array]:
        """Returns a batch of samples, to which the stream adds ``row`` and ``caption``.

        By default their arrays are stacked. One for samples that differ in length may pad them or put them end to end.
        Samples are not to be written to, and tensors among them may have become arrays: other processes may have made
        them.
        """
        return {name: np.stack([np.asarray(sample[name]) for sample in samples]) for name in samples[0]}

    def for_device(self) -> Self:
        """Returns a transform that leaves to `finish` what can be done to whole batches; by default nothing."""
        return self

    def finish(self, batch: Batch, send: Send) -> Batch:
        """Does, on the model's device, what is left to do of a batch; by default nothing.

        Args:
            batch: As collated, with ``row`` and ``caption``; all but ``on_cpu`` is on the device.
            send: Brings more there.
        """
        return batch
