"""Writing a split: all or nothing, in parallel, restartable.

Shards grow in ``OUT/.convert/SPLIT/FINGERPRINT/``, where the fingerprint stands for the inputs and settings, so that a
run that was cut off goes on where it stopped, and one with other inputs starts anew. The finished folder, manifest
included, is moved to ``OUT/SPLIT`` in one step; an older split stays usable until then.
"""

import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from harma_ray import __version__
from harma_ray.data.convert.contents import memory_of
from harma_ray.data.convert.duplicates import HASHES_NAME, write_hashes
from harma_ray.data.convert.examination import Examination, NeededImages
from harma_ray.data.convert.measuring import measure_shard, resolve, with_statistics_of_train
from harma_ray.data.convert.rows import Found, ImageSettings, tabulate_queries
from harma_ray.data.convert.shards import (
    ShardPlan,
    ShardResult,
    TaskMap,
    disk_error,
    find_finished,
    pack_shards,
    write_shard,
    write_table,
)
from harma_ray.data.convert.staging import lock, put_in_place, work_folder
from harma_ray.data.convert.unusable import Tolerance, list_bad, remove_lists
from harma_ray.data.kinds.base import Record, RowCheck
from harma_ray.data.kinds.queries import QueryRecord
from harma_ray.data.manifest import (
    MANIFEST_NAME,
    QUERIES_NAME,
    ROW_GROUP_BYTES,
    SCHEMA_VERSION,
    SHARD_BYTES,
    BadRow,
    Manifest,
    Rendered,
    Shard,
)
from harma_ray.data.rendering import Rendering
from harma_ray.data.splits import open_split
from harma_ray.errors import UserError
from harma_ray.files import atomic, output_path
from harma_ray.progress import progress_bar

MIN_SHARDS = 8
"""Splits are cut into this many shards even if they are small, so that several tasks write (and read) them."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WriteSettings(ImageSettings):
    """How a split is written, whatever it is made from."""

    max_bad: int = 0
    """Number of missing or unreadable images that may be left out; each is listed in the manifest."""
    seed: int = 0
    """Seed of the order of rows, which is random so that a row group holds a mixture."""
    overwrite: bool = False
    """Replaces a split that was made from other inputs or with other settings."""
    shard_bytes: int = SHARD_BYTES
    """Target size of a shard."""
    row_group_bytes: int = ROW_GROUP_BYTES
    """Target size of a row group."""
    progress: bool = False
    """Shows a progress bar on stderr."""
    map_tasks: TaskMap = map
    """Runs the tasks: here, or as `harma_ray.on_ray.tasks.map_with_ray` on a cluster."""
    check: RowCheck | None = None
    """What converters ask of all rows before any is written; None = nothing."""

    def __post_init__(self) -> None:
        least_values = {"resize": 1, "max_pixels": 1, "max_bad": 0, "seed": 0, "shard_bytes": 1, "row_group_bytes": 1}
        for name, least in least_values.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"`{name}` must be at least {least}, got {value}")

    @property
    def images(self) -> ImageSettings:
        """What of this is about single images."""
        return ImageSettings(self.resize, self.max_pixels, self.rendering)


DEFAULTS = WriteSettings()
"""How splits are written unless something else is asked for."""


@dataclass(frozen=True)
class _Job:
    """One split to be written."""

    split: Path
    """Its folder."""
    records: Sequence[Record]
    """What its rows are made from."""
    queries: Sequence[QueryRecord]
    """What goes with its images."""
    images: Examination
    """The images of the records."""
    wanted: Manifest
    """Its manifest, as far as it is known before anything is written."""
    settings: WriteSettings
    """How it is written."""
    tolerance: Tolerance
    """Which images may be left out."""


def write_split(
    records: Sequence[Record],
    out_dir: str | Path,
    *,
    options: Mapping[str, Any],
    inputs: Mapping[str, str],
    queries: Sequence[QueryRecord] = (),
    settings: WriteSettings = DEFAULTS,
) -> Manifest:
    """Writes one split of a data set, or finds that it is there already.

    Args:
        records: What the rows are made from, all of one kind. Every image is decoded whole before it is written.
        out_dir: Folder of the split, such as ``data/rsitmd/train``; the folder above is made if need be.
        options: The converter's name and its own settings, for the manifest.
        inputs: Annotation files and their hashes, for the manifest; image files and queries are added here.
        queries: Queries of composed retrieval whose images are among the records' ``source``; none by default.
        settings: How to write.

    Returns:
        The manifest. Rows and queries that need an image that was left out are left out and listed too.

    Raises:
        UserError: If more than ``settings.max_bad`` images are missing or unreadable (none is written to the split
            then), a split made from something else is there, or the disk is full. What was done so far is kept, so
            that the same call goes on from there.
    """
    split = output_path(out_dir)
    if not records:
        raise UserError(f"there are no images to write to {split}; check the annotations and the name of the split")
    settings = replace(settings, rendering=with_statistics_of_train(settings.rendering, split))
    try:
        needed = NeededImages.of(records)
        tolerance = Tolerance(split, needed.names, settings.max_bad)
        tolerance.check_missing(needed.missing)
        images = needed.examine(memory=memory_of(split), progress=settings.progress)
        wanted = _describe_wanted(records, queries, images, options, inputs, settings)
        job = _Job(split, records, queries, images, wanted, settings, tolerance)
        with lock(split):
            done = _find_done(job)
            if done is None:
                return _write(job)
            tolerance.check(done.bad)
            if settings.progress:
                print(f"{split} is done already, from the same inputs; nothing is written", file=sys.stderr)
            return done
    except OSError as error:
        raise disk_error(split, error) from error


def _describe_wanted(
    records: Sequence[Record], queries: Sequence[QueryRecord], images: Examination, options: Mapping[str, Any],
    inputs: Mapping[str, str], settings: WriteSettings,
) -> Manifest:  # fmt: skip
    """Returns the manifest of a split, as far as it is known before anything is written."""
    known = {"images": images.fingerprint, "queries": _hash_queries(records, queries)}
    inputs = {**inputs, **{name: content for name, content in known.items() if content is not None}}
    kept = {name: getattr(settings, name) for name in ("resize", "seed", "max_pixels")}
    if settings.rendering is not None:
        kept["rendering"] = settings.rendering.to_dict()
    as_read = json.loads(json.dumps({**options, **kept}))
    return Manifest(0, 0, (), dict(inputs), as_read, tool_version=__version__, kind=records[0].kind.name)


def _write(job: _Job) -> Manifest:
    """Writes what is not there yet."""
    job.tolerance.check(job.images.unreadable)
    job.images.check_ruled(job.settings.rendering, job.settings.max_bad)
    present, left_out = job.images.divide(job.records)
    if not present:
        raise UserError(
            f"none of the {len(job.records)} {job.wanted.kind} of {job.split} can be used, such as "
            f"{list_bad(left_out[:1])}"
        )
    work, plans = _plan(job, present)
    plans = _measure(job, plans)
    results = sorted(_map(job, write_shard, plans, "converting"), key=lambda result: result.file)
    return _finish(job, work, plans[0].images.rendering, results, left_out)


def _hash_queries(records: Sequence[Record], queries: Sequence[QueryRecord]) -> str | None:
    """Returns a hash of what rows and queries hold beside images and inputs; None if that is nothing."""
    held = [record.annotation for record in records if record.annotation is not None]
    return hashlib.sha256(repr([*held, *queries]).encode()).hexdigest() if held or queries else None


def _find_done(job: _Job) -> Manifest | None:
    """Returns the manifest that is there if it is the wanted one, None if the split is to be written."""
    split, wanted = job.split, job.wanted
    if not split.exists() or (split.is_dir() and not any(split.iterdir())):
        return None
    manifest_path = split / MANIFEST_NAME
    if not manifest_path.is_file():
        raise UserError(f"{split} exists but is no converted split; remove it or choose another folder")
    ours = (MANIFEST_NAME, QUERIES_NAME, HASHES_NAME)
    foreign = [p.name for p in split.iterdir() if p.name not in ours and not p.match("part-*.parquet")]
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
    if not job.settings.overwrite:
        raise UserError(
            f"{split} was made differently ({reason}); choose another folder, or overwrite it (--overwrite)"
        )
    if foreign:
        raise UserError(f"{split} also holds {', '.join(sorted(foreign)[:3])}, which overwriting would delete; move it")
    return None


def _plan(job: _Job, present: list[tuple[Record, int]]) -> tuple[Path, list[ShardPlan]]:
    """Cuts the records into shards, prepares the work folder, and checks that there is room."""
    settings, wanted = job.settings, job.wanted
    digest = hashlib.sha256(
        json.dumps(
            [SCHEMA_VERSION, __version__, settings.shard_bytes, settings.row_group_bytes, wanted.inputs, wanted.options]
        ).encode()
    )
    for record, _ in present:
        digest.update(repr(record).encode())
    fingerprint = digest.hexdigest()
    work = work_folder(job.split) / fingerprint[:16]
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
            images=settings.images,
            row_group_bytes=settings.row_group_bytes,
        )
        for number, piece in enumerate(pack_shards(sizes, settings.shard_bytes, minimum))
    ]
    done = sum(result.bytes for result in map(find_finished, plans) if result)
    needed, free = sum(sizes) - done, shutil.disk_usage(work).free
    if settings.resize is None and needed > free:
        raise UserError(
            f"{job.split} needs about {needed / 1e6:,.0f} MB but {free / 1e6:,.0f} MB are free; free some first"
        )
    return work, plans


def _measure(job: _Job, plans: list[ShardPlan]) -> list[ShardPlan]:
    """Returns the plans with the statistics of the whole split, for which its rasters are read once, if need be."""
    rule = job.settings.rendering
    if rule is None or not rule.needs_split:
        return plans
    rule = resolve(rule, job.split, _map(job, measure_shard, plans, "measuring"))
    return [replace(plan, images=replace(plan.images, rendering=rule)) for plan in plans]


def _map(job: _Job, function: Callable[[ShardPlan], Any], plans: list[ShardPlan], verb: str) -> Iterator[Any]:
    """Runs the tasks and shows how far they are."""
    counts = {plan.path.name: len(plan.records) for plan in plans}
    hidden, unit = not job.settings.progress, f" {job.wanted.kind}"
    with progress_bar(total=sum(counts.values()), unit=unit, disable=hidden, desc=verb) as bar:
        for result in job.settings.map_tasks(function, plans):
            yield result
            bar.update(counts[result.file])


def _finish(
    job: _Job, work: Path, rule: Rendering | None, results: list[ShardResult], left_out: list[BadRow]
) -> Manifest:
    """Writes the queries and the manifest, and moves the folder to its place."""
    # An image that several rows need is found bad by each of them.
    found = sum((result.found for result in results), Found())
    bad = {*left_out, *found.bad}
    job.tolerance.check(_sort(bad))
    lost = {row.source for row in bad}
    unusable = {query.source: [name for name in query.needs if name in lost] for query in job.queries}
    bad |= {query.explain(unusable[query.source]) for query in job.queries if unusable[query.source]}
    queries = [query for query in job.queries if not unusable[query.source]]
    filled = [result for result in results if result.rows]
    if not filled or (job.queries and not queries):
        what = f"{len(job.queries)} queries" if filled else f"{len(job.records)} {job.wanted.kind}"
        raise UserError(f"none of the {what} of {job.split} can be used, such as {list_bad(_sort(bad)[:1])}")
    shards = tuple(Shard(result.file, result.rows, result.bytes) for result in filled)
    manifest = replace(
        job.wanted,
        rows=sum(result.rows for result in filled),
        captions=sum(result.captions for result in filled),
        shards=shards,
        bad=tuple(_sort(bad)),
        queries=write_table(tabulate_queries(queries), work / QUERIES_NAME) if queries else None,
        rendered=_describe_rendered(found, rule),
    )
    names = {MANIFEST_NAME, *(shard.file for shard in shards), *([QUERIES_NAME] if queries else [])}
    hashes = {name: content for name, content in job.images.hashes.items() if name not in lost}
    if hashes:
        write_hashes(hashes, work)
        names.add(HASHES_NAME)
    with atomic(work / MANIFEST_NAME) as file:
        file.write_text(manifest.to_json())
    for path in work.iterdir():
        if path.name not in names:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    put_in_place(work, job.split)
    remove_lists(job.split)
    if bad:
        _logger.warning("%s", job.tolerance.tell_left_out(manifest.bad))
    for warning in found.looks.warnings():
        _logger.warning("%s: %s; `launch.py inspect` draws some", job.split, warning)
    return manifest


def _describe_rendered(found: Found, rule: Rendering | None) -> Rendered | None:
    """Returns what is to be known of the images that were rendered; None if there are none."""
    if not found.rendered:
        return None
    nodata = round(100 * found.nodata / sum(found.rendered.values()), 3)
    return Rendered(dict(sorted(found.rendered.items())), nodata, None if rule is None else rule.to_dict())


def _sort(bad: Iterable[BadRow]) -> list[BadRow]:
    return sorted(bad, key=lambda row: (row.source, row.reason))
