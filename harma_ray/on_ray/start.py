"""Starts or joins Ray, with what goes wrong in it: a start that fails once, an interruption that gets lost."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from harma_ray.errors import UserError
from harma_ray.on_ray.address import needs_token

logger = logging.getLogger(__name__)


def start_ray(options: Mapping[str, Any], address: str) -> Any:
    """Returns Ray's context; a start of its own that fails, as on a busy machine, is tried once more.

    Args:
        options: Arguments of ``ray.init``.
        address: ``local``, or the cluster's.

    Raises:
        UserError: If Ray is not there then.
    """
    with _heeding_interruptions():
        return _initialise(options, address)


@contextlib.contextmanager
def _heeding_interruptions() -> Iterator[None]:
    """Raises, at the end of the block, a Ctrl-C that got lost in it.

    One that comes as Ray forks is raised in a callback of Python's logging, which prints a trace and goes on.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, interrupted = signal.getsignal(signal.SIGINT), False

    def note(number: int, frame: Any) -> None:
        nonlocal interrupted
        interrupted = True
        signal.default_int_handler(number, frame)

    def print_others(unraisable: Any) -> None:
        if unraisable.exc_type is not KeyboardInterrupt:
            print_ignored(unraisable)

    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, note)
    print_ignored, sys.unraisablehook = sys.unraisablehook, print_others
    try:
        yield
    finally:
        sys.unraisablehook = print_ignored
        if before is signal.default_int_handler:
            signal.signal(signal.SIGINT, before)
    if interrupted:
        import ray

        ray.shutdown()
        raise KeyboardInterrupt


def _initialise(options: Mapping[str, Any], address: str) -> Any:
    import ray
    import ray.exceptions

    for tries_left in (1, 0):
        try:
            return ray.init(**options, log_to_driver=False, logging_level=logging.ERROR, configure_logging=True)
        except ray.exceptions.AuthenticationError as error:
            raise needs_token(address) from error
        except ValueError as error:
            raise UserError(f"Ray does not take its settings ({_reason(error)}); check those named RAY_...") from error
        except (OSError, RuntimeError, ray.exceptions.RayError) as error:
            failure = error
        except Exception as error:
            if type(error) is not Exception:  # what Ray raises when its own processes do not come up in time
                raise
            failure = error
        if address != "local":
            raise _cannot_join(failure, address) from failure
        if ray.is_initialized():
            raise failure
        logs = _end_failed_start(failure, keep_logs=not tries_left)
        if tries_left:
            logger.warning("Ray did not start (%s); trying once more", _reason(failure))
            continue
        raise UserError(
            f"Ray did not start on this machine in two tries ({_reason(failure)}); it may be too busy, or short of "
            f"memory or disk: try again{f', or look into {logs}' if logs else ''}"
        ) from failure
    raise AssertionError


def _reason(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].strip().rstrip(".")


def _cannot_join(error: BaseException, address: str) -> UserError:
    if "No node info found" in str(error.__cause__):  # of those on this machine
        return UserError(
            f"this machine does not belong to the Ray cluster at {address}; run the command on one that does, or "
            "submit it with `ray job submit`"
        )
    return UserError(f"cannot join the Ray cluster at {address} ({_reason(error)}); check --address and RAY_ADDRESS")


def _end_failed_start(error: BaseException, *, keep_logs: bool) -> Path | None:
    """Ends the processes of a cluster that did not come up, which nobody else knows, and drops its folder.

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
            shutil.rmtree(session, ignore_errors=True)
    return logs


def _descendants(pid: int) -> list[int]:
    """Returns the processes that a process of this machine has started, and theirs; none where Linux does not say."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return children + [pid for child in children for pid in _descendants(child)]
