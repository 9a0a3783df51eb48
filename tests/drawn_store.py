"""Stores of vectors that nobody encoded, of images that lie in class folders."""

import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from harma_ray.vectors.store import store_schema

CLASSES = ("farm", "lake", "port", "road")
IDENTITY = {"run": "one", "backbone": "abc"}


def draw_store(folder, name, count, *, seed, width=12, identity=IDENTITY, spread=0.6):
    """Writes images ``NAME/CLASS/N.png`` and a store ``NAME.store`` of vectors near the centre of their class."""
    rng, centres = np.random.default_rng(seed), np.random.default_rng(0).normal(size=(len(CLASSES), width))
    rows = []
    for number in range(count):
        label = CLASSES[number % len(CLASSES)]
        path = folder / name / label / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
        vector = centres[number % len(CLASSES)] + spread * rng.normal(size=width)
        key, content = f"{label}/{number:03d}.png", hashlib.sha256(path.read_bytes()).hexdigest()
        about = {"kind": "image", "source": key, "label_name": label, "content": content}
        rows.append({"id": key, **about, "vector": (vector / np.linalg.norm(vector)).astype(np.float32)})
    store = folder / f"{name}.store"
    return write_store(store, rows, {"encoder": identity, "width": width, "data": str(folder / name), "splits": {}})


def write_store(store, rows, manifest):
    """Writes rows of `store_schema` and a manifest."""
    store.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, store_schema(manifest["width"])), store / "vectors.parquet")
    (store / "manifest.json").write_text(json.dumps(manifest))
    return store


def stored_rows(store):
    """Returns rows and manifest of a store."""
    rows = pq.read_table(store / "vectors.parquet").to_pylist()
    return rows, json.loads((store / "manifest.json").read_text())
