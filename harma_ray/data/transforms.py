"""From an image to a uint8 tensor: the published augmentation and the evaluation resize.

Everything random comes from the generator that the caller passes, nothing from a global one, and nothing here keeps
state: all functions may be called from many threads. Division by 255 and normalisation happen on the device, elsewhere.
"""

# torchvision's functions take and return PIL images too, but their annotations speak of tensors alone.
# pyright: reportArgumentType=false, reportReturnType=false, reportAssignmentType=false

import functools
import math
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from harma_ray.compiler import deferred_compiler
from harma_ray.data.augmentation import MAX_LEVEL, Augmentation
from harma_ray.data.images import crop

with deferred_compiler():
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as F

_FILL = [128.0, 128.0, 128.0]
_CROP_ATTEMPTS = 10
_SHIFT = 10 / 224  # of the side of an image

# Strength lies in 0..1; signed, in -1..1, is that of what can go two ways.
_OPERATIONS: dict[str, Callable[[Image.Image, float, float], Image.Image]] = {
    "identity": lambda image, strength, signed: image,
    "autocontrast": lambda image, strength, signed: F.autocontrast(image),
    "equalize": lambda image, strength, signed: F.equalize(image),
    "brightness": lambda image, strength, signed: F.adjust_brightness(image, 1.8 * strength + 0.1),
    "sharpness": lambda image, strength, signed: _sharpen(image, 1.8 * strength + 0.1),
    "shear_x": lambda image, strength, signed: _affine(image, shear=(0.3 * signed, 0.0)),
    "shear_y": lambda image, strength, signed: _affine(image, shear=(0.0, 0.3 * signed)),
    "translate_x": lambda image, strength, signed: _shift(image, _SHIFT * signed * image.width, 0.0),
    "translate_y": lambda image, strength, signed: _shift(image, 0.0, _SHIFT * signed * image.height),
    "rotate": lambda image, strength, signed: F.rotate(image, 30 * signed, InterpolationMode.BILINEAR, fill=_FILL),
}
OPERATIONS = tuple(_OPERATIONS)
"""What the augmentation draws from."""

PUBLISHED = Augmentation()
"""The augmentation of the paper's code."""


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
    if augmentation.min_scale < 1:
        top, left, height, width = _draw_crop(image.height, image.width, rng, augmentation)
        image = _resize(crop(image, left, top, width, height), size)
    else:
        image = _resize(image, size)
    if rng.random() < augmentation.flip_probability:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for position in rng.integers(len(OPERATIONS), size=augmentation.num_operations):
        # Both numbers are drawn even if unused, so that another probability or level moves no later draw.
        applied, negative = rng.random(2) < (augmentation.operation_probability, 0.5)
        if applied:
            image = apply_operation(image, OPERATIONS[position], augmentation.level, negative=bool(negative))
    return to_tensor(image)


def eval_transform(image: Image.Image, size: int) -> torch.Tensor:
    """Resizes a whole RGB image to a square, WITHOUT keeping its aspect ratio (bicubic).

    Returns:
        uint8[3, size, size].
    """
    return to_tensor(_resize(image, size))


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
    values[1:-1, 3:-3] = _blends(factor).take(places)
    return Image.fromarray(pixels)


_SMOOTHED = ((2 * np.arange(13 * 255 + 1) + 13) // 26 * 256).astype(np.uint16)
"""Of each sum, 256 times the smoothed value."""


@functools.lru_cache(maxsize=16)
def _blends(factor: float) -> np.ndarray:
    """Returns what Pillow blends of a smoothed value and its own: uint8[256 * 256]."""
    smoothed, own = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8), indexing="ij")
    return np.array(Image.blend(Image.fromarray(smoothed), Image.fromarray(own), factor)).ravel()


def _shift(image: Image.Image, right: float, down: float) -> Image.Image:
    """Shifts, in pixels; uncovered pixels become grey."""
    if not (right.is_integer() and down.is_integer()):
        return _affine(image, translate=(right, down))
    # Nothing lies between pixels then (224 pixels at the published level: 7), and to paste is 15 times as fast.
    shifted = Image.new("RGB", image.size, tuple(map(int, _FILL)))
    shifted.paste(image, (int(right), int(down)))
    return shifted


def _affine(
    image: Image.Image, *, shear: tuple[float, float] = (0.0, 0.0), translate: tuple[float, float] = (0.0, 0.0)
) -> Image.Image:
    """Shears about the upper left corner (as tangents) and shifts (in pixels); uncovered pixels become grey."""
    degrees = [math.degrees(math.atan(value)) for value in shear]
    return F.affine(
        image,
        angle=0.0,
        translate=list(translate),  # fractions of pixels work on PIL images
        scale=1.0,
        shear=degrees,
        interpolation=InterpolationMode.BILINEAR,
        fill=_FILL,
        center=[0, 0],
    )


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


def _resize(image: Image.Image, size: int) -> Image.Image:
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
