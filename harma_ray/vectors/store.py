"""Stores of vectors: what `embed` writes, as Parquet or as an ``.npz`` of NumPy, and how both are read.

A Parquet store is a folder with ``vectors.parquet`` (`store_schema`) and ``manifest.json``. An ``.npz`` holds
``features`` (float32 [N, E]) and ``image_paths`` (texts [N]), as guides to ViTP's retrieval have it, where the class is
the name of the parent folder; those written here also hold ``ids``, ``sources``, ``labels`` and ``contents``, and a
manifest lies beside it, ``NAME.npz.json``, with shape and hash of the ``features`` that it is of. Nothing in either is
executed when it is read.

Shapes: N images, E embedding width.
"""

import hashlib
import json
import logging
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from harma_ray.data.manifest import MANIFEST_NAME
from harma_ray.data.order import iterate_slices
from harma_ray.errors import UserError, count, first_few
from harma_ray.retrieval.encoding import VectorIdentity

VECTORS_NAME = "vectors.parquet"
NPZ = ".npz"
ENCODER = "encoder"
"""Entry of a manifest: what the vectors depend on, `VectorIdentity.values`."""

QUERY = "query"
"""Kind of a row that is a query of composed retrieval."""

FEATURES = "features"
"""Entry of an ``.npz``'s manifest: shape and SHA-256 of the vectors that it is of."""

_ROWS_AT_ONCE = 4096
_NEEDED = ("id", "kind", "source", "label_name", "content", "vector")
_WINDOWS_SEPARATOR = re.compile(r"\\(?!x[0-9a-f]{2})")
"""A backslash that is none of an escape of `readable_name`."""

_logger = logging.getLogger(__name__)


def store_schema(width: int, *, queries: bool = False) -> pa.Schema:
    """Returns the columns of a Parquet store of vectors of some width, one row an image, a text or a query.

    ``label_name`` is the image's class, null if it has none; ``content`` the SHA-256 of its file, in hexadecimal
    digits; both are null for texts, ``text`` for images.

    Args:
        width: E.
        queries: Whether there are queries of composed retrieval. ``source`` and ``label_name`` are then the name of the
            reference and the category, ``text`` what changes it, and ``reference``, ``target`` (null: not known) and
            ``members`` (those of the subset; none: there is none) the ``id`` of images.
    """
    fields = [pa.field(name, pa.string()) for name in ("id", "kind", "source", "label_name", "content", "text")]
    if queries:
        fields += [pa.field(name, pa.string()) for name in ("reference", "target")]
        fields.append(pa.field("members", pa.list_(pa.string())))
    return pa.schema([*fields, pa.field("vector", pa.list_(pa.float32(), width))])


@dataclass(frozen=True)
class Store:
    """Vectors of images."""

    path: Path
    """Absolute; a folder or an ``.npz``."""
    ids: list[str]
    """N names, no two the same."""
    sources: list[str]
    """N paths or names of images, as their data set has them."""
    labels: list[str | None]
    """N classes; None: it has none."""
    contents: list[str]
    """N hashes of image files; none: they are not known."""
    vectors: Tensor
    """fp32[N, E], of length 1, so that their products are cosines."""
    manifest: Mapping[str, Any]
    """What else is known; empty if there is no manifest."""

    @property
    def identity(self) -> VectorIdentity | None:
        """What the vectors depend on; None if that is not known."""
        values = self.manifest.get(ENCODER)
        return VectorIdentity(values) if values else None

    def __len__(self) -> int:
        return len(self.ids)


def open_store(path: str | Path) -> Store:
    """Reads the vectors of images of a store.

    Raises:
        UserError: If there is none, it is damaged or of an earlier version, it holds no images, or vectors that are not
            finite, have no direction, or are not of the width that its manifest says.
    """
    place = Path(path).expanduser().absolute()
    if place.suffix == NPZ and place.is_file():
        store = _read_npz(place)
    elif (place / VECTORS_NAME).is_file():
        store = _read_parquet(place)
    else:
        raise UserError(
            f"{place} is no store of vectors; give a folder that `launch.py embed` wrote, or an .npz of features and "
            "image_paths"
        )
    width = store.manifest.get("width", store.vectors.shape[1])
    if not len(store):
        raise UserError(f"{place} holds no vectors of images")
    if width != store.vectors.shape[1]:
        raise UserError(
            f"{place} must hold vectors of width {width}, as its manifest says, but has {store.vectors.shape[1]}"
        )
    _make_units(store)
    return store


def _make_units(store: Store) -> None:
    """Divides vectors that were read by their lengths, where they lie, as a gallery may fill half of the memory."""
    lengths = torch.empty(len(store), 1, dtype=torch.float64)
    for part in iterate_slices(len(store), _ROWS_AT_ONCE):
        exact = store.vectors[part].double()
        lengths[part] = exact.norm(dim=1, keepdim=True)
        store.vectors[part] = exact / lengths[part]
    for wrong, told in (
        (~lengths.isfinite(), "NaN or infinite numbers in {} ({}); embed these images again"),
        (lengths == 0, "zeros alone, which have no direction, in {} ({})"),
    ):
        rows = wrong[:, 0].nonzero()[:, 0].tolist()
        if rows:
            where = told.format(count(len(rows), "vector"), first_few([store.ids[row] for row in rows]))
            raise UserError(f"{store.path} holds {where}")


def require_comparable(query: Store, gallery: Store) -> None:
    """Checks that vectors of two stores lie in one space; a warning if a store does not say how it was made.

    Raises:
        UserError: If widths, rules of rendering or what the vectors depend on differ.
    """
    widths = query.vectors.shape[1], gallery.vectors.shape[1]
    if widths[0] != widths[1]:
        raise UserError(
            f"vectors must have one width, but those of {query.path} have {widths[0]} and those of {gallery.path} "
            f"{widths[1]}; embed both with one model"
        )
    rules = [store.manifest.get("rendering") for store in (query, gallery)]
    if all(rules) and rules[0] != rules[1]:  # None: of a converted data set, of 8 bits, or not known
        raise UserError(
            f"images of {query.path} and {gallery.path} were rendered by different rules ({rules[0]}; {rules[1]}); "
            "embed both with the same --stretch, --bands, --nodata and --statistics"
        )
    if rules[0] != rules[1]:
        _logger.warning("only one of %s and %s says how images were rendered: %s", query.path, gallery.path, rules)
    ours, theirs = query.identity, gallery.identity
    if ours is None or theirs is None:
        unknown = query.path if ours is None else gallery.path
        _logger.warning(
            "%s does not say what made its vectors: that both stores' lie in one space is not checked", unknown
        )
        return
    names = dict.fromkeys([*ours.values, *theirs.values])
    different = [name for name in names if ours.values.get(name) != theirs.values.get(name)]
    if different:
        shown = "; ".join(f"{name}: {ours.values.get(name)} and {theirs.values.get(name)}" for name in different)
        raise UserError(
            f"vectors of {query.path} and {gallery.path} were not made alike ({shown}); embed both with one model and "
            "the same settings"
        )


def image_keys(query: Store, gallery: Store) -> tuple[list[str], list[str]]:
    """Returns what tells the images of two stores apart: hashes of their files, or names where a store has none."""
    if query.contents and gallery.contents:
        return query.contents, gallery.contents
    return query.ids, gallery.ids


def npz_manifest(path: Path) -> Path:
    """Returns where the manifest of an ``.npz`` lies."""
    return path.with_name(f"{path.name}.json")


def write_npz(table: pa.Table, path: Path) -> dict[str, Any]:
    """Writes the images of a table of `store_schema` in the layout of an ``.npz``.

    Args:
        table: All rows; texts are left out.
        path: Where it goes.

    Returns:
        What its manifest must hold as `FEATURES`, so that it is never taken for that of other vectors.
    """
    images = table.filter(pc.field("kind") == "image")
    ids, sources, contents = (images[name].to_pylist() for name in ("id", "source", "content"))
    labels, features = [label or "" for label in images["label_name"].to_pylist()], _vectors(images)
    with path.open("wb") as file:
        np.savez(
            file,
            features=features,
            image_paths=np.array(list(map(_labelled_path, sources, labels)), np.str_),
            ids=np.array(ids, np.str_),
            sources=np.array(sources, np.str_),
            labels=np.array(labels, np.str_),
            contents=np.array(contents, np.str_),
        )
    return _describe(features)


def _describe(features: np.ndarray) -> dict[str, Any]:
    digest = hashlib.sha256(np.ascontiguousarray(features, "<f4").data)
    return {"shape": list(features.shape), "sha256": digest.hexdigest()}


def parent_name(path: str) -> str:
    """Returns the name of the folder that a file lies in, whichever system's path it is; empty if there is none."""
    is_windows = "/" not in path and _WINDOWS_SEPARATOR.search(path)
    return (PureWindowsPath if is_windows else PurePosixPath)(path).parent.name


def _labelled_path(source: str, label: str) -> str:
    """Returns a path whose parent folder has the name of the class, for programs that read the class there."""
    return source if parent_name(source) == label else f"{label}/{PurePosixPath(source).name}"


def _read_parquet(place: Path) -> Store:
    try:
        manifest = json.loads((place / MANIFEST_NAME).read_text())
        names = pq.read_schema(place / VECTORS_NAME).names
        if not set(_NEEDED) <= set(names):
            missing = ", ".join(name for name in _NEEDED if name not in names)
            raise UserError(f"{place} was written by an earlier version (it has no {missing}); embed the images again")
        columns, vectors = _read_images(place / VECTORS_NAME)
    except (OSError, pa.ArrowException, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = str(error).partition("\n")[0]
        raise UserError(f"cannot read the vectors of {place} ({reason}); embed the images again") from error
    return Store(
        place, columns["id"], columns["source"], columns["label_name"],
        columns["content"] if all(columns["content"]) else [], torch.from_numpy(vectors), manifest,
    )  # fmt: skip


def _read_images(path: Path) -> tuple[dict[str, list], np.ndarray]:
    """Returns columns and vectors of the images alone, read a part at a time: vectors are in memory once."""
    columns: dict[str, list] = {name: [] for name in ("id", "source", "label_name", "content")}
    with pq.ParquetFile(path) as file:
        width = file.schema_arrow.field("vector").type.list_size
        vectors = np.empty((file.metadata.num_rows, width), np.float32)
        for group in range(file.num_row_groups):  # `iter_batches` would read all of them ahead
            table = file.read_row_group(group, columns=list(_NEEDED)).filter(pc.field("kind") == "image")
            first = len(columns["id"])
            vectors[first : first + len(table)] = _vectors(table)
            for name, values in columns.items():
                values += table[name].to_pylist()
    return columns, vectors[: len(columns["id"])]


def _vectors(table: pa.Table) -> np.ndarray:
    column = table["vector"].combine_chunks()
    width = table.schema.field("vector").type.list_size
    return np.array(column.flatten().to_numpy(zero_copy_only=False), np.float32).reshape(-1, width)


def _read_npz(place: Path) -> Store:
    beside = npz_manifest(place)
    try:
        with np.load(place, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        manifest = json.loads(beside.read_text()) if beside.is_file() else {}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(
            f"cannot read the vectors of {place} ({error}); write them as arrays without objects"
        ) from error
    features, paths = arrays.get("features"), arrays.get("image_paths")
    if features is None or paths is None or features.ndim != 2 or paths.shape != features.shape[:1]:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items()) or "nothing"
        raise UserError(f"{place} must hold features [N, D] and image_paths [N], but holds {shapes}")
    if features.dtype.kind != "f" or paths.dtype.kind != "U":
        raise UserError(
            f"{place} must hold features of float32 and image_paths of text, got {features.dtype}, {paths.dtype}"
        )
    if FEATURES in manifest and manifest[FEATURES] != _describe(features):
        raise UserError(
            f"{beside} was written with other vectors than {place} holds; put back the manifest that was written with "
            "them, or remove it, and what made them is not known"
        )
    texts = {name: arrays[name].tolist() for name in ("ids", "sources", "labels", "contents") if name in arrays}
    wrong = [name for name, values in texts.items() if len(values) != len(paths)]
    if wrong:
        raise UserError(f"{place} must hold {len(paths)} of {', '.join(wrong)}, one an image")
    names = paths.tolist()
    labels = texts.get("labels") or list(map(parent_name, names))
    contents = texts.get("contents", [])
    return Store(
        place, texts.get("ids", names), texts.get("sources", names), [label or None for label in labels],
        contents if all(contents) else [], torch.from_numpy(features.astype(np.float32, copy=False)), manifest,
    )  # fmt: skip
