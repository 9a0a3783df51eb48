"""What every converter makes of its input: light records that say where an image is and what is known about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from harma_ray.data.captions import clean_caption
from harma_ray.data.convert.mistakes import Mistakes
from harma_ray.data.schema import BadRow, Kind
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
class MemberSpec:
    """A generated image of composed retrieval, drawn when it is written."""

    seed: int
    """Seed of the data set."""
    index: int
    """Number of the query; queries with different numbers differ."""
    style: str
    """Look of the scene, one of the styles of ``harma_ray.data.scenes``."""
    size: int
    """Height and width in pixels."""
    member: int
    """Position among the members of the query."""


@dataclass(frozen=True)
class SourceRecord:
    """One image before conversion; holds no pixels."""

    kind: ClassVar[Kind] = "images"

    image_id: int
    """Number of the image, unique in its split."""
    source: str
    """Name of the image, relative to its root, the same on every machine."""
    origin: str
    """Where the record was read, for messages: annotation file and row."""
    image: Path | SceneSpec | MemberSpec
    """Absolute path of the image file, or the scene to draw."""
    captions: tuple[str, ...] = ()
    """Cleaned captions; a scene brings its own."""
    label: int | None = None
    """Number of the class."""
    label_name: str | None = None
    """Name of the class."""

    @property
    def images(self) -> tuple[tuple[str, Path | SceneSpec | MemberSpec], ...]:
        """Names and places of the images that the row needs."""
        return ((self.source, self.image),)


@dataclass(frozen=True)
class QueryRecord:
    """One query of composed retrieval, with the fields of ``QUERY_SCHEMA``."""

    pair_id: int
    """The data set's own number, or a running one."""
    reference: str
    """Name of the reference image."""
    target: str | None
    """Name of the target image; None = not known."""
    category: str | None
    """Part of the data set whose images it is to be found among; None = there are no parts."""
    captions: tuple[str, ...]
    """What changes the reference into the target, as annotated."""
    members: tuple[str, ...]
    """Names of the images of a subset ranking, reference and target included; possibly none."""
    source: str
    """Where it was read: annotation file and row."""

    @property
    def pair(self) -> list[str]:
        """Names of the reference and, if it is known, the target."""
        return [self.reference, *([] if self.target is None else [self.target])]

    @property
    def needs(self) -> list[str]:
        """Names of the images that it cannot be evaluated without."""
        return [*self.pair, *self.members]

    def explain(self, lost: Iterable[str]) -> BadRow:
        """Returns why it is left out if some images are."""
        return BadRow(self.source, f"needs {', '.join(dict.fromkeys(lost))}, which cannot be used")


@dataclass(frozen=True)
class TripletRecord:
    """One training row of composed retrieval before conversion; holds no pixels."""

    kind: ClassVar[Kind] = "triplets"

    query: QueryRecord
    """What is known of it; with a target."""
    reference_image: Path | MemberSpec
    """Absolute path of the file of the reference, or the scene to draw."""
    target_image: Path | MemberSpec
    """That of the target."""

    @property
    def images(self) -> tuple[tuple[str, Path | MemberSpec], ...]:
        """Names and places of the images that the row needs."""
        return ((self.query.reference, self.reference_image), (self.query.target or "", self.target_image))


Record = SourceRecord | TripletRecord
"""What becomes a row of a split."""


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


def fill_labels(records: list[SourceRecord], mistakes: Mistakes) -> list[SourceRecord]:
    """Gives a class number to records that have a class name alone.

    If no record has a number, the names are numbered in alphabetical order; else a name keeps the number that it has
    elsewhere. Records without a name stay as they are.

    Args:
        records: All records that share their classes.
        mistakes: Gets it if one name has two numbers, one number two names, or a name no number although others have.
    """
    numbers: dict[str, int] = {}
    names: dict[int, str] = {}
    for record in records:
        if record.label is None or record.label_name is None:
            continue
        number = numbers.setdefault(record.label_name, record.label)
        name = names.setdefault(record.label, record.label_name)
        if (number, name) != (record.label, record.label_name):
            mistakes.add(
                f"{record.origin}: a class has one number and one name, got {record.label} = {record.label_name!r} "
                f"and, in another row, {number} = {name!r}; correct one of them"
            )
    missing = {r.label_name: r.origin for r in records if r.label is None and r.label_name is not None}
    if not numbers:
        numbers = {name: number for number, name in enumerate(sorted(missing))}
    for name, origin in missing.items():
        if name not in numbers:
            mistakes.add(f"{origin}: class {name!r} has no `label`, but other classes have one; add it or drop all")
    return [
        replace(r, label=numbers.get(r.label_name)) if r.label is None and r.label_name is not None else r
        for r in records
    ]


def check_unique(records: list[SourceRecord], mistakes: Mistakes) -> None:
    """Notes, naming both rows, where two records of a split are the same image or have the same number."""
    seen: dict[str | int, SourceRecord] = {}
    for record in records:
        for key, what in ((record.source, "image"), (record.image_id, "image_id")):
            other = seen.setdefault(key, record)
            if other is not record:
                mistakes.add(
                    f"{record.origin}: {what} {key!r} is also in {other.origin}; an image has one row in a split"
                )
