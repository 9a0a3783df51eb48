"""What the terminal tells of a search as it goes."""

import io
import re
import time
from dataclasses import replace

import pytest
from rich.console import Console

from harma_ray.cli.tune_progress import SearchProgress, show_params
from harma_ray.recipes import recipe_config
from harma_ray.settings import build_config
from harma_ray.tune.results import SearchResults, TrialResult
from harma_ray.tune.space.definition import Limits, SearchDefinition
from harma_ray.tune.space.parameters import Range
from harma_ray.tune.study import Event, Report

RATE = Range(name="optim.learning_rate", kind="float", low=1e-4, high=1e-1, log=True)
SPACE = SearchDefinition(config=recipe_config("harma-scenes"), parameters=(RATE,), limits=Limits(trials=6))


def event(number, state, value=None, epoch=1.0, reason=None):
    report = None if value is None else Report(progress=epoch, value=value, values=(value,), trained=epoch)
    return Event(number, state, {"optim.learning_rate": 4e-3}, report, reason)


@pytest.fixture
def past(tmp_path):
    return SearchResults(tmp_path, SPACE, trials=())


def told(capsys):
    return capsys.readouterr().out.splitlines()


def test_every_end_is_a_line_with_the_best_so_far(past, capsys):
    with SearchProgress(past, time.perf_counter()) as progress:
        progress(event(0, "running"))
        progress(event(0, "running", 40.0))
        progress(event(1, "stopped", 20.0))
        progress(event(0, "complete", 10.0, 3.0))
        progress(event(2, "failed", reason="the loss is not finite"))
        progress(event(3, "complete", 15.0, 3.0))
    lines = [re.sub(r"^\[ *[\d.]+ s\] ", "", line) for line in told(capsys)]
    assert lines == [
        "trial 0 begins: learning_rate=0.004",
        "trial 1 stopped at epoch 1: r_mean 20.00 (best: trial 1)  learning_rate=0.004",
        "trial 0 complete: r_mean 10.00 (best: trial 0)  learning_rate=0.004",
        "trial 2 failed: the loss is not finite  learning_rate=0.004",
        "trial 3 complete: r_mean 15.00 (best: trial 3)  learning_rate=0.004",
    ]


def test_what_takes_long_is_told_of_meanwhile(past, capsys, monkeypatch):
    monkeypatch.setattr("harma_ray.cli.tune_progress._FIRST_LINE_SECONDS", 0.2)
    with SearchProgress(past, time.perf_counter()) as progress:
        time.sleep(1)
        progress(event(0, "running"))
        progress(event(1, "running", 20.0, 2.0))
        time.sleep(1)
    lines = [re.sub(r"^\[ *[\d.]+ s\] ", "", line) for line in told(capsys)]
    assert lines[0] == "0 trials ended, 0 running"
    assert lines[-1] == "0 trials ended, 2 running (at epoch 0, 2 of 3)"


def test_the_best_of_an_earlier_session_is_known(past, capsys, tmp_path):
    trial = TrialResult(4, "complete", {}, ((1, 30.0),), (30.0,), 3, 1.0, None, tmp_path)
    with SearchProgress(replace(past, trials=(trial,)), time.perf_counter()) as progress:
        progress(event(5, "complete", 20.0, 3.0))
    assert "(best: trial 4)" in told(capsys)[0]


def test_the_table_shows_what_runs_what_ended_and_how_much_is_left(past):
    progress = SearchProgress(past, time.perf_counter())
    progress._console.quiet = True
    progress._began -= 100  # two trials in a hundred seconds
    progress(event(0, "complete", 30.0, 3.0))
    progress(event(1, "complete", 20.0, 3.0))
    progress(event(2, "running", 25.0, 2.0))
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(progress._table())
    text = console.export_text()
    assert "2 trials ended, 1 running (at epoch 2 of 3); best r_mean 30.00 (trial 0); about 3 min left" in text
    assert re.search(r"0 \* +│ complete +│ +3/3 +│ +30.00 +│ learning_rate=0.004", text)
    assert re.search(r"2 +│ running +│ +2/3 +│ +25.00", text)


def test_what_is_counted_is_shown(past, capsys):
    config = build_config(SPACE.config, {"train.steps": 1_500_000, "train.eval_every_steps": 500})
    progress = SearchProgress(replace(past, definition=replace(SPACE, config=config)), time.perf_counter())
    progress(event(1, "stopped", 20.0, 1_200_500))
    assert "trial 1 stopped at step 1200500: r_mean 20.00" in told(capsys)[0]
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(progress._table())
    assert re.search(r"step .*\n(.*\n)*.* stopped +│ +1200500/1500000 ", console.export_text())


def test_settings_are_shown_under_their_last_names():
    params = {"optim.learning_rate": 0.000123456, "adapter.width": 64, "loss.triplet": "none"}
    assert show_params(params) == "learning_rate=0.000123 width=64 triplet=none"
