"""Readers of annotation files: HarMA's two layouts and Karpathy's."""

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from harma_ray.data.convert.annotations import Entry, describe_shape
from harma_ray.data.convert.image_paths import image_root, locate_image
from harma_ray.data.convert.json_files import read_json, read_rows
from harma_ray.data.convert.mistakes import Mistakes, all_mistakes
from harma_ray.data.convert.records import SPLITS, check_unique, clean_captions, fill_labels
from harma_ray.data.kinds.images import SourceRecord
from harma_ray.errors import UserError

_logger = logging.getLogger(__name__)

_TRAIN_ROW = '{"caption": text, "image": path, "image_id": number, "label_name"?: text, "label"?: number}'
_EVAL_ROW = '{"image": path, "caption": [texts], "label_name"?: text, "label"?: number}'
_NWPU_ROW = '{"filename": path, "split": name, "raw": text, "raw_1"?: text, ...}'
_NWPU_CAPTION = re.compile(r"raw(?:_(\d+))?")
_KARPATHY = '{"images": [{"filename": path, "split": name, "sentences": [{"raw": text}, ...]}, ...]}'


def read_harma(annotations: str | Path, images: str | Path) -> list[SourceRecord]:
    """Reads a HarMA annotation file, of training (a row a caption) or of evaluation (a row an image).

    Which of the two it is shows in most rows: their ``caption`` is a text or a list. Training rows of the same image
    are joined, in the order of its first row; captions keep their order. Evaluation rows are numbered from 0.

    Args:
        annotations: The JSON or JSON Lines file.
        images: Folder that the paths in it are relative to.

    Raises:
        UserError: Naming file and all rows that do not have one of these shapes.
    """
    root, path = image_root(images), Path(annotations)
    rows = read_rows(path, f"{_TRAIN_ROW} or {_EVAL_ROW}", _hint_at_karpathy)
    kinds = [type(row.value.get("caption")) for row in rows if isinstance(row.value, dict)]
    texts, lists = kinds.count(str), kinds.count(list)
    training = texts > lists or (texts == lists and kinds[:1] == [str])
    read, expected = (_join_training_rows, _TRAIN_ROW) if training else (_read_evaluation_rows, _EVAL_ROW)
    with all_mistakes(path.name) as mistakes:
        records = read([replace(row, expected=expected) for row in rows], root, mistakes)
        check_unique(records, mistakes)
        return fill_labels(records, mistakes)


def read_karpathy(annotations: str | Path, images: str | Path) -> dict[str, list[SourceRecord]]:
    """Reads a Karpathy-style annotation file, which RSICD, UCM and Sydney captions are published in, or NWPU-Captions'.

    The latter has classes, each with rows that hold their captions as ``raw``, ``raw_1``, ...; its images lie in
    folders of the classes, or in one.

    Args:
        annotations: The JSON file; all splits are in it.
        images: Folder that ``filename`` (after ``filepath``, if there) is relative to.

    Returns:
        The records of those of the splits train, val and test that are there, in the file's order, numbered by their
        place in the file.

    Raises:
        UserError: Naming file and all rows that do not have this shape, or if it has none of these splits.
    """
    root, file = image_root(images), Path(annotations).name
    content = read_json(annotations)
    of_classes = _is_nwpu(content)
    rows = content.get("images") if isinstance(content, dict) else None
    if not of_classes and (not isinstance(rows, list) or not rows):
        hint = "; such rows are read by `convert harma`" if isinstance(content, list) else ""
        raise UserError(
            f"{file} must look like {_KARPATHY} or {{class: [{_NWPU_ROW}]}}, got {describe_shape(content)}{hint}"
        )
    found: dict[str, list[SourceRecord]] = {}
    with all_mistakes(file) as mistakes:
        read = (
            _read_nwpu(content, file, root, mistakes) if of_classes else _read_images(rows or [], file, root, mistakes)
        )
        for split, record in read:
            found.setdefault(split, []).append(record)
        wanted = [split for split in SPLITS if split in found]
        for split in wanted:
            check_unique(found[split], mistakes)
    if not wanted:
        there = ", ".join(sorted(found))
        raise UserError(f"{file} has no images of split {', '.join(SPLITS)}; it has {there}")
    others = sorted(found.keys() - set(wanted))
    if others:
        left_out = ", ".join(f"{len(found[split])} of split {split}" for split in others)
        _logger.warning("%s: images of other splits than %s are left out: %s", file, ", ".join(wanted), left_out)
    return {split: found[split] for split in wanted}


def _is_nwpu(content: object) -> bool:
    """Tells whether a file has classes with rows, as NWPU-Captions has."""
    return (
        isinstance(content, dict)
        and "images" not in content
        and any(
            isinstance(rows, list) and rows and isinstance(rows[0], dict) and "raw" in rows[0]
            for rows in content.values()
        )
    )


def _hint_at_karpathy(content: object) -> str:
    has_images = isinstance(content, dict) and isinstance(content.get("images"), list)
    return "; such a file is read by `convert karpathy`" if has_images or _is_nwpu(content) else ""


def _read_images(
    rows: Sequence[object], file: str, root: Path, mistakes: Mistakes
) -> Iterator[tuple[str, SourceRecord]]:
    """Yields the images of a Karpathy-style file with their splits."""
    for number, value in enumerate(rows):
        row = Entry(value, f"{file} image {number + 1}", _KARPATHY)
        with mistakes.noted():
            split = row.text("split")
            folder = row.text("filepath") if row.has("filepath") else ""
            name = str(Path(folder) / row.text("filename"))
            texts = [Entry(sentence, row.origin, _KARPATHY).text("raw") for sentence in row.items("sentences")]
            if not texts:
                raise UserError(
                    f"{row.origin}: `sentences` is empty, so the image has no caption; correct or remove the row"
                )
            name, path = locate_image(root, name, row.origin)
            yield split, SourceRecord(number, name, row.origin, path, clean_captions(texts, row.origin))


def _read_nwpu(
    content: dict[str, Any], file: str, root: Path, mistakes: Mistakes
) -> Iterator[tuple[str, SourceRecord]]:
    """Yields the images of a file of NWPU-Captions with their splits."""
    splits, records = [], []
    for class_name, rows in content.items():
        for number, value in enumerate(rows if isinstance(rows, list) else [rows], 1):
            row = Entry(value, f"{file} {class_name} row {number}", _NWPU_ROW)
            origin = row.origin
            with mistakes.noted():
                split, file_name = row.text("split"), row.text("filename")
                keys = {int(match[1] or 0): key for key in row.fields if (match := _NWPU_CAPTION.fullmatch(key))}
                texts = [row.text(keys[place]) for place in sorted(keys)] or [row.text("raw")]
                places = [locate_image(root, name, origin) for name in (f"{class_name}/{file_name}", file_name)]
                name, path = next((place for place in places if place[1].is_file()), places[0])
                captions = clean_captions(texts, origin)
                records.append(SourceRecord(len(records), name, origin, path, captions, label_name=class_name))
                splits.append(split)
    yield from zip(splits, fill_labels(records, mistakes), strict=True)


def _join_training_rows(rows: Sequence[Entry], root: Path, mistakes: Mistakes) -> list[SourceRecord]:
    joined: dict[int, tuple[SourceRecord, list[str]]] = {}
    for row in rows:
        with mistakes.noted():
            text, image_id = row.text("caption"), row.number("image_id")
            captions = clean_captions([text], row.origin)
            record = _make_record(row, image_id, (), root)
            first, texts = joined.setdefault(image_id, (record, []))
            for name in ("source", "label", "label_name"):
                ours, theirs = getattr(record, name), getattr(first, name)
                if ours != theirs:
                    raise UserError(
                        f"{row.origin}: rows of one image_id must be of one image and class, but {image_id} has "
                        f"{ours!r} here and {theirs!r} in {first.origin}; correct one of them"
                    )
            texts.extend(captions)
    return [replace(record, captions=tuple(texts)) for record, texts in joined.values()]


def _read_evaluation_rows(rows: Sequence[Entry], root: Path, mistakes: Mistakes) -> list[SourceRecord]:
    records = []
    for number, row in enumerate(rows):
        with mistakes.noted():
            texts = row.items("caption")
            if not texts:
                raise UserError(f"{row.origin}: `caption` is an empty list; give the image a caption or remove the row")
            records.append(_make_record(row, number, clean_captions(texts, row.origin), root))
    return records


def _make_record(row: Entry, image_id: int, captions: tuple[str, ...], root: Path) -> SourceRecord:
    name = row.text("image")
    label = row.number("label") if row.has("label") else None
    label_name = row.text("label_name") if row.has("label_name") else None
    name, path = locate_image(root, name, row.origin)
    return SourceRecord(image_id, name, row.origin, path, captions, label, label_name)
