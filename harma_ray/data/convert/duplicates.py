"""Images that two splits of a data set share, byte for byte."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from harma_ray.data.convert.inspect import iterate_images
from harma_ray.data.convert.shards import write_table
from harma_ray.data.image_files import readable_name
from harma_ray.data.schema import Split, list_splits, open_split
from harma_ray.errors import UserError

HASHES_NAME = "hashes.parquet"
"""File of a split with the hashes of the image files that it was made from; drawn and older splits have none."""

_SCHEMA = pa.schema([pa.field("image", pa.string()), pa.field("sha256", pa.binary(32))])
_EXAMPLES = 3

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SharedImages:
    """The images of a split that another one has too."""

    split: str
    """Name of the split."""
    other: str
    """Name of the other one."""
    total: int
    """Number of different images of the split."""
    pairs: list[tuple[str, str]]
    """Names of each shared image here and there."""

    def tell(self) -> str:
        """Returns what they are and why it matters, in one line."""
        same = ", ".join(f"{self.split}: {here} = {self.other}: {there}" for here, there in self.pairs[:_EXAMPLES])
        more = ", ..." if len(self.pairs) > _EXAMPLES else ""
        return (
            f"{len(self.pairs):,} of {self.total:,} different images of {self.split} are byte for byte in {self.other} "
            f"too ({same}{more}): figures on the one are too good if the other is trained or selected on; remove them "
            "from one of the two, unless the data set is published so and you compare with its figures"
        )


def write_hashes(hashes: Mapping[str, str], folder: Path) -> None:
    """Writes the hashes of a split's images, in hexadecimal digits by their names, into its folder."""
    columns = [list(hashes), [bytes.fromhex(digits) for digits in hashes.values()]]
    write_table(pa.table(columns, schema=_SCHEMA), folder / HASHES_NAME)


def read_hashes(split: Split) -> dict[bytes, str]:
    """Returns the SHA-256 of a split's images with the name of the first image that has it.

    They are those of the files that the split was made from, or, if they were not kept, of the images as they are
    stored, which are all read then.
    """
    path = split.path / HASHES_NAME
    if path.is_file():
        try:
            table = pq.read_table(path, schema=_SCHEMA)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"cannot read {path} ({error}); convert the split again with --overwrite") from error
        pairs: Iterable[tuple[bytes, str]] = zip(
            table.column("sha256").to_pylist(), table.column("image").to_pylist(), strict=True
        )
    else:
        pairs = ((hashlib.sha256(data).digest(), name) for name, data in iterate_images(split))
    found: dict[bytes, str] = {}
    for content, name in pairs:
        found.setdefault(content, name)
    return found


def find_shared(data: str | Path, split: str | None = None) -> list[SharedImages]:
    """Compares the splits of a data set two by two.

    Args:
        data: Folder of the data set.
        split: Compares this one alone with all others.

    Raises:
        UserError: If a split cannot be read.
    """
    opened = [open_split(data, name) for name in list_splits(data)]
    hashes = {each.name: read_hashes(each) for each in opened if each.manifest.kind in ("images", "triplets")}
    pairs = [(later, earlier) for earlier, later in combinations(hashes, 2) if split in (None, earlier, later)]
    shared = [_compare(later, hashes[later], earlier, hashes[earlier]) for later, earlier in pairs]
    return [each for each in shared if each.pairs]


def warn_of_shared(split: Path, hashes: Mapping[str, str]) -> None:
    """Logs which images of a split that is to be written the splits beside it have too.

    Args:
        split: Folder of the split.
        hashes: SHA-256 of its images in hexadecimal digits, by their names; those of drawn images are not known.
    """
    if not hashes:
        return
    ours: dict[bytes, str] = {}
    for name, digits in hashes.items():
        ours.setdefault(bytes.fromhex(digits), name)
    for other in list_splits(split.parent):
        if other == split.name:
            continue
        try:
            opened = open_split(split.parent, other)
            if opened.manifest.kind not in ("images", "triplets"):
                continue
            shared = _compare(split.name, ours, other, read_hashes(opened))
        except UserError as error:  # no reason not to write this one
            _logger.warning("%s is not compared with split %s: %s", readable_name(split), other, error)
            continue
        if shared.pairs:
            _logger.warning("%s", shared.tell())


def _compare(split: str, ours: Mapping[bytes, str], other: str, theirs: Mapping[bytes, str]) -> SharedImages:
    pairs = sorted((name, theirs[content]) for content, name in ours.items() if content in theirs)
    return SharedImages(split, other, len(ours), pairs)
