"""Readers of annotation files: HarMA's two layouts and Karpathy's."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harma_ray.data.convert.annotations import (
    as_object,
    get_field,
    image_root,
    read_json,
    read_rows,
    resolve_image,
    tell_shape,
)
from harma_ray.data.convert.records import SPLITS, SourceRecord, check_unique, clean_captions, fill_labels
from harma_ray.errors import UserError

_logger = logging.getLogger(__name__)

_TRAIN_ROW = '{"caption": text, "image": path, "image_id": number, "label_name"?: text, "label"?: number}'
_EVAL_ROW = '{"image": path, "caption": [texts], "label_name"?: text, "label"?: number}'
_KARPATHY = '{"images": [{"filename": path, "split": name, "sentences": [{"raw": text}, ...]}, ...]}'


def read_harma(annotations: str | Path, images: str | Path) -> list[SourceRecord]:
    """Reads a HarMA annotation file, of training (a row a caption) or of evaluation (a row an image).

    Which of the two it is shows in the first row: its ``caption`` is a text or a list. Training rows of the same image
    are joined, in the order of its first row; captions keep their order. Evaluation rows are numbered from 0.

    Args:
        annotations: The JSON file.
        images: Folder that the paths in it are relative to.

    Raises:
        UserError: Naming file and row, if the file does not have one of these shapes.
    """
    root = image_root(images)
    rows = read_rows(Path(annotations), f"{_TRAIN_ROW} or {_EVAL_ROW}")
    first = rows[0][1]
    training = isinstance(first, dict) and isinstance(first.get("caption"), str)
    records = _join_training_rows(rows, root) if training else _read_evaluation_rows(rows, root)
    check_unique(records)
    return fill_labels(records)


def read_karpathy(
    annotations: str | Path, images: str | Path, splits: Sequence[str] | None = None
) -> dict[str, list[SourceRecord]]:
    """Reads a Karpathy-style annotation file, which RSICD, UCM, Sydney and NWPU captions are published in.

    Args:
        annotations: The JSON file; all splits are in it.
        images: Folder that ``filename`` (after ``filepath``, if there) is relative to.
        splits: The splits to read; by default those of train, val and test that are there.

    Returns:
        The records of each split, in the file's order, numbered by their place in the file.

    Raises:
        UserError: Naming file and row, if the file does not have this shape or has no such split.
    """
    root, file = image_root(images), Path(annotations).name
    content = read_json(annotations)
    rows = content.get("images") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{file} must look like {_KARPATHY}, got {tell_shape(content)}")
    found: dict[str, list[SourceRecord]] = {}
    for number, row in enumerate(rows):
        origin = f"{file} image {number + 1}"
        row = as_object(row, origin, _KARPATHY)
        split = get_field(row, "split", str, origin, _KARPATHY)
        if splits is not None and split not in splits:
            continue
        folder = get_field(row, "filepath", str, origin, _KARPATHY) if row.get("filepath") is not None else ""
        name = str(Path(folder) / get_field(row, "filename", str, origin, _KARPATHY))
        sentences = get_field(row, "sentences", list, origin, _KARPATHY)
        texts = [get_field(as_object(s, origin, _KARPATHY), "raw", str, origin, _KARPATHY) for s in sentences]
        if not texts:
            raise UserError(f"{origin}: `sentences` is empty, so the image has no caption; correct or remove the row")
        record = SourceRecord(number, name, origin, resolve_image(root, name, origin), clean_captions(texts, origin))
        found.setdefault(split, []).append(record)
    wanted = splits if splits is not None else [split for split in SPLITS if split in found]
    missing = [split for split in wanted if split not in found]
    if missing or not wanted:
        there = ", ".join(sorted({str(row.get("split")) for row in rows}))
        raise UserError(f"{file} has no images of split {', '.join(missing or SPLITS)}; it has {there}")
    others = sorted(found.keys() - set(wanted))
    if others:
        left_out = ", ".join(f"{len(found[split])} of split {split}" for split in others)
        _logger.warning("%s: images of other splits than %s are left out: %s", file, ", ".join(wanted), left_out)
    for split in wanted:
        check_unique(found[split])
    return {split: found[split] for split in wanted}


def _join_training_rows(rows: list[tuple[str, Any]], root: Path) -> list[SourceRecord]:
    joined: dict[int, tuple[SourceRecord, list[str]]] = {}
    for origin, row in rows:
        row = as_object(row, origin, _TRAIN_ROW)
        text = get_field(row, "caption", str, origin, _TRAIN_ROW)
        image_id = get_field(row, "image_id", int, origin, _TRAIN_ROW)
        captions = clean_captions([text], origin)
        record = _make_record(row, image_id, (), origin, root, _TRAIN_ROW)
        first, texts = joined.setdefault(image_id, (record, []))
        for name in ("source", "label", "label_name"):
            ours, theirs = getattr(record, name), getattr(first, name)
            if ours != theirs:
                raise UserError(
                    f"{origin}: rows of one image_id must be of one image and class, but {image_id} has {ours!r} here "
                    f"and {theirs!r} in {first.origin}; correct one of them"
                )
        texts.extend(captions)
    return [
        SourceRecord(r.image_id, r.source, r.origin, r.image, tuple(texts), r.label, r.label_name)
        for r, texts in joined.values()
    ]


def _read_evaluation_rows(rows: list[tuple[str, Any]], root: Path) -> list[SourceRecord]:
    records = []
    for number, (origin, row) in enumerate(rows):
        row = as_object(row, origin, _EVAL_ROW)
        texts = get_field(row, "caption", list, origin, _EVAL_ROW)
        if not texts:
            raise UserError(f"{origin}: `caption` is an empty list; give the image a caption or remove the row")
        records.append(_make_record(row, number, clean_captions(texts, origin), origin, root, _EVAL_ROW))
    return records


def _make_record(
    row: dict[str, Any], image_id: int, captions: tuple[str, ...], origin: str, root: Path, expected: str
) -> SourceRecord:
    name = get_field(row, "image", str, origin, expected)
    label = None if row.get("label") is None else get_field(row, "label", int, origin, expected)
    label_name = None if row.get("label_name") is None else get_field(row, "label_name", str, origin, expected)
    return SourceRecord(image_id, name, origin, resolve_image(root, name, origin), captions, label, label_name)
