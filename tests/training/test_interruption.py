import time

import pytest

from harma_ray.data.stream import Worker, local_batches
from harma_ray.recipes import make_task, recipe_config
from harma_ray.settings import build_config
from harma_ray.training.checkpoint import load_state
from harma_ray.training.interruption import STOP_NAME, StopSignal, TrainingStopped, ask_to_stop, withdraw_stop
from harma_ray.training.loop import run_training
from harma_ray.training.run_files import list_checkpoints, read_records

SETTINGS = {
    "model.pretrained": "random",
    "train.global_batch_size": 20,
    "train.captions": "one",
    "train.epochs": 3,
    "train.log_every_steps": 1,
    "adapter.width": 16,
    "adapter.shared_width": 8,
    "adapter.num_heads": 4,
}


def run(config, path, loader=local_batches, callback=lambda metrics: None):
    return run_training(make_task(config), config, path, worker=Worker(), loader=loader, callback=callback)


def test_a_training_that_is_asked_to_stop_saves_the_step_in_hand_and_goes_on_to_the_bit(scenes, tmp_path):
    """Once in the middle of an epoch, once at its end, where it evaluates first."""
    config = build_config(recipe_config("harma-scenes"), {**SETTINGS, "data.path": str(scenes)})
    expected = run(config, tmp_path / "quiet")
    path = tmp_path / "stopped"

    def asking(source, chunks, how):
        for batch in local_batches(source, chunks, how):
            ask_to_stop(path)
            yield batch

    for last in (1, 2):
        with pytest.raises(TrainingStopped):
            run(config, path, asking)
        assert list_checkpoints(path)[-1].name == f"step_{last:08d}"
        withdraw_stop(path)
    assert not (path / STOP_NAME).exists()
    assert run(config, path)["metrics"] == expected["metrics"]
    evaluated = [record["step"] for record in read_records(path) if record["kind"] == "evaluation"]
    assert evaluated == [0, 2, 4, 6]
    left, right = list_checkpoints(path)[-1], list_checkpoints(tmp_path / "quiet")[-1]
    assert (left / "trainable.safetensors").read_bytes() == (right / "trainable.safetensors").read_bytes()
    assert load_state(left)["rng"].equal(load_state(right)["rng"])
    steps = [record["step"] for record in read_records(path) if record["kind"] == "step"]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_the_wish_is_looked_up_some_five_times_a_second(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    signal, looked = StopSignal(tmp_path), []
    real = type(tmp_path).exists
    monkeypatch.setattr(type(tmp_path), "exists", lambda path: looked.append(clock[0]) or real(path))
    for step in range(1, 201):
        clock[0] = step / 50  # 50 steps a second
        assert not signal.is_given(step)
    assert 18 <= len(looked) <= 24
    ask_to_stop(tmp_path)
    waited = next(step for step in range(201, 300) if signal.is_given(step)) - 200
    assert waited <= 10
