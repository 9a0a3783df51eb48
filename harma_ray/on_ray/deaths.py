"""What became of the workers of a training, in one line: which, where, why as far as is known, and where its log lies.

Each worker leaves a note of itself in the folder of its run when it begins, so that others can tell of it afterwards.
Notes are those of the last start; traces of what workers raised, or of where they crashed, stay, for they were told of.
"""

import contextlib
import faulthandler
import json
import os
import re
import signal
import socket
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from harma_ray.errors import UserError, WorkerDied, WorkerFailed, count
from harma_ray.files import write_text
from harma_ray.on_ray.quirks import cause_of_death, is_hanging

PEER_SECONDS = 30
"""How long a worker that lost the connection to another keeps quiet, for Ray to find out which one died."""

_CRASHES = {signal.strsignal(number): number.name for number in signal.Signals}
"""Signals by what Python, like the system, calls them when they end it."""
_PEER_LOST = re.compile(r"closed by peer|reset by peer|Broken pipe|remote process exited|NCCL.*network error", re.S)
_crash_file: IO[str] | None = None  # faulthandler needs it open
_trace_path: Path | None = None


@dataclass(frozen=True)
class WorkerNote:
    """What a worker says of itself when it begins."""

    rank: int
    pid: int
    host: str
    address: str
    """IP address."""
    log: str
    """Where its messages go, on its machine; empty = not known."""
    kills: int | None
    """Processes that the machine had killed for want of memory before; None = it does not count them."""


def leave_note(folder: Path, rank: int) -> None:
    """Writes the note of this worker, and has Python write into the folder too where a crash has happened.

    Args:
        folder: Seen by all machines; made if missing.
        rank: Of this worker.
    """
    import ray.util

    global _crash_file, _trace_path
    folder.mkdir(parents=True, exist_ok=True)
    log = Path("/dev/fd/2").resolve()
    note = WorkerNote(
        rank, os.getpid(), socket.gethostname(), ray.util.get_node_ip_address(), str(log) if log.is_file() else "",
        _memory_kills(),
    )  # fmt: skip
    _crash_file = _trace_of(folder, note, "crash").open("w")
    faulthandler.enable(_crash_file)
    _trace_path = _trace_of(folder, note, "error")
    write_text(folder / f"worker-{rank}.json", json.dumps(asdict(note)))


def drop_notes(folder: Path) -> None:
    """Deletes notes, and with them the folder if no worker left a trace of what ended it.

    Args:
        folder: Of the notes; it may be missing.
    """
    for path in [*folder.glob("*.json"), *folder.glob("*.crash")]:
        if path.suffix == ".json" or not path.stat().st_size:
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def read_notes(folder: Path) -> list[WorkerNote]:
    """Returns the notes of the workers that began last, by rank."""
    return [WorkerNote(**json.loads(path.read_text())) for path in sorted(folder.glob("worker-*.json"))]


def leave_trace(error: BaseException) -> None:
    """Writes what this worker raised beside its note: Ray Train hands on the exception without its trace.

    If it tells of the end of another worker, it waits a while: that one is to be named.
    """
    if _trace_path is not None:
        with contextlib.suppress(UserError):  # a full disk may be why it failed
            write_text(_trace_path, "".join(traceback.format_exception(error)))
    if _PEER_LOST.search(str(error)):
        time.sleep(PEER_SECONDS)


def what_happened(failures: Mapping[int, BaseException], folder: Path) -> WorkerFailed:
    """Returns the error of a group of workers that has failed.

    Args:
        failures: What Ray Train knows, by rank.
        folder: Where the workers left their notes.
    """
    causes = {rank: cause_of_death(error) for rank, error in failures.items()}
    dead = {rank: cause for rank, cause in causes.items() if cause is not None}
    hanging = {rank: error for rank, error in failures.items() if is_hanging(error)}
    rank, error = min((dead or hanging or failures).items())
    found = [note for note in read_notes(folder) if note.rank == rank]
    note = found[0] if found else None
    place = f" on {note.host} ({note.address})" if note else ""
    if rank in dead:
        fate = f"died: {why_died(error, note, folder)}"
    elif rank in hanging:
        fate = f"does not answer any more: {_first_line(error)}"
    else:
        fate = f"failed: {type(error).__name__}: {_first_line(error)}"
    others = len(dead or hanging or failures) - 1
    more = f" (and {count(others, 'other')})" if others else ""
    kind = WorkerDied if rank in dead else WorkerFailed
    return kind(f"worker {rank}{place} {fate}{more}; {_logs(note, folder)}")


def why_died(error: BaseException, note: WorkerNote | None = None, folder: Path = Path()) -> str:
    """Returns why a worker's process has ended, as far as Ray, or its note and the folder of the notes, tell."""
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError" or "running low on memory" in text:
        return "Ray killed it because its machine's memory ran out"
    if getattr(error, "preempted", False):
        return "its machine was taken away (preempted)"
    if re.search(r"node (has |was )?(died|dead|terminated)|node has died", text):
        return "its machine was lost"
    crash = note and _trace_of(folder, note, "crash")
    told = re.match(r"Fatal Python error: (.+)", crash.read_text()) if crash and crash.is_file() else None
    if told:
        return f"{told[1]} ({_CRASHES[told[1]]})" if told[1] in _CRASHES else told[1]
    if note and note.host == socket.gethostname() and note.kills is not None and (_memory_kills() or 0) > note.kills:
        return "killed (SIGKILL) by the system, whose memory ran out"
    if "connection error" in text:
        return "killed (SIGKILL), by somebody or by a system short of memory"
    return _first_line(text.rpartition("Worker exit detail: ")[2])


def _logs(note: WorkerNote | None, folder: Path) -> str:
    if note is None:
        return "it had not begun to work"
    trace, crash = _trace_of(folder, note, "error"), _trace_of(folder, note, "crash")
    if trace.is_file():
        return f"the trace is in {trace}"
    stack = f", where it crashed in {crash}" if crash.is_file() and crash.stat().st_size else ""
    return f"its log is {note.log or 'in the logs of Ray'} there{stack}"


def _first_line(error: object) -> str:
    return (str(error).strip().splitlines() or ["no reason is known"])[0][:300]


def _trace_of(folder: Path, note: WorkerNote, kind: str) -> Path:
    return folder / f"worker-{note.rank}-{note.host}-{note.pid}.{kind}"


def _memory_kills() -> int | None:
    """Returns how many processes this machine's system has killed for want of memory since it was started."""
    try:
        counts = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    except OSError:
        return None
    return int(counts["oom_kill"]) if "oom_kill" in counts else None
