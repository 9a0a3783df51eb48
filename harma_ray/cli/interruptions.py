"""Ctrl-C and SIGTERM while a command runs: KeyboardInterrupt, but never inside an import."""

import _thread
import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

_AGAIN_SECONDS = 0.05
_IMPORTS = "<frozen importlib._bootstrap>"


@contextlib.contextmanager
def raised_between_imports() -> Iterator[None]:
    """Has Ctrl-C and SIGTERM raise KeyboardInterrupt in the block; one that comes in an import, when that is done.

    Who imports may forget it, as pyarrow does, which imports pandas when it first gives numbers to NumPy: the command
    went on then, and waited for ever for a lock that the import had left. A Ctrl-C that this process was started to
    ignore stays ignored.
    """
    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        numbers.append(signal.SIGINT)
    before = {number: signal.signal(number, _raise_or_wait) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise_or_wait(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename == _IMPORTS:
            # No `threading.Thread`: it takes a lock, which whoever is interrupted here may hold.
            _thread.start_new_thread(_send_again, (threading.get_ident(), number))
            return
        frame = frame.f_back
    raise KeyboardInterrupt


def _send_again(thread: int, number: int) -> None:
    time.sleep(_AGAIN_SECONDS)
    signal.pthread_kill(thread, number)
