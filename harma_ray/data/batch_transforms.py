"""The augmentation of `harma_ray.data.transforms` for whole batches, on the device that trains.

What is done image by image there, on CPUs that read the data, is done here to all images of a batch: the pixels are the
same to the bit, for Pillow's arithmetic is repeated, integers and doubles in its order (libImaging's Resample.c,
Geometry.c and Blend.c; ImageOps). So it is where Pillow is compiled as for x86-64; elsewhere a product and a sum may be
rounded once, and few pixels differ by one. Divisors are tensors, for torch may multiply by a number's inverse. Nothing
waits for the device.

Shape letters: B batch, G some images of it, H and W the largest crop, S side of the result.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from harma_ray.data.augmentation import MAX_LEVEL, Augmentation
from harma_ray.data.samples import Array, Send
from harma_ray.data.transforms import (
    FILL,
    OPERATIONS,
    blend_factor,
    blend_table,
    cut,
    draw_changes,
    resize,
    warp_matrix,
)

_LARGEST_SIDE = 1.5
_HIGHEST_RATIO = 100  # above it, some versions of Pillow resize in another order
_AT_A_TIME = 2**25  # numbers of an intermediate result in int32 (128 MiB); of several in doubles or int64 a quarter
_BITS = 22  # of Pillow's weights


def cut_transform(
    image: Image.Image, rng: np.random.Generator, size: int, augmentation: Augmentation
) -> dict[str, Array]:
    """Does what comes first of `train_transform`, cropping; `changed_batch` does the rest.

    Args:
        image: RGB image of any size.
        rng: Source of all randomness, drawn from as by `train_transform`.
        size: Height and width of what is to come out, in pixels.
        augmentation: What may happen.

    Returns:
        ``image``, uint8[h, w, 3]: the crop, resized if a side is more than 1.5 times as long as ``size``, as sending it
        would take longer, or if it is a line of pixels. ``changes``, int64[2 + operations]: whether its height is
        resized before its width, whether it is mirrored then, and the operations to apply: 0 for none, else 1 + twice
        the place in ``OPERATIONS``, and 1 more in the negative direction.
    """
    drawn = draw_changes(image.height, image.width, rng, augmentation)
    kept = cut(image, drawn)
    if max(kept.size) > _LARGEST_SIDE * size or kept.height > _HIGHEST_RATIO * kept.width:
        kept = resize(kept, size)
    changes = np.zeros(2 + augmentation.num_operations, np.int64)
    changes[:2] = is_height_first(kept.height, kept.width, size), drawn.is_mirrored
    for place, (name, negative) in enumerate(drawn.operations, start=2):
        changes[place] = 1 + 2 * OPERATIONS.index(name) + negative
    return {"image": np.asarray(kept), "changes": changes}


def collate_cuts(samples: Sequence[Mapping[str, Array]]) -> dict[str, np.ndarray]:
    """Puts what `cut_transform` returns together.

    Args:
        samples: At least one.

    Returns:
        ``image``, uint8[B, H, W, 3], crops in the upper left corner; ``crop_size``, int64[B, 2], their heights and
        widths; ``changes``, int64[B, 2 + operations].
    """
    crops = [np.asarray(sample["image"]) for sample in samples]
    sizes = np.array([crop.shape[:2] for crop in crops])
    images = np.zeros((len(crops), *sizes.max(axis=0), 3), np.uint8)
    for image, crop in zip(images, crops, strict=True):
        image[: crop.shape[0], : crop.shape[1]] = crop
    return {"image": images, "crop_size": sizes, "changes": np.stack([sample["changes"] for sample in samples])}


def changed_batch(images: Tensor, crop_sizes: Tensor, changes: Tensor, size: int, level: float, send: Send) -> Tensor:
    """Resizes, mirrors and changes the crops of a batch.

    Args:
        images: uint8[B, H, W, 3], on the device; see `collate_cuts`.
        crop_sizes: int64[B, 2], on the CPU.
        changes: int64[B, 2 + operations], on the CPU.
        size: Height and width of the result, in pixels.
        level: Strength of the operations, 0 to 10.
        send: Brings tensors to the device.

    Returns:
        uint8[B, 3, S, S] on the device.
    """
    result = images.new_empty(len(images), 3, size, size)
    if not len(images):
        return result
    weights = _Weights.of(send(crop_sizes), send(changes[:, 1] == 1), size, max(images.shape[1:3]))
    at_a_time = max(1, _AT_A_TIME // (3 * size * max(*images.shape[1:3], size)))
    for height_first in (False, True):
        for rows in (changes[:, 0] == height_first).nonzero().flatten().split(at_a_time):
            if len(rows):
                places = send(rows)
                planes = images.index_select(0, places).permute(0, 3, 1, 2)
                result.index_copy_(0, places, weights.of_some(places).resize(planes, height_first))
    for operations in changes[:, 2:].unbind(dim=1):
        _change(result, operations, level / MAX_LEVEL, send)
    return result


def is_height_first(height: int, width: int, size: int) -> bool:
    """Returns whether Pillow, of the version that is there, resizes an image's height before its width.

    Version 13 does so where the height shrinks by more than twice what the width does. Before, it was the other way
    round, from some version on but for images more than 100 times as high as wide, of which nothing is said here.

    Args:
        height: Of the image, in pixels.
        width: Likewise, at least a hundredth of that.
        size: Height and width of the result.
    """
    return _is_height_ever_first() and height > size and height - size > 2 * (width - size)


@functools.cache
def _is_height_ever_first() -> bool:
    tall = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 8, 3), dtype=np.uint8))
    by_turns = tall.resize((8, 16), Image.Resampling.BICUBIC).resize((16, 16), Image.Resampling.BICUBIC)
    return bool(np.array_equal(np.asarray(resize(tall, 16)), np.asarray(by_turns)))


@dataclass(frozen=True)
class _Weights:
    """Which pixels of an image's columns and rows make each of its resized ones, and their weights.

    As in ``precompute_coeffs`` and ``normalize_coeffs_8bpc`` of Pillow, sums begin at the first pixel.
    """

    first: Tensor
    """Where those that are summed begin, heights and widths: int64[G, 2, S]."""
    last: Tensor
    """The last pixels: int64[G, 2, 1]."""
    taps: Tensor
    """Weights of the first pixel and of those that follow: int32[G, 2, S, taps]."""

    @classmethod
    def of(cls, sizes: Tensor, mirrored: Tensor, size: int, longest: int) -> Self:
        """Computes those of crops of heights and widths int64[G, 2], none above ``longest``; mirrored: bool[G]."""
        scale = (sizes.double() / torch.full_like(sizes, size))[..., None]
        filter_scale = scale.clamp(min=1)
        support = 2 * filter_scale
        center = (torch.arange(size, dtype=torch.float64, device=sizes.device) + 0.5) * scale
        first = (center - support + 0.5).long().clamp_(min=0)
        end = torch.minimum((center + support + 0.5).long(), sizes[..., None])
        pixels = first[..., None] + torch.arange(int(4 * max(longest / size, 1)) + 1, device=sizes.device)
        inverse = torch.ones_like(filter_scale) / filter_scale
        distance = ((pixels.double() - center[..., None] + 0.5) * inverse[..., None]).abs_()
        near = (1.5 * distance - 2.5) * distance * distance + 1
        far = (((distance - 5) * distance + 8) * distance - 4) * -0.5
        weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
        weights = torch.where(pixels < end[..., None], weights, 0.0)
        total = functools.reduce(torch.add, weights.unbind(-1))  # in this order
        scaled = weights / total[..., None] * (1 << _BITS)
        taps = (scaled + torch.where(scaled < 0, -0.5, 0.5)).int()
        turned = torch.stack([torch.zeros_like(mirrored), mirrored], dim=1)[..., None]
        first = torch.where(turned, first.flip(2), first)
        return cls(first, sizes[..., None] - 1, torch.where(turned[..., None], taps.flip(2), taps))

    def of_some(self, places: Tensor) -> Self:
        """Returns those of some images, int64[G]."""
        return type(self)(*(values.index_select(0, places) for values in (self.first, self.last, self.taps)))

    def resize(self, planes: Tensor, height_first: bool) -> Tensor:
        """Resizes, and mirrors, crops that lie in uint8[G, 3, H, W]: uint8[G, 3, S, S]."""
        if height_first:
            return self._rows(self._rows(planes.mT, 0).mT, 1)
        return self._rows(self._rows(planes, 1).mT, 0).mT

    def _rows(self, planes: Tensor, axis: int) -> Tensor:
        """Resizes the rows of uint8[G, 3, R, N] as those of heights (0) or widths (1): uint8[G, 3, R, S]."""
        first, last = self.first[:, axis, None, None], self.last[:, axis, None, None]
        shape = (*planes.shape[:3], first.shape[3])
        total = torch.full(shape, 1 << (_BITS - 1), dtype=torch.int32, device=planes.device)
        for tap, weight in enumerate(self.taps[:, axis, None, None].unbind(-1)):
            total.addcmul_(planes.gather(3, torch.minimum(first + tap, last).expand(shape)), weight)
        return (total >> _BITS).clamp_(0, 255).to(torch.uint8)


def _change(images: Tensor, operations: Tensor, strength: float, send: Send) -> None:
    """Applies one operation, if any, to each image, uint8[B, 3, S, S]; operations int64[B] as in `cut_transform`."""
    rows: dict[Callable[[Tensor, Sequence[_Drawn], Send], Tensor], list[tuple[int, _Drawn]]] = {}
    for row, code in enumerate(operations.tolist()):
        name, negative = OPERATIONS[(code - 1) // 2], (code - 1) % 2
        if code and name != "identity":
            drawn = _Drawn(name, strength, -strength if negative else strength)
            rows.setdefault(_CHANGES.get(name, _warp), []).append((row, drawn))
    at_a_time = max(1, _AT_A_TIME // 4 // images[0].numel())
    for change, chosen in rows.items():
        for start in range(0, len(chosen), at_a_time):
            numbers, drawn = zip(*chosen[start : start + at_a_time], strict=True)
            places = send(torch.tensor(numbers))
            images.index_copy_(0, places, change(images.index_select(0, places), drawn, send))


class _Drawn(NamedTuple):
    """What is applied to an image; strengths as in `harma_ray.data.transforms`."""

    name: str
    strength: float
    signed: float


def _autocontrast(images: Tensor, drawn: Sequence[_Drawn], send: Send) -> Tensor:
    """Stretches each plane from its darkest and brightest pixel to 0 and 255."""
    low, high = (extreme.double() for extreme in (images.amin((2, 3), True), images.amax((2, 3), True)))
    scale = torch.full_like(low, 255) / (high - low).clamp(min=1)
    stretched = (images.double() * scale + -low * scale).clamp_(0, 255).to(torch.uint8)
    return torch.where(high > low, stretched, images)


def _equalize(images: Tensor, drawn: Sequence[_Drawn], send: Send) -> Tensor:
    """Makes the values of each plane about equally frequent."""
    values = images.flatten(2).long()
    counts = values.new_zeros(*values.shape[:2], 256).scatter_add_(2, values, torch.ones_like(values))
    brightest = counts.gather(2, values.amax(2, keepdim=True))
    step = (values.shape[2] - brightest) // 255
    below = counts.cumsum(2) - counts
    table = ((step // 2 + below) // step.clamp(min=1)).clamp_(max=255).to(torch.uint8)
    return torch.where(step > 0, table.gather(2, values), images.flatten(2)).view_as(images)


def _brighten(images: Tensor, drawn: Sequence[_Drawn], send: Send) -> Tensor:
    """Blends each image with black."""
    return _blended(images, torch.zeros_like(images), drawn, send)


def _sharpen(images: Tensor, drawn: Sequence[_Drawn], send: Send) -> Tensor:
    """Blends each image with what Pillow's filter makes smooth, (8 neighbours + 5 x itself) / 13 but for borders."""
    wide = images.int()
    rows = wide[..., :-2] + wide[..., 1:-1] + wide[..., 2:]
    sums = rows[..., :-2, :] + rows[..., 1:-1, :] + rows[..., 2:, :] + 4 * wide[..., 1:-1, 1:-1]
    smooth = images.clone()
    smooth[..., 1:-1, 1:-1] = ((2 * sums + 13) // 26).to(torch.uint8)
    return _blended(images, smooth, drawn, send)


def _blended(images: Tensor, others: Tensor, drawn: Sequence[_Drawn], send: Send) -> Tensor:
    """Blends images with others as Pillow does, all as much."""
    table = send(torch.from_numpy(blend_table(blend_factor(drawn[0].strength))))
    return table[256 * others.long() + images]


def _warp(images: Tensor, drawn: Sequence[_Drawn], send: Send) -> Tensor:
    """Takes each pixel of an image from where its operation's matrix says, bilinear; uncovered pixels become grey."""
    matrices = send(torch.tensor(
        [warp_matrix(each.name, each.signed, (images.shape[3], images.shape[2])) for each in drawn], dtype=torch.float64
    ))  # fmt: skip
    size = images.shape[3]
    middles = torch.arange(size, dtype=torch.float64, device=images.device) + 0.5
    a, b, c, d, e, f = matrices[:, :, None, None].unbind(1)
    x, y = (of_x * middles + of_y * middles[:, None] + shift for of_x, of_y, shift in ((a, b, c), (d, e, f)))
    inside = (x >= 0) & (x < size) & (y >= 0) & (y < size)
    (left, right, to_right), (top, bottom, down) = (_neighbours(place - 0.5, size) for place in (x, y))
    flat = images.flatten(2)

    def between(row: Tensor) -> Tensor:
        one, two = (
            flat.gather(2, (row * size + column).flatten(1)[:, None].expand_as(flat)).view_as(images)
            for column in (left, right)
        )
        return one + (two.short() - one) * to_right[:, None]

    upper, lower = between(top), between(bottom)
    blended = upper + (lower - upper) * down[:, None]
    return torch.where(inside[:, None], blended.to(torch.uint8), FILL)


_CHANGES = {"autocontrast": _autocontrast, "equalize": _equalize, "brightness": _brighten, "sharpness": _sharpen}
"""All others warp."""


def _neighbours(places: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the pixels before and after some places along a line, and how far each place is from the first."""
    before = places.floor()
    return before.long().clamp(0, size - 1), (before.long() + 1).clamp(0, size - 1), places - before
