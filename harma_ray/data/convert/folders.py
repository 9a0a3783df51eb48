"""Sources without annotation files: folders named after classes, and generated scenes."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from harma_ray.data.convert.annotations import image_root
from harma_ray.data.convert.records import (
    SPLITS,
    MemberSpec,
    QueryRecord,
    Record,
    SceneSpec,
    SourceRecord,
    TripletRecord,
    clean_captions,
    fill_labels,
)
from harma_ray.data.scenes import composed_scene, draw, scene
from harma_ray.errors import UserError

LABEL_FIELD = "{label}"
"""Stands for the class name in a caption template."""

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
    other. Classes are numbered in alphabetical order over all splits. Folders inside class folders are read too.

    Args:
        images: The root.
        caption_template: A caption for every image, such as ``an aerial photograph of {label}``; none by default.
        fractions: Parts of train, val and test; add up to 1. Unused if the root holds splits.
        seed: Seed of the splitting.

    Returns:
        The records of each split that has any; an image's number is its place among all images.

    Raises:
        UserError: If there are no class folders with images, or the template or fractions make no sense.
    """
    if caption_template is not None and LABEL_FIELD not in caption_template:
        raise UserError(f"the caption template must contain {LABEL_FIELD}, got {caption_template!r}")
    if len(fractions) != len(SPLITS) or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise UserError(f"fractions of train, val, test must be 3 numbers >= 0 that add up to 1, got {fractions}")
    root = image_root(images)
    folders = _list_folders(root)
    split_folders = [folder for folder in folders if folder.name in SPLITS]
    if split_folders and len(split_folders) < len(folders):
        others = ", ".join(f.name for f in folders if f.name not in SPLITS)
        raise UserError(f"{root} mixes splits ({', '.join(SPLITS)}) and other folders ({others}); move one kind away")
    records: list[tuple[str, SourceRecord]] = []
    for parent in split_folders or [root]:
        for path, class_name in _list_images(parent):
            name = path.relative_to(root).as_posix()
            split = parent.name if split_folders else _draw_split(seed, name, fractions)
            captions: tuple[str, ...] = ()
            if caption_template is not None:
                captions = clean_captions([caption_template.replace(LABEL_FIELD, class_name.replace("_", " "))], name)
            records.append(
                (split, SourceRecord(len(records), name, name, path, captions=captions, label_name=class_name))
            )
    if not records:
        raise UserError(
            f"{root} has no class folders with images; expected {root}/CLASS/IMAGE or {root}/train/CLASS/..."
        )
    labelled = fill_labels([record for _, record in records])
    result: dict[str, list[SourceRecord]] = {}
    for split in SPLITS:
        result[split] = [new for new, (where, _) in zip(labelled, records, strict=True) if where == split]
    return {split: rows for split, rows in result.items() if rows}


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
    records: dict[str, list[SourceRecord]] = {}
    for split, count in counts.items():
        records[split] = [
            SourceRecord(
                number,
                f"{style}/{split}/{number:06d}.png",
                f"{style} scene {index} of seed {seed}",
                SceneSpec(seed, index, style, size),
            )
            for number, index in enumerate(_number_scenes(split, count))
        ]
    return records


def list_composed_scenes(
    counts: Mapping[str, int], *, style: str, size: int, seed: int
) -> dict[str, tuple[list[Record], list[QueryRecord]]]:
    """Lists generated queries of composed retrieval; no query is in two splits.

    Args:
        counts: Number of queries of each split.
        style: Look of the scenes.
        size: Height and width in pixels.
        seed: Seed of the data set; other seeds give other scenes.

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
        for index in _number_scenes(split, count):
            composed = composed_scene(seed, index, style)
            names = tuple(f"scene-{index:06d}-{member}" for member in range(len(composed.members)))
            places = [MemberSpec(seed, index, style, size, member) for member in range(len(names))]
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


def _number_scenes(split: str, count: int) -> range:
    """Returns the numbers of a split's scenes, which no other split has, however many there are."""
    if split not in SPLITS or count < 1:
        raise UserError(f"scenes need 1 or more for some of {', '.join(SPLITS)}, got {split}={count}")
    first = SPLITS.index(split)
    return range(first, first + len(SPLITS) * count, len(SPLITS))


def _list_folders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.iterdir() if path.is_dir() and not path.name.startswith("."))


def _list_images(parent: Path) -> list[tuple[Path, str]]:
    """Lists images of the class folders of one parent, with their classes, in a fixed order."""
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    images, others = [], []
    for path in sorted(path for path in parent.iterdir() if path.is_file()):
        if path.suffix.lower() in suffixes:
            raise UserError(f"image {path} lies in no class folder; move it into one")
    for folder in _list_folders(parent):
        for path in sorted(folder.rglob("*")):
            if path.is_dir() or path.name.startswith("."):
                continue
            if path.suffix.lower() in suffixes:
                images.append((path, folder.name))
            else:
                others.append(path)
    if others:
        _logger.warning("%d files under %s are no images and are left out, such as %s", len(others), parent, others[0])
    return images


def _draw_split(seed: int, name: str, fractions: Sequence[float]) -> str:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    position = int.from_bytes(digest, "big") / 2**64
    if position < fractions[0]:
        return SPLITS[0]
    return SPLITS[1] if position < fractions[0] + fractions[1] or fractions[2] == 0 else SPLITS[2]
