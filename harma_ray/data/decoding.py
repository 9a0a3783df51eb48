"""From tables of rows to batches, several at a time and in their order.

What applies the transform is a `Decoder`: threads of this process here, Ray tasks in `harma_ray.on_ray.decoding`. It
begins batches ahead of their use, so that all that decodes has work while one batch is waited for.
"""

import contextlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, Self, TypeVar

import numpy as np
import pyarrow as pa

from harma_ray.data.order import iterate_slices
from harma_ray.data.samples import Array, RowTransform
from harma_ray.errors import UserError

T = TypeVar("T")
Handle = TypeVar("Handle")


class DecodeRows:
    """Applies a row transform to a table of rows; augmentation is seeded by (seed, epoch, row, caption) alone."""

    def __init__(self, transform: RowTransform, seed: int):
        """Prepares the transform.

        Args:
            transform: Turns one row into arrays.
            seed: The run's seed.
        """
        self.transform, self.seed = transform, seed

    def __call__(self, table: pa.Table) -> dict[str, Array]:
        """Returns a batch: the transform's, and ``row`` and ``caption``.

        Raises:
            UserError: Naming the first row that cannot be used.
        """
        return self.collate(table, self.samples(table))

    def samples(self, table: pa.Table) -> list[dict[str, Any]]:
        """Returns what the transform makes of each row; errors as above."""
        return [self._sample(row) for row in table.to_pylist()]

    def collate(self, table: pa.Table, samples: list[dict[str, Any]]) -> dict[str, Array]:
        """Returns the batch of a table's samples."""
        batch = self.transform.collate(samples)
        return {**batch, **{name: np.array(table[name].to_numpy()) for name in ("row", "caption")}}

    def _sample(self, row: dict[str, Any]) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, row["epoch"], row["row"], row["caption"]])
        try:
            return self.transform(row, rng)
        except UserError as error:
            raise UserError(f"row {row['row']} ({row['source']}): {error}") from error


class Decoder(ABC, Generic[Handle]):
    """Decodes several tables at a time; a context, whose end gives up what has been begun and not been waited for."""

    def __enter__(self) -> Self:
        """Returns the decoder."""
        return self

    def __exit__(self, *error: object) -> None:
        """Closes it."""
        self.close()

    @abstractmethod
    def begin(self, table: pa.Table) -> Handle:
        """Begins to decode a table, without waiting; any thread may do so."""

    @abstractmethod
    def finish(self, handle: Handle) -> list[dict[str, Any]]:
        """Waits for the samples of a table; they must not be written to.

        Raises:
            UserError: Naming the first row that cannot be used. Nothing else can be decoded then.
        """

    @abstractmethod
    def ahead(self) -> int:
        """Returns how many tables should have been begun before the first of them is waited for."""

    @abstractmethod
    def close(self) -> None:
        """Gives up what has been begun; who waits for it gets an error, and nothing can be begun any more."""


class DecodeInThreads(Decoder[list[Future[list[dict[str, Any]]]]]):
    """Decodes in threads of this process."""

    def __init__(self, decode: DecodeRows, num_threads: int, num_tables: int):
        """Starts no thread yet.

        Args:
            decode: What they apply.
            num_threads: Threads.
            num_tables: See `Decoder.ahead`.
        """
        self._decode, self._num_threads, self._num_tables = decode, num_threads, num_tables
        self._pool = ThreadPoolExecutor(num_threads)

    def begin(self, table: pa.Table) -> list[Future[list[dict[str, Any]]]]:
        """Gives each thread two parts, so that none waits long for the others."""
        size = -(-len(table) // (2 * self._num_threads))
        parts = iterate_slices(len(table), size)
        return [self._pool.submit(self._decode.samples, table.slice(part.start, size)) for part in parts]

    def finish(self, handle: list[Future[list[dict[str, Any]]]]) -> list[dict[str, Any]]:
        """Puts the parts together."""
        try:
            return [sample for part in handle for sample in part.result()]
        except BaseException:
            self.close()
            raise

    def ahead(self) -> int:
        """Returns the number that it was made with."""
        return self._num_tables

    def close(self) -> None:
        """Waits for the rows that are being decoded."""
        self._pool.shutdown(cancel_futures=True)


def decoded(
    tables: Iterable[pa.Table],
    collate: Callable[[pa.Table, list[dict[str, Any]]], T],
    decoder: Decoder[Any],
    ahead: int,
) -> Generator[T, None, None]:
    """Yields the batches of some tables, in order; a thread has begun the next ones, another has put some together.

    Args:
        tables: One for each batch.
        collate: Puts the samples of a table together.
        decoder: Makes samples; is closed at the end.
        ahead: Batches that are put together ahead of their use.
    """
    begun = ((table, decoder.begin(table)) for table in tables)
    with contextlib.closing(prefetched(begun, decoder.ahead)) as waiting:
        batches = (collate(table, decoder.finish(handle)) for table, handle in waiting)
        with contextlib.closing(prefetched(batches, lambda: ahead)) as ready, decoder:
            yield from ready


def prefetched(iterator: Iterator[T], ahead: Callable[[], int]) -> Generator[T, None, None]:
    """Yields what an iterator yields, asked for by a thread ahead of its use.

    Args:
        iterator: Never yields None; is waited for at the end, if the thread is within it.
        ahead: How far ahead, asked again before each; at least 1.
    """
    pool = ThreadPoolExecutor(1)
    waiting: deque[Future[T | None]] = deque()

    def fill() -> None:
        while len(waiting) < ahead():
            waiting.append(pool.submit(next, iterator, None))

    try:
        fill()
        while (value := waiting.popleft().result()) is not None:
            fill()
            yield value
    finally:
        pool.shutdown(cancel_futures=True)
