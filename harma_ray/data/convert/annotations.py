"""Rows and values of annotation files, read with checks that say what is wrong and where."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self, TypeVar

from harma_ray.errors import UserError, first_few

_T = TypeVar("_T")


@dataclass(frozen=True)
class Entry:
    """A JSON value of an annotation file.

    Its methods raise `UserError`, which tells the expected shape, if something is missing or of another kind.
    """

    value: object
    """What was read."""
    origin: str
    """Where, for messages: the file and the row."""
    expected: str
    """How it should look, for messages."""

    @property
    def fields(self) -> Mapping[str, object]:
        """The fields of a value that must be an object."""
        if not isinstance(self.value, dict):
            raise self._mistake(describe_shape(self.value))
        return self.value

    def has(self, name: str) -> bool:
        """Tells whether there is a field that is not null."""
        return self.fields.get(name) is not None

    def text(self, name: str) -> str:
        """Returns a field that must be a text."""
        return self._inside(name, self._field(name, str)).as_text()

    def texts(self, name: str) -> tuple[str, ...]:
        """Returns a field that must be a list of texts."""
        return tuple(self._inside(name, text).as_text() for text in self._field(name, list))

    def number(self, name: str) -> int:
        """Returns a field that must be a whole number that is positive or 0 and fits 31 bits."""
        number = self._field(name, int)
        if not 0 <= number < 2**31:  # labels are stored as int32
            raise UserError(f"{self.origin}: `{name}` must lie in 0..{2**31 - 1}, got {number}")
        return number

    def items(self, name: str) -> list[object]:
        """Returns a field that must be a list."""
        return self._field(name, list)

    def part(self, name: str) -> Self:
        """Returns a field that must be an object, as a part of this value."""
        return replace(self, value=self._field(name, dict))

    def as_text(self) -> str:
        """Returns a value that must be a text itself, without half a character."""
        if not isinstance(self.value, str):
            raise self._mistake(describe_shape(self.value))
        try:
            self.value.encode()
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
            raise UserError(
                f"{self.origin} holds half a character ({error.reason}), got {self.value!r}; correct it"
            ) from error
        return self.value

    def _field(self, name: str, kind: type[_T]) -> _T:
        value = self.fields.get(name)
        if isinstance(value, kind) and not isinstance(value, bool):
            return value
        keys = ", ".join(map(str, self.fields))
        got = f"`{name}` = {describe_shape(value)}" if name in self.fields else f"no `{name}` (keys: {keys})"
        raise self._mistake(f"{got}{_advise(self.fields, name, kind)}")

    def _inside(self, name: str, value: object) -> Self:
        return replace(self, value=value, origin=f"{self.origin}: `{name}`")

    def _mistake(self, got: str) -> UserError:
        return UserError(f"{self.origin} must look like {self.expected}, got {got}")


def hash_file(path: str | Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(*paths: str | Path) -> dict[str, str]:
    """Returns the SHA-256 of some files by their names."""
    return {Path(path).name: hash_file(path) for path in paths}


def check_distinct(names: Sequence[str], origin: str) -> None:
    """Raises UserError if a list of names has one twice."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{origin} lists {count_names(twice)} more than once; remove the repetitions")


def count_names(names: Sequence[str]) -> str:
    """Returns the number of some names with the first few of them, such as ``7 names (a, b, ...)``."""
    return f"{len(names)} name{'s' if len(names) > 1 else ''} ({first_few(names)})"


def _advise(row: Mapping[str, object], name: str, kind: type) -> str:
    """Returns how a wrong field is put right, where that is plain; empty otherwise."""
    value = row.get(name)
    if kind is int and isinstance(value, str | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if number.is_integer():
            return f"; write the number without quotes or decimal point: {int(number)}"
        if name == "image_id":
            return "; number the images from 0, the same number in all rows of one image"
        return "; leave it out or write null" if value != value else ""  # NaN
    if kind is list and isinstance(value, str):
        return f"; write it as a list: {json.dumps([value], ensure_ascii=False)}"
    if name == "image_id" and name not in row and isinstance(row.get("caption"), str):
        return (
            "; a training row needs it, and a row for evaluation, which does not, has a list: `caption`: "
            f"{json.dumps([row['caption']], ensure_ascii=False)}"
        )
    return ""


def describe_shape(value: object) -> str:
    """Describes a JSON value in a few words."""
    if isinstance(value, dict):
        keys = ", ".join(list(value)[:6])
        return f"an object with {f'keys {keys}' if keys else 'no keys'}"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
