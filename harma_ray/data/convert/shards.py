"""Planning and writing of single shards: what one task of a conversion does. Knows nothing of Ray."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError

from harma_ray.data.convert.rows import Found, ImageSettings, make_row
from harma_ray.data.kinds.base import Record
from harma_ray.data.manifest import ROW_GROUP_BYTES, Shard
from harma_ray.errors import UserError
from harma_ray.files import DISK_FULL, atomic


@dataclass(frozen=True)
class ShardPlan:
    """One shard to be written."""

    path: Path
    """Where the shard goes; absolute."""
    records: tuple[Record, ...]
    """What it holds, in this order; at least one, all of one kind."""
    fingerprint: str
    """Identifies the whole conversion; a finished shard of another one is not this shard."""
    images: ImageSettings
    """What becomes of its images."""
    row_group_bytes: int = ROW_GROUP_BYTES
    """Target size of a row group."""


@dataclass(frozen=True)
class ShardResult:
    """What became of a shard."""

    file: str
    """Name of the file."""
    rows: int
    """Number of rows written."""
    captions: int
    """Number of captions written."""
    bytes: int
    """Size of the file."""
    fingerprint: str
    """That of the plan."""
    found: Found
    """What was met on the way."""


_RESULT = TypeAdapter(ShardResult)

TaskMap = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[Any]]
"""Calls a function on each of several plans, somewhere, and yields the results in any order, as `map` does."""


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
    found = Found()
    captions = rows = 0
    kind = plan.records[0].kind
    try:
        with _open_writer(plan.path, kind.schema) as writer:
            for group in _row_groups(plan, found):
                writer.write_table(pa.Table.from_pylist(group, schema=kind.schema), row_group_size=len(group))
                rows += len(group)
                captions += sum(len(kind.texts(row)) for row in group)
        size = plan.path.stat().st_size
        result = ShardResult(plan.path.name, rows, captions, size, plan.fingerprint, found)
        with atomic(_result_path(plan.path)) as file:
            file.write_text(json.dumps(asdict(result)))
    except OSError as error:
        raise disk_error(plan.path, error) from error
    return result


def write_table(table: pa.Table, path: Path, *, row_group_size: int | None = None) -> Shard:
    """Writes a table as one file of a split, whole or not at all."""
    return write_tables([table], table.schema, path, row_group_size=row_group_size)


def write_tables(
    tables: Iterable[pa.Table], schema: pa.Schema, path: Path, *, row_group_size: int | None = None
) -> Shard:
    """Writes tables of one schema as one file, whole or not at all, each when it comes."""
    rows = 0
    with _open_writer(path, schema) as writer:
        for table in tables:
            writer.write_table(table, row_group_size)
            rows += table.num_rows
    return Shard(path.name, rows, path.stat().st_size)


def find_finished(plan: ShardPlan) -> ShardResult | None:
    """Returns the result of a shard that an earlier run of the same conversion completed, or None."""
    try:
        result = _RESULT.validate_json(_result_path(plan.path).read_bytes())
        if result.fingerprint == plan.fingerprint and result.bytes == plan.path.stat().st_size:
            return result
    except (OSError, ValidationError):
        return None  # no such file, or not ours: the shard is written anew
    return None


def disk_error(path: Path, error: OSError) -> UserError:
    """Returns the user's message for a failed write."""
    reason = error.strerror or str(error)
    if error.errno in DISK_FULL:
        return UserError(f"no room to write {path} ({reason}); free some and run the same command again: it continues")
    return UserError(f"cannot write {path} ({reason}); check the folder or choose another, and run the command again")


@contextmanager
def _open_writer(path: Path, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    options = {"compression": "NONE", "use_dictionary": False, "write_statistics": False, "write_page_checksum": True}
    with atomic(path) as made, made.open("wb") as file, pq.ParquetWriter(file, schema, **options) as writer:
        yield writer


def _row_groups(plan: ShardPlan, found: Found) -> Iterator[list[dict[str, Any]]]:
    """Yields rows in groups of about ``row_group_bytes``; adds what is met to ``found``."""
    group: list[dict[str, Any]] = []
    size, counted = 0, (bytes, str) if plan.records[0].kind.weighs_texts else (bytes,)
    for record in plan.records:
        row = make_row(record, plan.images, found)
        if row is None:
            continue
        row_bytes = _count_bytes(row, counted)
        if group and size + row_bytes > plan.row_group_bytes:
            yield group
            group, size = [], 0
        group.append(row)
        size += row_bytes
    if group:
        yield group


def _count_bytes(value: Any, counted: tuple[type, ...]) -> int:
    """Returns the size of the values of some types in a field, about."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return sum(_count_bytes(each, counted) for each in value)
    return len(value) if isinstance(value, counted) else 0


def _result_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.json")
