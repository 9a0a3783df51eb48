import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T
from torchvision.transforms import functional as F

from harma_ray.data.images import BadImage, to_rgb
from harma_ray.data.padding import padded_transform

SHAPES = [(37, 24), (24, 37), (31, 30), (30, 30), (25, 20), (20, 25), (1, 1), (2, 61), (200, 3), (40, 31)]
MODES = ["RGB", "L", "1", "P", "P transparent", "P short", "PA", "LA", "RGBA", "CMYK", "YCbCr"]


class SquarePad:
    def __call__(self, image):
        w, h = image.size
        m = max(w, h)
        px, py = int((m - w) / 2), int((m - h) / 2)
        return F.pad(image, [px, py, px, py], 0, "constant")


class TargetPad:
    def __init__(self, ratio):
        self.ratio = ratio

    def __call__(self, image):
        w, h = image.size
        if max(w, h) / min(w, h) < self.ratio:
            return image
        m = max(w, h) / self.ratio
        px, py = max(int((m - w) / 2), 0), max(int((m - h) / 2), 0)
        return F.pad(image, [px, py, px, py], 0, "constant")


def released_transform(image, size, pad):
    """The published order of steps, with torchvision's classes."""
    steps = [] if pad is None else [pad]
    steps += [T.Resize(size, interpolation=T.InterpolationMode.BICUBIC), T.CenterCrop(size)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's, of palettes with transparency
        image = T.Compose([*steps, lambda image: image.convert("RGB")])(image)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def noise(mode, width, height):
    generator = np.random.default_rng(0)
    colours = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
    if mode in ("LA", "RGBA"):
        image = colours.convert(mode)
        image.putalpha(Image.fromarray(generator.integers(0, 256, (height, width), dtype=np.uint8)))
        return image
    if mode.startswith("P"):
        image = Image.fromarray(generator.integers(0, 7, (height, width), dtype=np.uint8))
        image.putpalette([200, 10, 40, *generator.integers(0, 256, (6 if mode == "P short" else 255) * 3).tolist()])
        if mode == "P transparent":
            image.info["transparency"] = bytes(range(0, 210, 30))
        return image.convert("PA") if mode == "PA" else image
    return colours.convert(mode)


def white(width, height):
    return Image.new("RGB", (width, height), "white")


def lit(result):
    """Which columns and rows of a result hold any white."""
    return result[0].any(dim=0).tolist(), result[0].any(dim=1).tolist()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_result_equals_the_released_steps_bit_for_bit(mode, shape):
    image = noise(mode, *shape)
    before = image.tobytes()
    for size in (16, 33):
        for padding, pad in (("target", TargetPad(1.25)), ("square", SquarePad()), ("none", None)):
            result = padded_transform(image, size, padding=padding)
            assert (result.dtype, result.shape, result.is_contiguous()) == (torch.uint8, (3, size, size), True)
            assert torch.equal(result, released_transform(image, size, pad))
        for ratio in (1.0, 1.3, 2.5):
            result = padded_transform(image, size, target_ratio=ratio)
            assert torch.equal(result, released_transform(image, size, TargetPad(ratio)))
    assert image.tobytes() == before


def test_target_padding_is_the_default_and_grows_the_shorter_side_alone():
    columns, rows = lit(padded_transform(white(130, 100), 104))  # 130 / 1.25 = 104: two rows at the top and bottom
    assert columns == [True] * 104
    assert rows == [False] * 2 + [True] * 100 + [False] * 2
    columns, rows = lit(padded_transform(white(100, 130), 104))
    assert columns == [False] * 2 + [True] * 100 + [False] * 2
    assert rows == [True] * 104


def test_ratios_up_to_the_target_leave_an_image_as_it_is():
    for width in (100, 124, 125):
        image = noise("RGB", width, 100)
        assert torch.equal(padded_transform(image, 50), padded_transform(image, 50, padding="none"))
    image = noise("RGB", 128, 100)  # 102.4: one row each
    assert not torch.equal(padded_transform(image, 50), padded_transform(image, 50, padding="none"))


def test_square_padding_loses_one_pixel_of_an_odd_difference():
    columns, rows = lit(padded_transform(white(5, 10), 9, padding="square"))  # 9 x 10, cropped to 9 x 9
    assert columns == [False] * 2 + [True] * 5 + [False] * 2
    assert rows == [True] * 9


def test_palettes_are_padded_with_their_first_colour_and_transparency_with_black():
    palette = Image.new("P", (20, 40), 1)
    palette.putpalette([200, 10, 40, 255, 255, 255])
    result = padded_transform(palette, 40, padding="square")
    assert result[:, 0, 0].tolist() == [200, 10, 40]
    assert result[:, 0, 20].tolist() == [255] * 3
    for mode, corner in (("RGBA", [0] * 3), ("LA", [0] * 3), ("CMYK", [255] * 3)):
        result = padded_transform(Image.new("RGB", (20, 40), "grey").convert(mode), 40, padding="square")
        assert result[:, 0, 0].tolist() == corner
        assert result[:, 0, 20].tolist() not in ([0] * 3, [255] * 3)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_wide_images_are_stretched_before_they_are_padded(dtype):
    values = np.random.default_rng(0).integers(300, 4000, (20, 50)).astype(dtype)
    image = Image.fromarray(values)
    assert torch.equal(padded_transform(image, 24), padded_transform(to_rgb(image), 24))
    assert padded_transform(image, 24).max() > 200


def test_long_and_narrow_images_are_refused_before_they_grow():
    with pytest.raises(BadImage, match=r"2 x 40000 pixels would be resized to 288 x 5760000; the limit is 100,000,000"):
        padded_transform(white(2, 40_000), 288, padding="none")
    with pytest.raises(BadImage, match=r"1 x 20001 pixels would be padded to 20001 x 20001"):
        padded_transform(white(1, 20_001), 288, padding="square")
    with pytest.raises(BadImage, match=r"would be padded to 20001 x 15999"):
        padded_transform(white(20_001, 1), 288)


def test_limit_of_pixels_is_exact():
    image = white(10, 40)
    assert padded_transform(image, 20, padding="none", max_pixels=1600).shape == (3, 20, 20)
    with pytest.raises(BadImage, match="resized to 20 x 80; the limit is 1,599"):
        padded_transform(image, 20, padding="none", max_pixels=1599)
    assert padded_transform(image, 20, padding="square", max_pixels=1600).shape == (3, 20, 20)
    with pytest.raises(BadImage, match="padded to 40 x 40; the limit is 1,599"):
        padded_transform(image, 20, padding="square", max_pixels=1599)
