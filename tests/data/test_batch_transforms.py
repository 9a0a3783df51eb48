"""Batches on a device against the same changes image by image, by Pillow."""

import contextlib
import io
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from harma_ray.config import DataConfig
from harma_ray.data import batch_transforms
from harma_ray.data.augmentation import Augmentation
from harma_ray.data.batch_transforms import changed_batch, collate_cuts, cut_transform, is_height_first
from harma_ray.data.decoding import DecodeRows
from harma_ray.data.stream import Batches
from harma_ray.data.transforms import OPERATIONS, apply_operation, to_tensor, train_transform
from harma_ray.recipes.harma.task import PairTransform


def _pictures(count, shapes):
    """Noise, smooth pictures, flat, two-valued and dark ones."""
    rng = np.random.default_rng(0)
    for number in range(count):
        height, width = shapes[number % len(shapes)]
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        match number % 5:
            case 1:
                few = Image.fromarray(pixels[: height // 8 + 1, : width // 8 + 1])
                pixels = np.asarray(few.resize((width, height), Image.Resampling.BICUBIC))
            case 2:
                pixels = np.full_like(pixels, rng.integers(256))
            case 3:
                pixels = pixels // 128 * 200 + 20
            case 4:
                pixels = pixels // 5
        yield Image.fromarray(pixels)


def _one_by_one(pictures, size, augmentation):
    rngs = map(np.random.default_rng, range(len(pictures)))
    return torch.stack([train_transform(*each, size, augmentation) for each in zip(pictures, rngs, strict=True)])


def _together(pictures, size, augmentation, send=lambda tensor: tensor):
    rngs = map(np.random.default_rng, range(len(pictures)))
    samples = [cut_transform(*each, size, augmentation) for each in zip(pictures, rngs, strict=True)]
    images, sizes, changes = map(torch.from_numpy, collate_cuts(samples).values())
    return changed_batch(send(images), sizes, changes, size, augmentation.level, send)


SHAPES = [
    (224, [(256, 256), (224, 224), (300, 200)]),
    (32, [(48, 40), (7, 9), (400, 300), (30, 300), (1, 1), (33, 32)]),
    (65, [(65, 65), (64, 66), (97, 97), (98, 98), (2, 50)]),
    (1, [(1, 1), (3, 2), (50, 50)]),
    (2, [(2, 2), (3, 3)]),
    (300, [(405, 4), (303, 3), (404, 2), (2, 404)]),
]
MANY = Augmentation(operation_probability=0.9, num_operations=3)


@pytest.mark.parametrize(("size", "shapes"), SHAPES)
def test_a_batch_has_the_pixels_of_its_images_one_by_one(size, shapes):
    pictures = list(_pictures(40, shapes))
    for augmentation in (MANY, replace(MANY, min_scale=1.0)):
        assert torch.equal(_together(pictures, size, augmentation), _one_by_one(pictures, size, augmentation))


@pytest.mark.parametrize(("limit", "resized", "warped"), [(1, 1, 1), (9 * 3 * 48 * 48, 8, 2)])
def test_so_has_one_that_takes_several_turns(monkeypatch, limit, resized, warped):
    pictures = list(_pictures(60, [(40, 64), (64, 40), (50, 50)]))
    counts = {"resize": [], "warp": []}
    resize, warp = batch_transforms._Weights.resize, batch_transforms._warp
    monkeypatch.setattr(
        batch_transforms._Weights, "resize", lambda *args: counts["resize"].append(len(args[1])) or resize(*args)
    )
    monkeypatch.setattr(batch_transforms, "_warp", lambda *args: counts["warp"].append(len(args[0])) or warp(*args))
    monkeypatch.setattr(batch_transforms, "_AT_A_TIME", limit)
    assert torch.equal(_together(pictures, 48, MANY), _one_by_one(pictures, 48, MANY))
    assert (max(counts["resize"]), max(counts["warp"])) == (resized, warped)


@pytest.mark.parametrize(
    "augmentation",
    [Augmentation(num_operations=0, min_scale=1.0, flip_probability=0.0), Augmentation(), Augmentation(min_scale=0.01)],
)
def test_so_has_one_that_is_changed_little_or_as_published(augmentation):
    pictures = list(_pictures(50, [(40, 64), (64, 40), (96, 96)]))
    assert torch.equal(_together(pictures, 48, augmentation), _one_by_one(pictures, 48, augmentation))


@contextlib.contextmanager
def _nobody_waits():
    """Nothing may make the host wait for a GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


ON_A_GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_A_GPU)])
@pytest.mark.parametrize("in_turns", [False, True])
@pytest.mark.parametrize(("size", "shapes"), SHAPES)
def test_so_has_one_on_a_gpu_which_nobody_waits_for(monkeypatch, size, shapes, in_turns, device):
    if in_turns:
        monkeypatch.setattr(batch_transforms, "_AT_A_TIME", 9 * 3 * size * size)
    pictures = list(_pictures(60, shapes))
    with _nobody_waits():
        batch = _together(pictures, size, MANY, lambda tensor: tensor.pin_memory().to(device, non_blocking=True))
    assert torch.equal(batch.cpu(), _one_by_one(pictures, size, MANY))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_A_GPU)])
def test_a_stream_sends_crops_and_gives_what_it_gives_without(device):
    files = [io.BytesIO() for _ in range(40)]
    for file, picture in zip(files, _pictures(40, [(40, 64), (64, 40), (96, 96)]), strict=True):
        picture.save(file, "PNG")
    rows = [
        {"image": file.getvalue(), "captions": ["a farm"], "image_id": 7 * place, "label": None, "source": "",
         "row": place, "caption": 0, "epoch": 1}
        for place, file in enumerate(files)
    ]  # fmt: skip
    table, whole = pa.Table.from_pylist(rows), PairTransform("ViT-B-32", 48, 10**8, MANY)
    how = Batches(40, DecodeRows(whole.for_device(), 3), 1, device, DataConfig())
    batch = how.collate(table, how.decode.samples(table))
    assert {tensor.is_pinned() for tensor in batch.values()} == {device == "cuda"}
    with _nobody_waits() if device == "cuda" else contextlib.nullcontext():
        batch = how.send(batch)
    assert (batch["image"].device.type, batch["text"].device.type) == (device, "cpu")
    expected = DecodeRows(whole, 3)(table)
    assert batch.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(batch[name].cpu(), values)


@pytest.mark.parametrize("level", [0, 1, 2.5, 5, 7, 10])
@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_has_the_pixels_of_pillow(name, level):
    pictures = [picture for size in (1, 2, 3, 57) for picture in _pictures(10, [(size, size)])]
    for number, picture in enumerate(pictures):
        negative = number % 2 == 1
        changes = torch.tensor([[0, 0, 1 + 2 * OPERATIONS.index(name) + negative]])
        image = torch.from_numpy(np.array(picture))[None]
        sizes = torch.tensor([picture.size])
        result = changed_batch(image, sizes, changes, picture.width, level, lambda tensor: tensor)
        assert torch.equal(result[0], to_tensor(apply_operation(picture, name, level, negative=negative)))


def test_pillow_resizes_in_the_order_that_is_taken_for_its():
    """By turns, Pillow itself shows which side it takes first."""
    rng, seen = np.random.default_rng(0), set()
    for _ in range(2000):
        size, height, width = (int(side) for side in rng.integers(1, [40, 90, 90]))
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        first = (width, size) if (high := is_height_first(height, width, size)) else (size, height)
        by_turns = image.resize(first, Image.Resampling.BICUBIC).resize((size, size), Image.Resampling.BICUBIC)
        direct = image.resize((size, size), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(np.asarray(by_turns), np.asarray(direct))
        seen.add(high)
    assert False in seen


def test_an_empty_batch_stays_empty():
    nothing = torch.empty(0, 5, 5, 3, dtype=torch.uint8), torch.empty(0, 2).long(), torch.empty(0, 3).long()
    assert changed_batch(*nothing, 4, 7.0, lambda tensor: tensor).shape == (0, 3, 4, 4)


@pytest.mark.parametrize(
    ("size", "height", "width", "sent"),
    [
        (32, 48, 48, (48, 48)),
        (32, 49, 48, (32, 32)),
        (32, 1, 400, (32, 32)),
        (300, 300, 3, (300, 3)),
        (300, 303, 3, (300, 300)),  # in which order Pillow resizes it depends on its version
    ],
)
def test_a_crop_that_is_large_or_a_line_is_resized_before_it_is_sent(size, height, width, sent):
    whole = Augmentation(min_scale=1.0)
    sample = cut_transform(Image.new("RGB", (width, height)), np.random.default_rng(0), size, whole)
    assert sample["image"].shape == (*sent, 3)
