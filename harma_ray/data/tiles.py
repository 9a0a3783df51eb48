"""Dynamic tiling: an image of any shape as a grid of square tiles, and the whole of it once more as a thumbnail.

Source: InternVL's ``dynamic_preprocess`` (Chen et al., arXiv 2404.16821), which ViTP uses.
"""

import functools

from PIL import Image

from harma_ray.data.images import crop
from harma_ray.errors import UserError


def choose_grid(width: int, height: int, tile: int, max_tiles: int, min_tiles: int = 1) -> tuple[int, int]:
    """Returns the grid of tiles whose shape is nearest to an image's.

    Of all grids of `min_tiles` to `max_tiles` tiles it is the one with the smallest |width / height - columns / rows|.
    Of those that are equally near a larger one is taken if the image has more than half of its pixels.

    Args:
        width: Of the image, in pixels.
        height: Of the image, in pixels.
        tile: Side of a tile, in pixels.
        max_tiles: Most tiles, without the thumbnail.
        min_tiles: Fewest tiles.

    Returns:
        Columns and rows.
    """
    best, nearest = (1, 1), float("inf")
    for columns, rows in _grids(min_tiles, max_tiles):
        distance = abs(width / height - columns / rows)
        if distance < nearest:
            best, nearest = (columns, rows), distance
        elif distance == nearest and width * height > 0.5 * tile**2 * columns * rows:
            best = (columns, rows)
    return best


def count_tiles(width: int, height: int, tile: int, max_tiles: int, *, thumbnail: bool = True) -> int:
    """Returns how many tiles `cut_tiles` makes of an image, the thumbnail included."""
    columns, rows = choose_grid(width, height, tile, max_tiles)
    return columns * rows + (thumbnail and columns * rows > 1)


def cut_tiles(image: Image.Image, tile: int, max_tiles: int, *, thumbnail: bool = True) -> list[Image.Image]:
    """Returns an image as tiles.

    It is resized to the grid (bicubic, as Pillow does it) and cut row by row.

    Args:
        image: RGB.
        tile: Side of a tile, in pixels.
        max_tiles: Most tiles, without the thumbnail.
        thumbnail: Whether the whole image follows, as one more tile, if there are several.

    Returns:
        RGB images of tile x tile pixels.
    """
    columns, rows = choose_grid(image.width, image.height, tile, max_tiles)
    resized = image.resize((columns * tile, rows * tile))
    places = [(column * tile, row * tile) for row in range(rows) for column in range(columns)]
    tiles = [crop(resized, left, top, tile, tile) for left, top in places]
    if thumbnail and len(tiles) > 1:
        tiles.append(image.resize((tile, tile)))
    return tiles


def tiles_each(max_tiles: int, num_images: int) -> int:
    """Returns how many tiles each of a talk's images may have, of those that it may have in all."""
    if max_tiles < 1:
        raise UserError(f"`max_tiles` must be at least 1, got {max_tiles}")
    return max(1, max_tiles // max(1, num_images))


@functools.cache
def _grids(min_tiles: int, max_tiles: int) -> list[tuple[int, int]]:
    sides = range(1, max_tiles + 1)
    grids = [(c, r) for c in sides for r in sides if min_tiles <= c * r <= max_tiles]
    return sorted(grids, key=lambda grid: grid[0] * grid[1])
