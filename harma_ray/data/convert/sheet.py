"""A sheet of sample rows of a converted split: images with their captions, triplets, or queries with their images."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from harma_ray.data.kinds.drawing import MARGIN
from harma_ray.data.kinds.triplets import TRIPLETS
from harma_ray.data.order import IndexedSplit, read_samples
from harma_ray.data.queries import ComposedQueries
from harma_ray.data.splits import Split, index_rows
from harma_ray.errors import UserError
from harma_ray.files import atomic, output_path


def contact_sheet(split: Split, path: str | Path, n: int = 24, *, seed: int = 0) -> Path:
    """Draws a sample of a split's rows and saves it as PNG.

    An image has its class and first caption under it; of a triplet the reference, the captions and the target stand
    side by side: see `RowKind.draw`. Of images with queries beside them the queries are drawn, like triplets; their
    target is left open if it is not known.

    Args:
        split: An opened split.
        path: The PNG file; its folder is made if need be.
        n: Number of rows, or queries; at most those of the split.
        seed: Seed of the choice.

    Returns:
        The absolute path of the file.

    Raises:
        UserError: If ``n`` is not positive, the split holds no images, or the file cannot be written.
    """
    if n < 1:
        raise UserError(f"a contact sheet needs 1 image or more, got {n}")
    split.require_images("a contact sheet")
    queries = split.manifest.queries
    kind, count = (TRIPLETS, queries.rows) if queries else (split.kind, split.manifest.rows)
    chosen = np.sort(np.random.default_rng(seed).permutation(count)[:n])
    rows = _read_queries(split, chosen) if queries else _read_rows(split, chosen)
    cells = [kind.draw(row) for row in rows]
    columns, (width, height) = min(kind.cells_across, len(cells)), cells[0].size
    sheet = Image.new("RGB", (columns * width + MARGIN, -(-len(cells) // columns) * height + MARGIN), "white")
    for position, cell in enumerate(cells):
        sheet.paste(cell, (MARGIN + position % columns * width, MARGIN + position // columns * height))
    target = output_path(path)
    try:
        with atomic(target) as made:
            sheet.save(made, "PNG")
    except OSError as error:
        raise UserError(
            f"cannot write the contact sheet {target} ({error.strerror or error}); choose another folder (--sheet)"
        ) from error
    return target


def _read_rows(split: Split, rows: np.ndarray) -> list[dict[str, Any]]:
    """Returns some rows, by their numbers, which may come in any order."""
    samples = np.stack([rows, np.zeros_like(rows)], axis=1)
    return read_samples(IndexedSplit(split, index_rows(split)), samples, epoch=0).to_pylist()


def _read_queries(split: Split, chosen: np.ndarray) -> list[dict[str, Any]]:
    """Returns some of the queries that go with a split's images, by their numbers, as rows of triplets."""
    places, queries = ComposedQueries.of(split), split.queries().take(chosen).to_pylist()
    reference, target = (side[chosen].numpy() for side in (places.reference, places.target))
    wanted = np.unique(np.concatenate([reference, target[target >= 0]]))
    images = {row: each["image"] for row, each in zip(wanted.tolist(), _read_rows(split, wanted), strict=True)}
    pairs = zip(queries, reference.tolist(), target.tolist(), strict=True)
    return [{**query, "reference_image": images[of], "target_image": images.get(to)} for query, of, to in pairs]
