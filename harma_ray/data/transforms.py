"""From an image to a uint8 tensor: the published augmentation and the evaluation resize.

Everything random comes from the generator that the caller passes, nothing from a global one, and nothing here keeps
state: all functions may be called from many threads. Division by 255 and normalisation happen on the device, elsewhere.
`harma_ray.data.batch_transforms` makes the same changes to whole batches.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from PIL import Image, ImageEnhance, ImageOps

from harma_ray.data.augmentation import MAX_LEVEL, Augmentation
from harma_ray.data.images import crop

FILL = 128
"""Of all three bands, where an operation uncovers pixels."""
_CROP_ATTEMPTS = 10
_SHIFT = 10 / 224  # of the side of an image

# Strength lies in 0..1; signed, in -1..1, is that of what can go two ways.
_Operation = Callable[[Image.Image, float, float], Image.Image]


def _warped(name: str) -> _Operation:
    return lambda image, strength, signed: _warp(image, warp_matrix(name, signed, image.size))


_OPERATIONS: dict[str, _Operation] = {
    "identity": lambda image, strength, signed: image,
    "autocontrast": lambda image, strength, signed: ImageOps.autocontrast(image),
    "equalize": lambda image, strength, signed: ImageOps.equalize(image),
    "brightness": lambda image, strength, signed: ImageEnhance.Brightness(image).enhance(blend_factor(strength)),
    "sharpness": lambda image, strength, signed: _sharpen(image, blend_factor(strength)),
    **{name: _warped(name) for name in ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")},
}
OPERATIONS = tuple(_OPERATIONS)
"""What the augmentation draws from."""

PUBLISHED = Augmentation()
"""The augmentation of the paper's code."""


@dataclass(frozen=True)
class Changes:
    """What is drawn for one image, in the order in which it happens."""

    box: tuple[int, int, int, int]
    """Top, left, height and width of the crop, in pixels."""
    is_mirrored: bool
    """Left to right, once the crop has been resized."""
    operations: tuple[tuple[str, bool], ...]
    """Those that are applied, and whether in their negative direction."""


def draw_changes(height: int, width: int, rng: np.random.Generator, augmentation: Augmentation) -> Changes:
    """Draws the changes of an image.

    Args:
        height: Of the image, in pixels.
        width: Likewise.
        rng: Source of all randomness; equal states give equal changes.
        augmentation: What may happen.
    """
    box = _draw_crop(height, width, rng, augmentation) if augmentation.min_scale < 1 else (0, 0, height, width)
    is_mirrored = rng.random() < augmentation.flip_probability
    operations = []
    for position in rng.integers(len(OPERATIONS), size=augmentation.num_operations):
        # Both numbers are drawn even if unused, so that another probability or level moves no later draw.
        applied, negative = rng.random(2) < (augmentation.operation_probability, 0.5)
        if applied:
            operations.append((OPERATIONS[position], bool(negative)))
    return Changes(box, is_mirrored, tuple(operations))


def train_transform(
    image: Image.Image, rng: np.random.Generator, size: int, augmentation: Augmentation = PUBLISHED
) -> torch.Tensor:
    """Crops, mirrors and changes an image at random.

    Args:
        image: RGB image of any size.
        rng: Source of all randomness; equal states give equal results.
        size: Height and width of the result, in pixels.
        augmentation: What may happen; the published settings by default.

    Returns:
        uint8[3, size, size].
    """
    changes = draw_changes(image.height, image.width, rng, augmentation)
    image = resize(cut(image, changes), size)
    if changes.is_mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for name, negative in changes.operations:
        image = apply_operation(image, name, augmentation.level, negative=negative)
    return to_tensor(image)


def cut(image: Image.Image, changes: Changes) -> Image.Image:
    """Returns the part of an RGB image that the changes drawn for it keep."""
    top, left, height, width = changes.box
    return image if image.size == (width, height) else crop(image, left, top, width, height)


def eval_transform(image: Image.Image, size: int) -> torch.Tensor:
    """Resizes a whole RGB image to a square, WITHOUT keeping its aspect ratio (bicubic).

    Returns:
        uint8[3, size, size].
    """
    return to_tensor(resize(image, size))


def apply_operation(image: Image.Image, name: str, level: float, *, negative: bool = False) -> Image.Image:
    """Applies one of ``OPERATIONS``.

    Args:
        image: RGB image.
        name: The operation.
        level: Strength, 0 to 10; has no meaning for identity, autocontrast and equalize.
        negative: Shear, shift or rotate the other way.
    """
    if name not in _OPERATIONS:
        raise ValueError(f"`name` must be one of {', '.join(OPERATIONS)}, got {name}")
    strength = level / MAX_LEVEL
    return _OPERATIONS[name](image, strength, -strength if negative else strength)


def blend_factor(strength: float) -> float:
    """Returns the weight of an image that is blended with black or with its smoothed self."""
    return 1.8 * strength + 0.1


def warp_matrix(name: str, signed: float, size: tuple[int, int]) -> tuple[float, float, float, float, float, float]:
    """Returns where an operation takes each pixel from, in the order of torchvision's and Pillow's arithmetic.

    Args:
        name: A shear (about the upper left corner), a shift or the rotation (about the middle).
        signed: Its strength, -1 to 1: of at most 0.3 pixels a pixel, of 10/224 of a side, of 30 degrees.
        size: Width and height of the image, in pixels.

    Returns:
        (a, b, c, d, e, f): pixel (x, y), taken at its middle, comes from (a x + b y + c, d x + e y + f).
    """
    width, height = size
    if name.startswith("translate"):
        right, down = (_SHIFT * signed * width, 0.0) if name == "translate_x" else (0.0, _SHIFT * signed * height)
        return 1.0, 0.0, -right, 0.0, 1.0, -down
    if name.startswith("shear"):
        angle = math.radians(math.degrees(math.atan(0.3 * signed)))
        along, down = (math.tan(angle), 0.0) if name == "shear_x" else (0.0, math.sin(angle) / math.cos(angle))
        return 1.0, along, 0.0, down, 1.0, 0.0
    angle = -math.radians(30 * signed % 360)
    cosine, sine = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = width / 2, height / 2
    return cosine, sine, cosine * -x + sine * -y + x, -sine, cosine, -sine * -x + cosine * -y + y


def _sharpen(image: Image.Image, factor: float) -> Image.Image:
    """Blends an image with its smoothed self as ``PIL.ImageEnhance.Sharpness`` does, in two fifths of the time.

    The smoothed pixel is (sum of its 8 neighbours + 5 x itself) / 13, which no sum leaves half-way between two numbers:
    integers give what Pillow's floats give. Pixels at the border stay as they are.
    """
    pixels = np.array(image)
    height, width, _ = pixels.shape
    values = pixels.reshape(height, 3 * width)
    wide = values.astype(np.uint16)
    rows = wide[:, :-6] + wide[:, 3:-3]
    rows += wide[:, 6:]
    sums = rows[:-2] + rows[1:-1]
    sums += rows[2:]
    inner = wide[1:-1, 3:-3]
    sums += 4 * inner
    places = _SMOOTHED.take(sums)
    places += inner
    values[1:-1, 3:-3] = blend_table(factor).take(places)
    return Image.fromarray(pixels)


_SMOOTHED = ((2 * np.arange(13 * 255 + 1) + 13) // 26 * 256).astype(np.uint16)
"""Of each sum, 256 times the smoothed value."""


@functools.lru_cache(maxsize=16)
def blend_table(factor: float) -> np.ndarray:
    """Returns what Pillow blends of another value and an image's own: uint8[256 * 256], the other first."""
    other, own = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8), indexing="ij")
    return np.array(Image.blend(Image.fromarray(other), Image.fromarray(own), factor)).ravel()


def _warp(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    """Takes each pixel from where a matrix says, bilinear; uncovered pixels become grey."""
    grey = (FILL, FILL, FILL)
    *turned, right, down = (matrix[place] for place in (0, 1, 3, 4, 2, 5))
    if turned == [1, 0, 0, 1] and right.is_integer() and down.is_integer():
        # Nothing lies between pixels then (224 pixels at the published level: 7), and to paste is 15 times as fast.
        shifted = Image.new("RGB", image.size, grey)
        shifted.paste(image, (-int(right), -int(down)))
        return shifted
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=grey)


def _draw_crop(
    height: int, width: int, rng: np.random.Generator, augmentation: Augmentation
) -> tuple[int, int, int, int]:
    """Draws (top, left, height, width) as torchvision's RandomResizedCrop does, but from ``rng``."""
    limit = math.log(augmentation.max_aspect_ratio)
    for _ in range(_CROP_ATTEMPTS):
        area = height * width * rng.uniform(augmentation.min_scale, augmentation.max_scale)
        ratio = math.exp(rng.uniform(-limit, limit))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(rng.integers(height - crop_height + 1))
            left = int(rng.integers(width - crop_width + 1))
            return top, left, crop_height, crop_width
    # A long, narrow image: its middle, as wide or high as the ratio allows.
    crop_width = min(width, round(height * augmentation.max_aspect_ratio))
    crop_height = min(height, round(width * augmentation.max_aspect_ratio))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def resize(image: Image.Image, size: int) -> Image.Image:
    """Resizes an RGB image to a square, bicubic."""
    return image.resize((size, size), Image.Resampling.BICUBIC)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Copies the pixels of an RGB image, uint8[3, height, width]."""
    # With numpy: torch would copy with a team of OpenMP threads for every thread that decodes, and a process with more
    # such threads than cores makes all of them sleep at each other's barriers; training then slows by a seventh.
    pixels = _pixels(image)
    planes = np.empty((3, image.height, image.width), np.uint8)
    for band, plane in enumerate(planes):
        plane[:] = pixels[..., band]
    return torch.from_numpy(planes)


def _pixels(image: Image.Image) -> np.ndarray:
    """Returns the pixels of an RGB image, uint8[height, width, 3 or 4], of which the fourth number means nothing.

    What Pillow holds is looked at, where numpy would have it copied twice while other threads wait for Python.
    """
    try:
        values = pa.array(image).values
    except ValueError:  # so large that it does not lie in one piece
        return np.asarray(image)
    return values.to_numpy().reshape(image.height, image.width, 4)
