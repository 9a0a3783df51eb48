"""What is written is there whole, on disk, or not at all, and nothing else stays beside it."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from harma_ray.errors import UserError
from harma_ray.evaluation import Section
from harma_ray.files import (
    TEMPORARY_PREFIX,
    atomic,
    did_you_mean,
    in_threads,
    making,
    near_folders,
    near_paths,
    write_text,
)
from harma_ray.report.page import write_page


@pytest.mark.parametrize("number", [0, 1, 31, 64, 1000])
def test_threads_give_results_in_the_order_of_the_files(number):
    files = [Path(str(index)) for index in range(number)]
    assert list(in_threads(lambda path: int(path.name) ** 2, files)) == [index**2 for index in range(number)]


def test_an_error_of_a_thread_comes_out():
    with pytest.raises(ZeroDivisionError):
        list(in_threads(lambda path: 1 // int(path.name), [Path("1")] * 200 + [Path("0")]))


def write_folder(path):
    (path / "inner").mkdir(parents=True)
    (path / "inner" / "file").write_text("inner")
    (path / "file").write_text("new")


@pytest.mark.parametrize("make", [lambda path: path.write_text("new"), write_folder], ids=["file", "folder"])
def test_all_is_on_disk_before_it_has_its_name_and_the_name_before_the_block_is_over(tmp_path, monkeypatch, make):
    target, flushed, fsync = tmp_path / "deep" / "target", [], os.fsync

    def noting(descriptor):
        flushed.append((Path(f"/proc/self/fd/{descriptor}").resolve(), target.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noting)
    with atomic(target) as made:
        make(made)
        written = {made, *made.rglob("*")}
        assert not target.exists()
    assert set(flushed) == {(target.parent, True), *((path, False) for path in written)}
    assert [path.name for path in target.parent.iterdir()] == ["target"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_is_replaced_only_if_that_is_wanted(tmp_path, overwrite):
    write_text(tmp_path / "out" / "old", "old")
    try:
        with atomic(tmp_path / "out", overwrite=overwrite) as made:
            write_folder(made)
    except OSError:
        assert not overwrite
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == ({"file", "inner"} if overwrite else {"old"})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


WRITER = """
import sys
from pathlib import Path
from harma_ray.files import atomic
with atomic(Path(sys.argv[1])) as made:
    made.write_text("half")
    print("writing", flush=True)
    input()
"""


def test_what_a_killed_writer_left_is_deleted_by_the_next_one_and_a_living_ones_is_not(tmp_path):
    target = tmp_path / "out [1]"
    dead, living = (
        subprocess.Popen(
            [sys.executable, "-c", WRITER, target], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    )
    for process in (dead, living):
        assert process.stdout
        assert process.stdout.readline() == "writing\n"
    dead.send_signal(signal.SIGKILL)
    dead.communicate()
    (tmp_path / f"{TEMPORARY_PREFIX}other-1").mkdir()  # of another's
    assert len(list(tmp_path.glob(".tmp-out*"))) == 2
    write_text(target, "whole")
    assert target.read_text() == "whole"
    assert len(list(tmp_path.glob(".tmp-out*"))) == 1
    living.communicate("\n")
    assert living.returncode == 0
    assert target.read_text() == "half"
    assert {path.name for path in tmp_path.iterdir()} == {"out [1]", ".tmp-other-1"}


def test_what_cannot_be_read_meanwhile_is_no_failure_to_write(tmp_path):
    for missing in (Path("/nonexistent/image.png"), tmp_path / "image.png"):
        with pytest.raises(FileNotFoundError), making(tmp_path / "out"):
            missing.read_bytes()
    with pytest.raises(RuntimeError, match="shapes"), making(tmp_path / "out"):
        raise RuntimeError("shapes cannot be multiplied")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*/file/out \(Not a directory\); check the folder"):
        write_text(tmp_path / "file" / "out", "text")
    with (
        pytest.raises(UserError, match=r"cannot write .*/out \(No such file or directory\)"),
        making(tmp_path / "out") as made,
    ):
        (made / "inner").write_text("text")
    (tmp_path / "full" / "inner").mkdir(parents=True)
    with pytest.raises(UserError, match=r"cannot write .*/full \(Is a directory\)"):
        write_text(tmp_path / "full", "text")


@pytest.mark.parametrize("save", [
    lambda path: torch.save({"weights": torch.zeros(100_000)}, path),
    lambda path: save_file({"weights": torch.zeros(100_000)}, path),
    lambda path: path.write_bytes(bytes(400_000)),
], ids=["torch", "safetensors", "plain"])  # fmt: skip
def test_a_full_disk_is_told_whoever_writes(tmp_path, save):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    on_limit = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*/out \("), making(tmp_path / "out") as made:
            save(made)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, on_limit)
    assert not list(tmp_path.iterdir())


def test_a_page_is_whole_though_its_writer_ends(tmp_path, monkeypatch):
    def page(text):
        return write_page(tmp_path, "index.html", text, "", [Section("a", "A", "", {"a.png": text.encode()})])

    page("old")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        page("new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_wrong_path_is_told_with_what_lies_near(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/first", "runs/second", "data/ucm/train"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "runs" / "frosty").touch()
    runs = tmp_path / "runs"

    def near(path, *others):
        return near_folders(Path(path), lambda folder: folder.is_dir() and folder.parent == runs, *others)

    assert near("runs/frist") == [runs / "first"]  # no file of a nearer name
    assert near("first") == []
    assert near("first", "runs", "gone") == [runs / "first"]
    assert near("runs/first/checkpoints/step_3") == [runs / "first"]
    assert near("runs") == [runs / "first", runs / "second"]
    assert near_paths(Path("data/ucn")) == [tmp_path / "data" / "ucm"]
    assert did_you_mean([]) == ""
    assert did_you_mean([Path(name) for name in "abcd"]) == "; did you mean a or b or c?"
