"""Rows that are a talk about images: what visual-instruction training reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from harma_ray.data.images import check_sides
from harma_ray.data.kinds.base import BadRow, ImageSource, Record, RowKind, StoredImage
from harma_ray.data.kinds.drawing import LINE, MARGIN, THUMBNAIL, paste, write

if TYPE_CHECKING:
    from harma_ray.data.manifest import Manifest

Speaker = Literal["system", "human", "gpt"]
IMAGE_MARK = "<image>"
"""Stands in a question for an image of the talk, in their order."""

TALK_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("dataset", pa.string(), nullable=False),
        pa.field("images", pa.list_(pa.binary()), nullable=False),
        pa.field("image_names", pa.list_(pa.string()), nullable=False),
        pa.field("conversations", pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())])), nullable=False),
        pa.field("max_tiles", pa.int32()),
        pa.field("augment", pa.bool_(), nullable=False),
        pa.field("repeats", pa.int32(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
    ]
)
"""One row a talk: the bytes of its image files (possibly none) and its turns, of ``system`` (first, if at all),
``human`` and ``gpt``. ``max_tiles`` bounds the tiles of the talk's images together (null: the training's setting),
``augment`` says that images are compressed anew in training, ``repeats`` how often an epoch visits the row."""

_MAX_DRAWN = 3
_TURN_LINES = 8


class _Talks(RowKind):
    """Talks about images."""

    name = "talks"
    schema = TALK_SCHEMA
    images: ClassVar[Mapping[str, str]] = {"images": "image_names"}
    row, text, sample = "talk", "turn", "talk"
    group_column = "dataset"
    cells_across = 3

    def count_samples(self, shard: pq.ParquetFile) -> np.ndarray:
        """Returns how often an epoch visits each talk: int[N]."""
        return shard.read(columns=["repeats"]).column("repeats").to_numpy()

    def most_samples(self, manifest: Manifest, *, one_caption: bool) -> None:
        """Returns None: talks may be visited several times."""

    def describe(self, manifest: Manifest) -> str:
        """Returns the numbers of talks and turns."""
        return f"{manifest.rows:,} talks with {manifest.captions:,} turns"

    def texts(self, row: Mapping[str, Any]) -> Sequence[str]:
        """Returns what is said in a talk, a text a turn."""
        return [turn["value"] for turn in row["conversations"]]

    def draw(self, row: Mapping[str, Any]) -> Image.Image:
        """Draws the first images of a talk and its first turns."""
        step = THUMBNAIL + MARGIN
        cell = Image.new("RGB", (_MAX_DRAWN * step + MARGIN, THUMBNAIL + _TURN_LINES * LINE + 2 * MARGIN), "white")
        shown = row["images"][:_MAX_DRAWN]
        for number, data in enumerate(shown):
            paste(cell, data, number * step)
        left = len(shown) * step if len(shown) < _MAX_DRAWN else 0
        top = 0 if left or not shown else THUMBNAIL + 2
        top += write(cell, (left, top), f"{row['dataset']} {row['sample_id']}", "black", 2)
        room = (_MAX_DRAWN - len(shown)) or _MAX_DRAWN
        for turn in row["conversations"]:
            colour = "black" if turn["from"] == "gpt" else "dimgrey"
            text = f"{turn['from']}: {turn['value'].strip()}"
            top += write(cell, (left, top), text, colour, 3, columns=room)
        return cell


TALKS = _Talks()
"""Rows of `TALK_SCHEMA`."""


@dataclass(frozen=True)
class Turn:
    """What somebody says in a talk."""

    speaker: Speaker
    value: str


@dataclass(frozen=True)
class TalkRecord(Record):
    """One talk before conversion."""

    kind: ClassVar[RowKind] = TALKS

    sample_id: str
    """The data set's own name of it, or a running number."""
    dataset: str
    """Name of the data set, or the kind of question, by which answers are counted."""
    pictures: tuple[tuple[str, ImageSource], ...]
    """Names and sources of its images."""
    turns: tuple[Turn, ...]
    """What is said."""
    source: str
    """Where it was read: annotation file and line."""
    max_tiles: int | None = None
    """Tiles of its images together; None = as training is set."""
    augment: bool = False
    """Whether images are compressed anew, at a random quality, in training."""
    repeats: int = 1
    """How often an epoch visits it."""

    @property
    def images(self) -> Sequence[tuple[str, ImageSource]]:
        """Names and sources of its images."""
        return self.pictures

    @property
    def annotation(self) -> object:
        """What is said, and how it is trained on."""
        return self.sample_id, self.dataset, self.turns, self.max_tiles, self.augment, self.repeats

    def check_image(self, image: Image.Image) -> None:
        """Raises BadImage for a line of pixels: tiles would show nothing of it."""
        check_sides(image)

    def make_row(self, images: Sequence[StoredImage]) -> dict[str, Any]:
        """Returns the row of the talk."""
        return {
            "sample_id": self.sample_id,
            "dataset": self.dataset,
            "images": [image.data for image in images],
            "image_names": [name for name, _ in self.pictures],
            "conversations": [{"from": turn.speaker, "value": turn.value} for turn in self.turns],
            "max_tiles": self.max_tiles,
            "augment": self.augment,
            "repeats": self.repeats,
            "source": self.source,
        }

    def explain(self, lost: Sequence[str]) -> BadRow:
        """Returns that the talk needs its images."""
        return BadRow(self.source, f"needs {', '.join(lost)}, which cannot be used")
