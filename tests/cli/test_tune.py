"""``tune`` as a user types it: mistakes are told at once and leave nothing behind; a small search says where all is."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace

import optuna
import pytest
import yaml
from command_line import ROOT, SMALL_SPACE, done, ray_warns

from harma_ray.cli import main, make_parser
from harma_ray.cli.tune_run import _absolute, _plan, _require_same_data, _with_features
from harma_ray.data.convert.commands import convert_scenes
from harma_ray.errors import UserError
from harma_ray.recipes import load_config
from harma_ray.resources import Cluster
from harma_ray.settings import build_config
from harma_ray.tune.folder import create_search, open_search, read_search
from harma_ray.tune.space.file import load_search
from harma_ray.tune.storage import cause_of, open_study
from harma_ray.tune.study import Report, SearchStudy, trial_folder


def refused(capsys, *arguments):
    status = main(["tune", *map(str, arguments)])
    error = capsys.readouterr().err.strip()
    assert status == 2, error
    assert error.startswith("error: ")
    return error


@pytest.fixture
def space(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text(SMALL_SPACE)
    return path


def test_all_mistakes_of_a_space_are_told_at_once(capsys, tmp_path, scenes):
    (tmp_path / "bad.yaml").write_text("recipe: harma-scene\nspcae: {}\n")
    error = refused(capsys, tmp_path / "bad.yaml", "--data", scenes, "--runs", tmp_path / "runs")
    assert len(re.findall(r"line \d+, column \d+", error)) == 3  # `space` is missing too
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such.yaml"], "no-such.yaml"),
        ([], "give a search space"),
        (["report"], "report"),
        (["report", "nowhere"], "not the folder of a search"),
        (["--resume", "nowhere"], "not the folder of a search"),
        (["--resume", "nowhere", "--set", "seed=1"], "its own settings"),
        (["report", "nowhere", "--confirm", "3"], "only reads"),
        (["a.yaml", "--trials", "-1"], "`--trials` must be above 0"),
        (["--resume", "x" * 300], "(File name too long)"),
        (["a.yaml", "--out", "there"], "`--out` is the place of a `report`"),
    ],
)
def test_a_wrong_command_is_one_clear_line(capsys, arguments, message):
    error = refused(capsys, *arguments)
    assert message in error
    assert "\n" not in error


def test_a_limit_in_what_the_search_does_not_count_is_refused(capsys, space, scenes, tmp_path):
    start = [space, "--data", scenes, "--runs", tmp_path / "runs"]
    assert "this search counts epochs, got `--steps`; give `--epochs`" in refused(capsys, *start, "--steps", 9)
    start += ["--set", "train.steps=8", "--set", "train.eval_every_steps=4"]
    assert "this search counts steps, got `--epochs`; give `--steps`" in refused(capsys, *start, "--epochs", 9)
    assert "`--steps` must be enough for one trial, 8 steps, got 7" in refused(capsys, *start, "--steps", 7)


def test_missing_data_is_told_before_ray_starts(capsys, space, tmp_path):
    assert "does not exist" in refused(capsys, space, "--data", tmp_path / "no", "--runs", tmp_path / "runs")
    assert "no data set is given" in refused(capsys, space, "--runs", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_setting_that_is_searched_cannot_be_set(capsys, space, scenes):
    assert "--set" in refused(capsys, space, "--data", scenes, "--set", "adapter.width=16")


@pytest.fixture
def begun(space, scenes_copy, tmp_path):
    """A search of two trials that have ended, as its first session left it; its folder."""
    definition = load_search(space, overrides={"data.path": str(scenes_copy)})
    folder = create_search(tmp_path / "runs", "one?", definition)
    _require_same_data(folder, definition)
    study = SearchStudy(folder, definition)
    for value in (10.0, 20.0):
        number = study.next().number
        trial_folder(folder, number).mkdir(parents=True)
        study.close(number, Report(progress=2, value=value, values=(value,), trained=2, finished=True))
    return folder


def test_a_search_does_not_go_on_with_other_data(capsys, begun, scenes_copy, scenes, tmp_path):
    """The val split was converted anew from other scenes; with the same content elsewhere, all is well."""
    convert_scenes(tmp_path / "new", {"val": 12}, style="winter", size=64)
    shutil.rmtree(scenes_copy / "val")
    shutil.copytree(tmp_path / "new" / "val", scenes_copy / "val")
    error = refused(capsys, "--resume", begun)
    assert re.search(r"`val` held 13 rows \(fingerprint \w{12}\) and holds 12 rows \(fingerprint \w{12}\)", error)
    assert "`train`" not in error
    assert "start a new search" in error
    assert "holds 12 rows" in refused(capsys, "--resume", begun, "--data", scenes_copy)
    folder, definition = open_search(begun)
    _require_same_data(folder, replace(definition, config=build_config(definition.config, {"data.path": str(scenes)})))


def test_a_search_by_an_earlier_version_says_that_its_data_cannot_be_checked(capsys, begun):
    study = open_study(*open_search(begun))
    study._storage.set_study_user_attr(study._study_id, "data", None)  # as if it had never been kept
    _require_same_data(*open_search(begun))
    held = "the search does not say what train, val, test held, so nobody can tell if that changed"
    assert held in capsys.readouterr().out
    _require_same_data(*open_search(begun))
    assert capsys.readouterr().out == ""


def test_a_search_does_not_go_on_with_other_labelled_data(capsys, scenes, scenes_copy, tmp_path):
    """Top-1 is measured on a data set of its own; one of before, which did not keep what that held, goes on."""
    (tmp_path / "vitp.yaml").write_text("recipe: scenes-vitp\nspace: {model.drop_path: {choices: [0, 0.05]}}\n")
    data = {"data.path": str(scenes), "features.data": str(scenes_copy)}
    folder = create_search(tmp_path / "runs", "one", load_search(tmp_path / "vitp.yaml", overrides=data))
    _require_same_data(*open_search(folder))
    SearchStudy(*open_search(folder)).next()
    shutil.rmtree(scenes_copy / "val")
    shutil.copytree(scenes_copy / "test", scenes_copy / "val")
    with pytest.raises(UserError, match=r"`features.data/val` held 13 rows .* holds 11 rows .* start a new search"):
        _require_same_data(*open_search(folder))
    study = open_study(*open_search(folder))
    known = {name: split for name, split in study.user_attrs["data"].items() if "/" not in name}
    study.set_user_attr("data", known)
    _require_same_data(*open_search(folder))
    assert "what features.data/train, features.data/val, features.data/test held" in capsys.readouterr().out
    assert open_study(*open_search(folder)).user_attrs["data"]["features.data/val"]["rows"] == 11


def test_a_report_elsewhere_leaves_the_search_as_it_is(capsys, begun, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in [begun, *begun.rglob("*")]}
    assert main(["tune", "report", str(begun), "--out", str(tmp_path / "out")]) == 0
    assert {path: path.stat().st_mtime_ns for path in [begun, *begun.rglob("*")]} == before
    assert "20.00" in capsys.readouterr().out
    assert {"best.yaml", "report.html"} <= {path.name for path in (tmp_path / "out").iterdir()}
    study = open_study(*open_search(begun), read_only=True)
    with pytest.raises(optuna.exceptions.StorageInternalError) as error:
        study.set_user_attr("a", 1)
    assert cause_of(error.value) == "attempt to write a readonly database"


def test_a_report_of_a_read_only_search_names_the_way_out(capsys, begun, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root, who may write anywhere
    assert f"{begun} is read-only; add --out FOLDER" in refused(capsys, "report", begun)


def launch(*arguments, timeout=500):
    command = [sys.executable, str(ROOT / "launch.py"), "tune", *map(str, arguments)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)


@pytest.mark.parametrize(
    ("cluster", "options", "message"),
    [
        (Cluster(2, 0, 1, "local", "", ((2, 0, 8),)), {"concurrent": 500}, "room for"),
        (Cluster(8, 0, 1, "local", "", ((8, 0, 8),)), {"workers": 2}, "need Ray's dashboard"),
        (Cluster(8, 0, 1, "local", "here", ((8, 0, 8),)), {"workers": 3}, "use 18 or 21"),
    ],
)
def test_what_a_cluster_cannot_do_is_refused(space, scenes, cluster, options, message):
    """Each before a folder is made."""
    overrides = {"data.path": str(scenes), "scaling.num_workers": options.get("workers", 1)}
    definition = replace(load_search(space, overrides=overrides), concurrent=options.get("concurrent", 0))
    with pytest.raises(UserError, match=message):
        _plan(definition, cluster)


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_search_says_what_it_does_and_where_all_is(space, few_scenes, tmp_path):
    """In a folder of an odd name, whose commands can be pasted."""
    runs, name = tmp_path / "a b?c#d%20{e} it's $HOME é", "one?1"
    result = launch(space, "--data", few_scenes, "--runs", runs, "--name", name, "--confirm", 1)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stderr.strip() == ""
    folder = runs / name
    for part in ("trial 0", "at a time", "tensorboard --logdir", "optuna-dashboard ", "Ray's dashboard",
                 "epochs trained", "with fresh seeds", " 95 % CI  chance", str(folder / "report.html")):  # fmt: skip
        assert part in result.stdout, part
    results = read_search(*open_search(folder))
    assert len(results.trials) == 3
    best = results.trials[results.best]
    trained = load_config(folder / "best.yaml")
    assert trained.adapter.width == best.params["adapter.width"]
    assert trained.optim.learning_rate == best.params["optim.learning_rate"]
    assert f"{results.final['test']['r_mean']:.1f}" in result.stdout
    command = re.search(r"launch\.py (train --config .+)", result.stdout)[1]
    assert make_parser().parse_args(shlex.split(command)).config == str(folder / "best.yaml")
    url = shlex.split(re.search(r"optuna-dashboard .+", result.stdout)[0])[1]
    assert len(optuna.load_study(study_name="search", storage=url).trials) == 3
    assert yaml.safe_load((folder / "search.yaml").read_text())["limits"] == {"trials": 3}
    assert not list(folder.glob("ray"))
    assert main(["tune", "report", str(folder)]) == 0


STEP_SPACE = """
recipe: harma-scenes
fixed: {train.steps: 12, train.eval_every_steps: 4, train.global_batch_size: 20, adapter.shared_width: 8,
        model.pretrained: random}
space:
  optim.learning_rate: {choices: [4e-3, 1e-9, 1e-2]}
sampler: grid
scheduler: {name: asha, reduction_factor: 2}
concurrent: 1
"""
"""Trial 1 learns nothing."""


@pytest.mark.ray
@ray_warns
@pytest.mark.timeout(300)
def test_a_search_counts_steps_where_its_trainings_do(capsys, scenes, tmp_path, joined_here):
    """The second session goes on within a trial, at the step where the limit of the first cut it off."""
    (tmp_path / "steps.yaml").write_text(STEP_SPACE)
    folder = tmp_path / "runs" / "one"
    start = [tmp_path / "steps.yaml", "--data", scenes, "--runs", folder.parent, "--name", folder.name, "--steps", 20]
    first = done(capsys, "tune", *start)
    assert "a trial    12 steps, evaluated every 4" in first
    assert "trial 1 stopped at step 4: " in first
    assert [trial.state for trial in read_search(*open_search(folder)).trials] == ["complete", "stopped", "running"]
    again = done(capsys, "tune", "--resume", folder, "--steps", 100)
    assert "stopping early saved 22% of the ended trials' steps" in again
    results = read_search(*open_search(folder))
    assert [trial.state for trial in results.trials] == ["complete", "stopped", "complete"]
    assert [[step for step, _ in trial.curve] for trial in results.trials] == [[4, 8, 12], [4], [4, 8, 12]]
    assert [trial.trained for trial in results.trials] == [12, 4, 12]
    page = (folder / "report.html").read_text()
    assert "would have trained 36 steps; they trained 28: the scheduler saved 22.2 %" in page
    assert "scheduler asha (grace 4, reduction 2)" in page


COMBINER = "recipe: scenes-cir-combiner\nfixed: {data.path: nowhere}\nspace:\n"


@pytest.mark.parametrize(
    "text",
    [
        SMALL_SPACE.replace(",\n        model.pretrained: random", ""),
        COMBINER + "  combiner.dropout: {choices: [0.5, 0.1]}\n",
    ],
)
def test_a_search_from_when_random_weights_were_the_default_goes_on_with_them(text, tmp_path):
    (tmp_path / "search.yaml").write_text(text)
    assert load_search(tmp_path / "search.yaml").config.model.pretrained == ""
    assert open_search(tmp_path)[1].config.model.pretrained == "random"


@pytest.mark.parametrize("searched", [True, False])
def test_searched_paths_stay_as_they_are_written(searched, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    published = tmp_path / "RS5M_ViT-B-32_RET-2.pt"
    published.touch()
    space = "loss.gamma: {choices: [1.0, 2.0]}"
    if searched:
        space = f"model.pretrained: {{choices: [{published.name}, other.pt]}}"
    (tmp_path / "space.yaml").write_text(f"recipe: harma-rsitmd-geo\nfixed: {{data.path: data}}\nspace: {{{space}}}\n")
    config = _absolute(load_search(tmp_path / "space.yaml")).config
    assert config.model.pretrained == (published.name if searched else str(published))
    assert config.data.path == str(tmp_path / "data")


def test_features_are_not_computed_once_where_what_they_depend_on_is_searched(tmp_path):
    """The data set is not there: whoever looks for it fails."""
    cluster = Cluster(8, 0, 1, "local", "", ((8, 0, 8),))
    for setting in ("preparation.padding: {choices: [target, none]}", "features.cached: {choices: [true, false]}"):
        (tmp_path / "space.yaml").write_text(f"{COMBINER}  {setting}\n")
        definition = load_search(tmp_path / "space.yaml")
        assert _with_features(definition, tmp_path, cluster) is definition
    (tmp_path / "space.yaml").write_text(COMBINER + "  combiner.dropout: {choices: [0.5, 0.1]}\n")
    with pytest.raises(UserError, match="nowhere"):
        _with_features(load_search(tmp_path / "space.yaml"), tmp_path, cluster)
