"""Files and folders that are written whole or not at all, and where they may go."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

from harma_ray.errors import UserError

TEMPORARY_PREFIX = ".tmp-"
"""Files of this prefix are being written, or were when their writer died."""

_JOB_COPY = "working_dir_files"
"""Folder in which Ray keeps the copies of working folders that jobs run in."""


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for writing that appears under its name, on disk, only when the block ends without an error."""
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}-{path.name}")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file; what was there before stays if it cannot be written.

    Raises:
        UserError: If the disk is full or the folder cannot be written.
    """
    try:
        with atomic_file(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); free some space or choose another place") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a file to write, which takes the place of `path` if nothing fails."""
    partial = path.with_name(f".{path.name}.partial")
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            _flush(partial)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def making(folder: Path) -> Iterator[Path]:
    """Gives the name of a folder to make, which becomes `folder`, on disk, if nothing fails.

    Raises:
        UserError: If it cannot be written.
    """
    try:
        with atomic_folder(folder) as partial:
            yield partial
    except OSError as error:
        raise _cannot_write(folder, error) from error


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Gives the name of a folder to make, which becomes `folder`, on disk, when the block ends without an error."""
    work = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(work, ignore_errors=True)  # of one that was killed
    try:
        work.mkdir(parents=True)
        partial = work / folder.name
        yield partial
        for path in partial.rglob("*"):
            if path.is_file():
                _flush(path)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Makes the user's error of what goes wrong in writing weights."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors raise the others on a full disk
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
    return UserError(f"cannot write {path} ({reason}); check the folder and its free space")


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
