"""Vectors of a data set's images and captions, or of a folder's images, as Parquet, through Ray Data."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from harma_ray.cluster import quiet_data
from harma_ray.data.order import iterate_slices
from harma_ray.data.schema import list_splits, open_split
from harma_ray.errors import UserError
from harma_ray.models.weights import backbone_fingerprint
from harma_ray.runs import Run, open_run

SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp")


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
) -> str:
    """Writes vectors with columns ``id``, ``kind`` (image, text), ``source``, ``text``, ``vector`` (float32[E]).

    Ray must have been initialised. Rows are in the order of the shards, or of the sorted paths of a folder; a row of
    an image is followed by those of its captions.

    Args:
        run: Whose best weights encode.
        data: Folder of a converted data set, or of images (with sub-folders).
        out: Folder to make; written whole or not at all.
        split: One split of a data set; None = all.
        batch_size: Images at a time.
        num_actors: Processes that hold the model.
        use_gpu: Whether each of them takes a GPU.
        max_bad: Unreadable images that may be left out.

    Returns:
        A summary for the user.

    Raises:
        UserError: If there is nothing to encode, more than `max_bad` images are unreadable, or `out` exists.
    """
    import ray.data

    target = Path(out).expanduser().absolute()
    if target.exists():
        raise UserError(f"{target} exists; choose another --out")
    items = list(_items(Path(data).expanduser().absolute(), split, batch_size))
    if not items:
        raise UserError(f"{data} is neither a converted data set nor a folder with images ({', '.join(SUFFIXES)})")
    quiet_data()
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    blocks = min(len(items), 200)
    dataset = ray.data.from_items(items, override_num_blocks=blocks).map_batches(
        _Encoder,
        fn_constructor_kwargs={"run": str(run.path), "use_gpu": use_gpu},
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=num_actors),
        num_gpus=1 if use_gpu else 0,
    )
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        counts, bad, width = _write(dataset, partial / "vectors.parquet", max_bad)
        model = run.load_model()
        manifest = {
            "run": str(run.path),
            "checkpoint": run.best_checkpoint().name,
            "backbone": backbone_fingerprint(model),
            "width": width,
            "counts": counts,
            "bad": bad,
        }
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
        os.replace(partial, target)
    except OSError as error:
        raise UserError(f"cannot write {target} ({error.strerror}); check the folder and its free space") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    left_out = "".join(f"\n  left out: {entry}" for entry in bad)
    return f"wrote {counts['image']} image and {counts['text']} text vectors of width {width} to {target}{left_out}"


def _items(data: Path, split: str | None, batch_size: int) -> Iterator[dict[str, Any]]:
    """Yields small descriptions of batches; images are read where they are encoded."""
    splits = [split] if split else list_splits(data) if data.is_dir() else []
    for name in splits:
        rows = open_split(data, name).manifest.rows
        for part in iterate_slices(rows, batch_size):
            yield {"data": str(data), "split": name, "start": part.start, "stop": part.stop, "paths": ""}
    if not splits and data.is_dir():
        paths = sorted(str(path) for path in data.rglob("*") if path.suffix.lower() in SUFFIXES)
        for part in iterate_slices(len(paths), batch_size):
            yield {"data": str(data), "split": "", "start": 0, "stop": 0, "paths": json.dumps(paths[part])}


def _write(dataset: Any, path: Path, max_bad: int) -> tuple[dict[str, int], list[str], int]:
    counts, bad, writer, width = {"image": 0, "text": 0}, [], None, 0
    try:
        for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            kinds = np.array(table.column("kind").to_pylist())
            bad += [row["source"] for row in table.filter(pa.array(kinds == "bad")).to_pylist()]
            if len(bad) > max_bad:
                listed = "; ".join(bad[:10])
                raise UserError(f"{len(bad)} images cannot be read ({listed}); mend them or allow them with --max-bad")
            table = table.filter(pa.array(kinds != "bad"))
            for kind in counts:
                counts[kind] += int((kinds == kind).sum())
            if writer is None:
                width = table.schema.field("vector").type.list_size
                writer = pq.ParquetWriter(path, table.schema)
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()
    return counts, bad, width


class _Encoder:
    """Holds the model in its process."""

    def __init__(self, run: str, use_gpu: bool):
        import torch

        from harma_ray.api import Retriever

        opened = open_run(run)
        torch.set_num_threads(max(1, (os.cpu_count() or 1)))
        model, config = opened.load_model(), opened.config
        self._retriever = Retriever(model, config, "cuda" if use_gpu else "cpu")  # type: ignore[arg-type]

    def __call__(self, table: pa.Table) -> pa.Table:
        parts = [self._encode(item) for item in table.to_pylist()]
        return pa.concat_tables(parts)

    def _encode(self, item: dict[str, Any]) -> pa.Table:
        rows = list(_read_items(item))
        images, good = [], []
        for row in rows:
            try:
                vector = self._retriever.encode_images([row["image"]])[0]
            except UserError as error:
                row["bad"] = f"{row['source']}: {error}"
                continue
            images.append(vector.numpy())
            good.append(row)
        texts = [text for row in good for text in row["captions"]]
        text_vectors = iter(self._retriever.encode_texts(texts).numpy())
        columns: dict[str, list] = {"id": [], "kind": [], "source": [], "text": []}
        vectors: list[np.ndarray] = []
        width = self._retriever.model.embedding_width

        def add(key: str, kind: str, source: str, text: str | None, vector: np.ndarray) -> None:
            for name, value in zip(columns, (key, kind, source, text), strict=True):
                columns[name].append(value)
            vectors.append(vector)

        for row, vector in zip(good, images, strict=True):
            add(row["id"], "image", row["source"], None, vector)
            for number, text in enumerate(row["captions"]):
                add(f"{row['id']}#{number}", "text", row["source"], text, next(text_vectors))
        for row in rows:
            if "bad" in row:
                add(row["id"], "bad", row["bad"], None, np.zeros(width, np.float32))
        flat = pa.array(np.concatenate(vectors).astype(np.float32))
        arrays = [pa.array(values, pa.string()) for values in columns.values()]
        return pa.table([*arrays, pa.FixedSizeListArray.from_arrays(flat, width)], names=[*columns, "vector"])


def _read_items(item: dict[str, Any]) -> Iterator[dict[str, Any]]:
    from harma_ray.data.order import IndexedSplit, read_samples
    from harma_ray.data.schema import index_rows

    if item["paths"]:
        root = Path(item["data"])
        for path in json.loads(item["paths"]):
            name = str(Path(path).relative_to(root))
            yield {"id": name, "image": path, "source": name, "captions": []}
        return
    split = open_split(item["data"], item["split"])
    rows = np.arange(item["start"], item["stop"])
    samples = np.stack([rows, np.zeros_like(rows)], axis=1)
    for row in read_samples(IndexedSplit(split, index_rows(split)), samples, 0).to_pylist():
        key = f"{item['split']}/{row['image_id']}"
        yield {"id": key, "image": row["image"], "source": row["source"], "captions": row["captions"]}
