"""Weights on their way to a disk: files and folders that appear whole or not at all, mistakes told in one line."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from harma_ray.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a file to write, which takes the place of `path` if nothing fails."""
    partial = path.with_name(f".{path.name}.partial")
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def making(folder: Path) -> Iterator[Path]:
    """Gives a folder to make, which becomes `folder` if nothing fails."""
    with write_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            yield work / folder.name
            (work / folder.name).rename(folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Makes the user's error of what goes wrong in writing weights."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors raise the others on a full disk
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise UserError(f"cannot write {path} ({reason}); check the folder and its free space") from error
