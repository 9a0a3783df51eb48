"""Batches through Ray Data: chunks are read in tasks, ahead of the worker, in order.

Kept free of torch: the process of a read task starts in half the time and memory.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray
import ray.data
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from harma_ray.data.decoding import CLOSING_SECONDS
from harma_ray.data.order import Chunk, IndexedSplit
from harma_ray.on_ray.closing import closing_batches
from harma_ray.on_ray.quirks import Pause, quiet_data

if TYPE_CHECKING:
    from harma_ray.data.stream import Batches

THREADS_BESIDE_TASKS = 4
"""Threads that decode the first chunk at most, where tasks decode the others: more keep a GPU's training waiting."""

CHUNKS_AHEAD = 4
"""Chunks of one worker that may lie in Ray's object store; what tasks decode for it lies there beside them."""


def ray_batches(source: IndexedSplit, chunks: Sequence[Chunk], how: Batches) -> Iterator[dict[str, Any]]:
    """Yields batches whose rows follow the chunks' order.

    The first chunk, if it is whole batches, is read and decoded by threads of this process, while the processes start
    that read the others, in one Ray Data execution. A single chunk is read here as well and, if no tasks decode, all
    chunks of a split that would fit one.

    Args:
        source: What the chunks read from; put into the object store once.
        chunks: What is read at a time.
        how: Batch size, decoding and device.
    """
    from harma_ray.data.stream import prefetched_batches  # torch, which this process has

    config, here = how.config, how
    in_tasks = config.decodes_in_tasks(on_gpu=how.device != "cpu")
    if len(chunks) == 1 or (source.index.binary_bytes <= config.chunk_mb * 2**20 and not in_tasks):
        yield from prefetched_batches(source, chunks, how)
        return
    if in_tasks:
        here = replace(how, num_threads=min(how.num_threads, THREADS_BESIDE_TASKS))
    own = 0 if chunks[0].num_rows % how.batch_size else 1  # no batch may lie in two
    first, others = prefetched_batches(source, chunks[:own], here), _read_by_tasks(source, chunks[own:], how, in_tasks)
    with _begun(others) as begun:
        yield from first
        ready = begun.result()
        while ready:
            yield ready.pop()
        yield from others


@contextlib.contextmanager
def _begun(batches: Generator[Any, None, None]) -> Iterator[Future[list[Any]]]:
    """Has a thread take the first batch, if there is one; who takes it from the list is the only one that holds it.

    The batches are closed on leaving or, if the first takes too long, by the thread.
    """
    first: Future[list[Any]] = Future()
    closing = threading.Lock()
    left = False

    def begin() -> None:
        try:
            found = list(itertools.islice(batches, 1))
        except BaseException as error:
            first.set_exception(error)
            return
        with closing:
            first.set_result(found)
        if left:
            batches.close()

    threading.Thread(target=begin, daemon=True).start()
    try:
        yield first
    finally:
        wait([first], CLOSING_SECONDS)
        with closing:
            left = not first.done()
        if not left:
            batches.close()


def _read_by_tasks(
    source: IndexedSplit, chunks: Sequence[Chunk], how: Batches, in_tasks: bool
) -> Generator[dict[str, Any], None, None]:
    from harma_ray.on_ray.decoding import DecodeInTasks

    quiet_data()
    context, config = ray.data.DataContext.get_current(), how.config
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.custom_execution_callback_classes = [Pause]  # type: ignore[list-item]
    # One block a chunk: a task with more to hand over keeps its CPU until they are taken, while who takes them waits
    # for tasks that decode, and these for the CPU, until Ray Data lets go, seconds later.
    context.target_max_block_size = None
    context.execution_options.resource_limits = ray.data.ExecutionResources(
        object_store_memory=CHUNKS_AHEAD * config.chunk_mb * 2**20
    )
    dataset = ray.data.read_datasource(
        _ChunkSource(ray.put(source), chunks), override_num_blocks=len(chunks), num_cpus=config.task_cpus
    )
    tables = dataset.iter_batches(
        batch_size=how.batch_size, batch_format="pyarrow", prefetch_batches=config.prefetch_batches
    )
    decoder = DecodeInTasks(how.decode, config.task_cpus, config.prefetch_batches) if in_tasks else how.in_threads()
    yield from how.decoded(_closing(tables), decoder)


def _closing(tables: Iterable[pa.Table]) -> Generator[pa.Table, None, None]:
    with closing_batches(tables) as ready:
        yield from ready


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
