"""Runs on disk: their folder, their lock; where output may go."""

import contextlib
import json
import logging
import threading
from dataclasses import asdict, replace

import pytest

from harma_ray.errors import UserError
from harma_ray.files import output_path, write_text
from harma_ray.recipes import load_config, recipe_config
from harma_ray.runs import create_run
from harma_ray.settings import build_config
from harma_ray.training.run_files import META_NAME, METRICS_NAME, REPORT_NAME, CheckpointMeta, checkpoint_path


@pytest.fixture
def config():
    return build_config(recipe_config("harma-scenes"), {"optim.learning_rate": 4e-6, "train.precision": "bf16"})


def test_the_config_of_a_run_reads_back_as_it_was(config, tmp_path):
    run = create_run(tmp_path, "one", config)
    assert load_config(run.path / "config.yaml") == config


def test_a_taken_name_is_refused(config, tmp_path):
    create_run(tmp_path, "one", config)
    with pytest.raises(UserError, match="choose another --name"):
        create_run(tmp_path, "one", config)


def test_a_folder_that_cannot_be_written_is_refused(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another --runs"):
        create_run(tmp_path / "file" / "runs", "one", config)


def test_a_run_is_trained_by_one_process_at_a_time(config, tmp_path):
    run = create_run(tmp_path, "one", config)
    with run.locked(), pytest.raises(UserError, match="another process"), run.locked():
        pass
    with run.locked():
        pass


def test_a_lock_may_wait_for_another_process_to_end(config, tmp_path):
    run = create_run(tmp_path, "one", config)
    with contextlib.ExitStack() as other:
        other.enter_context(run.locked())
        timer = threading.Timer(0.3, other.close)
        timer.start()
        with run.locked(wait_seconds=60):
            assert not timer.is_alive()


def test_relative_output_of_a_job_is_refused(tmp_path, monkeypatch):
    copy = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    with pytest.raises(UserError, match="absolute path"):
        output_path("runs")
    assert output_path(tmp_path / "runs") == tmp_path / "runs"
    monkeypatch.chdir(tmp_path)
    assert output_path("runs") == tmp_path / "runs"


def test_a_text_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    file = tmp_path / "config.yaml"
    write_text(file, "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left"):
        write_text(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


@pytest.fixture
def stopped(config, tmp_path):
    """A run of 20 epochs, stopped in its third; its best checkpoint is that of the untrained model."""
    run = create_run(tmp_path, "one", build_config(config, {"train.epochs": 20}))
    for step, epoch, r_mean in ((0, 0, 9.0), (25, 2.5, 8.0)):
        folder = checkpoint_path(run.path, step)
        folder.mkdir(parents=True)
        meta = CheckpointMeta(step, epoch, {"r_mean": r_mean}, {}, "", config.recipe, "")
        (folder / META_NAME).write_text(json.dumps(asdict(meta)))
    (run.path / METRICS_NAME).write_text("")
    return run


def test_of_a_run_that_is_not_finished_it_is_told_once_which_checkpoint_is_used(stopped, caplog):
    for _ in range(2):
        assert stopped.best_checkpoint().name == "step_00000000"
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    told = "used is its best checkpoint so far, step 0 (epoch 0, the untrained model)"
    assert caplog.messages == [f"run {stopped.path} is not finished (epoch 2.5 of 20): {told}"]


def test_planned_steps_are_told_where_they_are_what_is_planned(stopped, caplog):
    replace(stopped, config=build_config(stopped.config, {"train.steps": 40})).best_checkpoint()
    assert "(step 25 of 40)" in caplog.text


@pytest.mark.parametrize("kind", ["finished", "imported", "trained to its end"])
def test_nothing_is_told_of_runs_that_will_not_go_on(stopped, caplog, kind):
    if kind == "finished":
        (stopped.path / REPORT_NAME).write_text("{}")
    elif kind == "imported":
        (stopped.path / METRICS_NAME).unlink()
    else:
        stopped = replace(stopped, config=build_config(stopped.config, {"train.steps": 25}))
    stopped.best_checkpoint()
    assert not caplog.messages


def test_a_start_from_a_run_that_its_training_made_no_better_is_told(stopped, caplog):
    (stopped.path / REPORT_NAME).write_text("{}")
    stopped.best_start()
    assert [message.partition(": its")[0] for message in caplog.messages] == [
        f"the best checkpoint of {stopped.path} is that of step 0, the untrained model"
    ]


def test_of_weights_that_were_imported_step_0_is_all_that_there_is(stopped, caplog):
    (stopped.path / METRICS_NAME).unlink()
    stopped.best_start()
    assert not caplog.messages
