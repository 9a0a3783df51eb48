import io
import math
import re
import sys
import threading
import time
from dataclasses import replace
from functools import partial

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from ray import cloudpickle
from torchvision.transforms import functional as F

from harma_ray.config import DataConfig
from harma_ray.data.order import training_order
from harma_ray.data.samples import RowTransform
from harma_ray.data.splits import open_split
from harma_ray.data.stream import EvaluationStream, TrainingStream, Worker, local_batches
from harma_ray.data.transforms import OPERATIONS, PUBLISHED, _draw_crop
from harma_ray.errors import UserError, find_user_error
from harma_ray.recipes import make_task, recipe_config

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # tasks cannot import a test
CONFIG = DataConfig(chunk_mb=0.05)


@pytest.fixture(scope="module")
def transform():
    return make_task(recipe_config("harma-scenes")).transform(training=True)


class LaterRefused(RowTransform):
    """Refuses all rows of the second epoch, which are read by tasks."""

    def __init__(self, transform):
        self.transform = transform

    def __call__(self, row, rng):
        if row["epoch"]:
            raise UserError("has been looked at")
        return self.transform(row, rng)


def stream(scenes, transform, *, world_size=1, rank=0, loader=local_batches, config=CONFIG):
    order = training_order(open_split(scenes, "train"), seed=3, global_batch_size=8, shuffle_window_mb=256)
    return TrainingStream(order, transform, config, Worker(rank, world_size), loader)


def collect(batches):
    return {
        (epoch_step, int(row), int(caption)): image
        for epoch_step, batch in enumerate(batches)
        for row, caption, image in zip(batch["row"], batch["caption"], batch["image"], strict=True)
    }


def test_batches_and_augmentation_do_not_depend_on_the_number_of_workers(scenes, transform):
    alone = collect(stream(scenes, transform).steps(0, 2))
    together = {}
    for rank in range(2):
        together |= collect(stream(scenes, transform, world_size=2, rank=rank).steps(0, 2))
    assert alone.keys() == together.keys()
    assert all(torch.equal(alone[key], together[key]) for key in alone)


def plain_image(data, size, seeds):
    """The published augmentation as it is usually written: Pillow and torchvision's functions alone."""
    rng, image = np.random.default_rng(seeds), Image.open(io.BytesIO(data)).convert("RGB")
    box = _draw_crop(image.height, image.width, rng, PUBLISHED)
    image = F.resized_crop(image, *box, [size, size], F.InterpolationMode.BICUBIC)
    image = F.hflip(image) if rng.random() < 0.5 else image
    for position in rng.integers(len(OPERATIONS), size=2):
        applied, negative = rng.random(2) < 0.5
        if applied:
            image = plain_operation(image, OPERATIONS[position], -1 if negative else 1)
    return F.pil_to_tensor(image)


def plain_operation(image, name, sign):
    shear, shift = math.degrees(math.atan(sign * 0.21)), 0.7 * (sign * 10 / 224 * image.width)
    affine = partial(
        F.affine, image, 0, scale=1, interpolation=F.InterpolationMode.BILINEAR, fill=[128] * 3, center=[0, 0]
    )
    return {
        "identity": lambda: image,
        "autocontrast": lambda: F.autocontrast(image),
        "equalize": lambda: F.equalize(image),
        "brightness": lambda: F.adjust_brightness(image, 1.8 * 0.7 + 0.1),
        "sharpness": lambda: F.adjust_sharpness(image, 1.8 * 0.7 + 0.1),
        "shear_x": lambda: affine(translate=[0, 0], shear=[shear, 0]),
        "shear_y": lambda: affine(translate=[0, 0], shear=[0, shear]),
        "translate_x": lambda: affine(translate=[shift, 0], shear=[0, 0]),
        "translate_y": lambda: affine(translate=[0, shift], shear=[0, 0]),
        "rotate": lambda: F.rotate(image, sign * 21, F.InterpolationMode.BILINEAR, fill=[128] * 3),
    }[name]()


@pytest.mark.parametrize(("size", "augment"), [(64, "cpu"), (224, "cpu"), (64, "device"), (40, "device")])
def test_batches_are_those_of_plain_pillow_torchvision_and_tokenizer(scenes, transform, size, augment):
    published = replace(transform, architecture="ViT-B-32", size=size, augmentation=PUBLISHED)
    rows = open_split(scenes, "train").read(["image", "captions"]).to_pylist()
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    for step, batch in enumerate(stream(scenes, published, config=replace(CONFIG, augment=augment)).steps(0, 2)):
        assert batch.keys() == {"row", "caption", "image", "text", "image_id", "label"}
        for number, (row, caption) in enumerate(zip(batch["row"].tolist(), batch["caption"].tolist(), strict=True)):
            image = plain_image(rows[row]["image"], size, [3, step // 25, row, caption])
            assert torch.equal(batch["image"][number], image)
            assert torch.equal(batch["text"][number], tokenizer([rows[row]["captions"][caption]])[0])


def test_augmentation_changes_from_epoch_to_epoch(scenes, transform):
    batches = list(stream(scenes, transform).steps(0, 2))
    seen = {}
    for number, batch in enumerate(batches):
        for row, caption, image in zip(batch["row"], batch["caption"], batch["image"], strict=True):
            seen.setdefault((int(row), int(caption)), {})[number // 25] = image
    both = [images for images in seen.values() if len(images) == 2]
    assert len(both) == 200
    assert np.mean([torch.equal(images[0], images[1]) for images in both]) < 0.05


def test_a_stream_goes_on_at_any_step(scenes, transform):
    whole = list(stream(scenes, transform).steps(0, 2))
    rest = list(stream(scenes, transform).steps(31, 2))
    assert len(rest) == 19
    for expected, batch in zip(whole[31:], rest, strict=True):
        assert all(torch.equal(expected[name], batch[name]) for name in expected)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_yields_every_row_once(scenes, world_size):
    transform = make_task(recipe_config("harma-scenes")).transform(training=False)
    split = open_split(scenes, "val")
    rows = []
    for rank in range(world_size):
        worker = Worker(rank, world_size)
        for batch in EvaluationStream(split, CONFIG, worker, local_batches).batches(transform, batch_size=4):
            rows += batch["row"].tolist()
    assert rows == list(range(13))


def test_a_row_that_cannot_be_used_is_named(scenes, transform):
    with pytest.raises(UserError, match=r"row \d+ \(.*\): .*pixels"):
        next(stream(scenes, replace(transform, max_pixels=10)).steps(0, 1))


def test_a_reader_that_changes_the_order_is_found_out(scenes, transform):
    def shuffled(source, chunks, how):
        return local_batches(source, list(chunks)[::-1], how)

    with pytest.raises(RuntimeError, match="another order"):
        list(stream(scenes, transform, loader=shuffled).steps(0, 1))


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("decode", ["worker", "tasks"])
def test_ray_data_yields_the_same_batches_as_reading_in_process(scenes, transform, ray_cluster, decode):
    from harma_ray.on_ray.stream import ray_batches

    config = replace(CONFIG, decode=decode)
    expected = list(stream(scenes, transform).steps(55, 3))
    batches = list(stream(scenes, transform, loader=ray_batches, config=config).steps(55, 3))
    assert len(batches) == len(expected) == 20
    rows = make_task(recipe_config("harma-scenes")).transform(training=False)
    for loader, found in ((local_batches, expected), (ray_batches, batches)):
        split = EvaluationStream(open_split(scenes, "train"), config, Worker(), loader, max_rows=33)
        found += split.batches(rows, batch_size=7)
    for left, right in zip(expected, batches, strict=True):
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_the_first_chunk_is_there_before_any_task_has_read(scenes, transform, ray_cluster, monkeypatch):
    from harma_ray.on_ray import stream as on_ray

    gate, by_tasks, expected = threading.Event(), on_ray._read_by_tasks, list(stream(scenes, transform).steps(0, 1))

    def late(*arguments):
        gate.wait()
        yield from by_tasks(*arguments)

    monkeypatch.setattr(on_ray, "_read_by_tasks", late)
    batches = stream(scenes, transform, loader=on_ray.ray_batches).steps(0, 1)
    try:
        found = [next(batches)]
    finally:
        gate.set()
    found += batches
    assert [batch["row"].tolist() for batch in found] == [batch["row"].tolist() for batch in expected]


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_one_place_for_tasks_is_enough_for_reading_and_decoding(scenes, transform, ray_cluster, monkeypatch):
    from ray.data import DataContext

    from harma_ray.on_ray.stream import ray_batches

    monkeypatch.setattr(DataContext.get_current(), "target_max_block_size", 1000)  # a chunk would be many blocks
    config = replace(CONFIG, decode="tasks", task_cpus=ray_cluster.cpus, chunk_mb=0.1)
    expected = list(stream(scenes, transform).steps(50, 3))
    batches = list(stream(scenes, transform, loader=ray_batches, config=config).steps(50, 3))
    assert [batch["row"].tolist() for batch in batches] == [batch["row"].tolist() for batch in expected]


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_stream_ends_soon_though_no_task_ever_reads(scenes, transform, ray_cluster, monkeypatch):
    from harma_ray.on_ray import stream as on_ray

    gate, closed = threading.Event(), threading.Event()

    def never(*arguments):
        gate.wait()
        try:
            yield
        finally:
            closed.set()

    monkeypatch.setattr(on_ray, "_read_by_tasks", never)
    monkeypatch.setattr(on_ray, "CLOSING_SECONDS", 0.5)
    batches = stream(scenes, transform, loader=on_ray.ray_batches).steps(0, 1)
    next(batches)
    begun = time.monotonic()
    batches.close()
    assert time.monotonic() - begun < 5
    assert not closed.is_set()
    gate.set()
    assert closed.wait(10)


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_split_that_fits_a_chunk_yields_the_same_batches_without_tasks(scenes, transform, ray_cluster, monkeypatch):
    import ray.data

    from harma_ray.on_ray.stream import ray_batches

    def no_tasks(*arguments, **options):
        raise AssertionError("tasks read")

    monkeypatch.setattr(ray.data, "read_datasource", no_tasks)
    whole = replace(CONFIG, chunk_mb=32)
    expected = list(stream(scenes, transform).steps(20, 3))
    batches = list(stream(scenes, transform, loader=ray_batches, config=whole).steps(20, 3))
    assert len(batches) == len(expected) == 55
    for left, right in zip(expected, batches, strict=True):
        assert all(torch.equal(left[name], right[name]) for name in left)
    with pytest.raises(AssertionError, match="tasks read"):
        list(stream(scenes, transform, loader=ray_batches).steps(20, 3))


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("decode", ["worker", "tasks"])
def test_a_row_that_cannot_be_used_is_named_wherever_it_is_decoded(scenes, transform, ray_cluster, decode):
    from harma_ray.on_ray.stream import ray_batches

    config, batches = replace(CONFIG, decode=decode), []
    with pytest.raises(Exception) as caught:  # noqa: PT011
        batches += stream(scenes, LaterRefused(transform), loader=ray_batches, config=config).steps(0, 2)
    assert re.match(r"row \d+ \(.*\): has been looked at$", str(find_user_error(caught.value)))


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_stream_that_is_ahead_does_not_keep_a_core_busy(scenes, transform, ray_cluster, monkeypatch):
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

    from harma_ray.on_ray.stream import ray_batches

    step, steps = StreamingExecutor._scheduling_loop_step, []

    def counted(*arguments):
        steps.append(time.monotonic())
        return step(*arguments)

    monkeypatch.setattr(StreamingExecutor, "_scheduling_loop_step", counted)
    batches = stream(scenes, transform, loader=ray_batches).steps(0, 200)
    next(batches)
    while len(steps) < 80:  # a loop that spins makes hundreds a second
        time.sleep(0.01)
    batches.close()
    assert np.min(np.diff(steps)) >= 0.02  # it rests after each step, however busy the machine is
