"""A run goes on with the data that it was begun on, wherever it lies, and with no other; figures say whose they are."""

import json
import shutil

import pytest
from command_line import done, refused

from harma_ray.data.convert.commands import convert_scenes
from harma_ray.data.splits import open_split
from harma_ray.data.stream import Worker, local_batches
from harma_ray.errors import UserError
from harma_ray.recipes import make_task, recipe_config
from harma_ray.runs import Run, create_run
from harma_ray.settings import build_config
from harma_ray.training.checkpoint import META_NAME, list_checkpoints, read_meta
from harma_ray.training.loop import run_training
from harma_ray.training.tracking import read_records


class Stop(Exception):
    pass


def train(run, callback=lambda metrics: None):
    return run_training(
        make_task(run.config), run.config, run.path, worker=Worker(), loader=local_batches, callback=callback
    )


@pytest.fixture(scope="module")
def kept(scenes, tmp_path_factory):
    """A run that stopped after its first epoch."""

    def callback(metrics):
        if metrics["epoch"] == 1:
            raise Stop

    config = build_config(recipe_config("harma-scenes"), {
        "model.pretrained": "random",
        "data.path": str(scenes), "train.epochs": 2, "train.global_batch_size": 20, "adapter.width": 16,
        "adapter.shared_width": 8,
    })  # fmt: skip
    run = create_run(tmp_path_factory.mktemp("runs"), "kept", config)
    with pytest.raises(Stop):
        train(run, callback)
    return run


@pytest.fixture
def stopped(kept, tmp_path):
    return Run(shutil.copytree(kept.path, tmp_path / "stopped"), kept.config)


@pytest.fixture
def other(tmp_path):
    """A data set of the same shape with other images."""
    convert_scenes(tmp_path / "other", {"train": 40, "val": 13, "test": 11}, style="winter", size=64)
    return tmp_path / "other"


def changed(run, **data):
    return Run(run.path, build_config(run.config, {f"data.{key}": str(value) for key, value in data.items()}))


def test_checkpoints_and_the_report_name_the_data(stopped, scenes):
    train(stopped)
    known = {
        name: {"fingerprint": open_split(scenes, name).fingerprint, "rows": rows}
        for name, rows in (("train", 40), ("val", 13), ("test", 11))
    }
    assert [read_meta(path).data for path in list_checkpoints(stopped.path)] == [known] * len(
        list_checkpoints(stopped.path)
    )
    assert stopped.report["data"] == known


def test_other_data_is_refused_before_ray_starts_and_by_the_loop(capsys, stopped, other):
    error = refused(capsys, "train", "--resume", stopped.path, "--data", other)
    assert f"run {stopped.path} was begun on other data than lies in {other} now: `train` held 40 rows" in error
    assert "put the data back as it was, or start a new run" in error
    with pytest.raises(UserError, match="`test` held 11 rows"):
        train(changed(stopped, path=other))
    assert Run(stopped.path, stopped.config) == stopped  # its settings were not touched
    assert str(other) not in (stopped.path / "config.yaml").read_text()


def test_a_data_set_that_was_moved_is_asked_for_and_gone_on_with(capsys, stopped, scenes, tmp_path):
    gone, moved = tmp_path / "gone", shutil.copytree(scenes, tmp_path / "it's moved")
    text = (stopped.path / "config.yaml").read_text()
    (stopped.path / "config.yaml").write_text(text.replace(str(scenes), str(gone)))
    error = refused(capsys, "train", "--resume", stopped.path)
    assert f"the data set {gone} of run {stopped.path} is not there" in error
    assert "--data FOLDER" in error
    assert train(changed(stopped, path=moved))["steps"] == 20


def test_a_run_of_before_says_that_nobody_can_tell(stopped, other):
    for path in list_checkpoints(stopped.path):
        meta = json.loads((path / META_NAME).read_text())
        del meta["data"]
        (path / META_NAME).write_text(json.dumps(meta))
    train(changed(stopped, path=other))
    notices = [record["text"] for record in read_records(stopped.path) if record["kind"] == "notice"]
    assert notices == ["the checkpoint does not say what train, val, test held, so nobody can tell if that changed"]


def test_figures_say_on_which_data_they_were_measured(capsys, stopped, other, scenes, random_run, tmp_path):
    figures = tmp_path / "figures.json"
    known = read_meta(list_checkpoints(stopped.path)[-1]).data
    for data, same in ((scenes, True), (other, False)):
        printed = done(capsys, "evaluate", "--run", stopped.path, "--data", data, "--split", "val", "--json", figures)
        told = json.loads(figures.read_text())
        assert (told["fingerprint"], told["rows"]) == (open_split(data, "val").fingerprint, 13)
        assert told["trained_on"] == known
        assert ("notice: the run was begun on another `val` than this one" not in printed) == same
    done(capsys, "evaluate", "--run", random_run.path, "--split", "val", "--json", figures)
    assert json.loads(figures.read_text())["trained_on"] is None


def test_features_count_as_the_data_they_were_computed_from(composed, tmp_path):
    from harma_ray.data.identity import content_fingerprint
    from harma_ray.data.manifest import Manifest
    from harma_ray.data.splits import Split

    vectors = Manifest(1, 1, (), inputs={"manifest": "abc"}, kind="image vectors")
    assert content_fingerprint(Split(tmp_path, vectors)) == "abc"
    split = open_split(composed, "val")
    assert content_fingerprint(split) == split.fingerprint
