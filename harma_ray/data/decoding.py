"""From tables of rows to batches, several at a time and in their order.

What applies the transform is a `Decoder`: threads of this process here, Ray tasks in `harma_ray.on_ray.decoding`. It
begins batches ahead of their use, so that all that decodes has work while one batch is waited for.
"""

import contextlib
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa

from harma_ray.data.order import iterate_slices
from harma_ray.data.samples import Array, RowTransform
from harma_ray.errors import UserError

CLOSING_SECONDS = 10
"""How long the end of a stream waits for what it is being read from. If that comes later, it is closed then."""

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
    """Decodes several tables at a time."""

    @abstractmethod
    def begin(self, table: pa.Table) -> Handle:
        """Begins to decode a table of at least one row, without waiting; any thread may do so."""

    @abstractmethod
    def finish(self, handle: Handle) -> list[dict[str, Any]]:
        """Waits for the samples of a table; they must not be written to.

        Raises:
            UserError: Naming the first row that cannot be used. Nothing else can be decoded then.
        """

    @abstractmethod
    def ahead(self) -> int:
        """Returns how many tables should have been begun beside that which is waited for."""

    @abstractmethod
    def close(self) -> None:
        """Gives up what has been begun: who waits for it, or begins something, gets an error before long."""


class DecodeInThreads(Decoder[list[Future[list[dict[str, Any]]]]]):
    """Decodes in threads of this process."""

    def __init__(self, decode: DecodeRows, num_threads: int):
        """Starts no thread yet.

        Args:
            decode: What they apply.
            num_threads: Threads.
        """
        self._decode, self._num_threads = decode, num_threads
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
        """Returns 1: the threads have work while a table is put together."""
        return 1

    def close(self) -> None:
        """Waits for the parts that are being decoded."""
        self._pool.shutdown(cancel_futures=True)


class Ahead(Iterator[T]):
    """The values of a generator, which a thread runs ahead of their use.

    The thread runs it and closes it, for nobody else can while it waits for a value. The process ends without it.
    """

    def __init__(self, values: Generator[T, None, None], ahead: Callable[[], int]):
        """Starts the thread.

        Args:
            values: The generator.
            ahead: How many values may lie ready, asked again before each; at least 1.
        """
        self._values, self._allowed = values, ahead
        self._ready: deque[T] = deque()
        self._changed = threading.Condition()
        self._is_closed = self._is_done = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __next__(self) -> T:
        """Waits for the next value; ends after the last, and if somebody closes this.

        Raises:
            BaseException: What the generator has raised.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._is_done or self._is_closed)
            if self._ready and not self._is_closed:
                self._changed.notify_all()
                return self._ready.popleft()
        if self._error is not None:
            raise self._error
        raise StopIteration

    def close(self) -> None:
        """Has the thread end as soon as it gets out of the generator; does not wait for it."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def join(self, seconds: float) -> None:
        """Waits for the thread's end, so long at most."""
        self._thread.join(max(0.0, seconds))

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            with contextlib.closing(self._values):
                while self._has_room():
                    value = next(self._values)
                    with self._changed:
                        self._ready.append(value)
                        self._changed.notify_all()
                    del value
        except StopIteration:
            pass
        except BaseException as raised:
            error = raised
        with self._changed:
            self._is_done, self._error = True, error
            self._changed.notify_all()

    def _has_room(self) -> bool:
        """Waits for room; tells whether there is any use for it."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or len(self._ready) < self._allowed())
            return not self._is_closed


def decoded(
    tables: Generator[pa.Table, None, None],
    collate: Callable[[pa.Table, list[dict[str, Any]]], T],
    decoder: Decoder[Any],
    ahead: int,
) -> Generator[T, None, None]:
    """Yields the batches of some tables, in order; a thread has begun the next ones, another has put some together.

    Args:
        tables: One for each batch; closed at the end, by the thread that asks for them. If it still waits for one, its
            end is waited for `CLOSING_SECONDS` at most.
        collate: Puts the samples of a table together.
        decoder: Makes samples; is closed at the end.
        ahead: Batches that are put together ahead of their use.
    """

    def begin() -> Generator[tuple[pa.Table, Any], None, None]:
        with contextlib.closing(tables):
            for table in tables:
                yield table, decoder.begin(table)

    def together(taken: tuple[pa.Table, Any]) -> T:
        table, handle = taken
        return collate(table, decoder.finish(handle))

    def finish() -> Generator[T, None, None]:
        yield from map(together, begun)  # which holds nothing meanwhile

    begun = Ahead(begin(), decoder.ahead)
    batches = Ahead(finish(), lambda: ahead)
    try:
        yield from batches
    finally:
        begun.close()
        batches.close()
        decoder.close()
        until = time.monotonic() + CLOSING_SECONDS
        for thread in (batches, begun):
            thread.join(until - time.monotonic())
