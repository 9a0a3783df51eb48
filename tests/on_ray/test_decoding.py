"""Samples that tasks decode are those that threads of the worker decode, wherever it runs and whatever happens."""

import gc
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import toy_language
from ray import cloudpickle
from toy_language import WholeCaption

from harma_ray.config import DataConfig
from harma_ray.data.decoding import DecodeInThreads, DecodeRows, decoded
from harma_ray.data.samples import RowTransform
from harma_ray.errors import UserError

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.usefixtures("ray_cluster"),
]

for module in (sys.modules[__name__], toy_language):  # other processes cannot import them
    cloudpickle.register_pickle_by_value(module)


class Noise(RowTransform):
    """A tensor, an array and a number drawn from the row's generator."""

    def __call__(self, row, rng):
        return {"image": torch.from_numpy(rng.random((3, 5))), "text": rng.integers(9, size=4), "number": rng.random()}


class Broken(Noise):
    def __call__(self, row, rng):
        raise TypeError("no number")


class OnceDead(Noise):
    """Kills the process that makes row 3, the first time."""

    def __init__(self, mark):
        self.mark = mark

    def __call__(self, row, rng):
        if row["row"] == 3 and not Path(self.mark).exists():
            Path(self.mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(row, rng)


class Refusing(Noise):
    def __call__(self, row, rng):
        raise UserError("has no letters")


def rows(count=150):
    numbers = np.arange(count)
    return pa.table({
        "row": numbers, "caption": numbers % 2, "epoch": np.ones(count, np.int64),
        "source": [f"{number}.png" for number in numbers],
        "captions": [["a ship" + "s" * (number % 7), "a port"] for number in numbers],
    })  # fmt: skip


def in_tasks(transform):
    from harma_ray.on_ray.decoding import DecodeInTasks

    return DecodeInTasks(DecodeRows(transform, seed=5), task_cpus=0.5, num_tables=2)


def batches(transform, *tables, decoder=in_tasks):
    return list(
        decoded((table for table in tables), DecodeRows(transform, seed=5).collate, decoder(transform), ahead=2)
    )


@pytest.mark.filterwarnings("error::UserWarning")  # torch's, of arrays that must not be written to
@pytest.mark.parametrize("transform", [Noise(), WholeCaption()], ids=["stacked", "end to end"])
@pytest.mark.parametrize("count", [1, 7, 150])
def test_tasks_and_threads_make_the_batches_that_are_made_one_by_one(transform, count):
    tables = [rows(count).slice(start, 50) for start in range(0, count, 50)] * 4
    expected = [DecodeRows(transform, seed=5)(table) for table in tables]
    for decoder in (in_tasks, lambda transform: DecodeInThreads(DecodeRows(transform, seed=5), 3)):
        for left, right in zip(expected, batches(transform, *tables, decoder=decoder), strict=True):
            assert left.keys() == right.keys()
            assert all(torch.equal(torch.as_tensor(left[name]), torch.as_tensor(right[name])) for name in left)


def test_samples_that_are_joined_come_apart_as_they_were():
    from harma_ray.on_ray.decoding import Joined

    rng = np.random.default_rng(0)
    samples = [
        {"image": rng.integers(0, 256, (number, 2, 3), np.uint8), "text": torch.arange(number), "id": np.int64(number)}
        for number in (3, 0, 1)
    ]
    found = list(Joined.of(samples).samples())
    for sample, back in zip(samples, found, strict=True):
        assert sample.keys() == back.keys()
        for name, value in sample.items():
            assert back[name].dtype == np.asarray(value).dtype
            np.testing.assert_array_equal(back[name], np.asarray(value), strict=True)
    for unlike in (samples[0] | {"more": 1}, samples[0] | {"id": 1.0}, {}):
        with pytest.raises(TypeError, match="same names and types"):
            Joined.of([*samples, unlike])


def test_a_task_whose_process_dies_is_done_again(tmp_path):
    (found,) = batches(OnceDead(str(tmp_path / "died")), rows())
    assert (tmp_path / "died").exists()
    np.testing.assert_array_equal(found["image"], DecodeRows(Noise(), seed=5)(rows())["image"])


def finished(*batches):
    """Waits for all tasks of some tables."""
    import ray

    references = [reference for batch in batches for reference in batch]
    assert len(ray.wait(references, num_returns=len(references), timeout=60)[0]) == len(references)


@pytest.mark.parametrize(
    ("transform", "kind", "message"),
    [
        (Refusing(), UserError, r"^row 0 \(0\.png\): has no letters$"),
        (Broken(), TypeError, "no number"),
    ],
    ids=["mistake", "bug"],
)
def test_what_goes_wrong_first_is_told_and_of_the_rest_nothing(transform, kind, message, capfd):
    decoder = in_tasks(transform)
    begun = [decoder.begin(rows()) for _ in range(4)]
    with pytest.raises(kind, match=message) as caught:
        decoder.finish(begun[0])
    assert ("in _sample" in "".join(getattr(caught.value, "__notes__", []))) == (kind is TypeError)  # where it happened
    finished(*begun)
    del begun
    gc.collect()
    with pytest.raises(RuntimeError, match="closed"):
        decoder.begin(rows())
    assert capfd.readouterr() == ("", "")


def test_a_stream_that_waits_for_tasks_ends_soon_though_they_never_run(ray_cluster):
    import ray

    @ray.remote(num_cpus=ray_cluster.cpus)
    class Everything:
        pass

    everything = Everything.remote()
    ray.get(everything.__ray_ready__.remote())
    decoder = in_tasks(Noise())
    begun, closing = decoder.begin(rows()), threading.Timer(1, decoder.close)
    try:
        closing.start()
        start = time.monotonic()
        with pytest.raises(RuntimeError, match="closed"):
            decoder.finish(begun)
        assert 0.9 < time.monotonic() - start < 8
    finally:
        ray.kill(everything)
        finished(begun)


def test_small_batches_keep_all_cpus_busy_as_far_as_memory_goes(ray_cluster, monkeypatch):
    import ray

    from harma_ray.on_ray import decoding

    def ahead(table):
        decoder = in_tasks(Noise())
        before = decoder.ahead()
        decoder.finish(decoder.begin(table))
        return before, decoder.ahead()

    busy = 3 * ray_cluster.cpus  # tasks of half a CPU, and half as many again
    assert ahead(rows(4)) == (2, busy)
    assert ahead(rows(65)) == (2, -(-busy // 2))  # of two tasks each
    size = 3 * 5 * 8 + 4 * 8 + 8
    store = ray.cluster_resources()["object_store_memory"]
    monkeypatch.setattr(decoding, "STORE_SHARE", (3 * 4 * size + 1) / store)
    assert ahead(rows(4)) == (2, 3)
    monkeypatch.setattr(decoding, "STORE_SHARE", 1 / store)
    assert ahead(rows(4)) == (2, 2)


@pytest.mark.parametrize(
    ("cpus", "gpus", "task_cpus", "tasks"),
    [(2, 0, 0.5, 6), (16, 1, 0.5, 48), (16, 1, 1, 24), (64, 8, 0.5, 24), (2000, 0, 0.5, 64), (1, 0, 4, 1)],
)
def test_a_worker_has_as_many_tasks_begun_as_its_share_of_the_cluster_runs(cpus, gpus, task_cpus, tasks):
    from harma_ray.on_ray.decoding import tasks_ahead

    assert tasks_ahead({"CPU": cpus, "GPU": gpus, "memory": 1e9}, task_cpus) == tasks


def test_a_worker_that_holds_all_cpus_of_its_place_is_not_waited_for():
    """A trial is an actor in a placement group that takes its tasks in, too, and there is no CPU left in it."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    place = placement_group([{"CPU": 1}])
    strategy = PlacementGroupSchedulingStrategy(place, placement_group_capture_child_tasks=True)

    @ray.remote(num_cpus=1, scheduling_strategy=strategy)
    class Trial:
        def batch(self):
            return batches(Noise(), rows())[0]["image"]

    try:
        found = ray.get(Trial.remote().batch.remote(), timeout=60)
        np.testing.assert_array_equal(found, DecodeRows(Noise(), seed=5)(rows())["image"])
    finally:
        remove_placement_group(place)


def test_tasks_decode_for_gpus_unless_the_settings_say_otherwise():
    settings = DataConfig()
    assert [settings.decodes_in_tasks(on_gpu=gpu) for gpu in (False, True)] == [False, True]
    assert [replace(settings, decode="tasks").decodes_in_tasks(on_gpu=gpu) for gpu in (False, True)] == [True, True]
    assert [settings.augments_on_device(on_gpu=gpu) for gpu in (False, True)] == [False, True]
    assert [replace(settings, augment="device").augments_on_device(on_gpu=gpu) for gpu in (False, True)] == [True, True]
    assert [replace(settings, augment="cpu").augments_on_device(on_gpu=gpu) for gpu in (False, True)] == [False, False]
    assert [replace(settings, decode="worker").decodes_in_tasks(on_gpu=gpu) for gpu in (False, True)] == [False, False]
