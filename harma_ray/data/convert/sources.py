"""Readers of annotation files: HarMA's two layouts and Karpathy's."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harma_ray.data.convert.records import (
    SPLITS,
    SourceRecord,
    check_unique,
    clean_captions,
    fill_labels,
    image_root,
    read_json,
    resolve_image,
)
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
    root, file = image_root(images), Path(annotations).name
    rows = read_json(annotations)
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{file} must be a JSON list of rows {_TRAIN_ROW} or {_EVAL_ROW}, got {_shape(rows)}")
    # Rows are counted from 1, as people count.
    named = [(f"{file} row {number}", row) for number, row in enumerate(rows, 1)]
    training = isinstance(rows[0], dict) and isinstance(rows[0].get("caption"), str)
    records = _join_training_rows(named, root) if training else _read_evaluation_rows(named, root)
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
        raise UserError(f"{file} must look like {_KARPATHY}, got {_shape(content)}")
    found: dict[str, list[SourceRecord]] = {}
    for number, row in enumerate(rows):
        origin = f"{file} image {number + 1}"
        row = _object(row, origin, _KARPATHY)
        split = _field(row, "split", str, origin, _KARPATHY)
        if splits is not None and split not in splits:
            continue
        folder = _field(row, "filepath", str, origin, _KARPATHY) if row.get("filepath") is not None else ""
        name = str(Path(folder) / _field(row, "filename", str, origin, _KARPATHY))
        sentences = _field(row, "sentences", list, origin, _KARPATHY)
        texts = [_field(_object(s, origin, _KARPATHY), "raw", str, origin, _KARPATHY) for s in sentences]
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
        row = _object(row, origin, _TRAIN_ROW)
        text = _field(row, "caption", str, origin, _TRAIN_ROW)
        image_id = _field(row, "image_id", int, origin, _TRAIN_ROW)
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
        row = _object(row, origin, _EVAL_ROW)
        texts = _field(row, "caption", list, origin, _EVAL_ROW)
        if not texts:
            raise UserError(f"{origin}: `caption` is an empty list; give the image a caption or remove the row")
        records.append(_make_record(row, number, clean_captions(texts, origin), origin, root, _EVAL_ROW))
    return records


def _make_record(
    row: dict[str, Any], image_id: int, captions: tuple[str, ...], origin: str, root: Path, expected: str
) -> SourceRecord:
    name = _field(row, "image", str, origin, expected)
    label = None if row.get("label") is None else _field(row, "label", int, origin, expected)
    label_name = None if row.get("label_name") is None else _field(row, "label_name", str, origin, expected)
    return SourceRecord(image_id, name, origin, resolve_image(root, name, origin), captions, label, label_name)


def _object(value: Any, origin: str, expected: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{origin} must look like {expected}, got {_shape(value)}")
    return value


def _field(row: dict[str, Any], name: str, kind: type, origin: str, expected: str) -> Any:
    value = row.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        got = f"`{name}` = {_shape(value)}" if name in row else f"no `{name}` (keys: {', '.join(map(str, row))})"
        raise UserError(f"{origin} must look like {expected}, got {got}")
    if isinstance(value, int) and not 0 <= value < 2**31:  # labels are stored as int32
        raise UserError(f"{origin}: `{name}` must lie in 0..{2**31 - 1}, got {value}")
    return value


def _shape(value: Any) -> str:
    """Describes a JSON value in a few words."""
    if isinstance(value, dict):
        keys = ", ".join(list(value)[:6])
        return f"an object with {f'keys {keys}' if keys else 'no keys'}"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
