"""Processes that Ray starts for every cluster, and one of this machine alone does without (Ray 2.60).

Each imports Ray, in a start that is bound by the CPUs, and the first looks at every log ten times a second for good.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

LOGS, AUTOSCALER = "start_log_monitor", "start_monitor"
"""What sends workers' output to drivers, of which none asks for it: it stays in files. What adds machines.

The dashboard's server stays where no dashboard is shown, too: the machine's agent looks for it every second, and logs
that it has not found it.
"""


@contextlib.contextmanager
def few_processes() -> Iterator[None]:
    """Leaves out what is not used of a cluster that this process starts in the block."""
    from ray._private.node import Node

    def start_nothing(self: Node, **settings: Any) -> None:
        pass

    theirs = {name: getattr(Node, name) for name in (LOGS, AUTOSCALER)}
    try:
        for name in theirs:
            setattr(Node, name, start_nothing)
        yield
    finally:
        for name, method in theirs.items():
            setattr(Node, name, method)
