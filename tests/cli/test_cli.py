"""The commands as a user types them: exit codes, one clear line, results that agree."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from command_line import ROOT, done, launch, ray_warns, refused

from harma_ray.cli import main


def small(batch_size):
    """Returns options of a short training."""
    return ["--set", "train.epochs=2", "--set", f"train.global_batch_size={batch_size}", "--set", "adapter.width=16",
            "--set", "adapter.shared_width=8", "--set", "adapter.num_heads=4", "--set",
            "model.pretrained=random"]  # fmt: skip


SMALL = small(batch_size=20)


def test_a_missing_data_set_is_one_clear_line(capsys, tmp_path):
    assert "does not exist" in refused(
        capsys, "train", "--recipe", "harma-scenes", "--data", tmp_path / "no", "--runs", tmp_path
    )


def test_an_unknown_key_is_one_clear_line(capsys, scenes):
    error = refused(capsys, "train", "--recipe", "harma-scenes", "--data", scenes, "--set", "los.margin=1")
    assert "unknown key `los.margin`; did you mean `loss.margin`?" in error


def test_a_missing_backbone_file_is_found_before_ray_starts(capsys, scenes):
    error = refused(
        capsys, "train", "--recipe", "harma-rsitmd-geo", "--data", scenes, "--set", "train.global_batch_size=8"
    )
    assert "RS5M_ViT-B-32_RET-2.pt" in error


def test_a_batch_larger_than_the_data_is_found_before_ray_starts(capsys, scenes):
    error = refused(capsys, "train", "--recipe", "harma-scenes", "--data", scenes, *small(batch_size=999))
    assert "200 pairs" in error


def test_a_missing_val_split_is_found_before_ray_starts(capsys, scenes_copy):
    (scenes_copy / "val" / "manifest.json").unlink()
    error = refused(capsys, "train", "--recipe", "harma-scenes", "--data", scenes_copy)
    assert "no split `val`" in error


def test_check_runs_one_step_and_says_that_all_is_well(capsys, scenes):
    assert main(["train", "--recipe", "harma-scenes", "--data", str(scenes), "--check", *SMALL]) == 0
    assert "every trainable parameter got a gradient" in capsys.readouterr().out


def test_inspect_tells_the_facts_and_draws_a_sheet(capsys, scenes_copy):
    assert main(["inspect", str(scenes_copy), "--split", "val"]) == 0
    assert "13" in capsys.readouterr().out
    assert (scenes_copy / "contact-sheet-val.png").stat().st_size > 1000


@pytest.fixture(scope="module")
def one_worker(scenes, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    result = launch(
        "train", "--recipe", "harma-scenes", "--data", scenes, "--runs", runs, "--name", "one", "--workers", 1, *SMALL
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return runs / "one", result


@pytest.mark.ray
def test_train_says_what_it_does_and_leaves_no_noise(one_worker):
    run, result = one_worker
    for part in ("40 images, 200 captions, 200 samples an epoch", "2 epochs x 10 steps of 20 samples", "1 worker",
                 "tensorboard --logdir", "starting 1 worker: each", "first step", "epoch 2", "best epoch",
                 "r_mean"):  # fmt: skip
        assert part in result.stdout, part
    assert result.stderr.strip() == ""
    assert json.loads((run / "report.json").read_text())["steps"] == 20


@pytest.mark.ray
@ray_warns
@pytest.mark.usefixtures("joined_here")
def test_evaluate_gives_the_runs_own_figures_for_any_number_of_workers_and_any_file(capsys, one_worker, tmp_path):
    run, _ = one_worker
    expected = json.loads((run / "report.json").read_text())["metrics"]["test"]
    released, figures = tmp_path / "released.pth", tmp_path / "figures.json"
    assert main(["checkpoint", "export", "--run", str(run), "--format", "released", "--out", str(released)]) == 0
    weights = (["--run", run], ["--checkpoint", released, "--config", run / "config.yaml"])
    for workers, source in enumerate(weights, 1):
        done(capsys, "evaluate", *source, "--split", "test", "--workers", workers, "--json", figures,
             "--report", tmp_path / f"report{workers}")  # fmt: skip
        assert json.loads(figures.read_text())["metrics"] == expected
        assert (tmp_path / f"report{workers}" / "index.html").exists()
    assert not list(run.glob(".evaluate-*")) + list(tmp_path.glob(".evaluate-*"))


IMPORT = "import time:"
"""How each line begins that Python writes with ``-X importtime``."""


def modules_are_there(process, folder):
    assert any("harma_ray.cli.train_run\n" in line for line in process.stderr)


def ray_is_starting(process, folder):
    while not list((folder / "ray").glob("session_*/logs")) and process.poll() is None:
        time.sleep(0.02)


@pytest.mark.ray
@pytest.mark.parametrize("moment", [modules_are_there, ray_is_starting])
def test_an_interruption_before_anything_has_begun_is_one_line(scenes, tmp_path, moment):
    command = [sys.executable, "-X", "importtime", str(ROOT / "launch.py"), "train", "--recipe", "harma-scenes",
               "--data", str(scenes), "--runs", str(tmp_path), "--workers", "1", *SMALL]  # fmt: skip
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, open(tmp_path / "stderr", "w") as errors:
        follow = moment is modules_are_there
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if follow else errors,
            text=True,
            env={**os.environ, "RAY_TMPDIR": folder},
        )
        try:
            moment(process, Path(folder))
            process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=120)
        finally:
            process.kill()
    written = (error or "") + (tmp_path / "stderr").read_text()
    (line,) = (line for line in written.splitlines() if not line.startswith(IMPORT))
    assert process.returncode == 2, line
    assert line.startswith("interrupted")


def test_a_run_folder_that_cannot_be_made_is_one_clear_line(capsys, scenes, tmp_path):
    (tmp_path / "file").write_text("")
    error = refused(capsys, "evaluate", "--zero-shot", "--recipe", "harma-scenes", "--data", scenes, "--json",
                    tmp_path / "file" / "figures.json")  # fmt: skip
    assert "does not exist" in error


def test_options_that_would_be_ignored_are_refused(capsys, scenes, random_run):
    assert "own settings" in refused(capsys, "train", "--resume", random_run.path, "--check")
    assert "own settings" in refused(capsys, "evaluate", "--run", random_run.path, "--recipe", "harma-scenes")


def test_a_config_file_is_trained_as_it_is(capsys, random_run):
    assert main(["train", "--config", str(random_run.path / "config.yaml"), "--check", *SMALL]) == 0
    assert "every trainable parameter got a gradient" in capsys.readouterr().out


@pytest.mark.ray
@ray_warns
@pytest.mark.usefixtures("joined_here")
def test_a_batch_that_does_not_divide_by_the_workers_leaves_no_run(scenes, capfd, tmp_path):
    error = refused(capfd, "train", "--recipe", "harma-scenes", "--data", scenes, "--runs", tmp_path, "--name", "odd",
                    "--workers", 2, *small(batch_size=21))  # fmt: skip
    assert error.endswith("got 21 and 2; use 20 or 22")
    assert not list(tmp_path.iterdir())


@pytest.mark.ray
@ray_warns
@pytest.mark.usefixtures("joined_here")
def test_talks_that_a_recipe_could_not_read_are_refused_where_they_are_converted(capsys, tmp_path, monkeypatch):
    talk = json.dumps({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "on and on " * 9}]})
    (tmp_path / "talks.jsonl").write_text(f"\n{talk}\n")
    (tmp_path / "meta.json").write_text(json.dumps({"talks": {"annotation": "talks.jsonl"}}))
    command = ["convert", "vitp", "--meta", tmp_path / "meta.json", "--images", tmp_path, "--out", tmp_path / "data"]
    limits = ["--recipe", "scenes-vitp", "--set", "talk.max_tokens=20"]
    assert main(list(map(str, [*command, *limits]))) == 2
    assert re.search(r"error: talks\.jsonl line 2: has \d+ tokens, of which 20 are read", capsys.readouterr().err)
    assert not (tmp_path / "data").exists()
    monkeypatch.setattr("harma_ray.on_ray.tasks.map_with_ray", map)
    assert "lengths of talks were not looked at" not in done(capsys, *command, *limits[:2])
    assert "lengths of talks were not looked at, which takes a tokenizer" in done(capsys, *command)


@pytest.mark.ray
@ray_warns
@pytest.mark.usefixtures("joined_here")
def test_an_image_that_a_worker_refuses_is_one_clear_line(scenes, capfd, tmp_path):
    wrong = ["--set", "data.max_pixels=10"]
    error = refused(capfd, "train", "--recipe", "harma-scenes", "--data", scenes, "--runs", tmp_path, "--name", "bad",
                    "--workers", 1, *SMALL, *wrong)  # fmt: skip
    assert error.startswith("error: row ")
