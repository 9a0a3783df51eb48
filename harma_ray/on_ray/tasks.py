"""Calls functions on a Ray cluster, in tasks or in processes that hold something, and hands on what users can mend."""

import pickle
from collections.abc import Callable, Generator, Sequence
from functools import cached_property, partial
from typing import Any, TypeVar

from harma_ray.errors import UserError, WorkerDied, find_user_error
from harma_ray.on_ray.closing import closing_batches
from harma_ray.on_ray.deaths import why_died
from harma_ray.on_ray.quirks import map_without_restarts, quiet_data

PlanT = TypeVar("PlanT")
ResultT = TypeVar("ResultT")
_BLOCKS = 200
"""Most pieces that the plans of actors are cut into."""


def map_with_ray(function: Callable[[PlanT], ResultT], plans: Sequence[PlanT]) -> Generator[ResultT]:
    """Calls a function on each plan as tasks of Ray Data, and yields results as they come.

    Ray must have been initialised.

    Args:
        function: Called in worker processes; what it raises as ``UserError`` is raised here, without Ray's wrapping.
        plans: One task each, with one logical CPU.

    Raises:
        WorkerDied: If processes end that work on one, again and again.
    """
    call = partial(_attempt, function)
    yield from _run(lambda rows: rows.map(call, num_cpus=1), plans, len(plans))


def map_in_actors(
    build: Callable[[], Callable[[PlanT], ResultT]], plans: Sequence[PlanT], *, num_actors: int, use_gpu: bool
) -> Generator[ResultT]:
    """Calls on each plan what was built once in each of some processes, and yields results in the plans' order.

    Ray must have been initialised.

    Args:
        build: Returns what is called; what either raises as ``UserError`` is raised here, without Ray's wrapping.
        plans: At least one.
        num_actors: Processes.
        use_gpu: Whether each of them takes a GPU.

    Raises:
        WorkerDied: If one of the processes ends.
    """
    from ray.data import ActorPoolStrategy

    options = {"compute": ActorPoolStrategy(size=num_actors), "num_gpus": 1 if use_gpu else 0}
    start = partial(map_without_restarts, function=_Actor, fn_constructor_args=(build,), **options)
    yield from _run(start, plans, min(len(plans), _BLOCKS), ordered=True)


class _Actor:
    """Holds what was built, from the first plan on: a mistake in building comes back like any other."""

    def __init__(self, build: Callable[[], Callable[[Any], Any]]):
        self._build = build

    @cached_property
    def _function(self) -> Callable[[Any], Any]:
        return self._build()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return _attempt(lambda plan: self._function(plan), row)


def _attempt(function: Callable[[Any], Any], row: dict[str, Any]) -> dict[str, Any]:
    """Returns the result of a plan, or the user's error: Ray would wrap an exception in its own traces."""
    try:
        return {"result": pickle.dumps(function(pickle.loads(row["plan"]))), "error": ""}
    except Exception as raised:
        error = find_user_error(raised)
        if error is None:
            raise
        return {"result": b"", "error": str(error)}


def _run(
    start: Callable[[Any], Any], plans: Sequence[Any], num_blocks: int, *, ordered: bool = False
) -> Generator[Any]:
    """Yields what an attempt at each plan gives, started on a Ray data set of the plans."""
    import ray.data
    from ray.exceptions import OutOfMemoryError, RayActorError, WorkerCrashedError

    quiet_data()
    rows = ray.data.from_items([{"plan": pickle.dumps(plan)} for plan in plans], override_num_blocks=num_blocks)
    rows.context.enable_progress_bars = rows.context.print_on_execution_start = False
    rows.context.execution_options.preserve_order = ordered
    try:
        with closing_batches(start(rows).iter_rows()) as found:
            for row in found:
                if row["error"]:
                    raise UserError(row["error"])
                yield pickle.loads(row["result"])
    except (RayActorError, WorkerCrashedError, OutOfMemoryError) as error:
        raise WorkerDied(f"a process that worked for this command died: {why_died(error)}") from error
