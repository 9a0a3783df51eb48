"""What is encoded of a split of composed retrieval: its images, and its queries as a model composes them."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from harma_ray.data.order import iterate_slices
from harma_ray.data.queries import ComposedQueries
from harma_ray.data.relative_captions import evaluation_text
from harma_ray.data.splits import Split
from harma_ray.vectors.job import Inputs, JobSettings, Request, first_rows, image_requests, read_images
from harma_ray.vectors.store import QUERY


def holds_queries(split: Split) -> bool:
    """Whether a split is one of composed retrieval."""
    return split.kind.is_query or split.manifest.queries is not None


def composed_requests(split: Split, query: str, settings: JobSettings, max_pixels: int) -> Iterator[Request]:
    """Yields requests of the images of a split of composed retrieval, those of triplets each once, and of its queries.

    Args:
        split: A gallery with queries, or triplets.
        query: How queries are made.
        settings: With the size of a batch.
        max_pixels: Largest width times height; 0 = any.
    """
    if split.kind.is_query:
        table = split.read(split.kind.light_columns)
        rows_of = first_rows({column: table[name].to_pylist() for column, name in split.kind.images.items()})
        column, lines = "reference_image", _triplet_lines(split.name, table.to_pylist())
        references, captions = range(len(table)), table["captions"].to_pylist()
    else:
        queries = ComposedQueries.of(split)
        rows_of, column = {"image": range(split.manifest.rows)}, "image"
        references, captions = queries.reference.tolist(), queries.captions
        lines = _gallery_lines(split, queries)
    for images, rows in rows_of.items():
        yield from image_requests(split, rows, settings, images, max_pixels)
    for part in iterate_slices(len(lines), settings.batch_size):
        yield partial(
            _read_queries, split.path, column, references[part], lines[part], captions[part], query, max_pixels
        )


def _gallery_lines(split: Split, queries: ComposedQueries) -> list[dict[str, Any]]:
    """Returns what a store holds of each query beside its vector; see `store_schema`."""
    ids = [f"{split.name}/{number}" for number in split.read(["image_id"])["image_id"].to_pylist()]
    found = []
    for row, pair_id in enumerate(queries.pair_ids):
        reference, target = int(queries.reference[row]), int(queries.target[row])
        line = {
            "id": f"{split.name}/query-{pair_id}",
            "source": queries.names[reference],
            "label_name": queries.categories and queries.categories[row],
            "text": evaluation_text(queries.captions[row]),
            "reference": ids[reference],
            "target": None if target < 0 else ids[target],
            "members": [ids[member] for member in queries.members[row]] if queries.members else [],
        }
        found.append({"kind": QUERY, **line})
    return found


def _triplet_lines(split: str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the same of triplets, whose subsets are not among the images."""
    return [
        {
            "id": f"{split}/query-{row['pair_id']}",
            "kind": QUERY,
            "source": row["reference"],
            "label_name": row["category"],
            "text": evaluation_text(row["captions"]),
            "reference": f"{split}/{row['reference']}",
            "target": f"{split}/{row['target']}",
            "members": [],
        }
        for row in rows
    ]


def _read_queries(
    path: Path,
    column: str,
    references: Sequence[int],
    lines: Sequence[Mapping[str, Any]],
    captions: Sequence[Sequence[str]],
    query: str,
    max_pixels: int,
) -> Inputs:
    """Reads the references of some queries."""
    rows, place = np.unique(np.asarray(references), return_inverse=True)  # several queries may share one
    read = read_images(path, rows, column, max_pixels)
    labels = [{"label": f"{path}: reference of {line['id']}"} for line in lines]
    return Inputs(
        [{**line, **label} for line, label in zip(lines, labels, strict=True)],
        [read.images[at] for at in place],
        captions=captions,
        query=query,
    )
