"""Vectors of a data set's images, captions and queries, or of a folder's images, as a store, through Ray Data."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from harma_ray.api import find_rendering, load_encoder, open_picture, require_encoder
from harma_ray.data.convert.shards import disk_error, write_tables
from harma_ray.data.convert.staging import lock, work_folder
from harma_ray.data.image_files import FoundImages, find_images, readable_name
from harma_ray.data.kinds import IMAGES, TRIPLETS
from harma_ray.data.manifest import MANIFEST_NAME
from harma_ray.data.order import iterate_slices
from harma_ray.data.rendering import Rendering
from harma_ray.data.splits import Split, list_splits, open_split
from harma_ray.errors import UserError, count
from harma_ray.files import making, new_path, write_text
from harma_ray.models.fingerprints import file_fingerprint
from harma_ray.recipes import QUERIES
from harma_ray.runs import Run
from harma_ray.settings import config_hash
from harma_ray.task import require_query
from harma_ray.training.checkpoint import WEIGHTS_NAME
from harma_ray.vectors.job import Inputs, JobSettings, Request, hash_file, image_requests
from harma_ray.vectors.parts import Part, encode_parts
from harma_ray.vectors.queries import composed_requests, holds_queries
from harma_ray.vectors.store import (
    ENCODER,
    FEATURES,
    NPZ,
    QUERY,
    VECTORS_NAME,
    npz_manifest,
    parent_name,
    write_npz,
)


def embed(
    run: Run,
    data: str | Path,
    out: str | Path,
    settings: JobSettings,
    *,
    split: str | None = None,
    rendering: Rendering | None = None,
    query: str | None = None,
) -> str:
    """Writes a store of vectors, see `harma_ray.vectors.store`, or goes on with one where a killed process stopped.

    Ray must have been initialised. Rows are in the order of the shards, or of the sorted paths of a folder's images
    (see `find_images`, `readable_name`), each image followed by its captions; a run of composed retrieval also composes
    the queries of a split, after its images. The class of a folder's image is the name of the folder that it lies in.

    Args:
        run: Whose best weights encode, in its `train.eval_precision`.
        data: Folder of a converted data set, or of images (with sub-folders).
        out: Folder to make, or a file that ends in ``.npz``, of images alone; written whole or not at all.
        settings: Of the job.
        split: One split of a data set; None = all.
        rendering: How a folder's images of more than 8 bits are shown; None = as the run's own were.
        query: How queries of composed retrieval are made; None = the run's own way.

    Returns a summary for the user.

    Raises:
        UserError: If there is nothing to encode, `out` exists, or as `encode` does; WorkerDied if a process ends.
    """
    target, folder = new_path(out), Path(data).expanduser().absolute()
    require_encoder(run)
    if query:
        require_query(run.task, None, query)
    splits = [split] if split else list_splits(folder) if folder.is_dir() else []
    rule = None if splits else rendering or find_rendering(run)
    found = _find(run, folder, splits, rule, settings, query, images_only=target.suffix == NPZ)
    checkpoint = run.best_checkpoint()  # for all processes: asked later, a run that goes on may have a better one
    about, job = _describe(run, checkpoint, folder, rule, found, settings)
    with ExitStack() as stack:
        _lock(stack, target)
        work = _own_folder(work_folder(target), job)
        load, way_out = partial(load_encoder, run, checkpoint), " or allow them with --max-bad"
        parts = encode_parts(work, found.requests, load, settings, hint=way_out, queries=QUERY in found.about)
        with making(target) as made:
            manifest = _write(parts, made, target, about)
        shutil.rmtree(work)
    as_in = "" if rendering else f", as in {run.config.data.path}"
    return _summarise(manifest, target, f"{rule.options}{as_in}" if rule else "")


def _lock(stack: ExitStack, target: Path) -> None:
    try:
        stack.enter_context(lock(target))
    except OSError as error:
        raise disk_error(target, error) from error


def _own_folder(work: Path, job: str) -> Path:
    """Returns where the parts of a job lie; those of other jobs, which had the same place to write to, are deleted."""
    own = work / hashlib.sha256(job.encode()).hexdigest()[:16]
    for other in work.glob("*"):
        if other != own:
            shutil.rmtree(other)
    return own


@dataclass(frozen=True)
class _Found:
    """What is to be encoded."""

    requests: list[Request]
    about: dict[str, Any]
    """What the manifest tells of it: fingerprints of splits, what was left out."""
    listing: str = ""
    """Changes with the files of a folder."""


def _describe(
    run: Run, checkpoint: Path, folder: Path, rule: Rendering | None, found: _Found, settings: JobSettings
) -> tuple[dict[str, Any], str]:
    """Returns what a store says of its origin, and the identity of the job that makes it."""
    origin = {"run": str(run.path), "checkpoint": checkpoint.name, "data": readable_name(folder)}
    about = {**origin, "rendering": rule and rule.to_dict(), **found.about}
    weights = file_fingerprint(checkpoint / WEIGHTS_NAME)
    return about, json.dumps([config_hash(run.config), weights, about, found.listing, settings.batch_size])


def _find(
    run: Run,
    folder: Path,
    splits: Sequence[str],
    rule: Rendering | None,
    settings: JobSettings,
    query: str | None,
    *,
    images_only: bool,
) -> _Found:
    """Returns what is to be encoded, of splits or of a folder's images, each once, and what is left out there."""
    max_pixels = run.config.data.max_pixels
    if splits:
        way = "" if images_only else query or next(iter(run.task.queries()), "")
        opened = [open_split(folder, name) for name in splits]
        found = _find_in_splits(opened, settings, way, max_pixels, captions=not images_only)
    else:
        found = _find_in_folder(folder, rule, settings, max_pixels)
    if query and QUERY not in found.about:
        what = "an .npz holds images alone" if images_only else f"{folder} has none"
        raise UserError(f"`--query` says how queries of composed retrieval are made, but {what}; leave it out")
    return found


def _find_in_splits(
    splits: Sequence[Split], settings: JobSettings, query: str, max_pixels: int, *, captions: bool
) -> _Found:
    requests: list[Request] = []
    about: dict[str, Any] = {"splits": {split.name: split.fingerprint for split in splits}, "left_out": {}}
    for split in splits:
        split.require_kind([IMAGES, TRIPLETS] if query else [IMAGES], "embed")
        if query and holds_queries(split):
            requests += composed_requests(split, query, settings, max_pixels)
            about[QUERY] = query
        else:
            rows = range(split.manifest.rows)
            requests += image_requests(split, rows, settings, "image", max_pixels, captions=captions)
    return _Found(requests, about)


def _find_in_folder(folder: Path, rule: Rendering | None, settings: JobSettings, max_pixels: int) -> _Found:
    found = find_images(folder) if folder.is_dir() else None
    if found is not None:
        found = found.once_per(lambda path: path.relative_to(folder).parts[:1])
        found.warn()
    if found is None or not found.images:
        raise UserError(f"{readable_name(folder)} is neither a converted data set nor a folder with images")
    requests: list[Request] = []
    for part in iterate_slices(len(found.images), settings.batch_size):
        files = [(found.name(path), path) for path in found.images[part]]
        requests.append(partial(_read_files, files, rule, max_pixels))
    return _Found(
        requests,
        {"splits": {}, "left_out": {reason: len(names) for reason, names in found.left_out.items()}},
        _listing(found),
    )


def _listing(found: FoundImages) -> str:
    digest = hashlib.sha256()
    for path in found.images:
        state = path.stat() if path.exists() else None  # a link may lead nowhere
        digest.update(repr((found.name(path), state and (state.st_size, state.st_mtime_ns))).encode())
    return digest.hexdigest()


def _read_files(files: Sequence[tuple[str, Path]], rule: Rendering | None, max_pixels: int) -> Inputs:
    rows = [
        {"id": name, "name": name, "label": name, "label_name": parent_name(name) or None, "content": hash_file(path)}
        for name, path in files
    ]
    return Inputs(rows, [partial(open_picture, path, rule, max_pixels) for _, path in files])


def _write(parts: Sequence[Part], made: Path, target: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """Writes vectors and manifest of a store that is to lie at `target`, and returns the latter."""
    kinds = ("image", "text", QUERY) if QUERY in about else ("image", "text")
    counts = {kind: sum(part.counts.get(kind, 0) for part in parts) for kind in kinds}
    manifest = {
        ENCODER: dict(parts[0].identity),
        **about,
        "width": parts[0].width,
        "unit": all(part.unit for part in parts),
        "counts": counts,
        "bad": [line for part in parts for line in part.bad],
    }
    if target.suffix == NPZ:
        manifest[FEATURES] = write_npz(pa.concat_tables([part.read() for part in parts]), made)
        write_text(npz_manifest(target), json.dumps(manifest, indent=1))
        return manifest
    made.mkdir()
    first = parts[0].read()
    shard = write_tables(_tables(parts), first.schema, made / VECTORS_NAME)
    manifest["shards"] = [asdict(shard)]
    write_text(made / MANIFEST_NAME, json.dumps(manifest, indent=1))
    return manifest


def _tables(parts: Sequence[Part]) -> Iterator[pa.Table]:
    for part in parts:
        yield part.read()


def _summarise(manifest: Mapping[str, Any], target: Path, rule: str) -> str:
    counts, bad = manifest["counts"], "".join(f"\n  left out: {entry}" for entry in manifest["bad"])
    *first, last = (kind for kind in counts if counts[kind])
    others = ", ".join(f"{counts[kind]:,} {kind}" for kind in first)
    shown = f"; images of more than 8 bits were rendered by {rule}" if rule else ""
    composed = f"; queries: {QUERIES[manifest[QUERY]]}" if QUERY in counts else ""
    vectors = (f"{others} and " if others else "") + count(counts[last], f"{last} vector")
    return (
        f"wrote {vectors} of width {manifest['width']}, in "
        f"{manifest[ENCODER]['precision']}, to {target}{shown}{composed}{bad}"
    )
