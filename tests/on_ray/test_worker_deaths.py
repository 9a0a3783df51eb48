"""What is said of workers that ended, from what Ray gives: exceptions of Ray Train with those of Ray inside."""

import json
import os
import socket
from dataclasses import asdict

import pytest
import ray.exceptions
from ray.core.generated.common_pb2 import ActorDiedErrorContext, NodeDeathInfo
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError

from harma_ray.cli import main
from harma_ray.errors import WorkerDied, WorkerFailed
from harma_ray.on_ray.deaths import WorkerNote, drop_notes, leave_note, leave_trace, read_notes, what_happened

LOST = "Worker unexpectedly exits with a connection error code 2. End of file. Some common causes include: ..."


def died(message, **more):
    context = ActorDiedErrorContext(error_message=message, actor_id=b"1" * 16, **more)
    return WorkerHealthCheckFailedError("A worker health check failed.", ray.exceptions.ActorDiedError(context))


@pytest.fixture
def notes(tmp_path):
    """The notes of two workers, the second of which crashed if a test says so."""
    folder = tmp_path / "workers"
    folder.mkdir()
    for rank in range(2):
        note = WorkerNote(rank, 100 + rank, "gpu7", "10.0.0.7", f"/tmp/ray/worker-{rank}.err", None)
        (folder / f"worker-{rank}.json").write_text(json.dumps(asdict(note)))
        (folder / f"worker-{rank}-gpu7-{100 + rank}.crash").write_text("")
    return folder


@pytest.mark.parametrize(
    ("failure", "why"),
    [
        (died(f"Worker exit detail: {LOST}"), "killed (SIGKILL), by somebody or by a system short of memory"),
        (died("The actor died because its node has died. Node Id: 4f"), "its machine was lost"),
        (
            died("", node_death_info=NodeDeathInfo(reason=NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED)),
            "its machine was taken away (preempted)",
        ),
        (
            WorkerHealthCheckFailedError("", ray.exceptions.OutOfMemoryError("killed: the node ran low")),
            "Ray killed it because its machine's memory ran out",
        ),
        (died("Worker exit detail: Worker exits with exit code 3."), "Worker exits with exit code 3."),
    ],
)
def test_a_dead_worker_is_told_in_one_line(notes, failure, why):
    error = what_happened({0: RuntimeError("Connection closed by peer"), 1: failure}, notes)
    assert isinstance(error, WorkerDied)
    assert str(error) == f"worker 1 on gpu7 (10.0.0.7) died: {why}; its log is /tmp/ray/worker-1.err there"


def test_a_crash_is_told_by_its_signal_and_where_it_was(notes):
    crash = notes / "worker-1-gpu7-101.crash"
    crash.write_text("Fatal Python error: Bus error\n\nCurrent thread ...")
    assert str(what_happened({1: died(LOST)}, notes)) == (
        f"worker 1 on gpu7 (10.0.0.7) died: Bus error (SIGBUS); its log is /tmp/ray/worker-1.err there, where it "
        f"crashed in {crash}"
    )


def test_a_kill_of_a_machine_that_counts_one_more_is_put_down_to_its_memory(notes, monkeypatch):
    note = WorkerNote(1, 101, socket.gethostname(), "10.0.0.7", "", 4)
    (notes / "worker-1.json").write_text(json.dumps(asdict(note)))
    for kills, why in ((4, "by somebody or by a system short of memory"), (5, "by the system, whose memory ran out")):
        monkeypatch.setattr("harma_ray.on_ray.deaths._memory_kills", lambda kills=kills: kills)
        assert f"died: killed (SIGKILL){'' if kills == 5 else ','} {why}; its log is in the logs of Ray there" in str(
            what_happened({1: died(LOST)}, notes)
        )


def test_several_dead_workers_and_one_that_never_began_are_told(notes):
    (notes / "worker-0.json").unlink()
    error = what_happened({0: died(LOST), 1: died(LOST)}, notes)
    assert str(error).startswith("worker 0 died: killed")
    assert str(error).endswith("(and 1 other); it had not begun to work")


def test_what_a_worker_raised_is_told_with_the_place_of_its_trace(tmp_path, monkeypatch):
    monkeypatch.setattr("faulthandler.enable", lambda file: file.close())  # this process goes on
    for name in ("_crash_file", "_trace_path"):
        monkeypatch.setattr(f"harma_ray.on_ray.deaths.{name}", None)
    try:
        leave_note(tmp_path, 1)
        raise MemoryError("no room for 5 GiB\nmore of it")
    except MemoryError as raised:
        leave_trace(raised)
        error = what_happened({1: raised.with_traceback(None)}, tmp_path)
    assert not isinstance(error, WorkerDied)
    trace = tmp_path / f"worker-1-{socket.gethostname()}-{os.getpid()}.error"
    assert str(error).startswith(f"worker 1 on {socket.gethostname()} (")
    assert str(error).endswith(f") failed: MemoryError: no room for 5 GiB; the trace is in {trace}")
    assert 'raise MemoryError("no room' in trace.read_text()


def test_another_start_forgets_the_notes_of_the_last_one_and_keeps_the_traces_that_were_told(notes):
    crash, trace = notes / "worker-1-gpu7-101.crash", notes / "worker-0-gpu7-100.error"
    crash.write_text("Fatal Python error: Aborted")
    trace.write_text("Traceback")
    drop_notes(notes)
    assert sorted(notes.iterdir()) == [trace, crash]
    assert not read_notes(notes)
    trace.unlink()
    crash.unlink()
    drop_notes(notes)
    assert not notes.exists()
    drop_notes(notes)


def test_a_worker_that_hangs_is_told(notes):
    error = what_happened({0: WorkerHealthCheckTimeoutError("no answer for 600 s")}, notes)
    assert "worker 0 on gpu7 (10.0.0.7) does not answer any more: no answer for 600 s" in str(error)


def test_the_command_line_tells_the_failure_with_the_way_to_go_on_and_exits_with_1(capsys, monkeypatch):
    error = WorkerFailed("worker 1 died")
    error.add_note("continue with: launch.py train --resume runs/one")

    def fail(options):
        raise error

    monkeypatch.setattr("harma_ray.cli.evaluate._evaluate", fail)
    assert main(["evaluate", "--run", "runs/one"]) == 1
    assert capsys.readouterr().err == "error: worker 1 died; continue with: launch.py train --resume runs/one\n"
