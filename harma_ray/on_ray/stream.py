"""Batches through Ray Data: chunks are read in tasks, ahead of the worker, in order.

Kept free of torch: the process of a read task starts in half the time and memory.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray
import ray.data
from ray.data.block import BlockMetadata
from ray.data.collate_fn import ArrowBatchCollateFn
from ray.data.datasource import Datasource, ReadTask

from harma_ray.data.order import Chunk, IndexedSplit
from harma_ray.on_ray.closing import closing_batches
from harma_ray.on_ray.quirks import Pause, quiet_data

if TYPE_CHECKING:
    from harma_ray.data.stream import Batches

BATCHES_AT_ONCE = 4
"""Batches that Ray Data collates at once, each in a thread of its own, if as many are prefetched (Ray 2.60). Threads
inside a batch on top of these would only wait for each other."""

CHUNKS_AHEAD = 4
"""Chunks of one worker that may lie in Ray's object store; what tasks decode for it lies there beside them."""


def ray_batches(source: IndexedSplit, chunks: Sequence[Chunk], how: Batches) -> Iterator[dict[str, Any]]:
    """Yields batches whose rows follow the chunks' order.

    A split that fits one chunk is read in this process. Of larger ones that is the first chunk alone, while the
    processes start that read the others, in one Ray Data execution. It is decoded here, too, in threads.

    Args:
        source: What the chunks read from; put into the object store once.
        chunks: What is read at a time; the rows of the first divide by the batch size, if there are more.
        how: Batch size, decoding and device.
    """
    from harma_ray.data.stream import prefetched_batches  # torch, which this process has
    from harma_ray.on_ray.decoding import DecodeInTasks

    config, first, later = how.config, chunks[:1], chunks[1:]
    in_tasks = config.decodes_in_tasks(on_gpu=how.device != "cpu")
    is_small = source.index.binary_bytes <= config.chunk_mb * 2**20
    if not later or (is_small and not in_tasks):
        yield from prefetched_batches(source, chunks, how)
        return
    rest = replace(how, decode=DecodeInTasks(how.decode, config.task_cpus)) if in_tasks else how
    others = prefetched_batches(source, later, rest) if is_small else _read_by_tasks(source, later, rest)
    with contextlib.closing(others), ThreadPoolExecutor(1) as pool:
        begun = pool.submit(next, others, None)
        yield from prefetched_batches(source, first, how)
        if (batch := begun.result()) is not None:
            yield batch
        yield from others


def _read_by_tasks(
    source: IndexedSplit, chunks: Sequence[Chunk], how: Batches
) -> Generator[dict[str, Any], None, None]:
    quiet_data()
    context, config = ray.data.DataContext.get_current(), how.config
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.custom_execution_callback_classes = [Pause]  # type: ignore[list-item]
    context.execution_options.resource_limits = ray.data.ExecutionResources(
        object_store_memory=CHUNKS_AHEAD * config.chunk_mb * 2**20
    )
    dataset = ray.data.read_datasource(
        _ChunkSource(ray.put(source), chunks), override_num_blocks=len(chunks), num_cpus=config.task_cpus
    )
    at_once = min(BATCHES_AT_ONCE, config.prefetch_batches)
    batches = dataset.iter_torch_batches(
        batch_size=how.batch_size,
        prefetch_batches=config.prefetch_batches,
        device="cpu",
        collate_fn=_Collate(replace(how, decode=how.decode.shared_by(at_once))),
    )
    with closing_batches(batches) as ready:
        for batch in ready:
            yield how.send(batch)


class _ChunkSource(Datasource):
    """A Ray Data source with one read task a chunk."""

    def __init__(self, source: ray.ObjectRef, chunks: Sequence[Chunk]):
        super().__init__()
        self._source, self._chunks = source, chunks

    def get_name(self) -> str:
        return "Shards"

    def get_read_tasks(self, parallelism: int, per_task_row_limit: Any = None, data_context: Any = None) -> list:
        return [
            ReadTask(
                functools.partial(_read_chunk, self._source, chunk),
                BlockMetadata(num_rows=chunk.num_rows, size_bytes=None, input_files=None, exec_stats=None),
            )
            for chunk in self._chunks
        ]

    def estimate_inmemory_data_size(self) -> int | None:
        return None


def _read_chunk(source: ray.ObjectRef, chunk: Chunk) -> Iterator[pa.Table]:
    yield chunk.read(_fetch(source))


@functools.lru_cache(maxsize=4)
def _fetch(reference: ray.ObjectRef) -> IndexedSplit:
    return ray.get(reference)


class _Collate(ArrowBatchCollateFn):
    def __init__(self, how: Batches):
        super().__init__()
        self._how = how

    def __call__(self, batch: pa.Table) -> dict[str, Any]:
        return self._how.collate(batch)
