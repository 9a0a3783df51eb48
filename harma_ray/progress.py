"""How far a long step is: a bar on a terminal, a line now and then in a file or a pipe."""

import sys
from typing import Any

from tqdm import tqdm

_LINE_SECONDS = 30
"""How long nothing is told where no bar can be redrawn."""
_LINE = "{desc}: {n_fmt} of {total_fmt}{unit}, {elapsed} so far, about {remaining} left"


def progress_bar(**options: Any) -> tqdm:
    """Returns a bar of tqdm on stderr, made with its options; where that is no terminal, one that prints lines."""
    if sys.stderr.isatty():
        return tqdm(**options)
    seconds = dict.fromkeys(("mininterval", "maxinterval", "delay"), _LINE_SECONDS)
    return _Lines(**options, **seconds, bar_format=_LINE)


class _Lines(tqdm):
    """Prints a line where a bar would be drawn again; nothing of a step that is short, and nothing at its end."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        self.fp.write(f"{self if msg is None else msg}\n")
        self.fp.flush()

    def close(self) -> None:
        self.disable = True  # else it would move the cursor
        super().close()
