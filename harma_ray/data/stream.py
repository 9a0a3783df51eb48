"""Streams of batches: every worker sees its own samples, in an order fixed beforehand (see `harma_ray.data.order`).

The loader is a parameter: `harma_ray.on_ray.stream.ray_batches` reads with Ray Data tasks ahead of the worker;
`local_batches` reads in the process itself. A training stream is one execution over all remaining steps of a run, so
an epoch after the first starts at once. Batches are checked against the order.
"""

import contextlib
import functools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from harma_ray.config import DataConfig
from harma_ray.data.decoding import DecodeInThreads, Decoder, DecodeRows, decoded
from harma_ray.data.order import (
    Chunk,
    IndexedSplit,
    RowsChunk,
    TrainingChunk,
    TrainingOrder,
    chunk_samples,
    iterate_slices,
    worker_rows,
)
from harma_ray.data.samples import Batch, RowTransform
from harma_ray.data.splits import Split, index_rows


@dataclass(frozen=True)
class Worker:
    """One of the processes of a training or an evaluation."""

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"
    """Where batches go."""
    decode_threads: int = 1
    """Threads that decode in this process."""


@dataclass(frozen=True)
class Batches:
    """How a loader turns rows into batches."""

    batch_size: int
    decode: DecodeRows
    num_threads: int
    """Threads that decode, if tasks do not."""
    device: str
    config: DataConfig

    def in_threads(self) -> DecodeInThreads:
        """Returns what decodes in threads of this process."""
        return DecodeInThreads(self.decode, self.num_threads)

    def decoded(self, tables: Generator[pa.Table, None, None], decoder: Decoder[Any]) -> Generator[Batch, None, None]:
        """Yields the batches of tables of so many rows, on the device, prepared ahead of their use; see `decoded`."""
        arrays = decoded(tables, self.collate, decoder, self.config.prefetch_batches)
        with contextlib.closing(arrays) as ready:
            for batch in ready:
                yield self.send(batch)

    def collate(self, table: pa.Table, samples: list[dict[str, Any]]) -> Batch:
        """Puts samples together to tensors on CPU, in memory from which they can be sent."""
        arrays = self.decode.collate(table, samples)
        return {name: self._sendable(torch.as_tensor(array)) for name, array in arrays.items()}

    def send(self, batch: Batch) -> Batch:
        """Returns a finished batch on the device, but for `RowTransform.on_cpu`; nobody waits for the device."""
        transform = self.decode.transform
        kept = transform.on_cpu | {"row", "caption"}
        sent = {name: value if name in kept else self._sent(value) for name, value in batch.items()}
        return transform.finish(sent, self._sent)

    def _sent(self, tensor: Tensor) -> Tensor:
        return self._sendable(tensor).to(self.device, non_blocking=True)

    def _sendable(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if torch.device(self.device).type == "cuda" else tensor


Loader = Callable[[IndexedSplit, Sequence[Chunk], Batches], Iterator[Batch]]
"""Yields batches of rows, in the order of the chunks that they are read from."""


def local_batches(source: IndexedSplit, chunks: Sequence[Chunk], how: Batches) -> Iterator[Batch]:
    """Yields batches whose rows follow the chunks' order, read and decoded in this process as they are asked for."""
    with contextlib.closing(how.in_threads()) as decoder:
        for table in _tables(source, chunks, how.batch_size):
            yield how.send(how.collate(table, decoder.finish(decoder.begin(table))))


def prefetched_batches(source: IndexedSplit, chunks: Sequence[Chunk], how: Batches) -> Generator[Batch, None, None]:
    """Yields the batches of `local_batches`, prepared ahead of their use."""
    return how.decoded(_tables(source, chunks, how.batch_size), how.in_threads())


def _tables(source: IndexedSplit, chunks: Sequence[Chunk], batch_size: int) -> Generator[pa.Table, None, None]:
    """Reads chunks one after the other; yields the rows of each batch."""
    rest: pa.Table | None = None
    for chunk in chunks:
        table = chunk.read(source)
        table = table if rest is None else pa.concat_tables([rest, table])
        full = len(table) - len(table) % batch_size
        for part in iterate_slices(full, batch_size):
            yield table.slice(part.start, batch_size)
        rest = table.slice(full)
    if rest is not None and len(rest):
        yield rest


class TrainingStream:
    """One worker's training batches."""

    def __init__(
        self, order: TrainingOrder, transform: RowTransform, config: DataConfig, worker: Worker, loader: Loader
    ):
        """Prepares a stream; nothing is read yet.

        Args:
            order: Order of the samples.
            transform: Turns rows into arrays.
            config: How to stream.
            worker: This worker; the number of workers must divide the global batch.
            loader: Makes batches of rows.
        """
        self.order, self._config, self._worker, self._loader = order, config, worker, loader
        on_device = config.augments_on_device(on_gpu=worker.device != "cpu")
        self._decode = DecodeRows(transform.for_device() if on_device else transform, order.seed)

    def steps(self, start_step: int, num_epochs: int, num_parts: int = 1) -> Generator[Batch, None, None]:
        """Yields the batches of all steps from `start_step` (counted over the whole run) to the last epoch's end.

        Args:
            start_step: The first step.
            num_epochs: Epochs of the whole run.
            num_parts: Batches of each step; this worker's share must divide by it.
        """
        worker, per_epoch = self._worker, self.order.steps_per_epoch
        share = self.order.samples_per_step // worker.world_size
        chunk_steps = max(1, chunk_samples(self.order.index, self._config.chunk_mb) // share)
        chunks = []
        for epoch in range(start_step // per_epoch, num_epochs):
            first = max(0, start_step - epoch * per_epoch)
            for part in iterate_slices(per_epoch - first, chunk_steps):
                start, stop = first + part.start, first + part.stop
                rows = (stop - start) * share
                chunks.append(TrainingChunk(epoch, worker.rank, worker.world_size, start, stop, rows))
        if not chunks:
            return
        expected, expected_epoch = np.empty(0), -1
        size = share // num_parts
        how = Batches(size, self._decode, worker.decode_threads, worker.device, self._config)
        for number, batch in enumerate(self._loader(self.order, chunks, how), start_step * num_parts):
            step, part = divmod(number, num_parts)
            epoch = step // per_epoch
            if epoch != expected_epoch:
                expected = self.order.worker_samples(epoch, worker.rank, worker.world_size)
                expected_epoch = epoch
            _check_order(batch, expected[step % per_epoch, part * size : (part + 1) * size])
            yield batch


class EvaluationStream:
    """One worker's rows of a split, each exactly once over all workers."""

    def __init__(
        self, split: Split, config: DataConfig, worker: Worker, loader: Loader, *, max_rows: int | None = None
    ):
        """Prepares a stream; nothing is read yet.

        Arguments as for `TrainingStream`; `max_rows` leaves out what comes after so many rows of the split.
        """
        self.split, self._config, self._worker, self._loader = split, config, worker, loader
        num_rows = split.manifest.rows if max_rows is None else min(max_rows, split.manifest.rows)
        self.rows = worker_rows(num_rows, worker.rank, worker.world_size)

    def over(self, split: Split, *, max_rows: int | None = None) -> Self:
        """Returns a stream of another split, or of part of this one, for the same workers."""
        return type(self)(split, self._config, self._worker, self._loader, max_rows=max_rows)

    @functools.cached_property
    def _source(self) -> IndexedSplit:
        return IndexedSplit(self.split, index_rows(self.split))

    def table(self, columns: Sequence[str]) -> pa.Table:
        """Returns light columns of the whole split, in row order."""
        return self.split.read(list(columns))

    def batches(self, transform: RowTransform, *, batch_size: int) -> Iterable[Batch]:
        """Yields this worker's rows in order; the last batch may be smaller."""
        if not len(self.rows):
            return
        size = chunk_samples(self._source.index, self._config.chunk_mb)
        size -= size % batch_size if size > batch_size else 0
        chunks = [RowsChunk(self.rows[part]) for part in iterate_slices(len(self.rows), size)]
        worker = self._worker
        how = Batches(batch_size, DecodeRows(transform, 0), worker.decode_threads, worker.device, self._config)
        done = 0
        for batch in self._loader(self._source, chunks, how):
            rows = self.rows[done : done + len(batch["row"])]
            _check_order(batch, np.stack([rows, np.zeros_like(rows)], axis=1))
            done += len(rows)
            yield batch


def _check_order(batch: Batch, expected: np.ndarray) -> None:
    seen = torch.stack([batch["row"], batch["caption"]], dim=1).numpy()
    if not np.array_equal(seen, expected):
        raise RuntimeError("the loader delivered samples in another order than planned; the stream cannot be trusted")
