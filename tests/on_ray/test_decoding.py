"""Samples that tasks decode are those that threads of the worker decode, wherever it runs and whatever happens."""

import os
import signal
import sys
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
from harma_ray.data.samples import RowTransform
from harma_ray.data.stream import DecodeRows
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


class FirstRefused(Noise):
    """Refuses the first row; the others take a while and leave a mark."""

    def __init__(self, marks):
        self.marks = marks

    def __call__(self, row, rng):
        if not row["row"]:
            raise UserError("has no letters")
        time.sleep(0.1)
        Path(self.marks, str(row["row"])).touch()
        return super().__call__(row, rng)


def rows(count=150):
    numbers = np.arange(count)
    return pa.table({
        "row": numbers, "caption": numbers % 2, "epoch": np.ones(count, np.int64),
        "source": [f"{number}.png" for number in numbers],
        "captions": [["a ship" + "s" * (number % 7), "a port"] for number in numbers],
    })  # fmt: skip


def in_tasks(transform):
    from harma_ray.on_ray.decoding import DecodeInTasks

    return DecodeInTasks(DecodeRows(transform, seed=5), task_cpus=0.5)


@pytest.mark.filterwarnings("error::UserWarning")  # torch's, of arrays that must not be written to
@pytest.mark.parametrize("transform", [Noise(), WholeCaption()], ids=["stacked", "end to end"])
@pytest.mark.parametrize("count", [1, 7, 150])
def test_tasks_make_the_batch_that_threads_make(transform, count):
    expected = DecodeRows(transform, seed=5, num_threads=3)(rows(count))
    found = in_tasks(transform)(rows(count))
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(values))


def test_a_task_whose_process_dies_is_done_again(tmp_path):
    found = in_tasks(OnceDead(str(tmp_path / "died")))(rows())
    assert (tmp_path / "died").exists()
    np.testing.assert_array_equal(found["image"], DecodeRows(Noise(), seed=5)(rows())["image"])


def test_a_row_that_cannot_be_used_is_told_as_the_mistake_that_it_is():
    with pytest.raises(UserError, match=r"^row \d+ \(\d+\.png\): has no letters$"):
        in_tasks(Refusing())(rows())


def test_nobody_decodes_the_rest_of_a_batch_with_a_row_that_cannot_be_used(tmp_path):
    decode = in_tasks(FirstRefused(str(tmp_path)))
    with pytest.raises(UserError, match="has no letters"):
        decode(rows())
    time.sleep(6)  # all of them take four
    assert len(list(tmp_path.iterdir())) < 100


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
            return in_tasks(Noise())(rows())["image"]

    try:
        found = ray.get(Trial.remote().batch.remote(), timeout=60)
        np.testing.assert_array_equal(found, DecodeRows(Noise(), seed=5)(rows())["image"])
    finally:
        remove_placement_group(place)


def test_tasks_decode_for_gpus_unless_the_settings_say_otherwise():
    settings = DataConfig()
    assert [settings.decodes_in_tasks(on_gpu=gpu) for gpu in (False, True)] == [False, True]
    assert [replace(settings, decode="tasks").decodes_in_tasks(on_gpu=gpu) for gpu in (False, True)] == [True, True]
    assert [replace(settings, decode="worker").decodes_in_tasks(on_gpu=gpu) for gpu in (False, True)] == [False, False]
