"""Both stages of composed retrieval on two workers that are killed, as is their driver: they end as if undisturbed."""

import shlex
import signal
from pathlib import Path

import pytest
from command_line import ray_warns
from interrupted import (
    OFTEN,
    assert_equal_to_the_bit,
    at_step,
    done_here,
    ended,
    kill_worker,
    resume,
    started,
    train,
    train_undisturbed,
    wait_until,
)

from harma_ray.vectors.features import FOLDER

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1500), ray_warns]
FINETUNE = {**OFTEN, "train.global_batch_size": 4}
COMBINER = {**FINETUNE, "train.epochs": 4, "combiner.projection_dim": 32, "combiner.hidden_dim": 16}
"""It drops half of the activations."""


def test_both_stages_of_composed_retrieval_survive_dead_workers_and_a_dead_driver(composed, joined, tmp_path):
    runs = tmp_path / "it's runs"
    quiet, run = runs / "stage 1", runs / "stage 1 disturbed"
    train_undisturbed("scenes-cir-finetune", composed, quiet, FINETUNE)
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
    done_here(resume(run), joined)
    assert_equal_to_the_bit(run, quiet)
    assert "Segmentation fault" in Path(crash).read_text()

    first, quiet, run = quiet, runs / "stage 2", runs / "stage 2 disturbed"
    again = train("scenes-cir-combiner", composed, run, COMBINER, "--from", first, "--set", "scaling.max_failures=1")
    with started(again, joined) as process:
        wait_until(process, at_step(run, 5))
        kill_worker(run, 0)
        wait_until(process, at_step(run, 20, starts=2))
        process.kill()
        out, _ = process.communicate(timeout=100)
    assert f"worker 0 on {note.host} ({note.address}) died: killed (SIGKILL)" in out
    assert "starting all workers again from the last checkpoint, restart 1 of 1" in out
    done_here(resume(run), joined)
    train_undisturbed("scenes-cir-combiner", run / FOLDER, quiet, COMBINER, first)
    assert_equal_to_the_bit(run, quiet)
