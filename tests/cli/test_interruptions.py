"""A search that is killed at a bad time goes on: no finished trial is lost or trained again."""

import contextlib
import json
import sqlite3

import pytest
from command_line import SMALL_SPACE, alone, ray_warns
from interrupted import started, wait_until

from harma_ray.cli import main
from harma_ray.training.tracking import METRICS_NAME, read_records
from harma_ray.tune.folder import open_search, read_search
from harma_ray.tune.study import trial_folder

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900), ray_warns]
SPACE = SMALL_SPACE + "sampler: {name: tpe, startup_trials: 2}\nscheduler: none\n"


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


def within_a_later_trial(folder):
    """Whether a trial is complete, and another has a step behind it."""
    known = states(folder)
    running = [trial_folder(folder, number) for number, state in enumerate(known) if state == "RUNNING"]
    return "COMPLETE" in known and any(
        record["kind"] == "step" for path in running if path.is_dir() for record in read_records(path)
    )


def records_of_finished(folder):
    finished = [number for number, state in enumerate(states(folder)) if state == "COMPLETE"]
    return {number: (trial_folder(folder, number) / METRICS_NAME).read_bytes() for number in finished}


def test_a_search_that_is_killed_with_its_cluster_goes_on(few_scenes, joined_here, capfd, tmp_path):
    (tmp_path / "space.yaml").write_text(SPACE)
    folder = tmp_path / "runs" / "killed"
    start = [tmp_path / "space.yaml", "--data", few_scenes, "--runs", tmp_path / "runs", "--name", "killed"]
    with started(["tune", *start, "--no-dashboard"], alone()) as process:
        wait_until(process, lambda: within_a_later_trial(folder))
        process.kill()
        process.communicate(timeout=120)
    finished = records_of_finished(folder)
    assert finished
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
