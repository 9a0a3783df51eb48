"""A training whose backbone gives all images one embedding: told in the record, the report, the terminal, a page."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from harma_ray.cli.train_run import print_report
from harma_ray.data.stream import Worker, local_batches
from harma_ray.evaluation import FIGURES
from harma_ray.models.backbones import build_clip
from harma_ray.recipes import make_task, recipe_config
from harma_ray.report.evaluation import results_table, write_report
from harma_ray.runs import Run
from harma_ray.settings import build_config
from harma_ray.training.loop import run_training
from harma_ray.training.step import evaluate_split
from harma_ray.training.tracking import METRICS_NAME, read_records


def run(config, path, callback=lambda metrics: None):
    return run_training(make_task(config), config, path, worker=Worker(), loader=local_batches, callback=callback)


def findings(path):
    return [record for record in read_records(path) if record["kind"] == "health"]


@pytest.fixture(scope="module")
def dead(scenes, tmp_path_factory):
    """The settings, folder and report of a run; beside it stands what there was of it after each epoch."""
    folder = tmp_path_factory.mktemp("dead")
    weights = build_clip("scenes-tiny", "random").state_dict()
    weights["visual.proj"] = torch.zeros_like(weights["visual.proj"])
    save_file(weights, folder / "backbone.safetensors")
    changes = {
        "train.global_batch_size": 20,
        "train.epochs": 3,
        "train.log_every_steps": 1,
        "adapter.width": 16,
        "adapter.shared_width": 8,
        "adapter.num_heads": 4,
        "data.path": str(scenes),
        "model.pretrained": str(folder / "backbone.safetensors"),
    }
    config = build_config(recipe_config("harma-scenes"), changes)
    path = folder / "run"
    path.mkdir()

    def keep(metrics):
        shutil.copytree(path, folder / f"epoch {metrics['epoch']:.0f}")

    return config, path, run(config, path, keep)


def test_a_dead_training_is_told_in_record_report_and_tensorboard(dead):
    _, path, report = dead
    told = [(record["step"], record["problem"], record["since"]) for record in findings(path)]
    assert told == [(17, "equal scores", 4), (20, "no better than untrained", 0)]
    assert [entry["problem"] for entry in report["health"]] == ["equal scores", "no better than untrained"]
    assert json.loads((path / "report.json").read_text()) == report
    assert report["best_epoch"] == 0
    events = EventAccumulator(str(path / "tensorboard")).Reload()
    assert len(events.Tensors("health/text_summary")) == 2


def test_the_end_of_a_dead_training_does_not_read_like_success(dead, capsys):
    config, path, _ = dead
    print_report(Run(path, config))
    last = capsys.readouterr().out.split("r_mean   mean of the six")[-1]
    assert "WARNING    all scores of a batch have been equal since step 4" in last
    assert "WARNING    no epoch is better than the untrained model" in last
    assert "try        a lower optim.learning_rate, such as 0.001 (now 0.004)" in last


def test_the_figures_at_the_end_are_told_as_evaluate_tells_them(dead, capsys):
    config, path, _ = dead
    print_report(Run(path, config))
    printed, own = capsys.readouterr().out, Run(path, config)
    for split in ("val", "test"):
        found = evaluate_split(own.task, config, own.load_model(), split, worker=Worker(), loader=local_batches)
        table = results_table(own.task.metrics, found.metrics, found.intervals(), found.chance(), found.ceiling())
        assert f"\n{split}\n{table}\n" in printed
        assert "95 % CI  chance" in str(table)


def test_a_report_of_code_that_kept_metrics_alone_is_printed(dead, capsys, tmp_path):
    config, _, report = dead
    earlier = {key: value for key, value in report.items() if key not in FIGURES[1:]}
    (tmp_path / "report.json").write_text(json.dumps(earlier))
    print_report(Run(tmp_path, config))
    assert "ceiling" not in capsys.readouterr().out


def test_a_page_shows_what_is_wrong_and_what_to_try(dead, tmp_path):
    config, path, report = dead
    task = make_task(config)
    page = write_report(
        tmp_path / "page",
        title="t",
        subtitle="s",
        results=results_table(task.metrics, report["metrics"]["val"]),
        sections=[],
        model=task.new_model(),
        settings={},
        metrics=task.metrics,
        records=list(read_records(path)),
    )
    assert "Warning: all scores of a batch have been equal since step 4" in page.read_text()
    assert "Try a lower optim.learning_rate" in page.read_text()


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_resumed_dead_training_tells_the_same(dead, tmp_path, epoch):
    config, path, report = dead
    shutil.copytree(path.with_name(f"epoch {epoch}"), tmp_path / "run")
    assert run(config, tmp_path / "run")["health"] == report["health"]
    assert findings(tmp_path / "run") == findings(path)


def test_a_run_of_code_that_did_not_watch_is_judged_when_it_goes_on(dead, tmp_path):
    config, path, report = dead
    shutil.copytree(path.with_name("epoch 2"), tmp_path / "run")
    record = Path(tmp_path / "run" / METRICS_NAME)
    lines = [line for line in record.read_text().splitlines(keepends=True) if '"health"' not in line]
    record.write_text("".join(lines))
    assert run(config, tmp_path / "run")["health"] == report["health"]
    assert [found["step"] for found in findings(tmp_path / "run")] == [20, 20]
