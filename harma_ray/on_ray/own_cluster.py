"""Processes that Ray starts for every cluster, and one of this machine alone does without (Ray 2.60).

Each imports Ray, in a start that is bound by the CPUs; what sends logs looks at all of them ten times a second, too.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

LOGS, AUTOSCALER = "start_log_monitor", "start_monitor"
"""What sends workers' output to drivers, of which none asks for it: it stays in files. What adds machines.

The dashboard's server stays where no dashboard is shown, too: the machine's agent looks for it every second, and logs
that it has not found it. Without a dashboard both are told that what it needs is not installed: they serve nothing
then, no metrics either, and the driver, which would find out, does not import it.
"""
PRESTART = "RAY_prestart_worker_first_driver"
"""Variable for Ray's node: whether it starts a process for each CPU ahead, which a driver waits for and actors do not
take. All processes of the cluster see it.
"""


@contextlib.contextmanager
def few_processes(*, dashboard: bool = False, for_tasks: bool = False) -> Iterator[None]:
    """Leaves out what is not used of a cluster that this process starts in the block.

    Args:
        dashboard: Whether it has Ray's dashboard.
        for_tasks: Whether it is for tasks, not actors.
    """
    from ray._private import utils
    from ray._private.node import Node

    with contextlib.ExitStack() as stack:
        for name in (LOGS, AUTOSCALER):
            stack.enter_context(_replaced(Node, name, _start_nothing))
        if not dashboard:
            stack.enter_context(_replaced(utils, "get_dashboard_dependency_error", _find_missing))
        if not for_tasks and PRESTART not in os.environ:
            os.environ[PRESTART] = "0"
            stack.callback(os.environ.pop, PRESTART, None)
        yield


@contextlib.contextmanager
def _replaced(place: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    before = getattr(place, name)
    setattr(place, name, function)
    try:
        yield
    finally:
        setattr(place, name, before)


def _start_nothing(node: Any, **settings: Any) -> None:
    pass


def _find_missing() -> ImportError:
    return ImportError("what a dashboard needs is not asked for")
