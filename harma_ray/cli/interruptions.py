"""Ctrl-C and SIGTERM while a command runs: KeyboardInterrupt, but not in the middle of an import."""

import _thread
import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

PATIENCE_SECONDS = 20.0
"""Imports that take longer, one after another, are interrupted: a start's take some five on a busy machine."""
_AGAIN_SECONDS = 0.05
_IMPORTS = "<frozen importlib._bootstrap>"


@contextlib.contextmanager
def raised_between_imports() -> Iterator[None]:
    """Has Ctrl-C and SIGTERM raise KeyboardInterrupt in the block; those that come in an import, once it is done.

    What imports may forget what is raised, as pyarrow does, which imports pandas when it first gives numbers to NumPy:
    the command went on then, and waited for ever for a lock that the import had left. Or it may end the process, as
    torch's C++ does. A Ctrl-C that this process was started to ignore stays ignored.
    """
    interruption = _Interruption()
    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        numbers.append(signal.SIGINT)
    before = {number: signal.signal(number, interruption.handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        is_due = interruption.take()
    if is_due:
        raise KeyboardInterrupt


class _Interruption:
    """One that waits for the end of an import; others that come meanwhile are the same one."""

    def __init__(self) -> None:
        self._since: float | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Raises KeyboardInterrupt, or has the main thread asked again soon."""
        now = time.monotonic()
        if not _is_importing(frame) or (self._since is not None and now - self._since > PATIENCE_SECONDS):
            self._since = None
            raise KeyboardInterrupt
        if self._since is None:
            self._since = now
            # No `threading.Thread`: it takes a lock, which whoever is interrupted here may hold.
            _thread.start_new_thread(self._remind, (now, threading.get_ident(), number))

    def take(self) -> bool:
        """Returns whether one still waits, and forgets it."""
        is_due, self._since = self._since is not None, None
        return is_due

    def _remind(self, since: float, thread: int, number: int) -> None:
        while True:
            time.sleep(_AGAIN_SECONDS)
            if self._since != since:
                return
            signal.pthread_kill(thread, number)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == _IMPORTS:
            return True
        frame = frame.f_back
    return False
