"""Runs the tasks of a conversion one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from harma_ray.data.convert.shards import ShardPlan

TaskMap = Callable[[Callable[[ShardPlan], Any], Sequence[ShardPlan]], Iterator[Any]]
"""Calls a function on each of several plans, somewhere, and yields the results in any order."""


def map_serially(function: Callable[[ShardPlan], Any], plans: Sequence[ShardPlan]) -> Iterator[Any]:
    """Calls a function on each plan, in this process."""
    yield from map(function, plans)
