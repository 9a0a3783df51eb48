"""Reading of JSON files, and what is said of those that are none."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harma_ray.data.convert.annotations import Entry, check_distinct, describe_shape
from harma_ray.errors import UserError

_OTHER_ENCODINGS = ("GB18030", "WINDOWS-1252")
_NO_JSON = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the file that it stands for; fetch it with `git lfs pull`"),
    (b"<", "is a web page or XML; download the file itself"),
    (b"PK", "is a zip archive; unpack it"),
    (b"\x1f\x8b", "is a gzip archive; unpack it"),
)


def read_json(path: str | Path, *, unique_keys: bool = False) -> Any:
    """Reads an annotation file: JSON in UTF-8, UTF-16 or UTF-32, or JSON Lines, which give a list.

    Args:
        path: The file.
        unique_keys: Refuses objects in which a key stands twice; JSON itself lets the last one win.

    Raises:
        UserError: If it is missing, cannot be read or is none of these, told as what it is; or a key stands twice.
    """
    return _read(Path(path), unique_keys=unique_keys)[0]


def _read(path: Path, *, unique_keys: bool = False) -> tuple[Any, list[int]]:
    """Returns what `read_json` does, and of JSON Lines the line that each row stands in, counted from 1."""

    def check(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        check_distinct([key for key, _ in pairs], path.name)
        return dict(pairs)

    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"annotation file {path} cannot be read ({error.strerror}); check the path") from error
    hook = check if unique_keys else None
    try:
        content = json.loads(data, object_pairs_hook=hook)
        if path.suffix not in (".jsonl", ".ndjson") or not isinstance(content, dict):
            return content, []
        text = data.decode(json.detect_encoding(data))
        return [content], [1 + text[: text.index("{")].count("\n")]
    except RecursionError as error:
        raise UserError(f"annotation file {path} is nested too deeply to be a list of annotations") from error
    except UnicodeDecodeError as error:
        raise UserError(f"annotation file {path} {_explain_encoding(path, data, error)}") from error
    except json.JSONDecodeError as error:
        reason = _recognise(data)
        if reason is None and error.msg == "Extra data" and error.doc.lstrip().startswith("{"):
            return _read_lines(path, error.doc, hook)
        raise UserError(f"annotation file {path} {reason or _explain_syntax(error)}") from error


def read_rows(path: Path, expected: str, hint: Callable[[object], str] = lambda content: "") -> list[Entry]:
    """Reads an annotation file that is a list.

    Args:
        path: The JSON file.
        expected: How a row looks, for messages.
        hint: What the message about a file of another shape ends with.

    Returns:
        The rows as they are, with origins such as ``val.json row 1`` or, of JSON Lines, ``val.jsonl line 1``; counted
        from 1, as people count, blank lines too.

    Raises:
        UserError: If the file cannot be read or is no list, or an empty one.
    """
    rows, lines = _read(path)
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path.name} must be a JSON list of rows {expected}, got {describe_shape(rows)}{hint(rows)}")
    word, numbers = ("line", lines) if lines else ("row", range(1, len(rows) + 1))
    return [Entry(row, f"{path.name} {word} {number}", expected) for number, row in zip(numbers, rows, strict=True)]


def _read_lines(path: Path, text: str, hook: Any) -> tuple[list[Any], list[int]]:
    rows, numbers = [], []
    for number, line in enumerate(text.split("\n"), 1):  # texts may hold other separators, such as U+2028
        try:
            if line.strip():
                rows.append(json.loads(line, object_pairs_hook=hook))
                numbers.append(number)
        except json.JSONDecodeError as error:
            raise UserError(
                f"annotation file {path} looks like JSON Lines, but line {number} is not JSON ({error.msg}, column "
                f"{error.colno}); correct the line"
            ) from error
    return rows, numbers


def _recognise(data: bytes) -> str | None:
    """Returns what a file is that is plainly no JSON."""
    start = data.lstrip(b"\xef\xbb\xbf \t\r\n")
    if not start:
        return "is empty; is it a complete download?"
    return next((reason for signature, reason in _NO_JSON if start.startswith(signature)), None)


def _explain_syntax(error: json.JSONDecodeError) -> str:
    way_out = "is it a complete download?" if error.pos >= len(error.doc.rstrip()) - 1 else "correct it there"
    if error.msg.startswith(("Unterminated string", "Expecting ',' delimiter")):
        way_out = "correct it there; is it a complete download?"
    return f"is not JSON ({error}); {way_out}"


def _explain_encoding(path: Path, data: bytes, error: UnicodeDecodeError) -> str:
    reason = _recognise(data)
    if reason is not None:
        return reason
    if error.encoding != "utf-8" or error.start >= len(data) - 3:
        return f"is not JSON ({error}); is it a complete download?"
    for encoding in _OTHER_ENCODINGS:
        try:
            json.loads(data.decode(encoding))
        except ValueError:
            continue
        convert = f"iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > {shlex.quote(f'{path.stem}-utf8.json')}"
        return f"is not JSON in UTF-8 (byte {error.start + 1}) but may be {encoding}; convert it: {convert}"
    return f"is not JSON ({error}); save it in UTF-8"
