"""Dynamic tiling against brute force, transformers and PIL."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from harma_ray.data.tiles import choose_grid, count_tiles, cut_tiles, tiles_each
from harma_ray.errors import UserError

SIZES = [(w, h) for w in (1, 9, 96, 300, 448, 700, 1333, 4000) for h in (1, 9, 96, 300, 448, 700, 1333, 4000)]


def brute_force(width, height, tile, max_tiles):
    """The rule with exact fractions: the nearest shape, of equal ones the largest that the image fills by half."""
    grids = [(c, r) for c in range(1, max_tiles + 1) for r in range(1, max_tiles + 1) if c * r <= max_tiles]
    shape = Fraction(width, height)
    nearest = min(abs(shape - Fraction(c, r)) for c, r in grids)
    equal = sorted((c * r, c, r) for c, r in grids if abs(shape - Fraction(c, r)) == nearest)
    chosen = equal[0]
    for grid in equal[1:]:
        if width * height > Fraction(tile**2 * grid[0], 2):
            chosen = grid
    return chosen[1:]


@pytest.mark.parametrize("max_tiles", [1, 2, 6, 12, 40])
def test_grids_are_those_of_the_rule(max_tiles):
    for width, height in SIZES:
        expected = brute_force(width, height, 448, max_tiles)
        found = choose_grid(width, height, 448, max_tiles)
        # two shapes, one wider and one higher, may be equally near: then the order of equal areas decides
        assert found == expected or Fraction(*found) != Fraction(*expected), (width, height)
        distance = abs(Fraction(width, height) - Fraction(*found))
        assert float(distance) == pytest.approx(float(abs(Fraction(width, height) - Fraction(*expected))), abs=1e-12)


@pytest.mark.parametrize("max_tiles", [1, 6, 12])
def test_grids_are_those_of_transformers(max_tiles):
    processing = pytest.importorskip("transformers.models.got_ocr2.image_processing_pil_got_ocr2")
    canvas = processing.get_optimal_tiled_canvas
    for width, height in SIZES:
        assert choose_grid(width, height, 448, max_tiles) == canvas((height, width), (448, 448), 1, max_tiles)


@pytest.mark.parametrize(
    ("size", "max_tiles", "expected"),
    [((256, 256), 6, 1), ((2000, 2000), 6, 5), ((2000, 2000), 12, 10), ((1600, 900), 6, 3), ((3200, 1800), 12, 9),
     ((4000, 1), 6, 7), ((1, 4000), 1, 1)],
)  # fmt: skip
def test_tile_counts_of_known_images(size, max_tiles, expected):
    assert count_tiles(*size, 448, max_tiles) == expected
    assert len(cut_tiles(Image.new("RGB", size), 448, max_tiles)) == expected


def test_pixels_are_those_of_a_bicubic_resize_cut_row_by_row():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (60, 95, 3), dtype=np.uint8))
    tiles = cut_tiles(image, 16, 6)
    columns, rows = choose_grid(95, 60, 16, 6)
    assert (columns, rows) == (3, 2)
    whole = np.asarray(image.resize((48, 32), Image.Resampling.BICUBIC))
    for (row, column), tile in zip(itertools.product(range(2), range(3)), tiles[:-1], strict=True):
        expected = whole[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
        assert np.array_equal(np.asarray(tile), expected)
    assert np.array_equal(np.asarray(tiles[-1]), np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC)))
    assert len(cut_tiles(image, 16, 6, thumbnail=False)) == 6


def test_several_images_share_the_tiles():
    assert [tiles_each(6, n) for n in (0, 1, 2, 4, 7)] == [6, 6, 3, 1, 1]
    with pytest.raises(UserError, match="at least 1, got 0"):
        tiles_each(0, 1)
