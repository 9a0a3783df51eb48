"""Decoding in Ray tasks, on CPUs that no worker has reserved: how a worker on a GPU gets most of its images.

A GPU's step is short, and what launches it is Python. Threads of the same process that decode take Python's lock from
it thousands of times a step (``benchmarks/contention.py``); other processes do not.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.exceptions import RayTaskError

from harma_ray.data.order import iterate_slices
from harma_ray.data.stream import DecodeRows
from harma_ray.errors import UserError

TASKS_OF_A_BATCH = 16
"""Tasks that share a batch at most."""
LEAST_ROWS = 8
"""Rows of a task at least, if the batch has so many."""


class DecodeInTasks(DecodeRows):
    """Makes a batch as `DecodeRows` does; its samples come from tasks, and are put together in this process."""

    def __init__(self, decode: DecodeRows, task_cpus: float):
        """Puts the transform into Ray's object store, once for all batches.

        Args:
            decode: What the tasks apply.
            task_cpus: CPUs that Ray reserves for each.
        """
        super().__init__(decode.transform, decode.seed)
        self._decode = ray.put(DecodeRows(decode.transform, decode.seed))
        # "DEFAULT": outside the placement group of a trial, whose CPUs are all its worker's
        self._task = _decoded.options(num_cpus=task_cpus, scheduling_strategy="DEFAULT")

    def with_threads(self, num_threads: int) -> DecodeRows:
        """Returns itself: its tasks have a thread each."""
        return self

    def samples(self, table: pa.Table) -> list[dict[str, Any]]:
        """Returns the samples of the rows, in their order, as arrays that must not be written to."""
        size = max(LEAST_ROWS, -(-len(table) // TASKS_OF_A_BATCH))
        parts = iterate_slices(len(table), size)
        tasks = [self._task.remote(self._decode, table.slice(part.start, size)) for part in parts]
        try:
            return [sample for part in ray.get(tasks) for sample in part]
        except BaseException as error:
            for task in tasks if ray.is_initialized() else ():
                ray.cancel(task)
            if isinstance(error, RayTaskError) and isinstance(error.cause, UserError):
                raise error.cause from None
            raise


@ray.remote
def _decoded(decode: DecodeRows, table: pa.Table) -> list[dict[str, Any]]:
    torch.set_num_threads(1)  # several such processes may share a CPU
    return [{name: np.asarray(value) for name, value in sample.items()} for sample in decode.samples(table)]
