import random
import threading

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms import functional as F

from harma_ray.data import transforms
from harma_ray.data.transforms import OPERATIONS, Augmentation, apply_operation, eval_transform, train_transform


@pytest.fixture
def image():
    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((256, 192), Image.Resampling.BICUBIC)


def _pixels(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def test_published_parameters():
    assert Augmentation() == Augmentation(
        min_scale=0.5,
        max_scale=1.0,
        max_aspect_ratio=4 / 3,
        flip_probability=0.5,
        num_operations=2,
        operation_probability=0.5,
        level=7.0,
    )
    assert set(OPERATIONS) == {
        *("identity", "autocontrast", "equalize", "brightness", "sharpness"),
        *("shear_x", "shear_y", "translate_x", "translate_y", "rotate"),
    }


@pytest.mark.parametrize("shape", [(224, 224), (1, 1), (7, 300), (3000, 2000)])
def test_a_tensor_has_the_pixels_of_an_image_however_it_lies_in_memory(shape):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape[::-1], 3), dtype=np.uint8))
    tensor = transforms.to_tensor(image)
    assert (tensor.dtype, tensor.is_contiguous()) == (torch.uint8, True)
    assert torch.equal(tensor, _pixels(image))
    image.paste((1, 2, 3), (0, 0, *shape))
    assert not torch.equal(tensor, _pixels(image))  # it is a copy


def test_evaluation_resizes_as_pil_does_without_keeping_the_aspect(image):
    result = eval_transform(image, 224)
    assert (result.dtype, result.shape, result.is_contiguous()) == (torch.uint8, (3, 224, 224), True)
    assert torch.equal(result, _pixels(image.resize((224, 224), Image.Resampling.BICUBIC)))


@pytest.mark.parametrize("size", [1, 64, 224])
@pytest.mark.parametrize("shape", [(256, 192), (1, 1), (3, 500), (500, 2), (64, 64)])
def test_any_image_gives_a_square_of_the_size(size, shape):
    image = Image.new("RGB", shape, "red")
    for seed in range(20):
        result = train_transform(image, np.random.default_rng(seed), size)
        assert (result.dtype, result.shape, result.is_contiguous()) == (torch.uint8, (3, size, size), True)


def test_no_augmentation_equals_evaluation(image):
    assert torch.equal(
        train_transform(
            image, np.random.default_rng(0), 96, Augmentation(min_scale=1.0, flip_probability=0.0, num_operations=0)
        ),
        eval_transform(image, 96),
    )


def test_equal_generators_give_equal_results_and_others_others(image):
    one, two, other = (train_transform(image, np.random.default_rng(seed), 64) for seed in (5, 5, 6))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_global_generators_are_neither_used_nor_moved(image):
    def states():
        return torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()

    before = states()
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        inside = states()
        results.append([train_transform(image, np.random.default_rng(n), 64) for n in range(10)])
        after = states()
        assert torch.equal(inside[0], after[0])
        np.testing.assert_array_equal(inside[1], after[1])
        assert inside[2] == after[2]
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
    torch.set_rng_state(before[0])


def test_each_operation_is_drawn_and_applied_equally_often(image, monkeypatch):
    calls = []
    monkeypatch.setattr(
        transforms, "apply_operation", lambda image, name, level, *, negative: calls.append((name, negative)) or image
    )
    small, rng, count = image.resize((16, 16)), np.random.default_rng(0), 5000
    for _ in range(count):
        train_transform(small, rng, 8)
    expected = count * 2 * 0.5 / len(OPERATIONS)
    observed = np.array([sum(name == wanted for name, _ in calls) for wanted in OPERATIONS])
    # Chi-square with 9 degrees of freedom: 27.9 is exceeded once in 1000 times; the seed is fixed.
    assert ((observed - expected) ** 2 / expected).sum() < 27.9
    assert abs(np.mean([negative for _, negative in calls]) - 0.5) < 0.03
    assert abs(len(calls) / (2 * count) - 0.5) < 0.03


def test_flip_probability(image):
    gradient = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8)[None, :, None], (64, 1, 3)))
    rng = np.random.default_rng(0)
    augmentation = Augmentation(num_operations=0)
    flipped = [
        bool(r[0, 4, 0] > r[0, 4, -1]) for r in (train_transform(gradient, rng, 8, augmentation) for _ in range(1000))
    ]
    assert abs(np.mean(flipped) - 0.5) < 0.06


def test_crops_stay_inside_and_have_the_published_scale_and_ratio():
    rng = np.random.default_rng(0)
    areas, ratios = [], []
    for _ in range(2000):
        top, left, height, width = transforms._draw_crop(300, 300, rng, Augmentation())
        assert 0 <= top <= 300 - height
        assert 0 <= left <= 300 - width
        areas.append(height * width / 90_000)
        ratios.append(width / height)
    assert min(areas) > 0.495
    assert max(areas) > 0.97
    assert 0.745 < min(ratios) < 0.78
    assert 1.28 < max(ratios) < 1.342
    assert abs(np.mean(np.log(ratios))) < 0.02


def test_long_images_are_cropped_in_their_middle():
    assert transforms._draw_crop(10, 1000, np.random.default_rng(0), Augmentation(min_scale=0.9)) == (0, 493, 10, 13)
    assert transforms._draw_crop(1000, 10, np.random.default_rng(0), Augmentation(min_scale=0.9)) == (493, 0, 13, 10)


def test_crop_is_resized_as_torchvision_does(image):
    augmentation = Augmentation(flip_probability=0, num_operations=0)
    box = transforms._draw_crop(image.height, image.width, np.random.default_rng(3), augmentation)
    expected = F.resized_crop(image, *box, [96, 96], F.InterpolationMode.BICUBIC)
    assert torch.equal(train_transform(image, np.random.default_rng(3), 96, augmentation), _pixels(expected))


def test_level_seven_of_the_colour_operations(image):
    expected = {
        "identity": image,
        "autocontrast": ImageOps.autocontrast(image),
        "equalize": ImageOps.equalize(image),
        "brightness": ImageEnhance.Brightness(image).enhance(1.36),
        "sharpness": ImageEnhance.Sharpness(image).enhance(1.36),
    }
    for name, wanted in expected.items():
        for negative in (False, True):
            result = apply_operation(image, name, 7, negative=negative)
            np.testing.assert_array_equal(np.asarray(result), np.asarray(wanted), err_msg=name)


@pytest.mark.parametrize("size", [224, 448])
@pytest.mark.parametrize("negative", [False, True])
def test_shift_is_seven_pixels_of_224_with_grey_fill(size, negative):
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    shift = 7 * size // 224
    right = np.asarray(apply_operation(Image.fromarray(pixels), "translate_x", 7, negative=negative))
    down = np.asarray(apply_operation(Image.fromarray(pixels), "translate_y", 7, negative=negative))
    for result, source in ((right, pixels), (down.transpose(1, 0, 2), pixels.transpose(1, 0, 2))):
        if negative:
            result, source = result[:, ::-1], source[:, ::-1]
        assert (result[:, :shift] == 128).all()
        np.testing.assert_array_equal(result[:, shift:], source[:, :-shift])


@pytest.mark.parametrize("shape", [(224, 224), (64, 48), (1, 1), (1, 5), (2, 9), (9, 2), (3, 3)])
@pytest.mark.parametrize("level", [0, 2.5, 5, 7, 10])
def test_sharpness_is_that_of_pillow_to_the_bit(shape, level):
    rng = np.random.default_rng(0)
    for high in (2, 256):  # of few values, sums come near to half-way
        image = Image.fromarray((rng.integers(0, high, (*shape[::-1], 3)) * (255 // (high - 1))).astype(np.uint8))
        expected = ImageEnhance.Sharpness(image).enhance(1.8 * level / 10 + 0.1)
        np.testing.assert_array_equal(np.asarray(apply_operation(image, "sharpness", level)), np.asarray(expected))


def test_every_sum_of_neighbours_smooths_as_pillow_does():
    """Nine pixels that add up to each possible number, and the one in the middle."""
    for middle in range(0, 256, 15):
        around = np.arange(8 * 255 + 1)
        patches = np.full((len(around), 3, 3), middle)
        others = np.array([(0, 0), (0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1), (2, 2)])
        for place, (row, column) in enumerate(others):
            patches[:, row, column] = around // 8 + (place < around % 8)
        strip = np.repeat(np.concatenate(list(patches), axis=1)[..., None], 3, axis=2).astype(np.uint8)
        picture = Image.fromarray(strip)
        smoothed = np.asarray(ImageEnhance.Sharpness(picture).enhance(0))
        np.testing.assert_array_equal(np.asarray(transforms._sharpen(picture, 0)), smoothed)


@pytest.mark.parametrize("shape", [(32, 24), (1, 5), (224, 224)])
@pytest.mark.parametrize("shift", [0, 1, -1, 7, -23, 32, -300])
def test_a_shift_by_whole_pixels_is_that_of_torchvision(shape, shift):
    noise = np.random.default_rng(0).integers(0, 256, (*shape[::-1], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    for offset in ((shift, 0), (0, shift)):
        expected = F.affine(
            image, 0, list(offset), 1, [0, 0], F.InterpolationMode.BILINEAR, fill=[128] * 3, center=[0, 0]
        )
        shifted = transforms._warp(image, (1.0, 0.0, float(-offset[0]), 0.0, 1.0, float(-offset[1])))
        np.testing.assert_array_equal(np.asarray(shifted), np.asarray(expected))


@pytest.mark.parametrize("size", [30, 112, 224, 336])
@pytest.mark.parametrize("level", [0, 3, 7, 10])
def test_shifts_of_the_augmentation_are_those_of_torchvision(size, level):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8))
    for negative in (False, True):
        shift = 10 / 224 * (-level if negative else level) / 10 * size
        expected = F.affine(
            image, 0, [shift, 0], 1, [0, 0], F.InterpolationMode.BILINEAR, fill=[128] * 3, center=[0, 0]
        )
        result = apply_operation(image, "translate_x", level, negative=negative)
        np.testing.assert_array_equal(np.asarray(result), np.asarray(expected))


@pytest.mark.parametrize(("name", "axis"), [("shear_x", 0), ("shear_y", 1)])
def test_shear_is_21_percent(name, axis):
    size = 200
    pixels = np.zeros((size, size, 3), np.uint8)
    pixels[:, size // 2 - 1 : size // 2 + 1] = 255
    if axis:
        pixels = pixels.transpose(1, 0, 2)
    slopes = []
    for negative in (False, True):
        sheared = np.asarray(apply_operation(Image.fromarray(pixels), name, 7, negative=negative))[..., 0].astype(float)
        sheared = sheared if axis == 0 else sheared.T
        # The line's place in each row; grey fill (128) is not the line.
        places = [np.average(np.arange(size), weights=np.where(row > 200, row, 0) + 1e-9) for row in sheared]
        slopes.append(np.polyfit(np.arange(10, 190), places[10:190], 1)[0])
    assert sorted(slopes) == pytest.approx([-0.21, 0.21], abs=0.01)


def test_rotation_is_21_degrees_about_the_middle(image):
    for negative in (False, True):
        expected = image.rotate(-21 if negative else 21, Image.Resampling.BILINEAR, fillcolor=(128, 128, 128))
        result = apply_operation(image, "rotate", 7, negative=negative)
        np.testing.assert_array_equal(np.asarray(result), np.asarray(expected))


def test_level_scales_the_operations():
    white = Image.new("RGB", (8, 8), (100, 100, 100))
    assert np.asarray(apply_operation(white, "brightness", 10))[0, 0, 0] == 190
    assert np.asarray(apply_operation(white, "brightness", 0))[0, 0, 0] == 10
    for name in ("shear_x", "shear_y", "translate_x", "translate_y", "rotate"):
        np.testing.assert_array_equal(np.asarray(apply_operation(white, name, 0)), np.asarray(white))


def test_unknown_operation_is_refused_by_name(image):
    with pytest.raises(ValueError, match="solarize"):
        apply_operation(image, "solarize", 7)


def test_threads_with_their_own_generators_do_not_disturb_each_other(image):
    expected = [train_transform(image, np.random.default_rng(seed), 64) for seed in range(20)]
    results = {}

    def work(seed):
        results[seed] = train_transform(image, np.random.default_rng(seed), 64)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[seed], expected[seed]) for seed in range(20))
