"""What a page says of the models that it is about, and runs that are compared."""

import json
import re

import pytest
from command_line import done, refused
from random_runs import make_random_run

from harma_ray.cli import evaluate_run
from harma_ray.cli.evaluated import Source, kept_weights
from harma_ray.data.splits import open_split
from harma_ray.errors import UserError
from harma_ray.import_export import load_model
from harma_ray.recipes import recipe_config
from harma_ray.runs import Run
from harma_ray.settings import build_config
from harma_ray.training.checkpoint import list_checkpoints, read_meta


@pytest.fixture(scope="module")
def other_run(scenes, tmp_path_factory):
    changes = {"data.path": str(scenes), "seed": 5, "optim.learning_rate": 0.0125}
    return make_random_run(
        tmp_path_factory.mktemp("runs"), "other", build_config(recipe_config("harma-scenes"), changes)
    )


def facts_of(page):
    """Returns the rows of the tables before the results."""
    html = page.read_text()
    part = html[html.index('<h2 id="about">') : html.index('<h2 id="results">')]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in part.split("</tr>")]
    return {title: cells for title, *cells in filter(None, rows)}


def test_a_checkpoint_that_was_replaced_meanwhile_is_told_as_such(random_run):
    gone = random_run.path / "checkpoints" / "step_00000099"
    for load in (random_run.load_checkpoint, lambda path: load_model(path, random_run.config)):
        with pytest.raises(UserError, match=r"step_00000099 is not there; .* now by step_00000000: repeat the command"):
            load(gone)


def replace_checkpoint(run):
    """Deletes a run's only checkpoint as its training does when a later one is better."""
    [path] = list_checkpoints(run.path)
    path.rename(path.with_name("step_00000099"))
    return path


def test_a_checkpoint_that_is_replaced_while_it_is_evaluated_is_kept_until_then(scenes, tmp_path):
    config = build_config(recipe_config("harma-scenes"), {"data.path": str(scenes)})
    run = make_random_run(tmp_path, "training", config)
    source = Source.find(run.config, str(run.path), None)
    expected = load_model(source.file, run.config).state_dict()
    with kept_weights(source) as file:
        gone = replace_checkpoint(run)
        assert str(gone) == source.file
        assert not gone.exists()
        kept = load_model(file, run.config).state_dict()
        assert all(kept[name].equal(tensor) for name, tensor in expected.items())
        assert list_checkpoints(run.path) == [gone.with_name("step_00000099")]
    assert [path.name for path in gone.parent.iterdir()] == ["step_00000099"]


def test_a_finished_run_is_evaluated_as_it_lies(scenes, tmp_path):
    run = make_random_run(tmp_path, "done", build_config(recipe_config("harma-scenes"), {"data.path": str(scenes)}))
    (run.path / "report.json").write_text("{}")
    source = Source.find(run.config, str(run.path), None)
    with kept_weights(source) as file:
        assert file == source.file
        assert len(list(list_checkpoints(run.path)[0].parent.iterdir())) == 1


def test_on_a_disk_without_links_a_running_run_is_evaluated_as_it_lies(scenes, tmp_path, monkeypatch):
    def no_links(*paths):
        raise PermissionError(1, "Operation not permitted")

    run = make_random_run(tmp_path, "training", build_config(recipe_config("harma-scenes"), {"data.path": str(scenes)}))
    source = Source.find(run.config, str(run.path), None)
    monkeypatch.setattr("os.link", no_links)
    with kept_weights(source) as file:
        assert file == source.file


def test_what_is_replaced_before_a_model_is_built_is_evaluated_all_the_same(capsys, scenes, tmp_path, monkeypatch):
    run = make_random_run(tmp_path, "training", build_config(recipe_config("harma-scenes"), {"data.path": str(scenes)}))

    def load_late(file, config):
        replace_checkpoint(run)
        return load_model(file, config)

    monkeypatch.setattr(evaluate_run, "load_model", load_late)
    assert "r_mean" in done(capsys, "evaluate", "--run", run.path)
    assert [path.name for path in list_checkpoints(run.path)] == ["step_00000099"]


def watch_asking(monkeypatch):
    """Returns the names of the runs that are asked for their best checkpoint from now on: each answer may differ."""
    asked, best = [], Run.best_checkpoint

    def ask(run, *arguments):
        asked.append(run.path.name)
        return best(run, *arguments)

    monkeypatch.setattr(Run, "best_checkpoint", ask)
    return asked


def test_a_page_says_which_checkpoints_of_which_runs_it_compares_and_the_figures_agree(
    capsys, monkeypatch, random_run, other_run, scenes, tmp_path
):
    alone = tmp_path / "alone.json"
    done(capsys, "evaluate", "--run", other_run.path, "--json", alone)
    asked = watch_asking(monkeypatch)
    printed = done(
        capsys, "evaluate", "--run", random_run.path, "--compare", other_run.path, "--json", tmp_path / "both.json",
        "--report", tmp_path / "page",
    )  # fmt: skip
    both, single = (json.loads(file.read_text()) for file in (tmp_path / "both.json", alone))
    assert asked == ["random", "other"]
    compared = both["compared"]["other"]
    assert [both["weights"], compared["weights"]] == [str(run.best_checkpoint()) for run in (random_run, other_run)]
    assert compared["metrics"] == single["metrics"]
    for name, value in compared["difference"].items():
        assert value == pytest.approx(single["metrics"][name] - both["metrics"][name])
        low, high = compared["interval_95"][name]
        assert low <= high
    assert "random on " in printed
    assert "\ndifference: the figure of a run minus that of random, on the same queries\n" in printed
    facts = facts_of(tmp_path / "page" / "index.html")
    meta = read_meta(list_checkpoints(random_run.path)[-1])
    assert facts["weights"] == [str(random_run.path), str(other_run.path)]
    assert facts["recipe"] == ["harma-scenes, seed 0", "harma-scenes, seed 5"]
    assert facts["checkpoint"][0] == "step 0 (epoch 0), the best by r_mean (%) on val: 1.00"
    assert f"(fingerprint {meta.backbone[:12]})" in facts["backbone"][0]
    assert f"11 images, 55 captions (fingerprint {open_split(scenes, 'test').fingerprint[:12]})" in facts["data"][0]
    begun = json.loads((random_run.path / "environment.json").read_text())
    assert facts["training begun"][0].startswith(begun["time"].replace("T", " "))
    assert (begun["git_commit"] or "")[:12] in facts["training begun"][0]
    assert facts["optim.learning_rate"] == ["0.004", "0.004", "0.0125"]  # the recipe's, and both runs'
    assert not {"data.path", "model.architecture"} & set(facts)


def test_runs_of_another_kind_or_none_are_refused_before_anything_is_built(capsys, random_run, composed, tmp_path):
    config = build_config(recipe_config("scenes-cir-finetune"), {"data.path": str(composed)})
    cir = make_random_run(tmp_path, "cir", config)
    told = refused(capsys, "evaluate", "--run", random_run.path, "--compare", cir.path)
    assert "one kind of retrieval, got random (harma-scenes), cir (scenes-cir-finetune)" in told
    assert "is not the folder of a run" in refused(capsys, "evaluate", "--run", random_run.path, "--compare", tmp_path)
