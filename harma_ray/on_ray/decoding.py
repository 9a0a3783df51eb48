"""Decoding in Ray tasks, on CPUs that no worker has reserved: how a worker on a GPU gets most of its images.

A GPU's step is short, and what launches it is Python. Threads of the same process that decode take Python's lock from
it thousands of times a step (``benchmarks/contention.py``); other processes do not.
"""

import itertools
import math
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch

from harma_ray.data.decoding import Decoder, DecodeRows
from harma_ray.data.order import iterate_slices
from harma_ray.errors import UserError

ROWS_OF_A_TASK = 64
"""Rows that a task decodes at most. With 32, 428 crops take the worker's process 66-84 ms in place of 53-60."""
MOST_TASKS = 64
"""Tasks that are begun ahead for a worker, unless the batches that the settings want prepared take more."""
STORE_SHARE = 0.25
"""Of a worker's share of Ray's object store, what samples that are decoded ahead may take; likewise."""

_LOOK_SECONDS = 0.5


class DecodeInTasks(Decoder[list[ray.ObjectRef]]):
    """Decodes in Ray tasks, of several tables at a time, so that they keep all CPUs busy whatever a batch's size."""

    def __init__(self, decode: DecodeRows, task_cpus: float, num_tables: int):
        """Puts the transform into Ray's object store, once for all tables.

        Args:
            decode: What the tasks apply.
            task_cpus: CPUs that Ray reserves for each.
            num_tables: Tables that are begun ahead at least.
        """
        self._decode = ray.put(decode)
        # "DEFAULT": outside the placement group of a trial, whose CPUs are all its worker's
        self._task = _decoded.options(num_cpus=task_cpus, scheduling_strategy="DEFAULT")
        self._num_tables, self._most_tables = num_tables, num_tables
        resources = ray.cluster_resources()
        self._num_tasks = tasks_ahead(resources, task_cpus)
        self._num_bytes = STORE_SHARE * resources.get("object_store_memory", 0) / max(1, resources.get("GPU", 0))
        self._closed = False

    def begin(self, table: pa.Table) -> list[ray.ObjectRef]:
        """Starts tasks of about as many rows each."""
        count = -(-len(table) // ROWS_OF_A_TASK)
        size = -(-len(table) // count)
        parts = [table.slice(part.start, size) for part in iterate_slices(len(table), size)]
        self._check()
        return [self._task.remote(self._decode, part) for part in parts]

    def finish(self, handle: list[ray.ObjectRef]) -> list[dict[str, Any]]:
        """Puts the parts together; they are arrays, also where the transform has made tensors."""
        parts = []
        try:
            for reference in handle:
                self._check()
                parts.append(self._part(reference))
        except BaseException:
            self.close()
            raise
        most = self._num_bytes // max(1, sum(part.num_bytes for part in parts))
        self._most_tables = int(max(self._num_tables, min(most, math.ceil(self._num_tasks / len(handle)))))
        return [sample for part in parts for sample in part.samples()]

    def _part(self, reference: ray.ObjectRef) -> "Joined":
        while not ray.wait([reference], timeout=_LOOK_SECONDS)[0]:
            self._check()
        part = ray.get(reference)
        if isinstance(part, Exception):
            raise part
        return part

    def _check(self) -> None:
        if self._closed or not ray.is_initialized():  # else a call would start a cluster
            raise RuntimeError("the stream has been closed")

    def ahead(self) -> int:
        """Returns as many as keep all CPUs of the worker's share of the cluster busy, as far as memory goes."""
        return self._most_tables

    def close(self) -> None:
        """Begins nothing more. What has been begun is done, for nobody, but before long.

        It is not cancelled: now and then the answer of a task that is cancelled as it ends makes Ray 2.60 end this
        process (``TaskManager::CompletePendingTask``).
        """
        self._closed = True


def tasks_ahead(resources: Mapping[str, float], task_cpus: float) -> int:
    """Returns how many tasks a worker should have begun: half as many again as its share of the CPUs runs at a time.

    More than can run, for workers have reserved some of these CPUs; and workers without GPUs, and those that share one,
    all take the same share. Those that wait cost nothing but the memory of their rows.

    Args:
        resources: Those of the cluster, of which each GPU has a share of the CPUs.
        task_cpus: CPUs of a task.
    """
    share = resources.get("CPU", 1) / max(1, resources.get("GPU", 0))
    return min(MOST_TASKS, math.ceil(1.5 * share / task_cpus))


@dataclass(frozen=True)
class Joined:
    """Samples whose arrays lie end to end: those that lie alone take the worker several times as long to get."""

    columns: Mapping[str, tuple[np.ndarray, Sequence[tuple[int, ...]]]]
    """By name, the values of all samples and the shape of each."""

    @classmethod
    def of(cls, samples: Sequence[Mapping[str, Any]]) -> "Joined":
        """Joins samples.

        Args:
            samples: At least one, each with an array at least; of any shapes.

        Raises:
            TypeError: Their arrays differ in names or types.
        """
        rows = [{name: np.asarray(value) for name, value in sample.items()} for sample in samples]
        kinds = [{name: str(array.dtype) for name, array in row.items()} for row in rows]
        for kind in kinds:
            if kind != kinds[0]:
                raise TypeError(
                    f"a transform must return arrays of the same names and types in all rows, got {kinds[0]} and {kind}"
                )
        return cls({
            name: (np.concatenate([row[name].ravel() for row in rows]), [row[name].shape for row in rows])
            for name in rows[0]
        })  # fmt: skip

    @property
    def num_bytes(self) -> int:
        """Of all arrays."""
        return sum(values.nbytes for values, _ in self.columns.values())

    def samples(self) -> Iterator[dict[str, np.ndarray]]:
        """Yields the samples."""
        split = [_split(values, shapes) for values, shapes in self.columns.values()]
        for arrays in zip(*split, strict=True):
            yield dict(zip(self.columns, arrays, strict=True))


def _split(values: np.ndarray, shapes: Sequence[tuple[int, ...]]) -> Iterable[np.ndarray]:
    ends = list(itertools.accumulate(map(math.prod, shapes)))
    for start, end, shape in zip([0, *ends], ends, shapes, strict=False):
        yield values[start:end].reshape(shape)


@ray.remote
def _decoded(decode: DecodeRows, table: pa.Table) -> Joined | Exception:
    """Returns what goes wrong instead of raising it, for of that which nobody asks for Ray would tell the terminal."""
    torch.set_num_threads(1)  # several such processes may share a CPU
    try:
        return Joined.of(decode.samples(table))
    except Exception as error:
        if not isinstance(error, UserError):
            error.add_note(traceback.format_exc())
        return error
