"""The converters as the command line calls them: read a source, write its splits."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from harma_ray.data.convert.annotations import hash_files
from harma_ray.data.convert.composed import ComposedSource
from harma_ray.data.convert.duplicates import warn_of_shared
from harma_ray.data.convert.folders import list_composed_scenes, list_scenes, read_class_folders
from harma_ray.data.convert.limits import check_rows
from harma_ray.data.convert.sources import read_harma, read_karpathy
from harma_ray.data.convert.talk_scenes import list_talk_scenes
from harma_ray.data.convert.talks import read_vitp, talks_of_images
from harma_ray.data.convert.writer import DEFAULTS, WriteSettings, write_split
from harma_ray.data.kinds.base import Record
from harma_ray.data.kinds.images import SourceRecord
from harma_ray.data.kinds.queries import QueryRecord
from harma_ray.data.manifest import Manifest
from harma_ray.errors import UserError
from harma_ray.files import output_path


def convert_harma(
    annotations: str | Path,
    images: str | Path,
    split: str,
    out: str | Path,
    *,
    talks: bool = False,
    settings: WriteSettings = DEFAULTS,
) -> Manifest:
    """Converts one HarMA annotation file, of training or evaluation, to one split of the data set ``out``.

    With `talks` the rows are talks made from captions and classes, see ``talks_of_images``.

    Raises:
        UserError: If the source or the folder ``out`` is not as it should be; see ``read_harma``, ``write_split``.
    """
    _check_name(split)
    records = {split: read_harma(annotations, images)}
    inputs = hash_files(annotations)
    return _write_images(records, out, {"converter": "harma"}, settings, talks=talks, inputs=inputs)[split]


def convert_karpathy(
    annotations: str | Path,
    images: str | Path,
    out: str | Path,
    *,
    talks: bool = False,
    settings: WriteSettings = DEFAULTS,
) -> dict[str, Manifest]:
    """Converts a Karpathy-style annotation file to the splits in it of the data set ``out``.

    With `talks` the rows are talks made from captions, see ``talks_of_images``.

    Raises:
        UserError: If the source or the folder ``out`` is not as it should be; see ``read_karpathy``, ``write_split``.
    """
    records = read_karpathy(annotations, images)
    inputs = hash_files(annotations)
    return _write_images(records, out, {"converter": "karpathy"}, settings, talks=talks, inputs=inputs)


def convert_folder(
    images: str | Path,
    out: str | Path,
    *,
    caption_template: str | None = None,
    fractions: Sequence[float] = (0.8, 0.1, 0.1),
    talks: bool = False,
    settings: WriteSettings = DEFAULTS,
) -> dict[str, Manifest]:
    """Converts class folders to the splits of the data set ``out``; see ``read_class_folders``.

    With `talks` the rows are talks made from the classes, see ``talks_of_images``.

    Raises:
        UserError: If the source or the folder ``out`` is not as it should be.
    """
    records = read_class_folders(images, caption_template=caption_template, fractions=fractions, seed=settings.seed)
    options = {"converter": "folder", "caption_template": caption_template, "fractions": list(fractions)}
    return _write_images(records, out, options, settings, talks=talks)


def convert_vitp(
    meta: str | Path,
    images: str | Path,
    split: str,
    out: str | Path,
    *,
    choice: str = "head",
    settings: WriteSettings = DEFAULTS,
) -> Manifest:
    """Converts the talks of a ViTP (InternVL) meta file to one split of the data set ``out``; see ``read_vitp``.

    Raises:
        UserError: If the source or the folder ``out`` is not as it should be.
    """
    _check_name(split)
    source = read_vitp(meta, images, choice=choice, seed=settings.seed)
    options = {"converter": "vitp", "choice": choice}
    return _write_splits({split: source.records}, out, options, settings, inputs=source.inputs)[split]


def convert_scenes_talk(
    out: str | Path, counts: Mapping[str, int], *, style: str, size: int, settings: WriteSettings = DEFAULTS
) -> dict[str, Manifest]:
    """Draws scenes and writes talks about them to the splits of ``out``; takes what ``convert_scenes`` does.

    Raises:
        UserError: If a setting is not valid or ``out`` cannot be written.
    """
    records = list_talk_scenes(counts, style=style, size=size, seed=settings.seed)
    options = {"converter": "scenes-talk", "style": style, "size": size}
    return _write_splits(records, out, options, settings, counts=counts)


def convert_scenes(
    out: str | Path,
    counts: Mapping[str, int],
    *,
    style: str,
    size: int,
    settings: WriteSettings = DEFAULTS,
) -> dict[str, Manifest]:
    """Draws scenes and writes them to the splits of the data set ``out``; ``settings.seed`` is their seed too.

    Args:
        out: Folder of the data set.
        counts: Number of scenes of each split, such as ``{"train": 2000, "val": 200, "test": 200}``.
        style: Look of the scenes.
        size: Height and width in pixels.
        settings: How to write.

    Raises:
        UserError: If a setting is not valid or ``out`` cannot be written.
    """
    records = list_scenes(counts, style=style, size=size, seed=settings.seed)
    options = {"converter": "scenes", "style": style, "size": size}
    return _write_splits(records, out, options, settings, counts=counts)


def convert_composed(source: ComposedSource, out: str | Path, *, settings: WriteSettings = DEFAULTS) -> Manifest:
    """Converts a split of FashionIQ or CIRR to one of the data set ``out``: triplets for ``train``, else a gallery.

    Args:
        source: What `read_fashioniq` or `read_cirr` has read.
        out: Folder of the data set.
        settings: How to write.

    Raises:
        UserError: If the folder ``out`` is not as it should be; see ``write_split``.
    """
    records, queries = {source.split: source.records}, {source.split: source.queries}
    manifests = _write_splits(records, out, source.options, settings, queries=queries, inputs=source.inputs)
    return manifests[source.split]


def convert_scenes_cir(
    out: str | Path,
    counts: Mapping[str, int],
    *,
    style: str,
    size: int,
    own_layouts: bool = False,
    settings: WriteSettings = DEFAULTS,
) -> dict[str, Manifest]:
    """Draws composed retrieval's scenes and writes them to the splits of ``out``; takes what ``convert_scenes`` does.

    A count is that of queries: of ``train`` they are triplets, of another split each brings 6 images to the gallery.
    With ``own_layouts`` each of these is laid out anew; without, what a sentence does not change stays where it is.

    Raises:
        UserError: If a setting is not valid or ``out`` cannot be written.
    """
    splits = list_composed_scenes(counts, style=style, size=size, seed=settings.seed, own_layouts=own_layouts)
    options: dict[str, Any] = {"converter": "scenes-cir", "style": style, "size": size}
    if own_layouts:  # conversions of before have no such option
        options["own_layouts"] = True
    records = {split: records for split, (records, _) in splits.items()}
    queries = {split: queries for split, (_, queries) in splits.items()}
    return _write_splits(records, out, options, settings, queries=queries, counts=counts)


def _check_name(split: str) -> None:
    if not split or split.startswith(".") or "/" in split:
        raise UserError(f"a split's name is a plain folder name such as train, val or test, got {split!r}")


def _write_images(
    records: Mapping[str, list[SourceRecord]],
    out: str | Path,
    options: Mapping[str, Any],
    settings: WriteSettings,
    *,
    talks: bool,
    inputs: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Manifest]:
    """Writes splits of images, or of talks about them."""
    if not talks:
        return _write_splits(records, out, options, settings, inputs=inputs)
    made = {split: talks_of_images(rows, settings.seed) for split, rows in records.items()}
    return _write_splits(made, out, {**options, "talks": True}, settings, inputs=inputs)


def _write_splits(
    records: Mapping[str, Sequence[Record]],
    out: str | Path,
    options: Mapping[str, Any],
    settings: WriteSettings,
    *,
    queries: Mapping[str, Sequence[QueryRecord]] = MappingProxyType({}),
    inputs: Mapping[str, str] = MappingProxyType({}),
    counts: Mapping[str, int] | None = None,
) -> dict[str, Manifest]:
    """Writes splits; takes what `write_split` does, and the counts of what is drawn."""
    check_rows([record for rows in records.values() for record in rows], settings, f"what is to become {out}")
    manifests = {
        split: write_split(
            rows,
            Path(out) / split,
            options=options if counts is None else {**options, "count": counts[split]},
            inputs=inputs,
            queries=queries.get(split, ()),
            settings=settings,
        )
        for split, rows in records.items()
    }
    if counts is None:  # what is drawn is in one split alone
        warn_of_shared(output_path(out), list(manifests))  # when all are new: those of before are no splits of the same
    return manifests
