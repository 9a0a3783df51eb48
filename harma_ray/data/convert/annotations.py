"""Reading of annotation files: JSON whose rows are checked one by one, and the image paths in it."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harma_ray.errors import UserError

_EXAMPLES = 5


def read_json(path: str | Path, *, unique_keys: bool = False) -> Any:
    """Reads an annotation file.

    Args:
        path: The JSON file.
        unique_keys: Refuses objects in which a key stands twice; JSON itself lets the last one win.

    Raises:
        UserError: If it is missing, cannot be read, or is not JSON in UTF-8, or a key stands twice.
    """

    def check(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        check_distinct([key for key, _ in pairs], Path(path).name)
        return dict(pairs)

    try:
        return json.loads(Path(path).read_bytes(), object_pairs_hook=check if unique_keys else None)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"annotation file {path} is not JSON ({error}); is it a complete download?") from error
    except RecursionError as error:
        raise UserError(f"annotation file {path} is nested too deeply to be a list of annotations") from error
    except OSError as error:
        raise UserError(f"annotation file {path} cannot be read ({error.strerror}); check the path") from error


def hash_file(path: str | Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def resolve_image(root: Path, name: str, origin: str) -> Path:
    """Returns the absolute path of an image under its root.

    Links below the root may lead anywhere: they are the user's own.

    Raises:
        UserError: If the name is empty, absolute, or leads out of the root.
    """
    path = Path(os.path.normpath(root / name))
    if not name or "\0" in name or Path(name).is_absolute() or root not in path.parents:
        raise UserError(f"{origin}: image paths must lie under the image folder {root}, got {name!r}; correct the row")
    return path


def image_root(path: str | Path) -> Path:
    """Returns an image folder as a clean absolute path.

    Raises:
        UserError: If it is no folder.
    """
    root = Path(os.path.abspath(Path(path).expanduser()))
    if not root.is_dir():
        raise UserError(f"image folder {root} does not exist; give the folder that image paths are relative to")
    return root


def read_rows(path: Path, expected: str) -> list[tuple[str, Any]]:
    """Reads an annotation file that is a list.

    Args:
        path: The JSON file.
        expected: How a row looks, for messages.

    Returns:
        The rows as they are, each with its origin for messages, such as ``val.json row 1``; counted from 1, as people
        count.

    Raises:
        UserError: If the file cannot be read or is no list, or an empty one.
    """
    rows = read_json(path)
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path.name} must be a JSON list of rows {expected}, got {tell_shape(rows)}")
    return [(f"{path.name} row {number}", row) for number, row in enumerate(rows, 1)]


def check_distinct(names: Sequence[str], origin: str) -> None:
    """Raises UserError if a list of names has one twice."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{origin} lists {tell_some(len(twice), 'name', twice)} more than once; remove the repetitions")


def tell_some(count: int, noun: str, examples: Sequence[str]) -> str:
    """Returns a number of things with the first few of them, such as ``7 names (a, b, ...)``."""
    more = ", ..." if count > _EXAMPLES else ""
    return f"{count} {noun}{'s' if count > 1 else ''} ({', '.join(map(str, examples[:_EXAMPLES]))}{more})"


def as_object(value: Any, origin: str, expected: str) -> dict[str, Any]:
    """Returns a JSON value that must be an object.

    Raises:
        UserError: If it is none; tells the expected shape.
    """
    if not isinstance(value, dict):
        raise UserError(f"{origin} must look like {expected}, got {tell_shape(value)}")
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
        got = f"`{name}` = {tell_shape(value)}" if name in row else f"no `{name}` (keys: {', '.join(map(str, row))})"
        raise UserError(f"{origin} must look like {expected}, got {got}")
    if isinstance(value, int) and not 0 <= value < 2**31:  # labels are stored as int32
        raise UserError(f"{origin}: `{name}` must lie in 0..{2**31 - 1}, got {value}")
    return as_text(value, f"{origin}: `{name}`", expected) if isinstance(value, str) else value


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
        raise UserError(f"{origin} must look like {expected}, got {tell_shape(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise UserError(f"{origin} holds half a character ({error.reason}), got {value!r}; correct it") from error
    return value


def tell_shape(value: Any) -> str:
    """Describes a JSON value in a few words."""
    if isinstance(value, dict):
        keys = ", ".join(list(value)[:6])
        return f"an object with {f'keys {keys}' if keys else 'no keys'}"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
