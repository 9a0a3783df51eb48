"""What works around Ray 2.60, each workaround beside what Ray does without it.

Each has a test in ``tests/on_ray`` that fails when Ray behaves otherwise: then it can go. Eight are a file each:
`harma_ray.on_ray.address`, `harma_ray.on_ray.closing`, `harma_ray.on_ray.folder`, `harma_ray.on_ray.interruption`,
`harma_ray.on_ray.own_cluster`, `harma_ray.on_ray.trainer`, `harma_ray.on_ray.process_group` and, for the words in which
Ray says why a process has ended, `harma_ray.on_ray.deaths`. `harma_ray.tune.scheduling` stands for Ray's own searcher.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import ray.data

T = TypeVar("T")

VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",  # else Ray reports to its makers
    "RAY_ENABLE_AUTO_CONNECT": "0",  # else a thread that outlives a cluster starts another one by asking for anything
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # every report waits for the controller's next poll, one in 2 s
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # else workers leave the folder that relative paths are meant from
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # else Ctrl-C ends a search otherwise than a training
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # else a trial's record is kept three times more
    "RAY_AIR_NEW_OUTPUT": "0",  # the newer output cannot be silenced whole
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that failed has no metrics
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",  # else Ray Tune writes its state every few seconds, and nobody reads it
}
"""What Ray reads when it is first imported, or in the processes that it starts."""

_DASHBOARD_VARIABLE = "RAY_API_SERVER_ADDRESS"
_logger = logging.getLogger(__name__)


# Starting Ray


def set_variables() -> None:
    """Sets what the user has not set, in this process and those that it starts."""
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def announced_dashboard(host: str) -> Iterator[int]:
    """Chooses a port for a dashboard and tells it to all processes that are started in the block.

    Without being told, Ray Train's helpers look for the clusters of this machine and give up if there are two: trials
    that are stopped would then keep their places for ever (Ray 2.60).
    """
    with socket.create_server((host, 0)) as free:
        port = free.getsockname()[1]
    before = os.environ.get(_DASHBOARD_VARIABLE)
    os.environ[_DASHBOARD_VARIABLE] = f"http://{host}:{port}"
    try:
        yield port
    finally:
        os.environ.pop(_DASHBOARD_VARIABLE)
        if before is not None:
            os.environ[_DASHBOARD_VARIABLE] = before


@contextlib.contextmanager
def keeping_handler(number: int) -> Iterator[None]:
    """Puts a signal's handler back at the end of the block, which it interrupts like Ctrl-C if it comes.

    ``ray.init`` replaces that of SIGTERM for good, by one that ends the process with the signal's number (Ray 2.60).
    """
    handler = signal.getsignal(number)
    try:
        yield
    except SystemExit as left:
        if left.code == number:
            raise KeyboardInterrupt from None
        raise
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(number, handler)


@contextlib.contextmanager
def heeding_interruptions() -> Iterator[None]:
    """Raises, at the end of the block, a Ctrl-C that got lost in it.

    Ray starts its processes with a function to be called in them (2.60), so that Python forks. A Ctrl-C that comes then
    is raised in a callback of Python's logging, which prints a trace and goes on.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handle, interrupted = signal.getsignal(signal.SIGINT), False

    def note(number: int, frame: Any) -> None:
        nonlocal interrupted
        assert callable(handle)
        try:
            handle(number, frame)
        except KeyboardInterrupt:
            interrupted = True
            raise

    def print_others(unraisable: Any) -> None:
        nonlocal interrupted
        if unraisable.exc_type is SystemExit:  # of Ray's handler of SIGTERM, see `keeping_handler`
            interrupted = True
        elif unraisable.exc_type is not KeyboardInterrupt:
            print_ignored(unraisable)

    if callable(handle):
        signal.signal(signal.SIGINT, note)
    print_ignored, sys.unraisablehook = sys.unraisablehook, print_others
    try:
        yield
    finally:
        sys.unraisablehook = print_ignored
        if callable(handle):
            signal.signal(signal.SIGINT, handle)
    if interrupted:
        import ray

        ray.shutdown()
        raise KeyboardInterrupt


def is_late_start(error: Exception) -> bool:
    """Says whether Ray's own processes did not come up in time, for which it has no class of its own (2.60)."""
    return type(error) is Exception


def is_stranger(error: BaseException) -> bool:
    """Says whether a cluster cannot be joined because this machine is not of it, which Ray 2.60 says in words alone."""
    return "No node info found" in str(error.__cause__)


def end_failed_start(error: BaseException, *, keep_logs: bool) -> Path | None:
    """Ends the processes of a cluster that did not come up, and drops its folder.

    ``ray.init`` that fails leaves them running, and nobody else knows them (Ray 2.60).

    Returns:
        The folder of its logs, if they are kept.
    """
    from ray._private.node import Node

    logs = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        node = frame.f_locals.get("self")
        if not isinstance(node, Node) or not hasattr(node, "all_processes"):
            continue
        own = [info.process.pid for infos in node.all_processes.values() for info in infos]
        orphans = [pid for parent in own for pid in _descendants(parent)]
        node.kill_all_processes(check_alive=False, allow_graceful=True, wait=True)
        for pid in orphans:  # they notice in a few seconds, and write logs until then
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        session = getattr(node, "_session_dir", None)
        if keep_logs:
            logs = session and Path(session, "logs")
        elif session:
            _remove(Path(session))
    return logs


def _remove(session: Path) -> None:
    """Removes the folder of a cluster whose processes are ended, and ends those that it had just started.

    They would make the folder again: their command lines name it.
    """
    for _ in range(50):
        late = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/cmdline") if _names(path, session)]
        for pid in late:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(session, ignore_errors=True)
        if not late and not session.exists():
            return
        time.sleep(0.1)


def _names(command_line: Path, folder: Path) -> bool:
    try:
        return os.fsencode(folder) in command_line.read_bytes()
    except OSError:
        return False


def _descendants(pid: int) -> list[int]:
    """Returns the processes that a process of this machine has started, and theirs; none where Linux does not say."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return children + [pid for child in children for pid in _descendants(child)]


def machine_memory() -> int:
    """Returns the bytes of this machine, or its container's limit if that is less.

    Ray 2.60 has no public name for it, and takes more of it for objects than is needed here.
    """
    from ray._common.utils import get_system_memory

    return get_system_memory()


def machine_cpus() -> int:
    """Returns the CPUs of this machine, or its container's limit if that is less: as Ray counts them, but at least one.

    Ray 2.60 has no public name for it, warns of a limit that is no whole number, and counts none of half a CPU.
    """
    from ray._private import utils

    level = utils.logger.level
    utils.logger.setLevel(logging.ERROR)
    try:
        return max(1, int(utils.get_num_cpus(override_docker_cpu_warning=True)))
    finally:
        utils.logger.setLevel(level)


def find_running_cluster() -> str:
    """Returns the address of the cluster that Ray finds by itself on this machine; raises ConnectionError.

    Ray 2.60 has no public name for it, and remembers what it has found once.
    """
    from ray._private import services

    services.find_gcs_addresses.cache_clear()
    return services.canonicalize_bootstrap_address_or_die("auto")


def quiet_errors() -> None:
    """Keeps what Ray prints of dead workers, whatever ``log_to_driver`` says (2.60), out of the terminal.

    `harma_ray.on_ray.deaths` tells it in one line.
    """
    import ray._private.worker

    def log(data: Mapping[str, Any], ignore_prefix: bool = False) -> None:
        _logger.info("%s", "\n".join(data["lines"]))

    ray._private.worker.print_to_stdstream = log


def quiet_data() -> None:
    """Keeps what Ray Data says of itself, and its traces of what it raises, out of the terminal (2.60)."""
    import ray.data

    logger = logging.getLogger(ray.data.__name__)  # set up when it is imported
    logger.setLevel(logging.ERROR)
    logger.handlers = [handler for handler in logger.handlers if handler.name != "console"]


# Ray Data


class Pause:
    """Rests between two steps of Ray Data's scheduling loop, as one of its callbacks, whose base is private.

    The loop waits for tasks with something to take, and does not take it while enough batches are ready: with the
    data ahead of the training, as it should be, it would spin on a whole core of the worker (Ray 2.60). The rests are
    short until the first chunks are there, then a fraction of what reading a chunk takes.
    """

    def __init__(self) -> None:
        self._steps = 0

    def before_execution_starts(self, executor: Any) -> None:
        """Does nothing."""

    def on_execution_step(self, executor: Any) -> None:
        """Rests."""
        self._steps += 1
        time.sleep(0.02 if self._steps < 100 else 0.1)

    def after_execution_succeeds(self, executor: Any) -> None:
        """Does nothing."""

    def after_execution_fails(self, executor: Any, error: Exception) -> None:
        """Does nothing."""


def map_without_restarts(dataset: ray.data.Dataset, function: type, **options: Any) -> ray.data.Dataset:
    """Calls ``map`` with actors that are not started again.

    Actors that may be make Ray print on the terminal that this could fail. To say that they may not, Ray 2.60 has
    nothing but an argument that it calls deprecated.
    """
    from ray.util.annotations import RayDeprecationWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)
        return dataset.map(function, max_restarts=0, **options)


# Ray Train


def cause_of_death(failure: BaseException) -> BaseException | None:
    """Returns why a worker's process has ended, if it has; Ray Train's exception is of a private class (2.60)."""
    return getattr(failure, "health_check_failure", None)


def is_hanging(failure: BaseException) -> bool:
    """Says whether a worker does not answer any more, from Ray Train's exception, whose class is private (2.60)."""
    return type(failure).__name__ == "WorkerHealthCheckTimeoutError"


# Ray Tune


class Unpickled:
    """What Ray Tune is given and would pickle whole (2.60), for a way of going on that is not ours."""

    def __getstate__(self) -> dict[str, Any]:
        """Returns nothing."""
        return {}


def start_side_by_side(concurrent: int) -> None:
    """Lets Ray Tune start the processes of so many trials at a time, not one after another (2.60)."""
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(concurrent)


def wait_for_stopped_trials() -> None:
    """Gives a trial that is stopped 60 s to leave its process to the next; Ray Tune 2.60 ends it after 2 s."""
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = "60"


def is_out_of_memory(error: RuntimeError) -> bool:
    """Says whether Ray killed a trial's process to save its machine, on which Ray Tune 2.60 ends the whole search."""
    import ray.exceptions

    return isinstance(error.__cause__, ray.exceptions.OutOfMemoryError)
