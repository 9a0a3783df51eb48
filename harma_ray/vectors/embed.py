"""Vectors of a data set's images and captions, or of a folder's images, as Parquet, through Ray Data."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from harma_ray.api import find_rendering, load_retriever
from harma_ray.data.image_files import FoundImages, find_images, original_name, readable_name
from harma_ray.data.kinds import IMAGES
from harma_ray.data.order import IndexedSplit, iterate_slices, read_samples
from harma_ray.data.rendering import Rendering
from harma_ray.data.splits import index_rows, list_splits, open_split
from harma_ray.errors import UserError
from harma_ray.files import making, output_path
from harma_ray.on_ray.stream import map_in_actors
from harma_ray.runs import Run
from harma_ray.training.checkpoint import read_meta


def embed(
    run: Run,
    data: str | Path,
    out: str | Path,
    *,
    split: str | None = None,
    batch_size: int = 64,
    num_actors: int = 1,
    use_gpu: bool = False,
    max_bad: int = 0,
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
        split: One split of a data set; None = all.
        batch_size: Images at a time.
        num_actors: Processes that hold the model.
        use_gpu: Whether each of them takes a GPU.
        max_bad: Unreadable images that may be left out.
        rendering: How a folder's images of more than 8 bits are shown; None = as those that the run was trained on, if
            they were and its data set is still there.

    Returns:
        A summary for the user.

    Raises:
        UserError: If there is nothing to encode, a shard is damaged, more than `max_bad` images are unreadable, the
            cluster has too few GPUs, or `out` exists.
    """
    _check_request(batch_size, num_actors, max_bad, use_gpu=use_gpu)
    target = output_path(out)
    if target.exists():
        raise UserError(f"{target} exists; choose another --out")
    folder = Path(data).expanduser().absolute()
    splits = [split] if split else list_splits(folder) if folder.is_dir() else []
    found = None if splits else _find_once(folder)
    items = list(_items(folder, splits, found, batch_size))
    width = load_retriever(run, "cpu").model.embedding_width  # mistakes show before Ray works
    rule = rendering or find_rendering(run)
    device = "cuda" if use_gpu else "cpu"
    settings = {"run": run, "device": device, "num_actors": num_actors, "rendering": rule}
    dataset = map_in_actors(items, _Encoder, settings, num_actors=num_actors, use_gpu=use_gpu)
    used = None if splits else rule
    with making(target) as partial:
        partial.mkdir()
        counts, bad = _write(dataset, partial / "vectors.parquet", width, max_bad)
        manifest = {
            **_describe_model(run),
            "data": readable_name(data),
            "width": width,
            "counts": counts,
            "bad": bad,
            "rendering": used and used.to_dict(),
            "left_out": {} if found is None else found.counts,
        }
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
    shown = f"; images of more than 8 bits were rendered by {used.options}" if used else ""
    if used and rendering is None:
        shown += f", as in {run.config.data.path}"
    return (
        f"wrote {counts['image']} image and {counts['text']} text vectors of width {width}, in "
        f"{run.config.train.eval_precision}, to {target}{shown}" + "".join(f"\n  left out: {entry}" for entry in bad)
    )


def _describe_model(run: Run) -> dict[str, str]:
    """Returns what tells the vectors' model from others."""
    checkpoint = run.best_checkpoint()
    return {
        "run": str(run.path),
        "recipe": run.config.recipe,
        "checkpoint": checkpoint.name,
        "backbone": read_meta(checkpoint).backbone,
        "precision": run.config.train.eval_precision,
    }


def _check_request(batch_size: int, num_actors: int, max_bad: int, *, use_gpu: bool) -> None:
    """Raises UserError for numbers that make no sense, or more processes with a GPU than there are GPUs."""
    import ray

    for name, value, low in (("batch_size", batch_size, 1), ("num_actors", num_actors, 1), ("max_bad", max_bad, 0)):
        if value < low:
            raise UserError(f"`{name}` must be at least {low}, got {value}")
    gpus = ray.cluster_resources().get("GPU", 0) if use_gpu else 0
    if use_gpu and num_actors > gpus:  # Ray itself would wait for ever
        raise UserError(f"{num_actors} processes need a GPU each, but the cluster has {gpus:g}; use fewer, or --cpu")


def _find_once(folder: Path) -> FoundImages:
    """Returns a folder's images, each once, and warns of what is left out; UserError if there are none."""
    found = find_images(folder) if folder.is_dir() else None
    if found is not None:
        found = found.once_per(lambda path: path.relative_to(folder).parts[:1])
        found.warn()
    if found is None or not found.images:
        raise UserError(f"{readable_name(folder)} is neither a converted data set nor a folder with images")
    return found


def _items(data: Path, splits: list[str], found: FoundImages | None, batch_size: int) -> Iterator[dict[str, Any]]:
    """Yields small descriptions of batches; images are read where they are encoded."""
    root = readable_name(data)
    for name in splits:
        opened = open_split(data, name)
        opened.require_kind([IMAGES], "embed")
        for part in iterate_slices(opened.manifest.rows, batch_size):
            yield {"data": root, "split": name, "start": part.start, "stop": part.stop, "names": ""}
    names = [] if found is None else [found.name(path) for path in found.images]
    for part in iterate_slices(len(names), batch_size):
        yield {"data": root, "split": "", "start": 0, "stop": 0, "names": json.dumps(names[part])}


def _write(dataset: Any, path: Path, width: int, max_bad: int) -> tuple[dict[str, int], list[str]]:
    from harma_ray.on_ray.quirks import closing_batches

    counts, bad = {"image": 0, "text": 0}, []
    tables = closing_batches(dataset.iter_batches(batch_size=None, batch_format="pyarrow"))
    with pq.ParquetWriter(path, _schema(width)) as writer, tables as ready:
        for table in ready:
            kinds = np.array(table.column("kind").to_pylist())
            failed = table.filter(pa.array(kinds == "error")).column("source").to_pylist()
            if failed:
                raise UserError(failed[0])
            bad += table.filter(pa.array(kinds == "bad")).column("source").to_pylist()
            if len(bad) > max_bad:
                listed = "; ".join(bad[:10])
                raise UserError(f"{len(bad)} images cannot be read ({listed}); mend them or allow them with --max-bad")
            for kind in counts:
                counts[kind] += int((kinds == kind).sum())
            writer.write_table(table.filter(pa.array(kinds != "bad")).cast(writer.schema))
    return counts, bad


def _schema(width: int) -> pa.Schema:
    texts = [pa.field(name, pa.string()) for name in ("id", "kind", "source", "text")]
    return pa.schema([*texts, pa.field("vector", pa.list_(pa.float32(), width))])


class _Encoder:
    """Holds the model in its process. Mistakes come back as rows: Ray would wrap an exception in its own traces."""

    def __init__(self, run: Run, device: str, num_actors: int, rendering: Rendering | None):
        import torch

        torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_actors))
        self._retriever = load_retriever(run, device, rendering)
        self._width = self._retriever.model.embedding_width

    def __call__(self, table: pa.Table) -> pa.Table:
        return pa.concat_tables([self._encode(item) for item in table.to_pylist()])

    def _encode(self, item: dict[str, Any]) -> pa.Table:
        try:
            rows = list(_read_items(item))
        except (UserError, OSError, pa.ArrowException) as error:
            return self._table([("", "error", f"cannot read {item['data']}: {error}", None, self._zeros())])
        images, good, lines = [], [], []
        prepare = self._retriever.prepare if item["names"] else self._retriever.prepare_stored
        for row in rows:
            try:
                images.append(prepare(row["image"]))
                good.append(row)
            except UserError as error:
                lines.append((row["id"], "bad", f"{row['source']}: {error}", None, self._zeros()))
        vectors = self._retriever.encode_prepared(images).numpy() if images else []
        texts = [text for row in good for text in row["captions"]]
        text_vectors = iter(self._retriever.encode_cleaned(texts).numpy() if texts else [])
        for row, vector in zip(good, vectors, strict=True):
            lines.append((row["id"], "image", row["source"], None, vector))
            for number, text in enumerate(row["captions"]):
                lines.append((f"{row['id']}#{number}", "text", row["source"], text, next(text_vectors)))
        return self._table(lines)

    def _zeros(self) -> np.ndarray:
        return np.zeros(self._width, np.float32)

    def _table(self, lines: list[tuple[str, str, str, str | None, np.ndarray]]) -> pa.Table:
        *texts, vectors = zip(*lines, strict=True)
        flat = pa.array(np.concatenate(vectors).astype(np.float32))
        arrays = [
            *(pa.array(column, pa.string()) for column in texts),
            pa.FixedSizeListArray.from_arrays(flat, self._width),
        ]
        return pa.table(arrays, schema=_schema(self._width))


def _read_items(item: dict[str, Any]) -> Iterator[dict[str, Any]]:
    data = original_name(item["data"])
    if item["names"]:
        for name in json.loads(item["names"]):
            path = os.path.join(data, original_name(name))
            yield {"id": name, "image": path, "source": name, "captions": []}
        return
    rows = np.arange(item["start"], item["stop"])
    samples = np.stack([rows, np.zeros_like(rows)], axis=1)
    for row in read_samples(_indexed(data, item["split"]), samples, 0).to_pylist():
        key = f"{item['split']}/{row['image_id']}"
        yield {"id": key, "image": row["image"], "source": row["source"], "captions": row["captions"]}


@functools.lru_cache(maxsize=4)
def _indexed(data: str, split: str) -> IndexedSplit:
    opened = open_split(data, split)
    return IndexedSplit(opened, index_rows(opened))
