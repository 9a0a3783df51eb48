"""A cluster of this machine alone has the processes that something here uses, and no others (Ray 2.60)."""

import contextlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from interrupted import children
from ray._private import utils
from ray._private.node import Node

from harma_ray.on_ray.own_cluster import AUTOSCALER, LOGS, few_processes

CODE = """
import contextlib
import ray
from harma_ray.on_ray import cluster
if {plainly}:
    cluster.few_processes = lambda **wishes: contextlib.nullcontext()
with cluster.ray_cluster(num_cpus=2, for_tasks={for_tasks}):
    print(ray._private.worker._global_node.get_logs_dir_path(), flush=True)
    input()
    assert ray.get(ray.remote(lambda: 4).remote()) == 4
    print("done", flush=True)
    input()
"""
STARTED = {LOGS: "log_monitor.py", AUTOSCALER: "monitor.py--logs-dir"}
"""How the process that a method of Ray's starts is told from others."""
AHEAD = re.compile(r"^(?!.*--raylet_socket_name).*(ray::IDLE|default_worker\.py)")
"""What is among the command lines of processes that wait for tasks."""


def command_lines(pids):
    lines = []
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended since
            lines.append(Path(f"/proc/{pid}/cmdline").read_text().replace("\0", ""))
    return lines


def errors(logs):
    agents = list(logs.glob("*agent*.log"))
    assert agents
    return [line for path in agents for line in path.read_text().splitlines() if "ERROR" in line]


def come_to_rest(logs):
    """Waits until the machine's agents find nothing wrong for seconds; what they miss they look for every second."""
    deadline, before = time.monotonic() + 60, None
    while (now := errors(logs)) != before:
        assert time.monotonic() < deadline, now[-1]
        before = now
        time.sleep(3)


@pytest.mark.ray
@pytest.mark.parametrize(("plainly", "for_tasks"), [(False, False), (False, True), (True, False)])
def test_what_nobody_uses_is_not_started_and_nobody_looks_for_it(plainly, for_tasks):
    process = subprocess.Popen(
        [sys.executable, "-c", CODE.format(plainly=plainly, for_tasks=for_tasks)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    logs = Path(process.stdout.readline().strip())
    ahead = [line for line in command_lines(children(process.pid)) if AHEAD.search(line)]
    print("", file=process.stdin, flush=True)
    assert process.stdout.readline() == "done\n"
    come_to_rest(logs)
    lines = command_lines(children(process.pid))
    _, error = process.communicate("\n", timeout=100)
    assert error == ""
    assert process.returncode == 0
    there = {name for name, part in STARTED.items() if any(part in line for line in lines)}
    assert there == (set(STARTED) if plainly else set())
    assert len(ahead) == (2 if plainly or for_tasks else 0), ahead
    assert any("--minimal" in line for line in lines) is not plainly, lines


def test_ray_has_its_ways_back():
    def ways():
        return [*(getattr(Node, name) for name in STARTED), utils.get_dashboard_dependency_error, dict(os.environ)]

    before = ways()
    with pytest.raises(KeyboardInterrupt), few_processes():
        raise KeyboardInterrupt
    assert ways() == before
    with few_processes():
        assert utils.get_dashboard_dependency_error() is not None
    with few_processes(dashboard=True):
        assert utils.get_dashboard_dependency_error() is None
