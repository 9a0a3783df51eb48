"""What is in image files, by SHA-256: read once, and known from then on as long as the files stay as they are.

Beside each hash all is kept by which the system tells a file, and one state of it, from others. It lies in the user's
cache folder, a file for every split that was made: a second conversion of thousands of images need not read them.
"""

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from harma_ray.data.convert.annotations import hash_file
from harma_ray.data.image_files import readable_name
from harma_ray.errors import count
from harma_ray.files import atomic, cache_folder, in_threads, settled_state
from harma_ray.progress import progress_bar

_COLUMNS = ("file", "state", "sha256")


@dataclass(frozen=True)
class Seen:
    """What the system tells of a file without reading it."""

    size: int = 0
    """Bytes."""
    state: str = ""
    """What tells the file, and this state of it, from others; empty if it changed just now."""
    is_missing: bool = False
    """Whether there is no such file."""
    reason: str = ""
    """Why it cannot be read; empty if it may be readable."""


def look_at(files: Sequence[Path]) -> dict[Path, Seen]:
    """Returns what the system tells of files; none is read."""
    return dict(zip(files, in_threads(_look_at, files), strict=True))


def hash_seen(
    seen: Mapping[Path, Seen], memory: Path | None, *, progress: bool
) -> tuple[dict[Path, str], dict[Path, str]]:
    """Returns the SHA-256 of files, and why some cannot be read, both by path.

    Args:
        seen: The files; those that are known to be unreadable are passed over.
        memory: Where hashes are remembered, as `memory_of` names it; None = nowhere.
        progress: Shows a progress bar on stderr if files are to be read.
    """
    known = _recall(memory)
    there = {path: each for path, each in seen.items() if not each.reason}
    hashes = {path: known.get((readable_name(path), each.state), "") for path, each in there.items()}
    to_read = [path for path, content in hashes.items() if not content]
    failures: dict[Path, str] = {}
    if not to_read:
        return hashes, failures
    shown = {"unit": " files", "disable": not progress, "desc": f"checking {count(len(to_read), 'file')}"}
    for path, (content, reason) in progress_bar(
        iterable=zip(to_read, in_threads(_hash, to_read), strict=True), total=len(to_read), **shown
    ):
        if reason:
            failures[path] = reason
            del hashes[path]
        else:
            hashes[path] = content
    _remember(memory, ((readable_name(path), there[path].state, content) for path, content in hashes.items()))
    return hashes, failures


def memory_of(split: Path) -> Path | None:
    """Returns where the hashes of a split's images are remembered; None: this user has no such place."""
    folder = cache_folder("contents")
    return folder and folder / f"{hashlib.sha256(str(split).encode()).hexdigest()}.parquet"


def tell_reason(path: Path, error: OSError) -> str:
    """Returns why a file cannot be read."""
    what = "cannot be found" if error.errno in (errno.ENOENT, errno.ENOTDIR) else "cannot be read"
    return f"{what} ({error.strerror}: {readable_name(path)})"


def _look_at(path: Path) -> Seen:
    try:
        found = path.stat()
    except OSError as error:
        return Seen(is_missing=error.errno in (errno.ENOENT, errno.ENOTDIR), reason=tell_reason(path, error))
    if not path.is_file():
        return Seen(reason="not a file")
    state = settled_state(found)
    return Seen(found.st_size, " ".join(map(str, state)) if state else "")


def _hash(path: Path) -> tuple[str, str]:
    """Returns a file's SHA-256, or why it cannot be read."""
    try:
        return hash_file(path), ""
    except OSError as error:
        return "", tell_reason(path, error)


def _recall(memory: Path | None) -> dict[tuple[str, str], str]:
    """Returns the hashes that are remembered, by the name and the state of a file."""
    if memory is not None:
        with contextlib.suppress(OSError, pa.ArrowException, KeyError):
            columns = pq.read_table(memory, columns=list(_COLUMNS), memory_map=False)
            names, states, contents = (columns[name].to_pylist() for name in _COLUMNS)
            return dict(zip(zip(names, states, strict=True), contents, strict=True))
    return {}


def _remember(memory: Path | None, rows: Iterable[tuple[str, str, str]]) -> None:
    """Keeps hashes of files that have stayed as they are for a while; where that cannot be written, nothing is kept."""
    kept = [row for row in rows if row[1]]
    if memory is not None and kept:
        columns = zip(*kept, strict=True)
        with contextlib.suppress(OSError), atomic(memory) as made:
            pq.write_table(pa.table(dict(zip(_COLUMNS, map(list, columns), strict=True))), os.fspath(made))
