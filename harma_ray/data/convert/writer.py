"""Writing a split: all or nothing, in parallel, restartable.

Shards grow in ``OUT/.convert/SPLIT/FINGERPRINT/``, where the fingerprint stands for the inputs and settings, so that a
run that was cut off goes on where it stopped, and one with other inputs starts anew. The finished folder, manifest
included, is moved to ``OUT/SPLIT`` in one step; an older split stays usable until then.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from harma_ray import __version__
from harma_ray.data.convert.records import SceneSpec, SourceRecord, hash_file
from harma_ray.data.convert.shards import (
    ShardPlan,
    ShardResult,
    disk_error,
    find_finished,
    pack_shards,
    write_shard,
)
from harma_ray.data.convert.staging import lock, swap, work_folder
from harma_ray.data.convert.tasks import map_with_ray
from harma_ray.data.images import MAX_PIXELS
from harma_ray.data.schema import (
    MANIFEST_NAME,
    ROW_GROUP_BYTES,
    SCHEMA_VERSION,
    SHARD_BYTES,
    BadRow,
    Manifest,
    Shard,
    open_split,
)
from harma_ray.errors import UserError
from harma_ray.files import atomic_file, output_path

MIN_SHARDS = 8
"""Splits are cut into this many shards even if they are small, so that several tasks write (and read) them."""

_LISTED = 10
_HASHING_THREADS = 8
_logger = logging.getLogger(__name__)

TaskMap = Callable[[Callable[[ShardPlan], ShardResult], Sequence[ShardPlan]], Iterator[ShardResult]]
"""Calls a function on each of several plans, somewhere, and yields the results in any order."""


@dataclass(frozen=True)
class WriteSettings:
    """How a split is written, whatever it is made from."""

    resize: int | None = None
    """Images whose shorter side is longer than this many pixels are made smaller (aspect kept) and encoded again, JPEG
    as JPEG of quality 95 and all others as PNG. None, the default, keeps every file byte for byte."""
    max_bad: int = 0
    """Number of missing or unreadable images that may be left out; each is listed in the manifest."""
    seed: int = 0
    """Seed of the order of rows, which is random so that a row group holds a mixture."""
    overwrite: bool = False
    """Replaces a split that was made from other inputs or with other settings."""
    max_pixels: int = MAX_PIXELS
    """Largest image that is read, in pixels."""
    shard_bytes: int = SHARD_BYTES
    """Target size of a shard."""
    row_group_bytes: int = ROW_GROUP_BYTES
    """Target size of a row group."""
    progress: bool = False
    """Shows a progress bar on stderr."""

    def __post_init__(self) -> None:
        for name, least in (("resize", 1), ("max_bad", 0), ("seed", 0), ("shard_bytes", 1), ("row_group_bytes", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"`{name}` must be at least {least}, got {value}")


def write_split(
    records: Sequence[SourceRecord],
    out_dir: str | Path,
    *,
    options: Mapping[str, Any],
    inputs: Mapping[str, str],
    settings: WriteSettings | None = None,
    map_tasks: TaskMap = map_with_ray,
) -> Manifest:
    """Writes one split of a data set, or finds that it is there already.

    Args:
        records: The images. Each is read and decoded whole before it is written.
        out_dir: Folder of the split, such as ``data/rsitmd/train``; the folder above is made if need be.
        options: The converter's name and its own settings, for the manifest.
        inputs: Annotation files and their hashes, for the manifest; image files are added here.
        settings: How to write; the defaults if None.
        map_tasks: Runs the tasks: ``map_with_ray`` (Ray must have been initialised) or ``map_serially``.

    Returns:
        The manifest.

    Raises:
        UserError: If more than ``settings.max_bad`` images are missing or unreadable (none is written to the split
            then), a split made from something else is there, or the disk is full. What was done so far is kept, so
            that the same call goes on from there.
    """
    settings = settings or WriteSettings()
    split = output_path(out_dir)
    if not records:
        raise UserError(f"there are no images to write to {split}; check the annotations and the name of the split")
    try:
        sizes, fingerprints, missing = _examine(records, settings.progress)
        if fingerprints is not None:
            inputs = {**inputs, "images": fingerprints}
        kept = {name: getattr(settings, name) for name in ("resize", "seed", "max_pixels")}
        wanted = Manifest(0, 0, (), dict(inputs), json.loads(json.dumps({**options, **kept})), tool_version=__version__)
        with lock(split):
            done = _find_done(split, wanted, settings)
            if done is not None:
                _check_bad(done.bad, settings.max_bad, len(records))
                _logger.info("%s is done already: %d images", split, done.rows)
                return done
            _check_bad(missing, settings.max_bad, len(records))
            absent = {row.source for row in missing}
            present = [(r, size) for r, size in zip(records, sizes, strict=True) if r.source not in absent]
            work, plans = _plan(present, split, wanted, settings)
            results = _run(plans, map_tasks, len(present), settings.progress)
            return _finish(split, work, results, missing, wanted, settings.max_bad, len(records))
    except OSError as error:
        raise disk_error(split, error) from error


def _examine(records: Sequence[SourceRecord], progress: bool) -> tuple[list[int], str | None, list[BadRow]]:
    """Returns image sizes, a hash of the files' names and contents (None without files), and what is missing."""
    digest, sizes, missing = hashlib.sha256(), [], []
    files = [record for record in records if not isinstance(record.image, SceneSpec)]
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        hashes = iter(tqdm(
            pool.map(_hash_file, [record.image for record in files]), total=len(files), unit=" images", desc="hashing",
            disable=not progress or not files,
        ))  # fmt: skip
        for record in records:
            if isinstance(record.image, SceneSpec):
                sizes.append(record.image.size**2 * 2)  # about what PNG makes of a scene
                continue
            size, content, reason = next(hashes)
            if reason:
                missing.append(BadRow(record.source, reason))
            sizes.append(size)
            digest.update(f"{record.source}\0{content}\n".encode())
    return sizes, digest.hexdigest() if files else None, missing


def _hash_file(path: Path) -> tuple[int, str, str]:
    """Returns a file's size, the hash of its content, and why it cannot be read, if so."""
    if path.exists() and not path.is_file():
        return 0, "", "not a file"
    try:
        return path.stat().st_size, hash_file(path), ""
    except OSError as error:
        verb = "found" if isinstance(error, FileNotFoundError) else "read"
        return 0, "", f"cannot be {verb} ({error.strerror}: {path})"


def _find_done(split: Path, wanted: Manifest, settings: WriteSettings) -> Manifest | None:
    """Returns the manifest that is there if it is the wanted one, None if the split is to be written."""
    if not split.exists() or (split.is_dir() and not any(split.iterdir())):
        return None
    manifest_path = split / MANIFEST_NAME
    if not manifest_path.is_file():
        raise UserError(f"{split} exists but is no converted split; remove it or choose another folder")
    foreign = [p.name for p in split.iterdir() if p.name != MANIFEST_NAME and not p.match("part-*.parquet")]
    reason = ""
    try:
        there = Manifest.from_json(manifest_path.read_text(), origin=str(manifest_path))
        old = {**there.inputs, **there.options}
        new = {**wanted.inputs, **wanted.options}
        reason = ", ".join(sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key)))
        if not reason:
            return open_split(split.parent, split.name).manifest
    except UserError as error:
        reason = reason or str(error)
    if not settings.overwrite:
        raise UserError(
            f"{split} was made differently ({reason}); choose another folder, or overwrite it (--overwrite)"
        )
    if foreign:
        raise UserError(f"{split} also holds {', '.join(sorted(foreign)[:3])}, which overwriting would delete; move it")
    return None


def _plan(
    present: list[tuple[SourceRecord, int]], split: Path, wanted: Manifest, settings: WriteSettings
) -> tuple[Path, list[ShardPlan]]:
    """Cuts the records into shards, prepares the work folder, and checks that there is room."""
    digest = hashlib.sha256(
        json.dumps(
            [SCHEMA_VERSION, __version__, settings.shard_bytes, settings.row_group_bytes, wanted.inputs, wanted.options]
        ).encode()
    )
    for record, _ in present:
        digest.update(repr(record).encode())
    fingerprint = digest.hexdigest()
    work = work_folder(split) / fingerprint[:16]
    for other in work.parent.glob("*"):
        if other != work:
            shutil.rmtree(other)
    work.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(settings.seed).permutation(len(present))
    shuffled = [present[position] for position in order]
    sizes = [size for _, size in shuffled]
    minimum = min(MIN_SHARDS, -(-sum(sizes) // settings.row_group_bytes)) or 1
    plans = [
        ShardPlan(
            path=work / f"part-{number:05d}.parquet",
            records=tuple(shuffled[position][0] for position in piece),
            fingerprint=fingerprint,
            resize=settings.resize,
            max_pixels=settings.max_pixels,
            row_group_bytes=settings.row_group_bytes,
        )
        for number, piece in enumerate(pack_shards(sizes, settings.shard_bytes, minimum))
    ]
    done = sum(result.bytes for result in map(find_finished, plans) if result)
    needed, free = sum(sizes) - done, shutil.disk_usage(work).free
    if settings.resize is None and needed > free:
        raise UserError(
            f"{split} needs about {needed / 1e6:,.0f} MB but {free / 1e6:,.0f} MB are free; free some first"
        )
    return work, plans


def _run(plans: list[ShardPlan], map_tasks: TaskMap, num_images: int, progress: bool) -> list[ShardResult]:
    results = []
    with tqdm(total=num_images, unit=" images", disable=not progress, desc="converting") as bar:
        for result in map_tasks(write_shard, plans):
            results.append(result)
            bar.update(result.rows + len(result.bad))
    return sorted(results, key=lambda result: result.file)


def _finish(
    split: Path,
    work: Path,
    results: list[ShardResult],
    missing: list[BadRow],
    wanted: Manifest,
    max_bad: int,
    num_images: int,
) -> Manifest:
    """Writes the manifest and moves the folder to its place."""
    bad = tuple(sorted([*missing, *(row for result in results for row in result.bad)], key=lambda row: row.source))
    _check_bad(bad, max_bad, num_images)
    filled = [result for result in results if result.rows]
    if not filled:
        raise UserError(f"none of the {num_images} images of {split} can be used, such as {_list_bad(bad[:1])}")
    shards = tuple(Shard(result.file, result.rows, result.bytes) for result in filled)
    manifest = Manifest(
        rows=sum(result.rows for result in filled),
        captions=sum(result.captions for result in filled),
        shards=shards,
        inputs=wanted.inputs,
        options=wanted.options,
        bad=bad,
        tool_version=wanted.tool_version,
    )
    names = {shard.file for shard in shards}
    with atomic_file(work / MANIFEST_NAME) as file:
        file.write(manifest.to_json().encode())
    for path in work.iterdir():
        if path.name not in names and path.name != MANIFEST_NAME:
            path.unlink()
    swap(work, split)
    if bad:
        _logger.warning("%d of %d images were left out: %s", len(bad), num_images, _list_bad(bad))
    return manifest


def _check_bad(bad: Sequence[BadRow], max_bad: int, num_images: int) -> None:
    if len(bad) > max_bad:
        raise UserError(
            f"{len(bad)} of {num_images} images cannot be used, at most {max_bad} may be left out (--max-bad): "
            f"{_list_bad(bad)}; mend them or raise the limit"
        )


def _list_bad(bad: Sequence[BadRow]) -> str:
    listed = ", ".join(f"{row.source} ({row.reason})" for row in bad[:_LISTED])
    return listed + (f", and {len(bad) - _LISTED} more" if len(bad) > _LISTED else "")
