"""Readers of the data sets of composed image retrieval: FashionIQ and CIRR."""

import logging
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harma_ray.data.convert.annotations import Entry, check_distinct, count_names, describe_shape, hash_files
from harma_ray.data.convert.examination import NeededImages
from harma_ray.data.convert.image_paths import image_root, locate_image
from harma_ray.data.convert.json_files import read_json, read_rows
from harma_ray.data.convert.mistakes import Mistakes, all_mistakes
from harma_ray.data.convert.unusable import list_beside, tell_missing, tell_wrong_folder
from harma_ray.data.kinds.base import Record
from harma_ray.data.kinds.images import SourceRecord
from harma_ray.data.kinds.queries import QueryRecord
from harma_ray.data.kinds.triplets import TripletRecord
from harma_ray.errors import UserError, count

CATEGORIES = ("dress", "toptee", "shirt")
"""FashionIQ's parts, in the order in which its training rows are joined."""
FASHIONIQ_SPLITS = ("train", "val")
CIRR_SPLITS = ("train", "val", "test1")

_FASHIONIQ_ROW = '{"candidate": name, "target": name, "captions": [1 or 2 texts]}'
_NAME = "the name of an image"
_FASHIONIQ_SUFFIXES = (".jpg", ".png", ".jpeg")
_CIRR_ROW = (
    '{"pairid": number, "reference": name, "target_hard": name, "caption": text, "img_set": {"members": [6 names]}}'
)
_CIRR_INDEX = "{name: path, ...}"
_CIRR_MEMBERS = 6
_EDGES = ".?, \t\n"  # what training strips from captions, and white space
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ComposedPart:
    """The queries of a category, or of all if there are none, and the images that answers are to be found among."""

    name: str
    """For people, such as ``dress val``."""
    queries: list[QueryRecord]
    """In the file's order."""
    index: list[str]
    """Names of the images, in the file's order."""
    category: str | None = None
    """The category."""
    label: int | None = None
    """Its number."""


@dataclass(frozen=True)
class ComposedSource:
    """What one split of composed retrieval is made from."""

    split: str
    """Name of the split: ``train`` is made of triplets, any other of the images of the index, with queries."""
    parts: list[ComposedPart]
    """The queries and the index."""
    root: Path
    """Absolute folder of the data set."""
    files: dict[str, Path]
    """Absolute paths of the images that the split needs, by their names; a file may be missing."""
    inputs: dict[str, str]
    """Annotation files and their SHA-256."""
    options: dict[str, Any]
    """What the manifest says of the reader: its name and settings."""

    @property
    def queries(self) -> list[QueryRecord]:
        """The queries that go with the images; none in training, whose rows hold them."""
        return [] if self.split == "train" else [query for part in self.parts for query in part.queries]

    @property
    def records(self) -> list[Record]:
        """What the rows of the split are made from."""
        if self.split == "train":
            queries = [query for part in self.parts for query in part.queries]
            return [TripletRecord(q, self.files[q.reference], self.files[q.target or ""]) for q in queries]
        images = [(part, name) for part in self.parts for name in part.index]
        return [
            SourceRecord(number, name, part.name, self.files[name], (), part.label, part.category)
            for number, (part, name) in enumerate(images)
        ]

    def report(self, out: Path | None = None) -> str:
        """Returns what the annotations tell of, and which image files are missing or empty, in lines for people.

        Args:
            out: Folder of the data set, where a list of what is missing may be written; None: all are told here.
        """
        needed = NeededImages.of(self.records)
        lines = [
            f"{p.name}: {count(len(p.queries), 'query')}, {count(len(p.index), 'image')} in the index"
            for p in self.parts
        ]
        lines.append(f"{len(needed.seen):,} distinct images are needed in all")
        missing = {each.path: each for each in needed.missing}
        empty = [path for path, seen in needed.seen.items() if not seen.size and path not in missing]
        if len(missing) == len(needed.seen):
            return "\n".join([*lines, tell_wrong_folder(list(missing.values()))])
        if missing and out:
            file = list_beside(out / self.split, "missing")
            lines.append(tell_missing(list(missing.values()), len(needed.seen), file))
        for told, paths in (("missing", [] if out else list(missing)), ("empty (0 bytes)", empty)):
            if paths:
                lines.append(f"{len(paths):,} of {len(needed.seen):,} images are {told} under {self.root}:")
                lines += [path.relative_to(self.root).as_posix() for path in paths]
        return "\n".join(lines if missing or empty else [*lines, "all images are there"])


def read_fashioniq(root: str | Path, split: str, categories: Sequence[str] = CATEGORIES) -> ComposedSource:
    """Reads FashionIQ's annotations of one split.

    Queries are numbered from 0 over all categories. An image in the index of two categories counts in both.

    Args:
        root: Folder with ``captions``, ``image_splits`` and ``images``.
        split: ``train`` or ``val``.
        categories: The categories to read.

    Raises:
        UserError: Naming file and row, if a file is missing or not of this shape, or a query of ``val`` names an image
            that is not in the index.
    """
    if split not in FASHIONIQ_SPLITS:
        why = "the answers of test were never published" if split == "test" else f"got {split!r}"
        raise UserError(f"of FashionIQ the splits {' and '.join(FASHIONIQ_SPLITS)} can be converted; {why}")
    unknown = [name for name in categories if name not in CATEGORIES]
    if unknown or not categories:
        raise UserError(f"FashionIQ's categories are {', '.join(CATEGORIES)}, got {', '.join(unknown) or 'none'}")
    read = [category for category in CATEGORIES if category in categories]
    options = {"converter": "fashioniq", "categories": read}
    source = ComposedSource(split, [], image_root(root), {}, {}, options)
    with all_mistakes(f"FashionIQ's split {split}") as mistakes:
        for label, category in enumerate(CATEGORIES):
            if category in categories:
                with mistakes.noted():
                    _add_category(source, category, label, mistakes)
    _warn(source.parts)
    return source


def read_cirr(root: str | Path, split: str) -> ComposedSource:
    """Reads CIRR's annotations of one split.

    Args:
        root: Folder with ``cirr`` and the images, whose paths in it the annotations tell.
        split: ``train``, ``val`` or ``test1``, whose queries have no target.

    Raises:
        UserError: Naming file and row, if a file is missing or not of this shape, a query names an image that is not
            in the index (in training, where members do not matter: a reference or target), or what evaluation rests
            on does not hold: numbers of pairs differ, the members are 6, reference and target among them.
    """
    if split not in CIRR_SPLITS:
        raise UserError(f"CIRR's splits are {', '.join(CIRR_SPLITS)}, got {split!r}")
    folder = image_root(root)
    texts = folder / "cirr" / "captions" / f"cap.rc2.{split}.json"
    index = folder / "cirr" / "image_splits" / f"split.rc2.{split}.json"
    rows, queries = read_rows(texts, _CIRR_ROW), []
    places = read_json(index, unique_keys=True)
    if not isinstance(places, dict) or not places:
        raise UserError(f"{index.name} must look like {_CIRR_INDEX}, got {describe_shape(places)}")
    files = {}
    with all_mistakes(f"CIRR's split {split}") as mistakes:
        for row in rows:
            with mistakes.noted():
                queries.append(_read_cirr_row(row, split))
        for name, place in places.items():
            with mistakes.noted():
                origin = f"{index.name} `{Entry(name, index.name, _CIRR_INDEX).as_text()}`"
                _, files[name] = locate_image(folder, Entry(place, origin, _CIRR_INDEX).as_text(), origin)
        _check_names(queries, places, index.name, split, mistakes)
        if split != "train":
            _check_pair_ids(queries, mistakes)
    if split == "train":
        files = {name: files[name] for query in queries for name in _names_of(query, split)}
    part = ComposedPart(split, queries, list(places))
    _warn([part])
    return ComposedSource(split, [part], folder, files, hash_files(texts, index), {"converter": "cirr"})


def _add_category(source: ComposedSource, category: str, label: int, mistakes: Mistakes) -> None:
    """Reads one category of FashionIQ and adds it to a source, and what is wrong with its rows to the mistakes."""
    texts = source.root / "captions" / f"cap.{category}.{source.split}.json"
    index = source.root / "image_splits" / f"split.{category}.{source.split}.json"
    for path in (texts, index):
        if not path.is_file():
            raise UserError(f"annotation file {path} does not exist; --categories can leave {category} out")
    rows = enumerate(read_rows(texts, _FASHIONIQ_ROW), start=sum(len(part.queries) for part in source.parts))
    queries, listed = [], []
    for number, row in rows:
        with mistakes.noted():
            queries.append(_read_fashioniq_row(row, number, category))
    places = read_rows(index, f"that are each {_NAME}")
    for place in places:
        with mistakes.noted():
            listed.append((replace(place, expected=_NAME).as_text(), place.origin))
    names = [name for name, _ in listed]
    if source.split == "train":  # takes images by their names; what the index has, and how often, does not matter
        listed = [(name, query.source) for query in queries for name in _names_of(query, source.split)]
    else:
        with mistakes.noted():
            check_distinct(names, index.name)
        if len(names) == len(places):
            _check_names(queries, set(names), index.name, source.split, mistakes)
    for name, origin in listed:
        with mistakes.noted():
            if name in source.files:
                continue
            source.files[name] = _find_fashioniq_image(source.root / "images", name, origin)
    source.inputs.update(hash_files(texts, index))
    source.parts.append(ComposedPart(f"{category} {source.split}", queries, names, category, label))


def _read_fashioniq_row(row: Entry, number: int, category: str) -> QueryRecord:
    captions = row.texts("captions")
    if len(captions) not in (1, 2):
        raise UserError(f"{row.origin}: `captions` must be 1 or 2 texts, got {len(captions)}; correct the row")
    return QueryRecord(number, row.text("candidate"), row.text("target"), category, captions, (), row.origin)


def _find_fashioniq_image(folder: Path, name: str, origin: str) -> Path:
    """Returns the path of an image; that of a .jpg file if there is none."""
    _, stem = locate_image(folder, name, origin)
    paths = [stem.with_name(f"{stem.name}{suffix}") for suffix in _FASHIONIQ_SUFFIXES]
    return next((path for path in paths if os.path.isfile(path)), paths[0])


def _read_cirr_row(row: Entry, split: str) -> QueryRecord:
    origin, group = row.origin, row.part("img_set")
    query = QueryRecord(
        pair_id=row.number("pairid"),
        reference=row.text("reference"),
        target=None if split == "test1" and not row.has("target_hard") else row.text("target_hard"),
        category=None,
        captions=(row.text("caption"),),
        members=group.texts("members"),
        source=origin,
    )
    if split == "train":
        return query
    absent = set(query.pair) - set(query.members)
    if absent or len(set(query.members)) != _CIRR_MEMBERS or len(query.members) != _CIRR_MEMBERS:
        raise UserError(
            f"{origin}: `members` must be {_CIRR_MEMBERS} different names, reference and target among them, got "
            f"{', '.join(query.members) or 'none'} for {query.reference} and {query.target}; correct the row"
        )
    if query.reference == query.target:  # the reference is never ranked
        raise UserError(f"{origin}: the target must not be the reference, got {query.target!r}; correct the row")
    return query


def _names_of(query: QueryRecord, split: str) -> list[str]:
    """Returns the images that a query of a split needs; training has no use for members."""
    return query.pair if split == "train" else query.needs


def _check_names(queries: list[QueryRecord], index: Collection[str], file: str, split: str, mistakes: Mistakes) -> None:
    """Notes images that queries name and the index has not."""
    wrong: dict[str, str] = {}
    for query in queries:
        for name in _names_of(query, split):
            if name not in index:
                wrong.setdefault(name, f"{name!r} of {query.source}")
    if wrong:
        mistakes.add(
            f"{file} lacks {count_names(list(wrong.values()))} that queries need; take both files from one release"
        )


def _check_pair_ids(queries: list[QueryRecord], mistakes: Mistakes) -> None:
    first: dict[int, QueryRecord] = {}
    for query in queries:
        other = first.setdefault(query.pair_id, query)
        if other is not query:
            mistakes.add(f"{query.source}: `pairid` {query.pair_id} is also in {other.source}; correct one of them")


def _warn(parts: list[ComposedPart]) -> None:
    """Logs what is odd but kept."""
    for part in parts:
        texts = [(text, query.source) for query in part.queries for text in query.captions]
        empty = [source for text, source in texts if not text.strip(_EDGES)]
        if empty:
            _logger.warning(
                "%s: %d of %d relative captions are empty, the first in %s", part.name, len(empty), len(texts), empty[0]
            )
        same = [query.source for query in part.queries if query.reference == query.target]
        if same:
            counts = (len(same), len(part.queries))
            _logger.warning(
                "%s: %d of %d targets are the reference itself, the first in %s", part.name, *counts, same[0]
            )
