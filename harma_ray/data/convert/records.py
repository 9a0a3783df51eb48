"""What converters make of annotations: cleaned captions, numbered classes, scenes to draw."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from harma_ray.data.captions import clean_caption
from harma_ray.data.convert.mistakes import Mistakes
from harma_ray.data.kinds.base import Drawn
from harma_ray.data.kinds.images import SourceRecord
from harma_ray.data.scenes import composed_scene, draw, scene
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

    def draw(self) -> Drawn:
        """Draws the scene; it has captions and a class."""
        drawn = scene(self.seed, self.index, self.style, self.size)
        return Drawn(drawn.image, tuple(map(clean_caption, drawn.captions)), drawn.label, drawn.label_name)


@dataclass(frozen=True)
class MemberSpec(SceneSpec):
    """A generated image of composed retrieval, drawn when it is written; its index is the number of the query."""

    member: int
    """Position among the members of the query."""
    own_layouts: bool = False
    """Whether each member is laid out anew."""

    def draw(self) -> Drawn:
        """Draws the member."""
        query = composed_scene(self.seed, self.index, self.style, own_layouts=self.own_layouts)
        return Drawn(draw(query.members[self.member], self.style, self.size))


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
