"""What every converter makes of its input: light records that say where an image is and what is known about it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harma_ray.data.captions import clean_caption
from harma_ray.errors import UserError

SPLITS = ("train", "val", "test")
"""Names of splits."""


@dataclass(frozen=True)
class SceneSpec:
    """A generated image, drawn when it is written."""

    seed: int
    """Seed of the data set."""
    index: int
    """Number of the scene; scenes with different numbers differ."""
    style: str
    """Look of the scene, one of the styles of ``harma_ray.data.scenes``."""
    size: int
    """Height and width in pixels."""


@dataclass(frozen=True)
class SourceRecord:
    """One image before conversion; holds no pixels."""

    image_id: int
    """Number of the image, unique in its split."""
    source: str
    """Name of the image, relative to its root, the same on every machine."""
    origin: str
    """Where the record was read, for messages: annotation file and row."""
    image: Path | SceneSpec
    """Absolute path of the image file, or the scene to draw."""
    captions: tuple[str, ...] = ()
    """Cleaned captions; a scene brings its own."""
    label: int | None = None
    """Number of the class."""
    label_name: str | None = None
    """Name of the class."""


def read_json(path: str | Path) -> Any:
    """Reads an annotation file.

    Raises:
        UserError: If it is missing, cannot be read, or is not JSON in UTF-8.
    """
    try:
        return json.loads(Path(path).read_bytes())
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


def clean_captions(texts: Iterable[Any], origin: str) -> tuple[str, ...]:
    """Cleans the captions of one image.

    Raises:
        UserError: If one is not a text, or nothing is left of it after cleaning.
    """
    cleaned = []
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"{origin}: captions must be texts, got {text!r}; correct the row")
        caption = clean_caption(text)
        if not caption:
            raise UserError(f"{origin}: the caption {text!r} is empty after cleaning; correct or remove it")
        cleaned.append(caption)
    return tuple(cleaned)


def fill_labels(records: list[SourceRecord]) -> list[SourceRecord]:
    """Gives a class number to records that have a class name alone.

    If no record has a number, the names are numbered in alphabetical order; else a name keeps the number that it has
    elsewhere. Records without a name stay as they are.

    Raises:
        UserError: If one name has two numbers, one number two names, or a name no number although others have one.
    """
    numbers: dict[str, int] = {}
    names: dict[int, str] = {}
    for record in records:
        if record.label is None or record.label_name is None:
            continue
        number = numbers.setdefault(record.label_name, record.label)
        name = names.setdefault(record.label, record.label_name)
        if (number, name) != (record.label, record.label_name):
            raise UserError(
                f"{record.origin}: a class has one number and one name, got {record.label} = {record.label_name!r} "
                f"and, in another row, {number} = {name!r}; correct one of them"
            )
    missing = {r.label_name: r.origin for r in records if r.label is None and r.label_name is not None}
    if not numbers:
        numbers = {name: number for number, name in enumerate(sorted(missing))}
    for name, origin in missing.items():
        if name not in numbers:
            raise UserError(f"{origin}: class {name!r} has no `label`, but other classes have one; add it or drop all")
    return [
        replace(r, label=numbers[r.label_name]) if r.label is None and r.label_name is not None else r for r in records
    ]


def check_unique(records: list[SourceRecord]) -> None:
    """Checks that no two records of a split are the same image or have the same number.

    Raises:
        UserError: Naming both rows.
    """
    seen: dict[str | int, SourceRecord] = {}
    for record in records:
        for key, what in ((record.source, "image"), (record.image_id, "image_id")):
            other = seen.setdefault(key, record)
            if other is not record:
                raise UserError(
                    f"{record.origin}: {what} {key!r} is also in {other.origin}; an image has one row in a split"
                )
