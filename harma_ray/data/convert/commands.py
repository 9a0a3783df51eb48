"""The converters as the command line calls them: read a source, write its splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harma_ray.data.convert.annotations import hash_file
from harma_ray.data.convert.composed import CATEGORIES, ComposedSource, read_cirr, read_fashioniq
from harma_ray.data.convert.duplicates import warn_of_shared
from harma_ray.data.convert.folders import list_composed_scenes, list_scenes, read_class_folders
from harma_ray.data.convert.sources import read_harma, read_karpathy
from harma_ray.data.convert.tasks import TaskMap, map_serially
from harma_ray.data.convert.writer import WriteSettings, write_split
from harma_ray.data.kinds.images import SourceRecord
from harma_ray.data.manifest import Manifest
from harma_ray.errors import UserError
from harma_ray.files import output_path


def convert_harma(
    annotations: str | Path,
    images: str | Path,
    split: str,
    out: str | Path,
    *,
    settings: WriteSettings | None = None,
    map_tasks: TaskMap = map_serially,
) -> Manifest:
    """Converts one HarMA annotation file, of training or evaluation, to one split of the data set ``out``.

    Raises:
        UserError: If the source or the folder ``out`` is not as it should be; see ``read_harma``, ``write_split``.
    """
    if not split or split.startswith(".") or "/" in split:
        raise UserError(f"a split's name is a plain folder name such as train, val or test, got {split!r}")
    records = {split: read_harma(annotations, images)}
    inputs = {Path(annotations).name: hash_file(annotations)}
    return _write_splits(records, out, {"converter": "harma"}, inputs, settings, map_tasks)[split]


def convert_karpathy(
    annotations: str | Path,
    images: str | Path,
    out: str | Path,
    *,
    splits: Sequence[str] | None = None,
    settings: WriteSettings | None = None,
    map_tasks: TaskMap = map_serially,
) -> dict[str, Manifest]:
    """Converts a Karpathy-style annotation file to the splits in it (or those named) of the data set ``out``.

    Raises:
        UserError: If the source or the folder ``out`` is not as it should be; see ``read_karpathy``, ``write_split``.
    """
    records = read_karpathy(annotations, images, splits)
    inputs = {Path(annotations).name: hash_file(annotations)}
    return _write_splits(records, out, {"converter": "karpathy"}, inputs, settings, map_tasks)


def convert_folder(
    images: str | Path,
    out: str | Path,
    *,
    caption_template: str | None = None,
    fractions: Sequence[float] = (0.8, 0.1, 0.1),
    settings: WriteSettings | None = None,
    map_tasks: TaskMap = map_serially,
) -> dict[str, Manifest]:
    """Converts class folders to the splits of the data set ``out``; see ``read_class_folders``.

    Raises:
        UserError: If the source or the folder ``out`` is not as it should be.
    """
    settings = settings or WriteSettings()
    records = read_class_folders(images, caption_template=caption_template, fractions=fractions, seed=settings.seed)
    options = {"converter": "folder", "caption_template": caption_template, "fractions": list(fractions)}
    return _write_splits(records, out, options, {}, settings, map_tasks)


def convert_scenes(
    out: str | Path,
    counts: Mapping[str, int],
    *,
    style: str,
    size: int,
    settings: WriteSettings | None = None,
    map_tasks: TaskMap = map_serially,
) -> dict[str, Manifest]:
    """Draws scenes and writes them to the splits of the data set ``out``; ``settings.seed`` is their seed too.

    Args:
        out: Folder of the data set.
        counts: Number of scenes of each split, such as ``{"train": 2000, "val": 200, "test": 200}``.
        style: Look of the scenes.
        size: Height and width in pixels.
        settings: How to write.
        map_tasks: Runs the tasks.

    Raises:
        UserError: If a setting is not valid or ``out`` cannot be written.
    """
    settings = settings or WriteSettings()
    records = list_scenes(counts, style=style, size=size, seed=settings.seed)
    options = {"converter": "scenes", "style": style, "size": size}
    return {
        split: write_split(
            rows,
            Path(out) / split,
            options={**options, "count": len(rows)},
            inputs={},
            settings=settings,
            map_tasks=map_tasks,
        )
        for split, rows in records.items()
    }


def convert_fashioniq(
    root: str | Path,
    split: str,
    out: str | Path,
    *,
    categories: Sequence[str] = CATEGORIES,
    settings: WriteSettings | None = None,
    map_tasks: TaskMap = map_serially,
) -> Manifest:
    """Converts a split of FashionIQ to one of the data set ``out``: triplets for ``train``, else images and queries.

    Raises:
        UserError: If the source or the folder ``out`` is not as it should be; see ``read_fashioniq``, ``write_split``.
    """
    source = read_fashioniq(root, split, categories)
    options = {"converter": "fashioniq", "categories": [part.category for part in source.parts]}
    return _write_composed(source, out, options, settings, map_tasks)


def convert_cirr(
    root: str | Path,
    split: str,
    out: str | Path,
    *,
    settings: WriteSettings | None = None,
    map_tasks: TaskMap = map_serially,
) -> Manifest:
    """Converts a split of CIRR to one of the data set ``out``: triplets for ``train``, else images and queries.

    Raises:
        UserError: If the source or the folder ``out`` is not as it should be; see ``read_cirr``, ``write_split``.
    """
    return _write_composed(read_cirr(root, split), out, {"converter": "cirr"}, settings, map_tasks)


def convert_scenes_cir(
    out: str | Path,
    counts: Mapping[str, int],
    *,
    style: str,
    size: int,
    settings: WriteSettings | None = None,
    map_tasks: TaskMap = map_serially,
) -> dict[str, Manifest]:
    """Draws composed retrieval's scenes and writes them to the splits of ``out``; takes what ``convert_scenes`` does.

    A count is that of queries: of ``train`` they are triplets, of another split each brings 6 images to the gallery.

    Raises:
        UserError: If a setting is not valid or ``out`` cannot be written.
    """
    settings = settings or WriteSettings()
    splits = list_composed_scenes(counts, style=style, size=size, seed=settings.seed)
    options = {"converter": "scenes-cir", "style": style, "size": size}
    return {
        split: write_split(
            records,
            Path(out) / split,
            options={**options, "count": counts[split]},
            inputs={},
            queries=queries,
            settings=settings,
            map_tasks=map_tasks,
        )
        for split, (records, queries) in splits.items()
    }


def _write_composed(
    source: ComposedSource,
    out: str | Path,
    options: Mapping[str, Any],
    settings: WriteSettings | None,
    map_tasks: TaskMap,
) -> Manifest:
    manifest = write_split(
        source.records,
        Path(out) / source.split,
        options=options,
        inputs=source.inputs,
        queries=source.queries,
        settings=settings,
        map_tasks=map_tasks,
        hint="; --annotations-only lists all that are missing",
    )
    warn_of_shared(output_path(out), [source.split])
    return manifest


def _write_splits(
    records: Mapping[str, list[SourceRecord]],
    out: str | Path,
    options: Mapping[str, Any],
    inputs: Mapping[str, str],
    settings: WriteSettings | None,
    map_tasks: TaskMap,
) -> dict[str, Manifest]:
    manifests = {
        split: write_split(
            rows, Path(out) / split, options=options, inputs=inputs, settings=settings, map_tasks=map_tasks
        )
        for split, rows in records.items()
    }
    warn_of_shared(output_path(out), list(manifests))  # when all are new: those of before are no splits of the same
    return manifests
