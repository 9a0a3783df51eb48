"""Planning and writing of single shards: what one task of a conversion does. Knows nothing of Ray."""

from __future__ import annotations

import errno
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from harma_ray.data.convert.records import SceneSpec, SourceRecord, clean_captions
from harma_ray.data.images import BadImage, decode_image
from harma_ray.data.scenes import scene
from harma_ray.data.schema import IMAGE_SCHEMA, ROW_GROUP_BYTES, BadRow
from harma_ray.errors import UserError
from harma_ray.files import atomic_file

JPEG_QUALITY = 95
"""Quality of JPEG images that had to be made smaller."""
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class ShardPlan:
    """One shard to be written."""

    path: Path
    """Where the shard goes; absolute."""
    records: tuple[SourceRecord, ...]
    """What it holds, in this order."""
    fingerprint: str
    """Identifies the whole conversion; a finished shard of another one is not this shard."""
    resize: int | None
    """Largest shorter side of an image, in pixels; larger images are made smaller. None keeps all files untouched."""
    max_pixels: int
    """Largest image that is read, in pixels."""
    row_group_bytes: int = ROW_GROUP_BYTES
    """Target size of a row group."""


@dataclass(frozen=True)
class ShardResult:
    """What became of a shard."""

    file: str
    """Name of the file."""
    rows: int
    """Number of images written."""
    captions: int
    """Number of captions written."""
    bytes: int
    """Size of the file."""
    bad: tuple[BadRow, ...]
    """Images that could not be used."""
    fingerprint: str
    """That of the plan."""


def pack_shards(sizes: Sequence[int], target: int, minimum: int) -> list[range]:
    """Cuts a list into consecutive pieces of nearly equal total size.

    Args:
        sizes: Bytes of each item.
        target: No piece is much larger than this unless one item is.
        minimum: Number of pieces to make at least, if there are as many items.
    """
    total = sum(sizes)
    count = min(len(sizes), max(minimum, -(-total // target)))
    bounds, filled = [0], 0
    for position, size in enumerate(sizes):
        # A piece ends where the running total passes its share, and leaves one item for each piece to come.
        due = filled >= total * len(bounds) / count or len(sizes) - position <= count - len(bounds)
        if position > bounds[-1] and len(bounds) < count and due:
            bounds.append(position)
        filled += size
    return [range(start, stop) for start, stop in zip(bounds, [*bounds[1:], len(sizes)], strict=True)]


def write_shard(plan: ShardPlan) -> ShardResult:
    """Writes one shard, unless it is there already.

    The file gets its name only when it is complete; its result lies beside it, as ``.NAME.json``, from then on.

    Raises:
        UserError: If the disk is full or the folder cannot be written.
    """
    finished = find_finished(plan)
    if finished is not None:
        return finished
    bad: list[BadRow] = []
    captions = rows = 0
    try:
        with (
            atomic_file(plan.path) as file,
            pq.ParquetWriter(
                file,
                IMAGE_SCHEMA,
                compression="NONE",
                use_dictionary=False,
                write_statistics=False,
                write_page_checksum=True,
            ) as writer,
        ):
            for group in _row_groups(plan, bad):
                writer.write_table(pa.Table.from_pylist(group, schema=IMAGE_SCHEMA), row_group_size=len(group))
                rows += len(group)
                captions += sum(len(row["captions"]) for row in group)
        size = plan.path.stat().st_size
        result = ShardResult(plan.path.name, rows, captions, size, tuple(bad), plan.fingerprint)
        with atomic_file(_result_path(plan.path)) as file:
            file.write(json.dumps(asdict(result)).encode())
    except OSError as error:
        raise disk_error(plan.path, error) from error
    return result


def find_finished(plan: ShardPlan) -> ShardResult | None:
    """Returns the result of a shard that an earlier run of the same conversion completed, or None."""
    try:
        raw = json.loads(_result_path(plan.path).read_bytes())
        result = ShardResult(**{**raw, "bad": tuple(BadRow(**row) for row in raw["bad"])})
        if result.fingerprint == plan.fingerprint and result.bytes == plan.path.stat().st_size:
            return result
    except (OSError, json.JSONDecodeError, KeyError, TypeError):
        return None  # no such file, or not ours: the shard is written anew
    return None


def disk_error(path: Path, error: OSError) -> UserError:
    """Returns the user's message for a failed write."""
    reason = error.strerror or str(error)
    if error.errno in _DISK_FULL:
        return UserError(f"no room to write {path} ({reason}); free some and run the same command again: it continues")
    return UserError(f"cannot write {path} ({reason}); check the folder or choose another, and run the command again")


def _row_groups(plan: ShardPlan, bad: list[BadRow]) -> Iterator[list[dict[str, Any]]]:
    """Yields rows in groups of about ``row_group_bytes``; adds what cannot be used to ``bad``."""
    group: list[dict[str, Any]] = []
    size = 0
    for record in plan.records:
        try:
            row = _make_row(record, plan.resize, plan.max_pixels)
        except BadImage as error:
            bad.append(BadRow(record.source, str(error)))
            continue
        if group and size + len(row["image"]) > plan.row_group_bytes:
            yield group
            group, size = [], 0
        group.append(row)
        size += len(row["image"])
    if group:
        yield group


def _make_row(record: SourceRecord, resize: int | None, max_pixels: int) -> dict[str, Any]:
    captions, label, label_name = record.captions, record.label, record.label_name
    if isinstance(record.image, SceneSpec):
        spec = record.image
        drawn = scene(spec.seed, spec.index, spec.style, spec.size)
        captions = clean_captions(drawn.captions, record.origin)
        label, label_name, image = drawn.label, drawn.label_name, drawn.image
        data = _encode(image, "PNG")
    else:
        data = _read(record.image)
        image = decode_image(data, max_pixels=max_pixels)
    if resize is not None and min(image.size) > resize:
        image = _shrink(image, resize)
        data = _encode(image, "JPEG" if data.startswith(b"\xff\xd8\xff") else "PNG")
    return {
        "image_id": record.image_id,
        "image": data,
        "height": image.height,
        "width": image.width,
        "captions": list(captions),
        "label": label,
        "label_name": label_name,
        "source": record.source,
    }


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadImage(f"cannot be read ({error.strerror})") from error


def _shrink(image: Image.Image, shorter_side: int) -> Image.Image:
    scale = shorter_side / min(image.size)
    size = (max(shorter_side, round(image.width * scale)), max(shorter_side, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC)


def _encode(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    options = {"quality": JPEG_QUALITY} if kind == "JPEG" else {}
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _result_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.json")
