"""The wish to end a training early: a file in its folder, which all workers heed after the same step."""

import time
from pathlib import Path

from harma_ray.distributed import broadcast_object

STOP_NAME = ".stop"
_SECONDS, _LONGEST = 0.2, 100
"""About how far two looks at the file are apart, and the most steps between them."""


class TrainingStopped(Exception):
    """A training has ended where it was asked to; its checkpoint is written."""


def ask_to_stop(run_dir: Path) -> None:
    """Asks the training of a run to end after the step in hand."""
    (run_dir / STOP_NAME).touch()


def withdraw_stop(run_dir: Path) -> None:
    """Forgets that a training was asked to end."""
    (run_dir / STOP_NAME).unlink(missing_ok=True)


class StopSignal:
    """Whether a training was asked to end, which worker 0 looks up some five times a second, and tells all others."""

    def __init__(self, run_dir: Path):
        """Looks for the file in a run's folder."""
        self._file, self._due = run_dir / STOP_NAME, 0
        self._looked: tuple[int, float] | None = None

    def is_given(self, step: int) -> bool:
        """Tells, on every worker alike, whether the training ends after a step; asked after each."""
        if step < self._due:
            return False
        now, stride = time.perf_counter(), 1
        if self._looked is not None:
            steps, seconds = step - self._looked[0], now - self._looked[1]
            stride = max(1, min(_LONGEST, int(_SECONDS * steps / max(seconds, 1e-6))))
        self._looked = (step, now)
        given, self._due = broadcast_object((self._file.exists(), step + stride))
        return given
