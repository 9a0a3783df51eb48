"""Commands that are interrupted and killed, and what must be equal in the end.

Interruptions come when the record shows a step, never after fixed seconds; workers are found by the notes that they
leave in the run's folder.
"""

import contextlib
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from command_line import ROOT
from ranks import run_on_ranks

from harma_ray.cli import main
from harma_ray.data.stream import Worker, local_batches
from harma_ray.on_ray.deaths import read_notes
from harma_ray.on_ray.workers import WORKERS_FOLDER
from harma_ray.recipes import recipe_config
from harma_ray.runs import create_run, open_run
from harma_ray.settings import build_config
from harma_ray.training.checkpoint import WEIGHTS_NAME, load_state
from harma_ray.training.interruption import STOP_NAME
from harma_ray.training.loop import run_training
from harma_ray.training.run_files import list_checkpoints, read_meta, read_records
from harma_ray.training.tracking import METRICS_NAME

OFTEN = {"train.epochs": 3, "train.checkpoint_every_steps": 2, "train.log_every_steps": 1, "train.threads": 1}
HARMA = {
    **OFTEN,
    "model.pretrained": "random",
    "train.global_batch_size": 16,
    "adapter.width": 16,
    "adapter.shared_width": 8,
    "adapter.num_heads": 4,
}
"""A training of a dozen steps an epoch."""
TIMES = ("seconds", "pairs_per_second", "data_wait_fraction", "memory_mb", "training_seconds", "checkpoint_bytes")


def train(recipe, data, run, settings, *more):
    chosen = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    return ["train", "--recipe", recipe, "--data", data, "--runs", run.parent, "--name", run.name, "--workers", 2,
            *more, *chosen]  # fmt: skip


def resume(run, *more):
    return ["train", "--resume", run, *more]


def train_undisturbed(recipe, data, run, settings, first=None):
    """Trains a run by two plain processes of torch, without Ray and its streams: what disturbed ones must be equal to.

    Args:
        recipe: Its recipe.
        data: Its data set.
        run: Its folder.
        settings: What it sets.
        first: The run that it builds on.
    """
    base = recipe_config(recipe)
    before = base.after(open_run(first)) if first else {}
    config = build_config(base, {"data.path": str(data), "scaling.num_workers": 2, **before, **settings})
    run_on_ranks(_train_rank, 2, create_run(run.parent, run.name, config), run.parent / f"{run.name}.store")


def _train_rank(rank, run, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    run_training(run.task, run.config, run.path, worker=Worker(rank, 2), loader=local_batches)
    dist.destroy_process_group()


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
    assert result.error == "", result.error[-3000:]
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
        time.sleep(0.05)


def at_step(run, step, starts=1):
    """Whether a run has come to a step in its n-th start; its record is read only when it has grown."""
    record, size = run / METRICS_NAME, -1

    def reached():
        nonlocal size
        before, size = size, record.stat().st_size if record.exists() else -1
        if size == before:
            return False
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
    assert_saved(run)


def assert_saved(run):
    """Checks that a run that was interrupted lost no step."""
    done = max(record["step"] for record in read_records(run) if record["kind"] == "step")
    assert read_meta(list_checkpoints(run)[-1]).step == done
    assert not (run / STOP_NAME).exists()


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
