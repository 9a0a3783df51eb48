"""From an image to a square uint8 tensor without distortion: CLIP4Cir's padding, resize and centre crop.

Nothing is random and nothing keeps state: all functions may be called from many threads.
"""

# torchvision's functions take and return PIL images too, but their annotations speak of tensors alone.
# pyright: reportArgumentType=false, reportReturnType=false, reportAssignmentType=false

from typing import Literal

import torch
from PIL import Image

from harma_ray.compiler import deferred_compiler
from harma_ray.data.images import MAX_PIXELS, BadImage, is_wide, to_rgb
from harma_ray.data.transforms import to_tensor

with deferred_compiler():
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as F

Padding = Literal["target", "square", "none"]


def padded_transform(
    image: Image.Image,
    size: int,
    *,
    padding: Padding = "target",
    target_ratio: float = 1.25,
    max_pixels: int = 0,
) -> torch.Tensor:
    """Pads an image, resizes its shorter side to `size` (bicubic), cuts out the centre and converts it to RGB.

    With m the longer side, each side s grows by p zeros at both of its ends:

    * "square": p = floor((m - s) / 2), so an odd difference leaves the image one pixel short of a square;
    * "target": p = max(0, trunc((m / target_ratio - s) / 2)), and 0 if longer over shorter side is below
      `target_ratio`: the shorter side alone grows, until the ratio is about the target;
    * "none": p = 0.

    Source: CLIP4Cir (Baldrati et al., CVPR 2022), as in the released code. There the conversion to RGB comes last, and
    so it does here, because it decides what padding and resize do: zero is the first colour of a palette (not black),
    transparent black with an alpha channel and white in CMYK; palettes and bilevel images are resized to the nearest
    pixel. Deviations: images of one band with more than 8 bits are converted first, by `to_rgb`, which stretches them
    over the range that they use: zero has no meaning there, and the released code clips them; and `open_image` turns
    images upright by their EXIF orientation, which the released code ignores.

    Args:
        image: Of any mode, as `open_image` gives it.
        size: Height and width of the result, in pixels.
        padding: See above.
        target_ratio: Longer over shorter side that "target" pads to, at least 1.
        max_pixels: Largest width times height of the padded image and of the resized one; long and narrow images reach
            it whatever their own size. 0 = ``MAX_PIXELS``, or twice those of the image if that is more.

    Returns:
        uint8[3, size, size].

    Raises:
        BadImage: The padded or resized image would be larger than `max_pixels`.
    """
    if is_wide(image):
        image = to_rgb(image)
    across, down = _margins(image.width, image.height, padding, target_ratio)
    _check_sizes(image, across, down, size, max_pixels)
    if across or down:
        image = F.pad(image, [across, down, across, down])
    image = F.resize(image, [size], InterpolationMode.BICUBIC)
    return to_tensor(to_rgb(F.center_crop(image, [size, size])))


def _check_sizes(image: Image.Image, across: int, down: int, size: int, max_pixels: int) -> None:
    padded = (image.width + 2 * across, image.height + 2 * down)
    resized = [int(size * side / min(padded)) for side in padded]
    limit = max_pixels or max(MAX_PIXELS, 2 * image.width * image.height)
    for step, (width, height) in (("padded", padded), ("resized", resized)):
        if width * height > limit:
            raise BadImage(
                f"{image.width} x {image.height} pixels would be {step} to {width} x {height}; "
                f"the limit is {limit:,} pixels: scale the image down or cut off its longer side"
            )


def _margins(width: int, height: int, padding: Padding, target_ratio: float) -> tuple[int, int]:
    """Returns how many pixels to add at the left and right each, and at the top and bottom each."""
    longer, shorter = max(width, height), min(width, height)
    if padding == "none":
        return 0, 0
    if padding == "square":
        return (longer - width) // 2, (longer - height) // 2
    if longer / shorter < target_ratio:
        return 0, 0
    wanted = longer / target_ratio
    return max(0, int((wanted - width) / 2)), max(0, int((wanted - height) / 2))
