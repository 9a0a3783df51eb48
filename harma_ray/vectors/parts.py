"""Vectors written in parts while they are made, so that a job that was killed goes on where it stopped."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from harma_ray.data.convert.shards import disk_error, write_table
from harma_ray.data.order import iterate_slices
from harma_ray.errors import UserError
from harma_ray.files import write_text
from harma_ray.vectors.job import Encoded, JobSettings, Load, Request, encode
from harma_ray.vectors.store import QUERY, store_schema

_BATCHES = 16
"""Requests whose vectors are written together: what is encoded again, at most, after a process was killed."""
_UNIT_TOLERANCE = 0.01
"""Within this of 1 a vector's length is 1, in bf16 too."""


@dataclass(frozen=True)
class Part:
    """Vectors of some requests, on disk."""

    file: str
    """Its table, of `store_schema`."""
    identity: Mapping[str, str | float | bool]
    """`VectorIdentity.values`."""
    width: int
    counts: Mapping[str, int]
    """Rows by kind."""
    unit: bool
    """Whether all vectors have length 1."""
    bad: Sequence[str]
    """Which images could not be read, and why."""

    def read(self) -> pa.Table:
        """Returns its rows."""
        return pq.read_table(self.file)


def encode_parts(
    folder: Path, requests: Sequence[Request], load: Load, settings: JobSettings, *, hint: str, queries: bool = False
) -> list[Part]:
    """Encodes what is not there yet, and returns all parts in the order of the requests.

    Parts with images that could not be read are made again, for these may have been mended.

    Args:
        folder: Where parts lie; of this job alone. Made with the first of them.
        requests: At least one; the same whenever the job goes on.
        load: See `encode`, as errors are.
        settings: Of the job.
        hint: See `encode`.
        queries: Whether the store has the columns of queries.

    Raises:
        UserError: As `encode`, if the disk is full, or if another model has made the parts that are there.
    """
    cuts = [*iterate_slices(len(requests), _BATCHES)]
    parts = {number: part for number in range(len(cuts)) if (part := _find(folder, number)) is not None}
    missing = [number for number in range(len(cuts)) if number not in parts]
    if missing:
        wanted = [request for number in missing for request in requests[cuts[number]]]
        with closing(encode(wanted, load, settings, progress="vectors", hint=hint)) as results:
            for number in missing:
                length = cuts[number].stop - cuts[number].start
                parts[number] = _write(folder, number, [*islice(results, length)], queries)
    if any(part.identity != parts[0].identity for part in parts.values()):
        raise UserError(f"the model has changed since its vectors in {folder} were made; delete that folder")
    return [parts[number] for number in range(len(cuts))]


def _find(folder: Path, number: int) -> Part | None:
    """Returns a part that is there, whole and without unreadable images."""
    path = _record(folder, number)
    if not path.is_file():
        return None
    part = Part(**json.loads(path.read_text()))
    return None if part.bad else replace(part, file=str(path.with_suffix(".parquet")))  # its folder may have moved


def _record(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.json"


def _write(folder: Path, number: int, found: Sequence[Encoded], queries: bool) -> Part:
    width = found[0].images.shape[1]
    rows = [line for each in found for line in _lines(each)]
    file = _record(folder, number).with_suffix(".parquet")
    try:
        write_table(pa.Table.from_pylist(rows, store_schema(width, queries=queries)), file)
    except OSError as error:
        raise disk_error(file, error) from error
    vectors = np.stack([row["vector"] for row in rows]) if rows else np.ones((1, 1))
    part = Part(
        file=str(file),
        identity=found[0].identity.values,
        width=width,
        counts=dict(Counter(row["kind"] for row in rows)),
        unit=bool((np.abs(np.linalg.norm(vectors, axis=1) - 1) < _UNIT_TOLERANCE).all()),
        bad=[line for each in found for line in each.bad],
    )
    write_text(_record(folder, number), json.dumps(asdict(part)))
    return part


def _lines(found: Encoded) -> Iterator[dict[str, Any]]:
    """Yields the row of each query, or of each image, followed by those of its captions."""
    for row, vector in zip(found.rows, found.images, strict=True):
        if row.get("kind") == QUERY:
            yield {**row, "vector": vector}
            continue
        key, about = row["id"], {"label_name": row.get("label_name"), "content": row["content"]}
        yield {"id": key, "kind": "image", "source": row["name"], **about, "vector": vector}
        for number, text in enumerate(row.get("captions", ())):
            if text in found.texts:
                about = {"id": f"{key}#{number}", "kind": "text", "source": row["name"], "text": text}
                yield {**about, "vector": found.texts[text]}
