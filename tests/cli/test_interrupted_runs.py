"""Runs of two workers that are interrupted and killed, as a user types them: they end as if nothing had happened.

Interruptions come when the record shows a step, never after fixed seconds; workers are found by the notes that they
leave in the run's folder.
"""

import contextlib
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command_line import ROOT, alone, ray_warns

from harma_ray.cli import main
from harma_ray.on_ray.deaths import read_notes
from harma_ray.on_ray.workers import WORKERS_FOLDER
from harma_ray.training.checkpoint import WEIGHTS_NAME, list_checkpoints, load_state, read_meta
from harma_ray.training.tracking import read_records
from harma_ray.tune.study import trial_folder

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1500), ray_warns]
OFTEN = {"train.epochs": 3, "train.checkpoint_every_steps": 2, "train.log_every_steps": 1, "train.threads": 1}
HARMA = {
    **OFTEN,
    "model.pretrained": "random",
    "train.global_batch_size": 8,
    "adapter.width": 16,
    "adapter.shared_width": 8,
    "adapter.num_heads": 4,
}
FINETUNE = {**OFTEN, "train.epochs": 6, "train.global_batch_size": 4}
COMBINER = {**FINETUNE, "combiner.projection_dim": 32, "combiner.hidden_dim": 16}  # drops half of the activations
TIMES = ("seconds", "pairs_per_second", "data_wait_fraction", "memory_mb", "training_seconds", "checkpoint_bytes")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("it's runs")


def train(recipe, data, run, settings, *more):
    chosen = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    return ["train", "--recipe", recipe, "--data", data, "--runs", run.parent, "--name", run.name, "--workers", 2,
            *more, *chosen]  # fmt: skip


def resume(run, *more):
    return ["train", "--resume", run, *more]


@contextlib.contextmanager
def started(arguments, environment):
    """Starts a command; kills it if the block fails."""
    command = [sys.executable, str(ROOT / "launch.py"), *map(str, arguments)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def ended(process):
    """Waits for the end of a command; returns its status and what it said."""
    out, error = process.communicate(timeout=400)
    return SimpleNamespace(status=process.returncode, out=out, error=error.strip())


def done(arguments, environment):
    with started(arguments, environment) as process:
        result = ended(process)
    assert result.status == 0, result.error[-3000:]
    assert result.error == ""
    return result


def done_here(arguments, environment):
    """Runs a command that nobody disturbs in this process; returns what it printed."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setenv("RAY_ADDRESS", environment["RAY_ADDRESS"])
        assert main([str(argument) for argument in arguments]) == 0
    return out.getvalue()


def wait_until(process, reached):
    """Waits until something holds of a command at work."""
    deadline = time.monotonic() + 400
    while not reached():
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"it never came to that: {ended(process)}")
        time.sleep(0.02)


def at_step(run, step, starts=1):
    """Whether a run has come to a step in its n-th start."""

    def reached():
        records = list(read_records(run))
        own = [number for number, record in enumerate(records) if record["kind"] == "start"]
        return len(own) >= starts and any(r["kind"] == "step" and r["step"] >= step for r in records[own[-1] :])

    return reached


def kill_worker(run, rank, how=signal.SIGKILL):
    note = next(note for note in read_notes(run / WORKERS_FOLDER) if note.rank == rank)
    os.kill(note.pid, how)
    return note


def interrupt(process, run):
    """Does as Ctrl-C in a terminal, and checks what the user is told."""
    os.killpg(process.pid, signal.SIGINT)
    result = ended(process)
    assert (result.status, len(result.error.splitlines())) == (2, 1), result.error
    assert result.error.startswith("interrupted: what was finished is kept; continue with: ")
    assert shlex.split(result.error.partition("continue with: ")[2])[-2:] == ["--resume", str(run)]
    assert not (run / "report.json").exists()


def without_times(record):
    return {name: value for name, value in record.items() if name not in TIMES}


def told(run):
    """The record of a run without times and starts, and its report."""
    records = [without_times(record) for record in read_records(run) if record["kind"] not in ("start", "notice")]
    return records, without_times(json.loads((run / "report.json").read_text()))


def same_state(left, right):
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same_state(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same_state, left, right))
    return left == right


def assert_equal_to_the_bit(run, expected):
    assert told(run) == told(expected)
    assert [path.name for path in list_checkpoints(run)] == [path.name for path in list_checkpoints(expected)]
    for left, right in zip(list_checkpoints(run), list_checkpoints(expected), strict=True):
        assert (left / WEIGHTS_NAME).read_bytes() == (right / WEIGHTS_NAME).read_bytes(), left
        assert same_state(load_state(left), load_state(right)), left


def children(pid):
    """The processes below one, by number."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    below = {pid}
    while more := {child for child, parent in parents.items() if parent in below} - below:
        below |= more
    return below - {pid}


@pytest.fixture(scope="module")
def harma(joined, scenes, runs):
    """A run that nobody disturbs."""
    done_here(train("harma-scenes", scenes, runs / "quiet", HARMA), joined)
    return runs / "quiet"


@pytest.fixture(scope="module")
def stopped(joined, scenes, runs):
    """A run one of whose workers was killed, whereupon they were started again, and which was then interrupted."""
    run = runs / "disturbed"
    with started(train("harma-scenes", scenes, run, HARMA, "--set", "scaling.max_failures=1"), joined) as process:
        wait_until(process, at_step(run, 5))
        note = kill_worker(run, 0)
        wait_until(process, at_step(run, 20, starts=2))
        assert Path(note.log).is_file()
        interrupt(process, run)
    return run


def test_a_run_goes_on_after_the_death_of_a_worker_ctrl_c_and_the_death_of_its_driver_and_cluster(
    harma, stopped, tmp_path
):
    run = Path(shutil.copytree(stopped, tmp_path / "disturbed"))
    last = read_meta(list_checkpoints(run)[-1]).step
    with started(resume(run), alone()) as process:
        wait_until(process, at_step(run, last + 5, starts=3))
        below = children(process.pid)
        process.kill()
        process.communicate(timeout=100)
    assert {note.pid for note in read_notes(run / WORKERS_FOLDER)} < below
    deadline = time.monotonic() + 100
    while left := {pid for pid in below if Path(f"/proc/{pid}").exists()}:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    done(resume(run), alone())
    assert_equal_to_the_bit(run, harma)
    steps = [record["step"] for record in read_records(run) if record["kind"] == "step"]
    assert steps == list(range(1, 76))


def test_another_number_of_workers_goes_on_with_the_same_batches(harma, stopped, joined, tmp_path):
    """Two workers, then one, then two."""
    run = Path(shutil.copytree(stopped, tmp_path / "passed on"))
    last = read_meta(list_checkpoints(run)[-1]).step
    with started(resume(run, "--workers", 1), joined) as process:
        wait_until(process, at_step(run, last + 5, starts=3))
        interrupt(process, run)
    printed = done_here(resume(run, "--workers", 2), joined)
    assert "notice: 2 worker(s) go on with what 1 began" in printed
    notices = [record["text"] for record in read_records(run) if record["kind"] == "notice"]
    assert [notice.partition(":")[0] for notice in notices] == [
        "1 worker(s) go on with what 2 began",
        "2 worker(s) go on with what 1 began",
    ]
    (records, report), (expected, expected_report) = told(run), told(harma)
    assert report["metrics"]["val"] == pytest.approx(expected_report["metrics"]["val"], abs=8)  # ranks may swap
    for record, quiet in zip(records, expected, strict=True):
        assert record["kind"] == quiet["kind"]
        if record["kind"] == "step":
            assert record["loss"] == pytest.approx(quiet["loss"], rel=1e-3)


def test_both_stages_of_composed_retrieval_survive_dead_workers_ctrl_c_and_a_dead_driver(composed, joined, runs):
    quiet, run = runs / "stage 1", runs / "stage 1 disturbed"
    done_here(train("scenes-cir-finetune", composed, quiet, FINETUNE), joined)
    with started(train("scenes-cir-finetune", composed, run, FINETUNE), joined) as process:
        wait_until(process, at_step(run, 5))
        note = kill_worker(run, 1, signal.SIGSEGV)
        result = ended(process)
    assert (result.status, len(result.error.splitlines())) == (1, 1), result.error
    assert result.error.startswith(
        f"error: worker 1 on {note.host} ({note.address}) died: Segmentation fault (SIGSEGV); its log is {note.log} "
    )
    assert "scaling.max_failures" in result.error
    command = result.error.partition("continue with: ")[2]
    assert shlex.split(command) == ["python", "launch.py", "train", "--resume", str(run)]
    crash = result.error.partition("where it crashed in ")[2].partition(";")[0]
    with started(resume(run), joined) as process:
        wait_until(process, at_step(run, 20, starts=2))
        interrupt(process, run)
    done_here(resume(run), joined)
    assert_equal_to_the_bit(run, quiet)
    assert "Segmentation fault" in Path(crash).read_text()

    first, quiet, run = quiet, runs / "stage 2", runs / "stage 2 disturbed"
    done_here(train("scenes-cir-combiner", composed, quiet, COMBINER, "--from", first), joined)
    again = train("scenes-cir-combiner", composed, run, COMBINER, "--from", first, "--set", "scaling.max_failures=1")
    with started(again, joined) as process:
        wait_until(process, at_step(run, 5))
        kill_worker(run, 1)
        wait_until(process, at_step(run, 20, starts=2))
        process.kill()
        out, _ = process.communicate(timeout=100)
    assert f"worker 1 on {note.host} ({note.address}) died: killed (SIGKILL)" in out
    assert "starting all workers again from the last checkpoint, restart 1 of 1" in out
    done_here(resume(run), joined)
    assert_equal_to_the_bit(run, quiet)


def test_a_trial_of_two_workers_ends_as_the_run_of_its_setting(harma, scenes, runs):
    """Its worker is killed, then its search interrupted and resumed."""
    fixed = ", ".join(f"{name}: {value}" for name, value in HARMA.items())
    (runs / "space.yaml").write_text(
        f"recipe: harma-scenes\nfixed: {{{fixed}}}\nspace:\n  optim.learning_rate: {{choices: [0.004]}}\n"
        "sampler: grid\nscheduler: none\nlimits: {trials: 1}\n"
    )
    folder = runs / "search"
    trial = trial_folder(folder, 0)
    options = ["--data", scenes, "--runs", runs, "--name", "search", "--workers", 2]
    with started(["tune", runs / "space.yaml", *options], alone()) as process:
        wait_until(process, at_step(trial, 5))
        kill_worker(trial, 1)
        wait_until(process, at_step(trial, 30, starts=2))
        os.killpg(process.pid, signal.SIGINT)
        result = ended(process)
    assert (result.status, len(result.error.splitlines())) == (2, 1), result.error
    done(["tune", "--resume", folder], alone())
    left, right = list_checkpoints(trial)[-1], list_checkpoints(harma)[-1]
    assert (left / WEIGHTS_NAME).read_bytes() == (right / WEIGHTS_NAME).read_bytes()
    kinds = ("step", "monitor", "evaluation")
    records = [
        [without_times(record) for record in read_records(path) if record["kind"] in kinds and record["step"]]
        for path in (trial, harma)
    ]
    assert records[0] == records[1]
