"""Vectors of a data set's images and captions, or of a folder's images, as Parquet, through Ray Data."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from harma_ray.api import find_rendering, load_encoder, open_picture, require_encoder
from harma_ray.data.convert.shards import write_tables
from harma_ray.data.image_files import find_images, readable_name
from harma_ray.data.kinds import IMAGES
from harma_ray.data.manifest import MANIFEST_NAME
from harma_ray.data.order import iterate_slices
from harma_ray.data.rendering import Rendering
from harma_ray.data.splits import list_splits, open_split
from harma_ray.errors import UserError
from harma_ray.files import making, output_path, write_text
from harma_ray.runs import Run
from harma_ray.vectors.job import Encoded, Inputs, JobSettings, Request, encode, image_requests


def embed(
    run: Run,
    data: str | Path,
    out: str | Path,
    settings: JobSettings,
    *,
    split: str | None = None,
    rendering: Rendering | None = None,
) -> str:
    """Writes vectors with columns ``id``, ``kind`` (image, text), ``source``, ``text``, ``vector`` (float32[E]).

    Ray must have been initialised. Rows are in the order of the shards, or of the sorted paths of a folder's images
    (see `find_images`; names that are not UTF-8 are escaped by `readable_name`); a row of an image is followed by those
    of its captions.

    Args:
        run: Whose best weights encode, in its `train.eval_precision`.
        data: Folder of a converted data set, or of images (with sub-folders).
        out: Folder to make; written whole or not at all.
        settings: Of the job.
        split: One split of a data set; None = all.
        rendering: How a folder's images of more than 8 bits are shown; None = as those that the run was trained on, if
            they were and its data set is still there.

    Returns:
        A summary for the user.

    Raises:
        UserError: If there is nothing to encode, `out` exists, or as `encode` does.
        WorkerDied: If one of the processes ends.
    """
    target, folder = output_path(out), Path(data).expanduser().absolute()
    if target.exists():
        raise UserError(f"{target} exists; choose another --out")
    require_encoder(run)
    splits = [split] if split else list_splits(folder) if folder.is_dir() else []
    rule = None if splits else rendering or find_rendering(run)
    requests, left_out = _find(folder, splits, rule, settings, run.config.data.max_pixels)
    about = {"data": readable_name(data), "rendering": rule and rule.to_dict(), "left_out": left_out}
    hint = " or allow them with --max-bad"
    results = encode(requests, partial(load_encoder, run), settings, progress="vectors", hint=hint)
    with closing(results), making(target) as work:
        manifest = _write(results, work, about)
    shown = f"; images of more than 8 bits were rendered by {rule.options}" if rule else ""
    origin = f", as in {run.config.data.path}" if rule and rendering is None else ""
    return _summarise(manifest, f"{target}{shown}{origin}")


def _find(
    folder: Path, splits: Sequence[str], rule: Rendering | None, settings: JobSettings, max_pixels: int
) -> tuple[list[Request], dict[str, int]]:
    """Returns what is to be encoded, of splits or of a folder's images, each once, and what is left out there."""
    requests: list[Request] = []
    for name in splits:
        split = open_split(folder, name)
        split.require_kind([IMAGES], "embed")
        requests += image_requests(split, range(split.manifest.rows), settings, "image", max_pixels, captions=True)
    if splits:
        return requests, {}
    found = find_images(folder) if folder.is_dir() else None
    if found is not None:
        found = found.once_per(lambda path: path.relative_to(folder).parts[:1])
        found.warn()
    if found is None or not found.images:
        raise UserError(f"{readable_name(folder)} is neither a converted data set nor a folder with images")
    for part in iterate_slices(len(found.images), settings.batch_size):
        rows = [{"name": name, "label": name} for name in map(found.name, found.images[part])]
        images = [partial(open_picture, path, rule, max_pixels) for path in found.images[part]]
        requests.append(partial(Inputs, rows, images))
    return requests, {reason: len(names) for reason, names in found.left_out.items()}


def _write(results: Iterator[Encoded], folder: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the vectors and the manifest, and returns the latter."""
    folder.mkdir()
    first, bad, counts = next(results), [], Counter(image=0, text=0)

    def tables() -> Iterator[pa.Table]:
        for found in chain([first], results):
            lines = [*_lines(found)]
            counts.update(line["kind"] for line in lines)
            bad.extend(found.bad)
            yield pa.Table.from_pylist(lines, schema)

    texts = [pa.field(name, pa.string()) for name in ("id", "kind", "source", "text")]
    schema = pa.schema([*texts, pa.field("vector", pa.list_(pa.float32(), first.images.shape[1]))])
    shard = write_tables(tables(), schema, folder / "vectors.parquet")
    width, identity = first.images.shape[1], first.identity.values
    manifest = {**identity, **about, "width": width, "counts": dict(counts), "bad": bad, "shards": [asdict(shard)]}
    write_text(folder / MANIFEST_NAME, json.dumps(manifest, indent=1))
    return manifest


def _summarise(manifest: Mapping[str, Any], place: str) -> str:
    counts, bad = manifest["counts"], "".join(f"\n  left out: {entry}" for entry in manifest["bad"])
    return (
        f"wrote {counts['image']} image and {counts['text']} text vectors of width {manifest['width']}, in "
        f"{manifest['precision']}, to {place}{bad}"
    )


def _lines(found: Encoded) -> Iterator[dict[str, Any]]:
    """Yields the row of each image, followed by those of its captions."""
    for row, vector in zip(found.rows, found.images, strict=True):
        key = f"{row['split']}/{row['image_id']}" if "split" in row else row["name"]
        yield {"id": key, "kind": "image", "source": row["name"], "vector": vector}
        for number, text in enumerate(row.get("captions", ())):
            if text in found.texts:
                about = {"id": f"{key}#{number}", "kind": "text", "source": row["name"], "text": text}
                yield {**about, "vector": found.texts[text]}
