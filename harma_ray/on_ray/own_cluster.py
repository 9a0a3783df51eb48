"""Processes that Ray starts for every cluster, and one of this machine alone does without (Ray 2.60).

Each imports Ray, in a start that is bound by the CPUs; what sends logs looks at all of them ten times a second, too.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

LOGS, AUTOSCALER = "start_log_monitor", "start_monitor"
"""What sends workers' output to drivers, of which none asks for it: it stays in files. What adds machines.

The dashboard's server stays where no dashboard is shown, too: the machine's agent looks for it every second, and logs
that it has not found it. Both are told that what a dashboard needs is not installed, and import less.
"""
AHEAD = "RAY_prestart_worker_first_driver"
"""Variable for Ray's node: whether it starts a process for each CPU ahead, for which a driver waits.

Most of what is started here are actors, which do not take them.
"""


@contextlib.contextmanager
def few_processes(*, dashboard: bool) -> Iterator[None]:
    """Leaves out what is not used of a cluster that this process starts in the block.

    Args:
        dashboard: Whether it has Ray's dashboard.
    """
    from ray._private import utils
    from ray._private.node import Node

    def start_nothing(self: Node, **settings: Any) -> None:
        pass

    def find_missing() -> ImportError:
        return ImportError("the dashboard's packages are not asked for")

    ours = [(Node, name, start_nothing) for name in (LOGS, AUTOSCALER)]
    ours += [] if dashboard else [(utils, utils.get_dashboard_dependency_error.__name__, find_missing)]
    theirs = [(place, name, getattr(place, name)) for place, name, _ in ours]
    is_free = AHEAD not in os.environ
    try:
        for place, name, function in ours:
            setattr(place, name, function)
        os.environ.setdefault(AHEAD, "0")
        yield
    finally:
        for place, name, function in theirs:
            setattr(place, name, function)
        if is_free:
            os.environ.pop(AHEAD, None)
