"""Where Ray's own files go when TMPDIR serves it, and when it does not; none of this starts Ray."""

import logging
import os
import socket
import tempfile
from pathlib import Path

import pytest

from harma_ray.errors import UserError
from harma_ray.on_ray import folder as ray_folder
from harma_ray.on_ray.folder import choose_folder

ROOM = 107 - len("/ray/session_2026-01-01_00-00-00_000000_/sockets/dash_MetricsHead") - len(str(os.getpid()))


@pytest.fixture
def place(monkeypatch):
    """A short folder that stands for /tmp."""
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.delenv("TMPDIR", raising=False)
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setattr(ray_folder, "_SHORT", Path(folder))
        yield Path(folder)


def long_folder(place, num_bytes):
    return place / ("x" * (num_bytes - len(str(place)) - 1))


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="the limit of Linux")
def test_the_longest_folder_that_serves_holds_rays_longest_socket_and_one_byte_more_does_not(place, monkeypatch):
    for num_bytes, fits in ((ROOM, True), (ROOM + 1, False)):
        folder = long_folder(place, num_bytes)
        monkeypatch.setenv("TMPDIR", str(folder))
        assert choose_folder()[0] == (folder if fits else place) / "ray"
        session = folder / "ray" / f"session_2026-11-26_10-26-00_920123_{os.getpid()}" / "sockets"
        session.mkdir(parents=True)
        with socket.socket(socket.AF_UNIX) as tried:
            if fits:
                tried.bind(str(session / "dash_MetricsHead"))
            else:
                with pytest.raises(OSError, match="too long"):
                    tried.bind(str(session / "dash_MetricsHead"))


def test_without_tmpdir_ray_has_its_usual_folder(place, caplog):
    assert choose_folder() == (place / "ray", None)
    assert not caplog.records


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
@pytest.mark.parametrize("text", ["scratch", "a b'c?%20", "not/there/yet"])
def test_a_folder_that_serves_is_taken_and_made(place, monkeypatch, caplog, name, text):
    monkeypatch.setenv(name, str(place / text))
    assert choose_folder() == (place / text / "ray", None)
    assert not list((place / text / "ray").iterdir())
    assert not caplog.records


def test_rays_own_variable_goes_before_tmpdir(place, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(place / "general"))
    monkeypatch.setenv("RAY_TMPDIR", str(place / "rays"))
    assert choose_folder() == (place / "rays" / "ray", None)
    assert not (place / "general").exists()


def test_a_relative_folder_is_meant_from_the_working_folder(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("TMPDIR", "scratch")
    assert choose_folder() == (place / "scratch" / "ray", None)


def test_instead_of_one_too_long_for_sockets_the_short_one_is_taken_and_big_objects_stay_there(
    place, monkeypatch, caplog
):
    folder = long_folder(place, 90)
    monkeypatch.setenv("TMPDIR", str(folder))
    with caplog.at_level(logging.WARNING):
        assert choose_folder() == (place / "ray", folder / "ray")
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith(f"Ray's own files go to {place / 'ray'}, not to TMPDIR={folder}")
    assert "107 are allowed" in message
    assert "RAY_TMPDIR" in message
    assert "\n" not in message


def test_one_that_is_not_ascii_is_replaced_because_ray_cannot_write_it_down(place, monkeypatch, caplog):
    monkeypatch.setenv("TMPDIR", str(place / "ü"))
    with caplog.at_level(logging.WARNING):
        assert choose_folder() == (place / "ray", None)
    assert "ASCII" in caplog.text


def test_one_that_cannot_be_made_is_replaced(place, monkeypatch, caplog):
    (place / "file").write_text("")
    monkeypatch.setenv("TMPDIR", str(place / "file" / "scratch"))
    with caplog.at_level(logging.WARNING):
        assert choose_folder() == (place / "ray", None)
    assert "(not a directory)" in caplog.text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_one_that_cannot_be_written_is_replaced(place, monkeypatch, caplog):
    (place / "locked").mkdir(mode=0o500)
    monkeypatch.setenv("TMPDIR", str(place / "locked"))
    with caplog.at_level(logging.WARNING):
        assert choose_folder() == (place / "ray", None)
    assert "permission denied" in caplog.text


def test_a_folder_that_was_chosen_for_ray_is_refused_not_replaced(place, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(long_folder(place, 90)))
    with pytest.raises(UserError, match=rf"RAY_TMPDIR=.*107 are allowed\); export RAY_TMPDIR=FOLDER .* {ROOM} bytes"):
        choose_folder()


def test_where_no_folder_serves_both_are_named(place, monkeypatch):
    (place / "ray").write_text("")
    with pytest.raises(UserError, match=rf"cannot lie in {place} \(file exists\); export RAY_TMPDIR"):
        choose_folder()
    monkeypatch.setenv("TMPDIR", str(long_folder(place, 90)))
    with pytest.raises(UserError, match=rf"neither in TMPDIR=.*nor in {place} \(file exists\); export RAY_TMPDIR"):
        choose_folder()
