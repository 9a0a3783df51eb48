"""Files and folders that are written whole or not at all, and where they may go."""

import difflib
import errno
import fcntl
import glob
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from harma_ray.errors import UserError

ResultT = TypeVar("ResultT")

TEMPORARY_PREFIX = ".tmp-"
"""In folders of this prefix something is being written, or was when its writer died."""
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of the system's errors that mean so."""

CONFIG_NAME = "config.yaml"
"""The settings of a run in its folder."""
SEARCH_NAME = "search.yaml"
"""The definition of a search in its folder."""
RUNS = "runs"
"""Folder of all runs and searches, unless another is named."""
SETTLED_SECONDS = 2.0
"""A file may change twice within what a file system takes for one moment; so long after a change it is not known."""

_THREADS = 8
"""Files that are read at the same time: on a network drive each is waited for."""
_TURN = 32
"""Most files that a thread takes at once: handing it each by itself takes longer than reading a small one."""

_JOB_COPY = "working_dir_files"
"""Folder in which Ray keeps the copies of working folders that jobs run in."""


@contextmanager
def atomic(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Gives a name for a file or folder to be made, which becomes `path`, on disk, if the block ends without an error.

    What earlier writers of `path` left when they were killed is deleted.

    Args:
        path: Where it goes; a file there is replaced.
        overwrite: Whether a folder there is replaced, or a file there by a folder, too.

    Raises:
        OSError: If it cannot be made or moved to its place; see `making` for the user's error.
    """
    if not path.parent.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
    with _work_folder(path) as work:
        made = work / path.name
        yield made
        for each in [made, *made.rglob("*")]:
            _flush(each)
        if overwrite and path.exists() and (path.is_dir() or made.is_dir()):
            swap(made, path, work / "replaced")
        else:
            os.replace(made, path)
            _flush(path.parent)


@contextmanager
def making(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Gives a name for a file or folder to be made, as `atomic` does.

    Args:
        path: Where it goes.
        overwrite: Whether what is there is replaced, a file by a folder, too.

    Raises:
        UserError: If it cannot be written; all other errors of the block stay what they are.
    """
    try:
        with atomic(path, overwrite=overwrite) as made:
            yield made
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _is_of_writing(error, path):
            raise
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise UserError(f"cannot write {path} ({reason}); check the folder and its free space") from error


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file; what was there before stays if it cannot be written.

    Raises:
        UserError: If the disk is full or the folder cannot be written.
    """
    with making(path) as made:
        made.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Writes a text as `write_bytes` does."""
    write_bytes(path, text.encode())


def swap(made: Path, folder: Path, old: Path) -> None:
    """Moves a finished folder to its place, on disk; what was there before goes to `old` and is deleted after that."""
    with ExitStack() as undo:
        if folder.exists():
            os.rename(folder, old)
            undo.callback(os.rename, old, folder)
        os.rename(made, folder)
        undo.pop_all()
    _flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _work_folder(path: Path) -> Iterator[Path]:
    """Makes a folder beside a path, locked and deleted in the end; deletes those of writers that have died."""
    prefix = f"{TEMPORARY_PREFIX}{path.name}-"
    for left in path.parent.glob(f"{glob.escape(prefix)}*"):
        with suppress(OSError), _locked(left, fcntl.LOCK_EX | fcntl.LOCK_NB):  # its writer lives if it is locked
            if any(left.iterdir()):  # an empty one may be about to be locked
                shutil.rmtree(left)
    temporary = tempfile.TemporaryDirectory(prefix=prefix, dir=path.parent, ignore_cleanup_errors=True)
    with temporary as work, ExitStack() as stack:
        with suppress(OSError):  # some network file systems have no locks
            stack.enter_context(_locked(Path(work), fcntl.LOCK_EX))
        yield Path(work)


@contextmanager
def _locked(folder: Path, how: int) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, how)
        yield
    finally:
        os.close(descriptor)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_of_writing(error: Exception, path: Path) -> bool:
    """Tells whether something went wrong in making a file or folder by `atomic`, not in reading what goes into it."""
    if isinstance(error, RuntimeError):
        return "inline_container" in str(error)  # of torch, on a full disk
    if not isinstance(error, OSError) or error.errno in DISK_FULL:
        return True
    if not error.filename:
        return False
    place = Path(os.fsdecode(error.filename))
    work = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-")
    return path.is_relative_to(place) or str(place).startswith(str(work))


def output_path(path: str | Path) -> Path:
    """Returns the absolute path of something that a command is to write.

    Raises:
        UserError: If the path is relative and the working folder is the copy that a Ray job runs in: Ray deletes it;
            or if it is no UTF-8.
    """
    path = Path(path).expanduser()
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"output must have a name in UTF-8, got {os.fsencode(path)!r}; choose another") from error
    if not path.is_absolute() and _JOB_COPY in Path.cwd().parts:
        raise UserError(f"`{path}` would be lost with this job's working folder; give an absolute path for all output")
    return path.absolute()


def new_path(out: str | Path) -> Path:
    """Returns `output_path` of what ``--out`` names; raises UserError if it is there."""
    target = output_path(out)
    if target.exists():
        raise UserError(f"{target} exists; choose another --out")
    return target


def figures_path(file: str | Path | None) -> Path | None:
    """Returns `output_path` of what ``--json`` names, if anything; raises UserError if its folder is not there."""
    target = output_path(file) if file else None
    if target and not target.parent.is_dir():
        raise UserError(f"the folder of `--json` {target} does not exist")
    return target


def require_writable(path: Path, option: str) -> None:
    """Raises UserError unless a file or folder can be made at a place; `option` is what names another."""
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        reason = "is read-only" if above.is_dir() else "is no folder"
        raise UserError(f"cannot make {path}, because {above} {reason}; choose another {option}")


def kept_path(path: str | Path, name: str) -> Path:
    """Returns the absolute path of what a run, once made, will be read with again: data, weights, another run.

    Args:
        path: As the user gave it.
        name: What it is, for the message.

    Raises:
        UserError: If it leads into the copy of a working folder that a Ray job runs in: Ray makes it without what
            ``.gitignore`` names, and deletes it.
    """
    path = Path(path).expanduser().absolute()
    if _JOB_COPY in path.parts:
        raise UserError(
            f"{name} `{path.name}` would be read from this job's working folder, a copy that Ray makes without "
            "weights, data and runs (.gitignore) and deletes in the end; give its absolute path on storage that all "
            "machines mount"
        )
    return path


def near_paths(path: Path, is_wanted: Callable[[Path], bool] = Path.exists, *others: str | Path) -> list[Path]:
    """Returns what a path that is not there, or is something else, may have meant, the nearest first.

    Args:
        path: The path.
        is_wanted: Tells whether another one is what should have been named.
        others: Folders that it may lie in, beside its own.
    """
    path = path.absolute()
    found: list[Path] = []
    for place in dict.fromkeys([path.parent, *(Path(other).absolute() for other in others)]):
        with suppress(OSError):
            there = sorted(place.iterdir())  # endings, such as .yaml, are alike in any case
            near = difflib.get_close_matches(path.stem, {each.stem for each in there})
            found += [each for stem in near for each in there if each.stem == stem and is_wanted(each)]
    return found


def near_folders(path: Path, is_wanted: Callable[[Path], bool], *others: str | Path) -> list[Path]:
    """Returns folders that a path may have meant: what it lies in, near ones, or what is in it; see `near_paths`."""
    path = path.absolute()
    above = [folder for folder in path.parents[:2] if is_wanted(folder)]
    found = above or near_paths(path, is_wanted, *others)
    if not found and path.is_dir():
        with suppress(OSError):
            found = sorted(each for each in path.iterdir() if is_wanted(each))
    return found


def did_you_mean(paths: Sequence[Path]) -> str:
    """Returns the end of a message that names up to three paths, if there are any."""
    return f"; did you mean {' or '.join(map(str, paths[:3]))}?" if paths else ""


def in_threads(function: Callable[[Path], ResultT], files: Sequence[Path]) -> Iterator[ResultT]:
    """Yields what a function returns of each file, in their order; several are read at the same time."""
    turn = max(1, min(_TURN, len(files) // (4 * _THREADS)))
    turns = [files[start : start + turn] for start in range(0, len(files), turn)]
    with ThreadPoolExecutor(_THREADS) as pool:
        for results in pool.map(lambda some: [function(file) for file in some], turns):
            yield from results


def settled_state(found: os.stat_result) -> tuple[int, ...] | None:
    """Returns what the system tells a file by, and one state of it, from all others; None if it changed just now."""
    if time.time() - max(found.st_mtime, found.st_ctime) < SETTLED_SECONDS:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def cache_folder(name: str) -> Path | None:
    """Returns where something of this name is remembered for the user; None: this user has no such place."""
    asked = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (asked if asked.is_absolute() else Path("~/.cache").expanduser()) / "harma_ray" / name
    except RuntimeError:  # nobody knows the user's home
        return None
