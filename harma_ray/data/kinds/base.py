"""What depends on what the rows of a split are: a `RowKind`, and the records that its rows are made from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from harma_ray.data.manifest import BadRow, Manifest


@dataclass(frozen=True)
class Drawn:
    """A drawn image, and what is known of it."""

    image: Image.Image
    """RGB."""
    captions: tuple[str, ...] = ()
    """Cleaned captions."""
    label: int | None = None
    """Number of the class."""
    label_name: str | None = None
    """Name of the class."""


class Drawing(Protocol):
    """An image that is drawn when it is written; two that are equal are the same image."""

    @property
    def size(self) -> int:
        """Height and width in pixels."""
        ...

    def draw(self) -> Drawn:
        """Draws it."""
        ...


ImageSource = Path | Drawing
"""The absolute path of an image file, or what is drawn."""


@dataclass(frozen=True)
class StoredImage:
    """An image as a row stores it."""

    data: bytes
    """The file."""
    image: Image.Image
    """The picture in it."""
    drawn: Drawn | None = None
    """What is known of it if it was drawn."""


class Record(ABC):
    """What becomes a row of a split; holds no pixels."""

    kind: ClassVar[RowKind]
    """What the row is."""

    @property
    @abstractmethod
    def images(self) -> Sequence[tuple[str, ImageSource]]:
        """Names and sources of the images that the row needs."""

    @property
    def annotation(self) -> object:
        """What else a second conversion must find unchanged, by its ``repr``; None = the inputs' hashes cover it."""
        return None

    def check_image(self, image: Image.Image) -> None:  # noqa: B027
        """Raises BadImage for an image that a row of this kind cannot hold."""

    @abstractmethod
    def make_row(self, images: Sequence[StoredImage]) -> dict[str, Any]:
        """Returns the row, by the columns of the schema.

        Args:
            images: Those of `images`, in this order.
        """

    @abstractmethod
    def explain(self, lost: Sequence[str]) -> BadRow | None:
        """Returns why it is left out if some of its images, by name, are; None if that says it all."""


RowCheck = Callable[[Record, Sequence[tuple[int, int]]], None]
"""Raises UserError, naming where it stands, for a record whose row a model could not read whole, given width and height
of each of its images in pixels; travels to other processes."""


class RowKind:
    """What the rows of a split are. One object a kind, in `harma_ray.data.kinds.KINDS`."""

    name: ClassVar[str]
    """What manifests and messages call the rows, in the plural."""
    schema: ClassVar[pa.Schema]
    """The columns of a shard; ``source`` names a row in messages."""
    images: ClassVar[Mapping[str, str]] = {}
    """Columns that hold image files, each with the column of the image's name; none = the kind holds no images. For
    lists of images that column holds lists of names, or a text by which they are numbered."""
    is_image: ClassVar[bool] = False
    """Whether a row is one image with ``height``, ``width``, ``label``, ``label_name``, and so can show a result."""
    is_query: ClassVar[bool] = False
    """Whether a row is a query of composed retrieval, with the columns of ``QUERY_SCHEMA``, and is trained on."""
    encoded: ClassVar[RowKind | None] = None
    """The kind with encoders' outputs in place of the images; None = there is none."""
    is_encoded: ClassVar[bool] = False
    """Whether it holds encoders' outputs in place of the images of another split."""
    weighs_texts: ClassVar[bool] = True
    """Whether shards, row groups and chunks are cut by the bytes of texts too, beside those of images and vectors."""
    row: ClassVar[str] = "image"
    """What facts call a row."""
    text: ClassVar[str] = "caption"
    """What they call one of its texts."""
    sample: ClassVar[str] = "pair"
    """What messages call what a training step has a batch of."""
    group_column: ClassVar[str] = ""
    """Column by whose values rows are counted; empty: none."""
    cells_across: ClassVar[int] = 6
    """Most cells side by side on a contact sheet."""

    @property
    def light_columns(self) -> list[str]:
        """Names of the columns that hold no images or vectors."""
        return [field.name for field in self.schema if not _holds_binary(field.type)]

    def count_samples(self, shard: pq.ParquetFile) -> np.ndarray:
        """Returns how many samples of an epoch each row of a shard gives: int[N]; one unless a kind says otherwise."""
        return np.ones(shard.metadata.num_rows, np.int64)

    def most_samples(self, manifest: Manifest, *, one_caption: bool) -> int | None:
        """Returns how many samples an epoch has at most, see `count_samples`; None: the manifest does not tell."""
        return manifest.rows

    def describe(self, manifest: Manifest) -> str:
        """Returns what a split holds in a few words."""
        return f"{manifest.rows:,} {self.name}"

    def texts(self, row: Mapping[str, Any]) -> Sequence[str]:
        """Returns the texts of a row, of which only the light columns need be there."""
        return row["captions"]

    def iterate_images(self, rows: pa.Table) -> Iterator[tuple[str, bytes]]:
        """Yields names and bytes of the images of some rows, column by column; see `images` for those of a list."""
        for column, name_column in self.images.items():
            for name, held in zip(rows.column(name_column).to_pylist(), rows.column(column), strict=True):
                files = held.as_py()
                if not isinstance(files, list):
                    yield name, files
                elif isinstance(name, list):
                    yield from zip(name, files, strict=True)
                else:
                    yield from ((f"{name}#{number}", file) for number, file in enumerate(files))

    def draw(self, row: Mapping[str, Any]) -> Image.Image:
        """Draws a row for a contact sheet; all cells have one size. A kind with images has it."""
        raise NotImplementedError(f"rows of {self.name} cannot be drawn")


def _holds_binary(type_: pa.DataType) -> bool:
    inner = [type_.field(number).type for number in range(type_.num_fields)]
    return pa.types.is_binary(type_) or pa.types.is_large_binary(type_) or any(map(_holds_binary, inner))
