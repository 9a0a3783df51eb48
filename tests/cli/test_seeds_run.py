"""Several seeds of one setting, all of which are there already: nothing starts Ray."""

import json

import pytest
from command_line import done, refused
from random_runs import make_random_run

from harma_ray.cli.seeds_run import begun_runs
from harma_ray.data.identity import data_identity
from harma_ray.errors import UserError
from harma_ray.recipes import recipe_config
from harma_ray.runs import open_run
from harma_ray.settings import build_config
from harma_ray.training.health import Finding
from harma_ray.training.run_files import META_NAME, list_checkpoints

SETTINGS = {"model.pretrained": "random", "train.epochs": 1}
VALUES = {0: 10.0, 1: 13.0, 2: 11.5}


@pytest.fixture
def finished(scenes, tmp_path):
    """Three runs, as `train --seeds 0,1,2 --name many` leaves them."""
    for seed, value in VALUES.items():
        config = build_config(recipe_config("harma-scenes"), {**SETTINGS, "data.path": str(scenes), "seed": seed})
        run = make_random_run(tmp_path, f"many-seed{seed}", config)
        metrics = {split: {"txt_r1": value, "r_mean": value} for split in ("val", "test")}
        report = {"metrics": metrics, "selected_on": "val", "objective": "r_mean", "data": data_identity(config)}
        (run.path / "report.json").write_text(json.dumps(report))
        meta = list_checkpoints(run.path)[0] / META_NAME
        meta.write_text(json.dumps({**json.loads(meta.read_text()), "data": data_identity(config)}))
    return tmp_path


def train(scenes, runs, *more):
    settings = [word for name, value in SETTINGS.items() for word in ("--set", f"{name}={value}")]
    return ["train", "--recipe", "harma-scenes", "--data", scenes, "--runs", runs, "--seeds", "0,1,2", "--name", "many",
            *settings, *more]  # fmt: skip


def test_finished_seeds_are_taken_as_they_are_and_their_table_is_kept(capsys, finished, scenes, monkeypatch):
    monkeypatch.setattr("harma_ray.cli.train_run.ray_cluster", None)
    printed = done(capsys, *train(scenes, finished))
    assert printed.count("finished, and taken as it is") == 3
    row = next(line for line in printed.splitlines() if line.startswith("r_mean"))
    assert [float(cell) for cell in row.split()[1:]] == [11.5, 1.5, *VALUES.values()]  # 2.25, 2.25, 0 over 3 - 1
    kept = (finished / "many-seeds.md").read_text()
    assert kept in printed
    assert "11.50 ± 1.50" in kept
    assert "harma-scenes on scenes" in kept
    assert "Settings that are not the recipe's: train.epochs=1, model.pretrained=random." in kept


def test_what_to_try_is_told_once_after_all_seeds(capsys, finished, scenes, monkeypatch):
    monkeypatch.setattr("harma_ray.cli.train_run.ray_cluster", None)
    finding = Finding("no better than untrained", 0, "no epoch is better", ("this", "that")).as_record()
    for seed in VALUES:
        path = finished / f"many-seed{seed}" / "report.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "health": [finding]}))
    lines = done(capsys, *train(scenes, finished)).splitlines()
    assert lines[-5:] == [
        *(f"WARNING    many-seed{seed}: no epoch is better" for seed in VALUES),
        "try        this",
        "           that",
    ]


def test_a_seed_of_other_settings_is_refused(capsys, finished, scenes):
    error = refused(capsys, *train(scenes, finished, "--set", "optim.learning_rate=2e-4"))
    assert f"run {finished / 'many-seed0'} is there, but was made with other settings; choose another --name" in error


def test_a_seed_that_was_interrupted_goes_on_with_the_workers_that_are_asked_for_now(finished, scenes):
    path = finished / "many-seed1"
    (path / "report.json").unlink()
    config = build_config(open_run(path).config, {"scaling.num_workers": 3})
    found = begun_runs(finished, {"many-seed1": config, "many-seed7": config})
    assert found["many-seed1"].report is None
    assert list(found) == ["many-seed1"]
    assert found["many-seed1"].config.scaling.num_workers == 3
    assert open_run(path).config.scaling.num_workers != 3  # its folder is another process's until it is locked


def test_a_seed_whose_name_is_taken_is_refused_before_ray(capsys, scenes, tmp_path, monkeypatch):
    monkeypatch.setattr("harma_ray.cli.train_run.ray_cluster", None)
    (tmp_path / "many-seed2").mkdir()
    assert f"run {tmp_path / 'many-seed2'} exists; choose another --name" in refused(capsys, *train(scenes, tmp_path))


def test_a_seed_on_other_data_is_refused(finished, composed):
    config = build_config(open_run(finished / "many-seed0").config, {"data.path": str(composed)})
    with pytest.raises(UserError, match=r"many-seed0 was begun on other data .*; put .* or choose another --name"):
        begun_runs(finished, {"many-seed0": config})
