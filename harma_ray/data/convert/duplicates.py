"""What two splits of a data set share: images, byte for byte, and captions, word for word."""

import functools
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from harma_ray.data.convert.inspect import iterate_images, read_texts
from harma_ray.data.convert.shards import write_table
from harma_ray.data.splits import Split, list_splits, open_split
from harma_ray.errors import UserError, first_few

HASHES_NAME = "hashes.parquet"
"""File of a split with the hashes of the image files that it was made from; drawn and older splits have none."""

_SCHEMA = pa.schema([pa.field("image", pa.string()), pa.field("sha256", pa.binary(32))])
_EXAMPLES = 3
_T = TypeVar("_T")

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
        same = first_few([f"{self.split}: {here} = {self.other}: {there}" for here, there in self.pairs], _EXAMPLES)
        return (
            f"{len(self.pairs):,} of {self.total:,} different images of {self.split} are byte for byte in {self.other} "
            f"too, {len(self.pairs) / self.total:.1%} ({same}): figures on the one are too good if the other is "
            "trained or selected on; remove them from one of the two, unless the data set is published so and you "
            "compare with its figures"
        )


@dataclass(frozen=True)
class SharedCaptions:
    """How many captions of a split another one has too."""

    split: str
    """Name of the split."""
    other: str
    """Name of the other one."""
    different: int
    """Number of different captions of the split."""
    different_shared: int
    """Number of those that the other one has too."""
    captions: int
    """Number of its captions, equal ones counted as often as they occur."""
    shared: int
    """Number of those that the other one has too."""

    def tell(self) -> str:
        """Returns the counts and shares, in one line."""
        return (
            f"{self.shared:,} of {self.captions:,} captions of {self.split} are word for word in {self.other} too, "
            f"{self.shared / self.captions:.1%} ({self.different_shared:,} of {self.different:,} different ones, "
            f"{self.different_shared / self.different:.1%})"
        )


def compare_captions(data: str | Path, splits: Collection[str] | None = None) -> list[SharedCaptions]:
    """Compares the captions of the splits of a data set two by two, as they are stored.

    Args:
        data: Folder of the data set.
        splits: Compares these with each other and with all others; None = all. Those without captions take no part.

    Raises:
        UserError: If a split cannot be read.
    """
    counts = {}
    for name in list_splits(data):
        split = open_split(data, name)
        if split.kind.text == "caption" and not split.kind.is_encoded:
            counts[name] = Counter(text for texts in read_texts(split) for text in texts)
    pairs = [
        (later, earlier)
        for earlier, later in combinations([name for name in counts if counts[name]], 2)
        if splits is None or earlier in splits or later in splits
    ]
    found = []
    for later, earlier in pairs:
        ours, both = counts[later], counts[later].keys() & counts[earlier].keys()
        shared = sum(ours[text] for text in both)
        found.append(SharedCaptions(later, earlier, len(ours), len(both), ours.total(), shared))
    return found


def write_hashes(hashes: Mapping[str, str], folder: Path) -> None:
    """Writes the hashes of a split's images, in hexadecimal digits by their names, into its folder."""
    columns = [list(hashes), [bytes.fromhex(digits) for digits in hashes.values()]]
    write_table(pa.table(columns, schema=_SCHEMA), folder / HASHES_NAME)


def read_hashes(split: Split, *, as_stored: bool = False) -> dict[bytes, str]:
    """Returns the SHA-256 of a split's images with the name of the first image that has it.

    Args:
        split: The split.
        as_stored: Takes the images as they are stored, which are all read then. Otherwise the files that the split was
            made from, if their hashes were kept.

    Raises:
        UserError: If the split cannot be read.
    """
    path = split.path / HASHES_NAME
    found: dict[bytes, str] = {}
    try:
        if path.is_file() and not as_stored:
            table = pq.read_table(path, schema=_SCHEMA)
            pairs: Iterable[tuple[bytes, str]] = zip(
                table["sha256"].to_pylist(), table["image"].to_pylist(), strict=True
            )
        else:
            pairs = ((hashlib.sha256(data).digest(), name) for name, data in iterate_images(split))
        for content, name in pairs:
            found.setdefault(content, name)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot read {split.path} ({error}); convert the split again with --overwrite") from error
    return found


def find_shared(
    data: str | Path, splits: Collection[str] | None = None, *, skips_unreadable: bool = False
) -> list[SharedImages]:
    """Compares the splits of a data set two by two.

    Args:
        data: Folder of the data set.
        splits: Compares these with each other and with all others; None = all.
        skips_unreadable: Logs which splits cannot be read, and compares the rest.

    Raises:
        UserError: If a split cannot be read.
    """
    opened = _read_each(list_splits(data), functools.partial(open_split, data), skips_unreadable)
    there = {name: split for name, split in opened.items() if split.kind.images}
    if len(there) < 2:
        return []
    # Of images that were made smaller without keeping hashes, nothing but what is stored can be compared.
    as_stored = any(
        not (split.path / HASHES_NAME).is_file() and split.manifest.options.get("resize") for split in there.values()
    )
    hashes = _read_each(there, lambda name: read_hashes(there[name], as_stored=as_stored), skips_unreadable)
    pairs = [
        (later, earlier)
        for earlier, later in combinations(hashes, 2)
        if splits is None or earlier in splits or later in splits
    ]
    shared = [_compare(later, hashes[later], earlier, hashes[earlier]) for later, earlier in pairs]
    return [each for each in shared if each.pairs]


def _read_each(names: Iterable[str], read: Callable[[str], _T], skips_unreadable: bool) -> dict[str, _T]:
    """Returns what is read of each split; see `find_shared`."""
    found: dict[str, _T] = {}
    for name in names:
        try:
            found[name] = read(name)
        except UserError as error:
            if not skips_unreadable:
                raise
            _logger.warning("split %s is not compared with the others: %s", name, error)
    return found


def warn_of_shared(data: str | Path, written: Collection[str]) -> None:
    """Logs which images the splits that were just written share with each other or with those beside them."""
    for each in find_shared(data, written, skips_unreadable=True):
        _logger.warning("%s", each.tell())


def _compare(split: str, ours: Mapping[bytes, str], other: str, theirs: Mapping[bytes, str]) -> SharedImages:
    pairs = sorted((name, theirs[content]) for content, name in ours.items() if content in theirs)
    return SharedImages(split, other, len(ours), pairs)
