"""Runs the tasks of a conversion on a Ray cluster."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from harma_ray.errors import UserError
from harma_ray.on_ray.quirks import closing_batches, quiet_data

PlanT = TypeVar("PlanT")


def map_with_ray(function: Callable[[PlanT], Any], plans: Sequence[PlanT], *, num_cpus: float = 1) -> Iterator[Any]:
    """Calls a function on each plan as tasks of Ray Data, and yields results as they come.

    Ray must have been initialised.

    Args:
        function: Called in worker processes; what it raises as ``UserError`` is raised here, without Ray's wrapping.
        plans: One task each.
        num_cpus: Logical CPUs of a task.
    """
    import ray.data

    def call(row: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"result": pickle.dumps(function(pickle.loads(row["plan"]))), "error": ""}
        except UserError as error:
            return {"result": b"", "error": str(error)}

    quiet_data()
    items = [{"plan": pickle.dumps(plan)} for plan in plans]
    tasks = ray.data.from_items(items, override_num_blocks=len(items)).map(call, num_cpus=num_cpus)
    tasks.context.enable_progress_bars = False
    tasks.context.print_on_execution_start = False
    with closing_batches(tasks.iter_rows()) as rows:
        for row in rows:
            if row["error"]:
                raise UserError(row["error"])
            yield pickle.loads(row["result"])
