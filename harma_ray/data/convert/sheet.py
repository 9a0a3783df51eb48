"""A sheet of sample rows of a converted split: images with their captions, or triplets."""

from pathlib import Path

import numpy as np
from PIL import Image

from harma_ray.data.kinds.drawing import MARGIN
from harma_ray.data.order import IndexedSplit, read_samples
from harma_ray.data.splits import Split, index_rows
from harma_ray.errors import UserError
from harma_ray.files import atomic, output_path


def contact_sheet(split: Split, path: str | Path, n: int = 24, *, seed: int = 0) -> Path:
    """Draws a sample of a split's rows and saves it as PNG.

    An image has its class and first caption under it; of a triplet the reference, the captions and the target stand
    side by side: see `RowKind.draw`.

    Args:
        split: An opened split.
        path: The PNG file; its folder is made if need be.
        n: Number of rows, at most those of the split.
        seed: Seed of the choice.

    Returns:
        The absolute path of the file.

    Raises:
        UserError: If ``n`` is not positive, the split holds no images, or the file cannot be written.
    """
    if n < 1:
        raise UserError(f"a contact sheet needs 1 image or more, got {n}")
    split.require_images("a contact sheet")
    chosen = np.sort(np.random.default_rng(seed).permutation(split.manifest.rows)[:n])
    samples = np.stack([chosen, np.zeros_like(chosen)], axis=1)
    table = read_samples(IndexedSplit(split, index_rows(split)), samples, epoch=0)
    cells = [split.kind.draw(row) for row in table.to_pylist()]
    columns, (width, height) = min(split.kind.cells_across, len(cells)), cells[0].size
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
