"""Checks of the rows of annotation files."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harma_ray.errors import UserError

_EXAMPLES = 5


def hash_file(path: str | Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_distinct(names: Sequence[str], origin: str) -> None:
    """Raises UserError if a list of names has one twice."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{origin} lists {list_some(len(twice), 'name', twice)} more than once; remove the repetitions")


def list_some(count: int, noun: str, examples: Sequence[str]) -> str:
    """Returns a number of things with the first few of them, such as ``7 names (a, b, ...)``."""
    more = ", ..." if count > _EXAMPLES else ""
    return f"{count} {noun}{'s' if count > 1 else ''} ({', '.join(map(str, examples[:_EXAMPLES]))}{more})"


def as_object(value: Any, origin: str, expected: str) -> dict[str, Any]:
    """Returns a JSON value that must be an object.

    Raises:
        UserError: If it is none; tells the expected shape.
    """
    if not isinstance(value, dict):
        raise UserError(f"{origin} must look like {expected}, got {describe_shape(value)}")
    return value


def get_field(row: dict[str, Any], name: str, kind: type, origin: str, expected: str) -> Any:
    """Returns a field of a row.

    Args:
        row: The row.
        name: Of the field.
        kind: Type that its value must be of; numbers must fit 31 bits and be positive or 0.
        origin: Of the row, for messages.
        expected: How a row looks, for messages.

    Raises:
        UserError: If it is missing or of another kind.
    """
    value = row.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        got = (
            f"`{name}` = {describe_shape(value)}" if name in row else f"no `{name}` (keys: {', '.join(map(str, row))})"
        )
        raise UserError(f"{origin} must look like {expected}, got {got}{_advise(row, name, kind)}")
    if isinstance(value, int) and not 0 <= value < 2**31:  # labels are stored as int32
        raise UserError(f"{origin}: `{name}` must lie in 0..{2**31 - 1}, got {value}")
    return as_text(value, f"{origin}: `{name}`", expected) if isinstance(value, str) else value


def _advise(row: dict[str, Any], name: str, kind: type) -> str:
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


def get_texts(row: dict[str, Any], name: str, origin: str, expected: str) -> tuple[str, ...]:
    """Returns a field of a row that must be a list of texts; takes and raises what `get_field` does."""
    texts = get_field(row, name, list, origin, expected)
    return tuple(as_text(text, f"{origin}: `{name}`", expected) for text in texts)


def as_text(value: Any, origin: str, expected: str) -> str:
    """Returns a JSON value that must be a text.

    Raises:
        UserError: If it is none, or holds half a character; tells the expected shape.
    """
    if not isinstance(value, str):
        raise UserError(f"{origin} must look like {expected}, got {describe_shape(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise UserError(f"{origin} holds half a character ({error.reason}), got {value!r}; correct it") from error
    return value


def describe_shape(value: Any) -> str:
    """Describes a JSON value in a few words."""
    if isinstance(value, dict):
        keys = ", ".join(list(value)[:6])
        return f"an object with {f'keys {keys}' if keys else 'no keys'}"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
