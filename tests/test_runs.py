"""Runs on disk: their folder, their lock; where output may go."""

import contextlib
import threading

import pytest

from harma_ray.errors import UserError
from harma_ray.files import output_path, write_text
from harma_ray.recipes import load_config, recipe_config
from harma_ray.runs import create_run
from harma_ray.settings import build_config


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
