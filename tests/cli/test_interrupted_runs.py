"""Runs of two workers that are interrupted, or whose driver dies: they end as if nothing had happened."""

import shutil
import time
from pathlib import Path

import pytest
from command_line import alone, ray_warns
from interrupted import (
    HARMA,
    assert_equal_to_the_bit,
    at_step,
    children,
    done_here,
    interrupt,
    resume,
    started,
    told,
    train,
    train_undisturbed,
    wait_until,
)

from harma_ray.data.stream import Worker, local_batches
from harma_ray.on_ray.deaths import read_notes
from harma_ray.on_ray.workers import WORKERS_FOLDER
from harma_ray.recipes import make_task
from harma_ray.runs import CONFIG_NAME, open_run
from harma_ray.settings import build_config, to_yaml
from harma_ray.training.checkpoint import list_checkpoints, read_meta
from harma_ray.training.loop import run_training
from harma_ray.training.tracking import read_records

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1500), ray_warns]

SETTINGS = {**HARMA, "data.chunk_mb": 0.05, "data.decode": "tasks"}
"""Rows are read as those of more data, images decoded as for workers on GPUs."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("it's runs")


@pytest.fixture(scope="module")
def harma(scenes, runs):
    """A run that nobody disturbs."""
    train_undisturbed("harma-scenes", scenes, runs / "quiet", SETTINGS)
    return runs / "quiet"


@pytest.fixture(scope="module")
def stopped(joined, scenes, runs):
    """A run that was interrupted, which changes images batch by batch."""
    run = runs / "disturbed"
    with started(train("harma-scenes", scenes, run, {**SETTINGS, "data.augment": "device"}), joined) as process:
        wait_until(process, at_step(run, 8))
        interrupt(process, run)
    return run


def wait_for_end(pids):
    """Waits until processes are gone."""
    deadline = time.monotonic() + 100
    while left := {pid for pid in pids if Path(f"/proc/{pid}").exists()}:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


@pytest.fixture(scope="module")
def ending():
    """Processes that are gone in the end: Ray's agents try for a minute to tell a cluster that is dead of its death."""
    pids = set()
    yield pids
    wait_for_end(pids)


def test_a_run_goes_on_after_ctrl_c_and_the_death_of_its_driver_and_cluster(harma, stopped, joined, ending, tmp_path):
    run = Path(shutil.copytree(stopped, tmp_path / "disturbed"))
    last = read_meta(list_checkpoints(run)[-1]).step
    with started(resume(run), alone()) as process:
        wait_until(process, at_step(run, last + 4, starts=2))
        below = children(process.pid)
        process.kill()
        process.communicate(timeout=100)
    ending |= below
    workers = {note.pid for note in read_notes(run / WORKERS_FOLDER)}
    assert workers < below
    wait_for_end(workers)
    done_here(resume(run), joined)
    assert_equal_to_the_bit(run, harma)
    steps = [record["step"] for record in read_records(run) if record["kind"] == "step"]
    assert steps == list(range(1, 37))


class Stop(Exception):
    pass


def five_batches(source, chunks, how):
    for number, batch in enumerate(local_batches(source, chunks, how)):
        if number == 5:
            raise Stop
        yield batch


def test_another_number_of_workers_goes_on_with_the_same_batches(harma, stopped, joined, tmp_path):
    """Two workers, then one, which is this process, then two."""
    run = Path(shutil.copytree(stopped, tmp_path / "passed on"))
    config = build_config(open_run(run).config, {"scaling.num_workers": 1})
    (run / CONFIG_NAME).write_text(to_yaml(config))
    with pytest.raises(Stop):
        run_training(make_task(config), config, run, worker=Worker(), loader=five_batches)
    printed = done_here(resume(run, "--workers", 2), joined)
    assert open_run(run).config.scaling.num_workers == 2
    assert "notice: 2 workers took over what 1 began" in printed
    notices = [record["text"] for record in read_records(run) if record["kind"] == "notice"]
    assert [notice.partition(":")[0] for notice in notices] == [
        "1 worker took over what 2 began",
        "2 workers took over what 1 began",
    ]
    (records, report), (expected, expected_report) = told(run), told(harma)
    assert report["metrics"]["val"] == pytest.approx(expected_report["metrics"]["val"], abs=8)  # ranks may swap
    for record, quiet in zip(records, expected, strict=True):
        assert record["kind"] == quiet["kind"]
        if record["kind"] == "step":
            assert record["loss"] == pytest.approx(quiet["loss"], rel=1e-3)
