"""A training as it goes, line by line on the terminal."""

import time

from harma_ray.cli.train_run import Progress
from harma_ray.evaluation import Metrics
from harma_ray.training.health import Finding


def step(at):
    return {"kind": "step", "step": at, "loss": 1.0, "pairs_per_second": 5.0, "data_wait_fraction": 0.0}


def health(at, *, over=False):
    message = "epoch 2 is better" if over else "no epoch is better"
    return {
        "kind": "health",
        "step": at,
        **Finding("no better than untrained", 0, message, ("this",), over).as_record(),
    }


def evaluation(at):
    return {"kind": "evaluation", "step": at, "epoch": at / 20, "split": "val", "r_mean": 3.0}


def test_a_step_is_told_once_whatever_follows_it(capsys):
    progress = Progress(80, time.perf_counter(), Metrics(("r_mean",), "r_mean"))
    for record in (step(1), step(20), evaluation(20), health(20), step(30), health(30), health(40, over=True)):
        progress(record)
    lines = [line.partition(" s] ")[2] or line for line in capsys.readouterr().out.splitlines()]
    assert [line.partition("  ")[0] for line in lines] == [
        "first step", "step 20/80", "epoch 1", "WARNING", "try",
        "step 30/80", "WARNING", "try", "step 40/80", "better",
    ]  # fmt: skip


def test_rates_count_pairs_where_a_sample_has_several(capsys):
    progress = Progress(80, time.perf_counter(), Metrics(("r_mean",), "r_mean"), counted="pairs")
    progress(step(1))
    progress(step(20))
    assert " pairs/s  waiting for data " in capsys.readouterr().out


def test_the_figures_of_step_0_say_whose_they_are_and_one_of_several_seeds_advises_nothing(capsys):
    start = "the start from first's weights"
    progress = Progress(80, time.perf_counter(), Metrics(("r_mean",), "r_mean"), start, advise=False)
    for record in (evaluation(0), evaluation(20), health(20)):
        progress(record)
    told = capsys.readouterr().out
    assert told.count(start) == 1
    assert f"epoch 0  val  r_mean 3.00  ({start})\n" in told
    assert "try  " not in told
