"""Mistakes in the rows of annotation files, told all at once."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from harma_ray.errors import UserError

_TOLD = 10
_CHANGING = re.compile(r"'[^']*'|\"[^\"]*\"|\d+")


class Mistakes:
    """What is wrong with the rows of some files."""

    def __init__(self) -> None:
        self._kinds: dict[str, list[str]] = {}

    def add(self, text: str) -> None:
        """Adds a mistake."""
        self._kinds.setdefault(_CHANGING.sub("", text), []).append(text)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Adds the UserError that the block raises, if it does."""
        try:
            yield
        except UserError as error:
            self.add(str(error))

    def refuse(self, where: str) -> None:
        """Raises UserError if there are any, in one line if there is one; of several that are alike it tells the first.

        Args:
            where: The file or data set that they were found in.
        """
        count = sum(map(len, self._kinds.values()))
        if not count:
            return
        lines = [
            f"{texts[0]}{f' (and {len(texts) - 1:,} more like this)' if len(texts) > 1 else ''}"
            for texts in self._kinds.values()
        ]
        if count == 1:
            raise UserError(lines[0])
        more = [f"... and mistakes of {len(lines) - _TOLD} more kinds"] if len(lines) > _TOLD else []
        raise UserError("\n  ".join([f"{where} has {count:,} mistakes:", *lines[:_TOLD], *more]))


@contextmanager
def all_mistakes(where: str) -> Iterator[Mistakes]:
    """Gives a block something to note mistakes in, and raises UserError with all of them at its end."""
    mistakes = Mistakes()
    yield mistakes
    mistakes.refuse(where)
