"""Rows that a recipe's model could not read whole, found before any is written."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from harma_ray.data.convert.mistakes import all_mistakes
from harma_ray.data.convert.writer import WriteSettings
from harma_ray.data.image_reading import picture_size
from harma_ray.data.images import BadImage
from harma_ray.data.kinds.base import ImageSource, Record, RowCheck
from harma_ray.data.order import iterate_slices
from harma_ray.errors import UserError
from harma_ray.progress import progress_bar

_PART = 1000


@dataclass(frozen=True)
class _Part:
    """Some of the rows, for one task."""

    place: int
    records: Sequence[Record]
    check: RowCheck
    resize: int | None


def check_rows(records: Sequence[Record], settings: WriteSettings, where: str) -> None:
    """Asks `WriteSettings.check` of all rows; no image is decoded, for their headers say how large they are.

    A row with an image that cannot be read is passed over: it is told of when it is to be written.

    Args:
        records: What the rows are made from.
        settings: How they will be written.
        where: What messages call them together.

    Raises:
        UserError: With all rows that are refused.
    """
    if settings.check is None:
        return
    slices = iterate_slices(len(records), _PART)
    parts = [_Part(part.start, records[part], settings.check, settings.resize) for part in slices]
    found = {}
    with progress_bar(total=len(records), unit=" rows", desc="checking", disable=not settings.progress) as bar:
        for place, told in settings.map_tasks(_check_part, parts):
            found[place] = told
            bar.update(min(_PART, len(records) - place))
    with all_mistakes(where) as mistakes:
        for text in (text for place in sorted(found) for text in found[place]):
            mistakes.add(text)


def _check_part(part: _Part) -> tuple[int, list[str]]:
    """Returns the place of a part, and what is wrong with its rows."""
    found = []
    for record in part.records:
        with suppress(BadImage):
            sizes = [_size_of(source, part.resize) for _, source in record.images]
            try:
                part.check(record, sizes)
            except UserError as error:
                found.append(str(error))
    return part.place, found


def _size_of(source: ImageSource, resize: int | None) -> tuple[int, int]:
    if isinstance(source, Path):
        return picture_size(source, resize=resize)
    side = min(source.size, resize or source.size)
    return side, side
