"""Ctrl-C and SIGTERM while Ray Train is at work: what is in hand is saved before it is left."""

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

GRACE_SECONDS = 25
"""How long workers may take to save; what ends processes (Kubernetes, Slurm) gives some 30 s."""


def fit(trainer: Any, on_interrupt: Callable[[], None] | None = None) -> Any:
    """Trains with Ray Train, and returns what worker 0 returns.

    Ray Train works in a thread, where it leaves the handler of Ctrl-C alone: on the main thread its own (2.60) stops
    the workers on the spot and ends with an exit that says success.

    Args:
        trainer: Of Ray Train.
        on_interrupt: Asks the workers to end, at the first Ctrl-C or SIGTERM; then they have `GRACE_SECONDS`, and a
            second one ends the wait. None: the first is the last.

    Raises:
        KeyboardInterrupt: If they have not ended by themselves.
    """
    if threading.current_thread() is not threading.main_thread():  # in a trial
        return trainer.fit().return_value
    done: Future[Any] = Future()

    def work() -> None:
        try:
            done.set_result(trainer.fit().return_value)
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        return _result(done, math.inf)
    except KeyboardInterrupt:
        if on_interrupt is None:
            raise
        on_interrupt()
    try:
        return _result(done, GRACE_SECONDS)
    except Exception as error:  # too late, or what ends this process has ended workers too
        raise KeyboardInterrupt from error


def _result(done: Future[Any], seconds: float) -> Any:
    """Waits for a result in short rests, since a signal that another thread is given does not end a long one."""
    deadline = time.monotonic() + seconds
    while not done.done() and time.monotonic() < deadline:
        wait([done], timeout=0.2)
    return done.result(timeout=0)
