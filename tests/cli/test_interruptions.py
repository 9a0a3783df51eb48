"""A search that is killed at a bad time goes on: no finished trial is lost or trained again."""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time

import pytest
from command_line import ROOT, SMALL_SPACE, alone, ray_warns

from harma_ray.cli import main
from harma_ray.training.tracking import METRICS_NAME, read_records
from harma_ray.tune.folder import open_search, read_search
from harma_ray.tune.study import trial_folder

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900), ray_warns]
SPACE = SMALL_SPACE + "sampler: {name: tpe, startup_trials: 2}\nscheduler: none\n"


def command(*arguments):
    return [sys.executable, str(ROOT / "launch.py"), "tune", *map(str, arguments), "--no-dashboard"]


def states(folder):
    """Looks at the study without opening it, which might get in the way of the search that is making it."""
    storage = folder / "optuna.db"
    if not storage.exists():
        return []
    try:
        with contextlib.closing(sqlite3.connect(f"file:{storage}?mode=ro", uri=True)) as database:
            return [state for (state,) in database.execute("SELECT state FROM trials ORDER BY number")]
    except sqlite3.OperationalError:  # it has no tables yet
        return []


def before_the_first_epoch_ends(folder):
    return states(folder)[:1] == ["RUNNING"]


def after_two_trials(folder):
    return states(folder).count("COMPLETE") >= 2


def start_and_stop(arguments, folder, moment, how):
    """Starts or resumes a search and stops its driver and with it its cluster at a moment; returns what it said."""
    process = subprocess.Popen(
        command(*arguments),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=alone(),
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    while not moment(folder):
        assert process.poll() is None, process.stderr.read().decode()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    if how == signal.SIGINT:
        os.killpg(process.pid, how)  # as a terminal does
    else:
        process.kill()
    _, error = process.communicate(timeout=120)
    return process.returncode, error.decode().strip()


def records_of_finished(folder):
    finished = [number for number, state in enumerate(states(folder)) if state == "COMPLETE"]
    return {number: (trial_folder(folder, number) / METRICS_NAME).read_bytes() for number in finished}


def test_a_search_that_is_stopped_at_two_moments_with_its_cluster_goes_on(scenes, joined_here, capfd, tmp_path):
    (tmp_path / "space.yaml").write_text(SPACE)
    folder = tmp_path / "runs" / "killed"
    start = [tmp_path / "space.yaml", "--data", scenes, "--runs", tmp_path / "runs", "--name", "killed"]
    start_and_stop(start, folder, before_the_first_epoch_ends, signal.SIGKILL)
    status, error = start_and_stop(["--resume", folder], folder, after_two_trials, signal.SIGINT)
    assert status == 2
    way_out = f"continue with: python launch.py tune --resume {folder}"
    assert error == f"interrupted: what was finished is kept; {way_out}"
    finished = records_of_finished(folder)
    assert len(finished) >= 2
    assert main(["tune", "--resume", str(folder), "--no-dashboard"]) == 0
    assert capfd.readouterr().err.strip() == ""
    results = read_search(*open_search(folder))
    assert [trial.state for trial in results.trials] == ["complete"] * 3
    for number, record in finished.items():
        now = (trial_folder(folder, number) / METRICS_NAME).read_bytes()
        assert now.startswith(record)  # the winner's final figures may follow
        assert [json.loads(line)["kind"] for line in now[len(record) :].splitlines()] in (
            [],
            ["start", "final", "final"],
        )
    for trial in results.trials:
        assert [epoch for epoch, _ in trial.curve] == [1, 2]
        steps = [record["step"] for record in read_records(trial.folder) if record["kind"] == "step"]
        assert steps == sorted(set(steps))
    assert len({tuple(trial.params.values()) for trial in results.trials}) == 3
    assert (folder / "report.html").exists()
