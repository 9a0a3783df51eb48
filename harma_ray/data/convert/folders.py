"""Sources without annotation files: folders named after classes, and generated scenes."""

import hashlib
import logging
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from harma_ray.data.convert.image_paths import image_root
from harma_ray.data.convert.mistakes import Mistakes
from harma_ray.data.convert.records import SPLITS, MemberSpec, SceneSpec, clean_captions, fill_labels
from harma_ray.data.image_files import FoundImages, find_images, readable_name
from harma_ray.data.kinds.base import Record
from harma_ray.data.kinds.images import SourceRecord
from harma_ray.data.kinds.queries import QueryRecord
from harma_ray.data.kinds.triplets import TripletRecord
from harma_ray.data.scenes import composed_scene, draw, scene
from harma_ray.errors import UserError, first_few

LABEL_FIELD = "{label}"
"""Stands for the class name in a caption template."""

_LIKE_SPLITS = frozenset((*SPLITS, "training", "validation", "valid", "dev", "testing"))
"""Names, in small letters, that folders of splits have elsewhere."""

_logger = logging.getLogger(__name__)


def read_class_folders(
    images: str | Path,
    *,
    caption_template: str | None = None,
    fractions: Sequence[float] = (0.8, 0.1, 0.1),
    seed: int = 0,
) -> dict[str, list[SourceRecord]]:
    """Reads folders of images whose names are classes.

    Either the root holds ``train``, ``val`` and ``test`` (some of them), each with class folders, or class folders
    directly: then a hash of the seed and an image's path decides its split, so that an image added later moves no
    other. Classes are numbered in alphabetical order over all splits. Folders inside class folders are read too, links
    are followed (see ``find_images``): an image that links bring into several classes is in each of them, in the same
    split, and once in each. What is left out is logged.

    Args:
        images: The root.
        caption_template: A caption for every image, such as ``an aerial photograph of {label}``; none by default.
        fractions: Parts of train, val and test; add up to 1. Unused if the root holds splits.
        seed: Seed of the splitting.

    Returns:
        The records of each split that has any; an image's number is its place among all images.

    Raises:
        UserError: If there are no class folders with images, there is one that seems to hold those that are meant, or
            the template or fractions make no sense.
    """
    _check_options(caption_template, fractions)
    root = image_root(images)
    found = find_images(root)
    depth = 2 if any(path.relative_to(root).parts[0] in SPLITS for path in found.images) else 1
    found = found.once_per(lambda path: path.relative_to(root).parts[:depth])
    found.warn()
    _check_layout(found, depth)
    first = found.first_paths()
    records: list[tuple[str, SourceRecord]] = []
    for path in found.images:
        parts, name = path.relative_to(root).parts, found.name(path)
        class_name = readable_name(parts[depth - 1])
        split = parts[0] if depth == 2 else _draw_split(seed, found.name(first.get(path, path)), fractions)
        captions: tuple[str, ...] = ()
        if caption_template is not None:
            _check_class_name(root, parts[depth - 1])
            captions = clean_captions([caption_template.replace(LABEL_FIELD, class_name.replace("_", " "))], name)
        records.append((split, SourceRecord(len(records), name, name, path, captions=captions, label_name=class_name)))
    labelled = fill_labels([record for _, record in records], Mistakes())  # names alone cannot contradict each other
    placed = [(split, record) for (split, _), record in zip(records, labelled, strict=True)]
    rows_of = {split: [record for where, record in placed if where == split] for split in SPLITS}
    return {split: rows for split, rows in rows_of.items() if rows}


def _check_options(caption_template: str | None, fractions: Sequence[float]) -> None:
    if caption_template is not None and LABEL_FIELD not in caption_template:
        raise UserError(f"the caption template must contain {LABEL_FIELD}, got {caption_template!r}")
    if len(fractions) != len(SPLITS) or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise UserError(f"fractions of train, val, test must be 3 numbers >= 0 that add up to 1, got {fractions}")


def list_scenes(counts: Mapping[str, int], *, style: str, size: int, seed: int) -> dict[str, list[SourceRecord]]:
    """Lists generated scenes; no scene is in two splits, and a split's scenes do not depend on the other counts.

    Args:
        counts: Number of scenes of each split.
        style: Look of the scenes.
        size: Height and width in pixels.
        seed: Seed of the data set; other seeds give other scenes.

    Raises:
        UserError: If a count, the style, the size or the seed is not valid.
    """
    scene(seed, 0, style, size)  # draws one to check the settings here, before anything starts
    return {
        split: [
            SourceRecord(
                number,
                f"{style}/{split}/{number:06d}.png",
                f"{style} scene {index} of seed {seed}",
                SceneSpec(seed, index, style, size),
            )
            for number, index in enumerate(number_scenes(split, count))
        ]
        for split, count in counts.items()
    }


def list_composed_scenes(
    counts: Mapping[str, int], *, style: str, size: int, seed: int, own_layouts: bool = False
) -> dict[str, tuple[list[Record], list[QueryRecord]]]:
    """Lists generated queries of composed retrieval; no query is in two splits.

    Args:
        counts: Number of queries of each split.
        style: Look of the scenes.
        size: Height and width in pixels.
        seed: Seed of the data set; other seeds give other scenes.
        own_layouts: Whether each image is laid out anew.

    Returns:
        Of each split the records and the queries: of ``train`` triplets and no queries, of any other all members of
        all queries, and the queries.

    Raises:
        UserError: If a count, the style, the size or the seed is not valid.
    """
    draw(composed_scene(seed, 0, style).reference, style, size)  # checks the settings here, before anything starts
    splits: dict[str, tuple[list[Record], list[QueryRecord]]] = {}
    for split, count in counts.items():
        records: list[Record] = []
        queries: list[QueryRecord] = []
        for index in number_scenes(split, count):
            composed = composed_scene(seed, index, style, own_layouts=own_layouts)
            names = tuple(f"scene-{index:06d}-{member}" for member in range(len(composed.members)))
            places = [MemberSpec(seed, index, style, size, member, own_layouts) for member in range(len(names))]
            reference, target = composed.members.index(composed.reference), composed.members.index(composed.target)
            origin = f"{style} query {index} of seed {seed}"
            query = QueryRecord(
                len(queries), names[reference], names[target], None, (composed.sentence,), names, origin
            )
            queries.append(query)
            if split == "train":
                records.append(TripletRecord(query, places[reference], places[target]))
                continue
            for name, place in zip(names, places, strict=True):
                records.append(SourceRecord(len(records), name, origin, place))
        splits[split] = (records, [] if split == "train" else queries)
    return splits


def number_scenes(split: str, count: int) -> range:
    """Returns the numbers of a split's scenes, which no other split has, however many there are."""
    if split not in SPLITS or count < 1:
        raise UserError(f"scenes need 1 or more for some of {', '.join(SPLITS)}, got {split}={count}")
    first = SPLITS.index(split)
    return range(first, first + len(SPLITS) * count, len(SPLITS))


def _check_layout(found: FoundImages, depth: int) -> None:
    """Raises UserError unless every image lies in a class folder, and the folders look like classes or splits.

    Args:
        found: The images.
        depth: Place of the class folder on a path below the root: 2 below splits, else 1.
    """
    root = found.root
    where = readable_name(root)
    if not found.images:
        raise UserError(
            f"{where} has no class folders with images; expected {where}/CLASS/IMAGE or {where}/train/CLASS/..."
        )
    parts = [path.relative_to(root).parts for path in found.images]
    tops = {names[0] for names in parts if len(names) > 1}
    others = tops.difference(SPLITS)
    if depth == 2 and others:
        mixed = f"splits ({', '.join(SPLITS)}) and other folders ({_list_some(others)})"
        raise UserError(f"{where} mixes {mixed}; move one kind away")
    loose = [path for path, names in zip(found.images, parts, strict=True) if len(names) <= depth]
    if loose:
        which = f"{len(loose)} images lie" if len(loose) > 1 else "an image lies"
        raise UserError(f"{which} in no class folder ({readable_name(loose[0])}); move every image into one")
    if depth == 1 and all(name.lower() in _LIKE_SPLITS for name in tops):
        raise UserError(
            f"the folders of {where} look like splits ({', '.join(sorted(tops))}) but are not named "
            f"{', '.join(SPLITS)}; rename them, or give a folder with links of these names to them"
        )
    below = [names[depth - 1 :] for names in parts]
    _check_wrapping(root, below, depth)
    if all(len(names) > 2 for names in below):  # classes may be divided further: by years, by places
        classes, inner = ({names[place] for names in below} for place in (0, 1))
        way_out = "give one of the outer folders with --images" if depth == 1 else "move them up"
        _logger.warning(
            "%s: the %d classes are %s; the folders inside them, %s, are no classes: if they are meant to be, %s",
            where, len(classes), _list_some(classes), _list_some(inner), way_out,
        )  # fmt: skip


def _list_some(names: Iterable[str]) -> str:
    """Returns the first few names in alphabetical order."""
    return first_few(sorted(map(readable_name, names)))


def _check_wrapping(root: Path, parts: Sequence[tuple[str, ...]], depth: int) -> None:
    """Raises UserError if the only class would be a folder of folders, such as the top one of an archive.

    Args:
        root: The folder that the user gave.
        parts: Parts of the images' paths from the class folder on.
        depth: Place of the class folder on a path below the root.
    """
    shared = Path(os.path.commonpath([Path(*names[:-1]) for names in parts])).parts
    inner = {names[len(shared)] for names in parts if len(names) > len(shared) + 1}
    if not shared or any(len(names) <= len(shared) + 1 for names in parts):
        return
    wrapper = "/".join(shared)
    if depth == 1:
        way_out = f"give --images {shlex.quote(readable_name(root / wrapper))}"
    else:
        way_out = "move them up, into the folders of the splits"
    raise UserError(
        f"all images of {readable_name(root)} would be of one class, {readable_name(shared[0])!r}, but they lie in "
        f"{len(inner)} folders of {readable_name(wrapper)} ({_list_some(inner)}): if these are the classes, {way_out}; "
        "if not, move the images themselves into the class folder"
    )


def _check_class_name(root: Path, name: str) -> None:
    """Raises UserError if a class name that is to stand in captions cannot be read."""
    if readable_name(name) != name:
        raise UserError(
            f"class folder {readable_name(root / name)} has a name that is not UTF-8, which captions cannot be made "
            "of; rename it or leave out --caption-template"
        )


def _draw_split(seed: int, name: str, fractions: Sequence[float]) -> str:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    position = int.from_bytes(digest, "big") / 2**64
    if position < fractions[0]:
        return SPLITS[0]
    return SPLITS[1] if position < fractions[0] + fractions[1] or fractions[2] == 0 else SPLITS[2]
