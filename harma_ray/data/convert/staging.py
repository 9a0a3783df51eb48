"""Where a split is made and how it gets to its place, whole, when several programs or a crash could interfere."""

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from harma_ray.errors import UserError
from harma_ray.files import swap

WORK_FOLDER = ".convert"
"""Folder beside the splits in which they are made."""

_logger = logging.getLogger(__name__)


def put_in_place(work: Path, split: Path) -> None:
    """Moves a finished folder to its place; what was there before is deleted after that."""
    swap(work, split, _old_folder(split))


@contextmanager
def lock(split: Path) -> Iterator[None]:
    """Keeps others from writing a split (or vectors), puts back what a killed one moved away, tidies up at the end."""
    folder = split.parent / WORK_FOLDER
    path = folder / f"{split.name}.lock"
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"another command is writing {split}; wait for its end") from error
            except OSError as error:  # some network file systems have no locks
                _logger.warning("%s cannot be locked (%s): write it by one command at a time", split, error.strerror)
            if not path.exists() or path.stat().st_ino != os.fstat(file.fileno()).st_ino:
                continue  # its owner has just removed the file: what we hold locks nothing
            old = _old_folder(split)
            if old.exists() and not split.exists():
                os.rename(old, split)
            elif old.exists():
                shutil.rmtree(old)
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
                with suppress(OSError):  # not empty: there is work to go on with
                    work_folder(split).rmdir()
                with suppress(OSError):
                    folder.rmdir()
            return


def work_folder(split: Path) -> Path:
    """Returns the folder that unfinished versions of a split are in."""
    return split.parent / WORK_FOLDER / split.name


def _old_folder(split: Path) -> Path:
    return split.parent / WORK_FOLDER / f"{split.name}.old"
