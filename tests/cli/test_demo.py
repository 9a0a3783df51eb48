"""The demo of ViTP, made small: what it prints, and that a model that learnt nothing is no success."""

import re

import pytest
from command_line import ray_warns, refused

from harma_ray.cli import demo_talks, main
from harma_ray.data.stream import Worker, local_batches
from harma_ray.recipes import recipe_config
from harma_ray.settings import build_config
from harma_ray.training.loop import run_training

SMALL = {"train.steps": 2, "train.eval_every_steps": 2, "selection.answers": 12}


def first_on_ray(train_and_print):
    """Trains the first run as the demo does, the others here."""
    trained = []

    def train(run, prepared, *more):
        if not trained:
            train_and_print(run, prepared, *more)
        else:
            run_training(run.task, prepared.config, run.path, worker=Worker(), loader=local_batches)
        trained.append(run)

    return train


@pytest.mark.ray
@ray_warns
@pytest.mark.usefixtures("joined_here")
def test_a_demo_that_learns_nothing_prints_its_tables_and_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_talks, "SCENES_TOLD", {"train": 60, "val": 6, "test": 12})
    monkeypatch.setattr(demo_talks, "SCENES_BY_CLASS", {"summer": {"train": 60}, "winter": {"val": 20, "test": 30}})
    monkeypatch.setattr(demo_talks, "map_with_ray", map)  # so few scenes are drawn sooner than Ray's processes start
    monkeypatch.setattr(demo_talks, "recipe_config", lambda name: build_config(recipe_config(name), SMALL))
    monkeypatch.setattr(demo_talks, "train_and_print", first_on_ray(demo_talks.train_and_print))
    assert main(["demo", "vitp", "--out", str(tmp_path / "demo"), "--workers", "1"]) == 2
    told = capsys.readouterr()
    assert re.search(r"error: pretraining should bring 10 points, got .* of Top-1 over the untrained", told.err)
    rows = {
        name: re.findall(rf"^{name} +(.*)", told.out, re.MULTILINE) for name in ("untrained", "pretrained", "chance")
    }
    assert [len(row.split()) for row in rows["untrained"]] == [len(row.split()) for row in rows["pretrained"]] == [4, 7]
    assert 0 < float(rows["chance"][0].split()[0]) < 30  # ten classes
    assert len(list((tmp_path / "demo" / "runs").glob("vitp-*"))) == 2


def test_a_demo_without_the_extra_says_so_before_anything_is_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert 'pip install "harma-ray[vitp]"' in refused(capsys, "demo", "vitp", "--out", tmp_path / "demo")
    assert not (tmp_path / "demo").exists()
