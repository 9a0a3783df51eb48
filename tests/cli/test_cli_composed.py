"""CLIP4Cir as a user types it: two stages, a search, evaluation, submissions, weights in and out."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from command_line import done, ray_warns, refused
from random_runs import make_random_run
from raw_composed import draw_fashioniq
from safetensors.torch import load_file
from stored_queries import brute_force_ranks

from harma_ray.cli import make_parser
from harma_ray.data.convert.commands import convert_scenes_cir
from harma_ray.data.manifest import MANIFEST_NAME, BadRow
from harma_ray.data.splits import list_splits, open_split
from harma_ray.errors import UserError
from harma_ray.import_export import load_model
from harma_ray.models.backbones import build_clip
from harma_ray.models.combiner import Combiner
from harma_ray.models.fingerprints import backbone_fingerprint
from harma_ray.models.weights import save_clip
from harma_ray.recipes import make_task, recipe_config
from harma_ray.runs import open_run
from harma_ray.settings import build_config
from harma_ray.training.checkpoint import read_meta, save_checkpoint
from harma_ray.training.tracking import read_records

FIRST = {"train.global_batch_size": 20, "train.epochs": 1}
SECOND = {"train.global_batch_size": 8, "train.epochs": 2, "combiner.projection_dim": 32, "combiner.hidden_dim": 16}
SPACE = """
recipe: scenes-cir-combiner
fixed: {model.pretrained: random, train.epochs: 1, train.global_batch_size: 8, combiner.hidden_dim: 16}
space:
  combiner.projection_dim: {choices: [32, 512]}
sampler: grid
scheduler: none
limits: {}
concurrent: 1
"""


def sets(changes):
    return [word for name, value in changes.items() for word in ("--set", f"{name}={value}")]


def small(composed, recipe, **changes):
    sizes = FIRST if recipe.endswith("finetune") else SECOND
    return build_config(recipe_config(recipe), {"data.path": str(composed), **sizes, **changes})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def tuned(composed, runs):
    """A run of the first stage, with random weights, which counts as finished."""
    run = make_random_run(runs, "tuned", small(composed, "scenes-cir-finetune", seed=3))
    (run.path / "report.json").write_text("{}")
    return run


@pytest.fixture(scope="module")
def combined(composed, runs):
    """A run of the second stage, with random weights."""
    return make_random_run(runs, "combined", small(composed, "scenes-cir-combiner"))


@pytest.mark.ray
@ray_warns
@pytest.mark.usefixtures("joined_here")
def test_the_second_stage_builds_on_a_run_of_the_first(capsys, composed, tuned, tmp_path):
    printed = done(capsys, "train", "--recipe", "scenes-cir-combiner", "--from", tuned.path, "--data", composed,
                   "--runs", tmp_path, "--name", "second", "--workers", 1, *sets(SECOND))  # fmt: skip
    for part in ("40 triplets", "2 epochs x 5 steps of 8 samples", "group_recall_at1", "recall_at10"):
        assert part in printed, part
    run = open_run(tmp_path / "second")
    assert list_splits(run.path / "features") == ["train", "val", "test"]
    report = run.report
    assert report is not None
    model, first = run.load_model(), tuned.load_model()
    for name, tensor in first.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    figures = tmp_path / "figures.json"
    printed = done(
        capsys, "evaluate", "--run", run.path, "--split", "test", "--json", figures, "--report", tmp_path / "page"
    )
    assert "group_recall_at1" in printed
    found = json.loads(figures.read_text())
    assert found["metrics"] == pytest.approx(report["metrics"]["test"], abs=1e-6)  # images here, vectors there
    assert found["chance"]["group_recall_at1"] == pytest.approx(20)
    assert "<img" in (tmp_path / "page" / "index.html").read_text()
    assert "is finished" in done(capsys, "train", "--resume", run.path)


@pytest.mark.ray
@ray_warns
@pytest.mark.usefixtures("joined_here")
def test_a_search_over_the_second_stage_computes_features_once(capsys, composed, tuned, tmp_path):
    (tmp_path / "space.yaml").write_text(SPACE)
    done(capsys, "tune", tmp_path / "space.yaml", "--from", tuned.path, "--data", composed, "--runs", tmp_path,
         "--name", "found", "--no-dashboard")  # fmt: skip
    folder = tmp_path / "found"
    trials = sorted(path for path in (folder / "trials").iterdir())
    assert len(trials) == 2
    for path in trials:
        assert open_run(path).config.data.path == str(folder / "features")
        assert not (path / "features").exists()
        assert [record["split"] for record in read_records(path) if record["kind"] == "evaluation"] == ["val"]
    assert open_run(trials[0]).config.model.tuned == str(tuned.best_checkpoint())


def test_a_stage_that_does_not_fit_is_one_clear_line(capsys, composed, tuned, combined, random_run):
    for recipe, source, why in (
        ("harma-scenes", tuned, "which is a run of scenes-cir-finetune: their models have nothing in common"),
        ("scenes-cir-finetune", combined, "which is a run of scenes-cir-combiner"),
        ("scenes-cir-combiner", random_run, "which is a run of harma-scenes"),
    ):
        assert why in refused(capsys, "train", "--recipe", recipe, "--from", source.path, "--data", composed)
    (tuned.path / "report.json").rename(tuned.path / "away.json")
    try:
        unfinished = refused(
            capsys, "train", "--recipe", "scenes-cir-combiner", "--from", tuned.path, "--data", composed
        )
    finally:
        (tuned.path / "away.json").rename(tuned.path / "report.json")
    assert f"is not finished; finish it first: python launch.py train --resume {tuned.path}" in unfinished
    none = refused(capsys, "train", "--recipe", "scenes-cir-combiner", "--from", composed, "--data", composed)
    assert "is not the folder of a run" in none


def test_data_of_captions_are_refused_before_ray_starts(capsys, scenes):
    error = refused(capsys, "train", "--recipe", "scenes-cir-finetune", "--data", scenes)
    assert "needs triplets, but" in error


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    """10 queries among 60 images."""
    out = tmp_path_factory.mktemp("gallery")
    convert_scenes_cir(out, {"test": 10}, style="summer", size=64)
    return out


@pytest.mark.parametrize("stage", ["tuned", "combined"])
def test_a_submission_is_what_a_plain_ranking_gives(capsys, gallery, request, stage, tmp_path):
    run = request.getfixturevalue(stage)
    done(
        capsys,
        "predict",
        "cirr-test",
        "--run",
        run.path,
        "--data",
        gallery,
        "--split",
        "test",
        "--out",
        tmp_path,
        "--name",
        "try",
    )
    files = {metric: tmp_path / f"{metric}_submission_try.json" for metric in ("recall", "recall_subset")}
    found = {metric: json.loads(path.read_text()) for metric, path in files.items()}
    for metric, path in files.items():
        assert (found[metric].pop("version"), found[metric].pop("metric")) == ("rc2", metric)
        assert list(found[metric]) == sorted(found[metric])
        assert path.read_text() == json.dumps(json.loads(path.read_text()), sort_keys=True)
    split, model, inputs = open_split(gallery, "test"), run.load_model(), run.task._inputs
    names = split.read(["source"]).column("source").to_pylist()
    with torch.no_grad():
        images = torch.stack([inputs.image(data) for data in split.read(["image"]).column("image").to_pylist()])
        vectors = model.image_features(images)
        for row in split.queries().to_pylist():
            text = model.text_features(inputs.tokens(row["captions"]))
            query = model.compose(vectors[names.index(row["reference"])][None], text)[0]
            scores = torch.nn.functional.normalize(vectors, dim=1) @ query
            order = [names[place] for place in scores.argsort(descending=True, stable=True)]
            order.remove(row["reference"])
            key = str(row["pair_id"])
            score_of = dict(zip(names, scores.tolist(), strict=True))
            among = [name for name in order if name in row["members"]]
            for listed, wanted in ((found["recall"][key], order[:50]), (found["recall_subset"][key], among[:3])):
                assert [score_of[n] for n in listed] == pytest.approx([score_of[n] for n in wanted], abs=1e-5)
                assert len(set(listed)) == len(wanted)
                assert row["reference"] not in listed
            assert set(found["recall_subset"][key]) <= set(row["members"])
    assert {len(listed) for listed in found["recall"].values()} == {50}
    assert (
        set(found["recall"]) == set(found["recall_subset"]) == {str(r["pair_id"]) for r in split.queries().to_pylist()}
    )


def test_a_submission_that_the_server_would_refuse_is_not_written(
    capsys, composed, scenes, tuned, random_run, tmp_path
):
    def predict(run, data, split):
        return refused(capsys, "predict", "cirr-test", "--run", run.path, "--data", data, "--split", split, "--out",
                       tmp_path / "out")  # fmt: skip

    assert "has 50 names a query, but" in predict(tuned, composed, "val")
    assert "has no queries of composed retrieval" in predict(tuned, scenes, "val")
    assert "recipe harma-scenes has no composed queries" in predict(random_run, composed, "val")
    assert "no split `test1`" in predict(tuned, composed, "test1")
    assert not (tmp_path / "out").exists()


def test_a_submission_without_every_pair_is_refused(capsys, gallery, tuned, tmp_path):
    split = open_split(gallery, "test")
    lacking = replace(split.manifest, bad=(BadRow("test1-7-img0.png", "not an image"),))
    copy = Path(shutil.copytree(gallery, tmp_path / "data"))
    (copy / "test" / MANIFEST_NAME).write_text(lacking.to_json())
    command = [
        "predict",
        "cirr-test",
        "--run",
        tuned.path,
        "--data",
        copy,
        "--split",
        "test",
        "--out",
        tmp_path / "out",
    ]
    assert "1 were left out of" in (error := refused(capsys, *command))
    assert "test1-7-img0.png" in error
    assert "must be a plain part of a file's name" in refused(capsys, *command, "--name", "a/b")
    assert not (tmp_path / "out").exists()


def test_the_best_by_another_metric_is_taken_if_it_was_kept(capsys, composed, tuned, tmp_path):
    run = make_random_run(tmp_path, "two", tuned.config)
    model = run.load_model()
    with torch.no_grad():
        model.clip.ln_final.weight.add_(1)
    first = run.best_checkpoint()
    meta = read_meta(first)
    later = replace(meta, step=5, epoch=1.0, metrics={"r_mean": 0.5, "recall_at1": 9.0})
    save_checkpoint(run.path, later, model, {})
    assert run.best_checkpoint() == first
    figures = [tmp_path / name for name in ("usual.json", "other.json")]
    done(capsys, "evaluate", "--run", run.path, "--split", "val", "--json", figures[0])
    done(capsys, "evaluate", "--run", run.path, "--split", "val", "--metric", "recall_at1", "--json", figures[1])
    usual, other = (json.loads(path.read_text()) for path in figures)
    assert other["weights"].endswith("step_00000005")
    assert usual["metrics"] != other["metrics"]
    out = tmp_path / "clip.safetensors"
    done(
        capsys,
        "checkpoint",
        "export",
        "--run",
        run.path,
        "--format",
        "open_clip",
        "--metric",
        "recall_at1",
        "--out",
        out,
    )
    assert torch.equal(load_file(out)["ln_final.weight"], model.clip.ln_final.weight)
    assert "has the metric `recall_at50`" in refused(
        capsys, "evaluate", "--run", run.path, "--metric", "recall_at50", "--split", "val"
    )


@pytest.mark.ray
@ray_warns
@pytest.mark.usefixtures("joined_here")
def test_vectors_of_queries_find_what_evaluation_finds(capsys, composed, paired, tmp_path):
    command, store = ("embed", "--run", paired.path, "--data", composed, "--split", "val"), tmp_path / "store"
    printed = done(capsys, *command, "--query", "sum", "--out", store)
    assert "30 image and 5 query vectors of width 128, in fp32" in printed
    assert printed.rstrip().endswith("queries: the sum of image and text features")
    assert json.loads((store / MANIFEST_NAME).read_text())["query"] == "sum"
    ranks, among = zip(*brute_force_ranks(pq.read_table(store / "vectors.parquet").to_pylist()), strict=True)
    found = figures(capsys, tmp_path, "--run", paired.path, "--query", "sum", "--split", "val")["metrics"]
    for k in (1, 5, 10):
        assert found[f"recall_at{k}"] == pytest.approx(100 * sum(rank < k for rank in ranks) / 5)
    assert found["group_recall_at1"] == pytest.approx(100 * sum(rank < 1 for rank in among) / 5)
    error = refused(capsys, *command, "--query", "sum", "--out", tmp_path / "images.npz")
    assert "an .npz holds images alone; leave it out" in error


def test_published_files_go_out_and_come_in(capsys, composed, tuned, combined, tmp_path):
    clip, combiner = tmp_path / "clip.pt", tmp_path / "combiner.pt"
    error = refused(
        capsys, "checkpoint", "export", "--run", tuned.path, "--format", "adapter", "--out", tmp_path / "no"
    )
    assert "export it as `released` or `open_clip`" in error
    done(capsys, "checkpoint", "export", "--run", tuned.path, "--format", "released", "--out", clip)
    done(capsys, "checkpoint", "export", "--run", combined.path, "--format", "released", "--out", combiner)
    state = torch.load(clip, weights_only=True)
    assert set(state) == {"epoch", "CLIP"}
    assert set(torch.load(combiner, weights_only=True)) == {"epoch", "Combiner", "trained_on"}
    assert "open_clip state dict" in done(capsys, "checkpoint", "show", clip)
    assert "features, projection 32, hidden 16" in done(capsys, "checkpoint", "show", combiner)
    done(capsys, "checkpoint", "import", clip, "--recipe", "scenes-cir-finetune", "--out", tmp_path / "clip")
    base = tmp_path / "base.safetensors"
    save_clip(combined.load_model().clip, base)
    done(capsys, "checkpoint", "import", combiner, "--recipe", "scenes-cir-combiner", "--clip", base, "--out",
         tmp_path / "combiner")  # fmt: skip
    assert open_run(tmp_path / "combiner").config.combiner.projection_dim == 32
    again = open_run(tmp_path / "combiner").load_model().state_dict()
    for name, tensor in combined.load_model().state_dict().items():
        assert torch.equal(again[name], tensor), name
    backbone = build_config(tuned.config, {"model.pretrained": str(tmp_path / "clip" / "backbone.safetensors")})
    again = load_model(None, backbone).state_dict()
    for name, tensor in tuned.load_model().state_dict().items():
        assert torch.equal(again[name], tensor), name


@pytest.mark.parametrize(("stage", "section"), [("tuned", "CLIP"), ("combined", "Combiner")])
@pytest.mark.parametrize("change", ["missing", "left over"])
def test_a_published_file_that_does_not_fit_is_refused_by_name(capsys, request, tmp_path, stage, section, change):
    run = request.getfixturevalue(stage)
    done(capsys, "checkpoint", "export", "--run", run.path, "--format", "released", "--out", tmp_path / "good.pt")
    content = torch.load(tmp_path / "good.pt", weights_only=True)
    name = {"CLIP": "ln_final.weight", "Combiner": "dynamic_scalar.3.bias"}[section]
    if change == "missing":
        del content[section][name]
    else:
        name = "stranger.weight"
        content[section][name] = torch.zeros(1)
    torch.save(content, tmp_path / "bad.pt")
    pair = ("--clip", "random") if section == "Combiner" else ()
    error = refused(capsys, "checkpoint", "import", tmp_path / "bad.pt", "--recipe", run.config.recipe, "--out",
                    tmp_path / "out", *pair)  # fmt: skip
    assert name in error
    assert not (tmp_path / "out").exists()


def test_a_dry_check_lists_all_missing_images(capsys, tmp_path):
    root = draw_fashioniq(tmp_path)
    assert "all images are there" in done(
        capsys, "convert", "fashioniq", "--root", root, "--split", "val", "--annotations-only"
    )
    for name in ("Dv1.jpg", "Sv2.jpg"):
        (root / "images" / name).unlink()
    report = done(capsys, "convert", "fashioniq", "--root", root, "--split", "val", "--annotations-only")
    assert report.splitlines()[-3:] == [f"2 of 25 images are missing under {root}:", "images/Dv1.jpg", "images/Sv2.jpg"]
    assert "with --out" in refused(capsys, "convert", "fashioniq", "--root", root, "--split", "val")


@pytest.fixture(scope="module")
def paired(composed, runs, tuned):
    """A run of the second stage on the run of the first, with random weights."""
    changes = {"model.tuned": str(tuned.best_checkpoint()), "model.tuned_seed": 3}
    return make_random_run(runs, "paired", small(composed, "scenes-cir-combiner", **changes))


def figures(capsys, tmp_path, *command):
    done(capsys, "evaluate", *command, "--json", tmp_path / "figures.json")
    return json.loads((tmp_path / "figures.json").read_text())


def test_a_combiner_that_nobody_trained_is_never_scored(capsys, composed, tuned, tmp_path):
    """Not as the backbone either: CLIP alone gives the figures of the sum."""
    data = ("--data", composed, "--split", "val")
    first = figures(capsys, tmp_path, "--zero-shot", "--recipe", "scenes-cir-finetune", *data)
    command = ("--zero-shot", "--recipe", "scenes-cir-combiner", "--set", "model.pretrained=random", *data)
    second = figures(capsys, tmp_path, *command)
    assert second == first
    assert second["query"] == "sum"
    assert "queries: the sum of image and text features" in done(capsys, "evaluate", *command)
    assert "must be one of sum, image, text for this model" in refused(
        capsys, "evaluate", *command, "--query", "combiner"
    )
    baseline = make_task(small(composed, "scenes-cir-combiner")).baseline_model()
    assert {name.split(".")[0] for name, _ in baseline.named_parameters()} == {"encoder"}


def test_a_second_stage_is_evaluated_with_the_sum_too(capsys, composed, tuned, paired, tmp_path):
    data = ("--split", "val")
    own = figures(capsys, tmp_path, "--run", paired.path, *data)
    added = figures(capsys, tmp_path, "--run", paired.path, "--query", "sum", *data)
    first = figures(capsys, tmp_path, "--run", tuned.path, *data)
    assert (own["query"], added["query"], first["query"]) == ("combiner", "sum", "sum")
    halves = {f"{half}_only_r_mean": first["metrics"].pop(f"{half}_only_r_mean") for half in ("image", "text")}
    assert added["metrics"] == first["metrics"] != own["metrics"]
    assert added["interval_95"] == first["interval_95"]
    assert own["metrics"]["sum_r_mean"] == added["metrics"]["r_mean"]
    every = figures(capsys, tmp_path, "--run", paired.path, "--query", "all", *data, "--report", tmp_path / "page")
    assert list(every["queries"]) == ["combiner", "sum", "image", "text"]
    assert every["metrics"] == own["metrics"]
    assert every["queries"]["sum"]["metrics"] == first["metrics"]
    for half in ("image", "text"):
        found = figures(capsys, tmp_path, "--run", paired.path, "--query", half, *data)
        assert found["metrics"]["r_mean"] == halves[f"{half}_only_r_mean"]
        assert every["queries"][half]["metrics"] == found["metrics"]
        assert set(found["interval_95"]) >= {"recall_at1", "recall_at50", "group_recall_at1", "r_mean"}
    assert "Kinds of queries" in (tmp_path / "page" / "index.html").read_text()


def test_queries_of_one_kind_alone_have_no_switch(capsys, scenes, tuned, random_run):
    error = refused(capsys, "evaluate", "--run", random_run.path, "--split", "val", "--query", "all")
    assert "`--query` is for composed retrieval" in error
    assert "must be one of sum, image, text" in refused(
        capsys, "evaluate", "--run", tuned.path, "--split", "val", "--query", "combiner"
    )


@pytest.mark.parametrize("command", [["evaluate"], ["predict", "cirr-test", "--data", "data"]])
def test_the_recipes_say_how_queries_can_be_made(capsys, monkeypatch, command):
    monkeypatch.setattr("harma_ray.recipes.QUERIES", {"product": "the product of both"})
    arguments = [*command, "--run", "run", "--query"]
    assert make_parser().parse_args([*arguments, "product"]).query == "product"
    with pytest.raises(UserError, match="invalid choice: 'sum'"):
        make_parser().parse_args([*arguments, "sum"])
    with pytest.raises(SystemExit):
        make_parser().parse_args([*command, "--help"])
    assert "product = the product of both" in " ".join(capsys.readouterr().out.split())


def test_a_published_clip_alone_and_the_sum_of_a_second_stage_give_the_first_ones_submission(
    capsys, gallery, tuned, paired, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))  # no shell makes a path of the ~ in an assignment
    done(capsys, "checkpoint", "export", "--run", tuned.path, "--format", "released", "--out", tmp_path / "clip.pt")
    sources = {
        "first": ("--run", tuned.path),
        "second": ("--run", paired.path, "--query", "sum"),
        "clip": ("--zero-shot", "--recipe", "scenes-cir-finetune", "--set", "model.pretrained=~/clip.pt"),
        "combined": ("--run", paired.path),
        "image": ("--run", paired.path, "--query", "image"),
    }
    files = {}
    for name, source in sources.items():
        named = () if name == "clip" else ("--name", name)
        printed = done(capsys, "predict", "cirr-test", *source, "--data", gallery, "--split", "test", "--out",
                       tmp_path / "sent", *named)  # fmt: skip
        wanted = {"combined": "the Combiner's", "image": "the reference image alone"}
        assert f"queries: {wanted.get(name, 'the sum of image and text features')}; fp32" in printed
        files[name] = [
            (tmp_path / "sent" / f"{kind}_submission_{name}.json").read_text() for kind in ("recall", "recall_subset")
        ]
    assert files["second"] == files["clip"] == files["first"]
    assert len({tuple(files[name]) for name in ("first", "combined", "image")}) == 3


def test_a_published_combiner_is_paired_with_the_clip_that_is_given(capsys, composed, tuned, paired, tmp_path):
    clip, combiner, anonymous = (tmp_path / name for name in ("clip.pt", "combiner.pt", "anonymous.pt"))
    for run, path in ((tuned, clip), (paired, combiner)):
        done(capsys, "checkpoint", "export", "--run", run.path, "--format", "released", "--out", path)
    content = torch.load(combiner, weights_only=True)
    del content["trained_on"]
    torch.save(content, anonymous)  # as CLIP4Cir's own program writes it
    command = ("checkpoint", "import", anonymous, "--recipe", "scenes-cir-combiner", "--out", tmp_path / "made")
    error = refused(capsys, *command)
    assert "is a Combiner without its CLIP" in error
    assert "--clip FILE" in error
    assert not (tmp_path / "made").exists()
    printed = done(capsys, *command, "--clip", clip)
    assert f"paired with {clip} (`scenes-tiny`, fingerprint {backbone_fingerprint(tuned.load_model())[:12]})" in printed
    assert "does not say which CLIP it was trained on" in printed
    clip.unlink()  # both are in the run now
    again, wanted = open_run(tmp_path / "made").load_model().state_dict(), paired.load_model().state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in wanted.items())
    done(capsys, *command[:-1], tmp_path / "by-run", "--clip", tuned.path)
    again = open_run(tmp_path / "by-run").load_model().state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in wanted.items())


def test_a_combiner_and_a_clip_that_do_not_belong_together_are_refused(capsys, tuned, paired, tmp_path):
    combiner, other = tmp_path / "combiner.pt", tmp_path / "other.safetensors"
    done(capsys, "checkpoint", "export", "--run", paired.path, "--format", "released", "--out", combiner)
    save_clip(build_clip("scenes-tiny", "random", seed=8), other)
    command = ("checkpoint", "import", combiner, "--recipe", "scenes-cir-combiner", "--out", tmp_path / "made")
    assert "was trained on a CLIP with fingerprint" in refused(capsys, *command, "--clip", other)
    torch.save({"epoch": 1, "Combiner": Combiner(64, 32, 16).state_dict()}, combiner)
    assert "combines features of width 64, but" in refused(capsys, *command, "--clip", other)
    clip = ("checkpoint", "import", other, "--recipe", "scenes-cir-finetune", "--out", tmp_path / "made")
    assert "`--clip` is for a Combiner" in refused(capsys, *clip, "--clip", other)
    assert not (tmp_path / "made").exists()


def test_a_second_stage_builds_on_the_best_by_another_metric(capsys, composed, tuned, tmp_path):
    run = make_random_run(tmp_path, "first", tuned.config)
    (run.path / "report.json").write_text("{}")
    meta = read_meta(run.best_checkpoint())
    save_checkpoint(
        run.path, replace(meta, step=5, metrics={"r_mean": 0.5, "harmonic_mean": 9.0}), run.load_model(), {}
    )
    for metric in (None, "harmonic_mean"):
        base = recipe_config("scenes-cir-combiner")
        config = build_config(base, base.after(run, metric))
        assert config.model.tuned == str(run.best_checkpoint(metric))
    assert run.best_checkpoint("harmonic_mean").name == "step_00000005" != run.best_checkpoint().name
    command = ("train", "--recipe", "scenes-cir-combiner", "--data", composed)
    assert "give it with --from" in refused(capsys, *command, "--metric", "harmonic_mean")
    assert "has the metric `recall_at50`" in refused(capsys, *command, "--from", run.path, "--metric", "recall_at50")


def test_the_best_by_a_metric_is_not_what_was_left_of_a_run(capsys, tuned, tmp_path):
    """A run keeps the best by its own criteria; by another the best may be gone, and a worse one is no answer."""
    run = make_random_run(tmp_path, "run", tuned.config)
    line = {"kind": "evaluation", "step": 3, "epoch": 3, "split": "val", "r_mean": 1.0}
    records = [{**line, "harmonic_mean": 31.5}, {**line, "epoch": 4, "harmonic_mean": 20.0}]
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    kept = replace(read_meta(run.best_checkpoint()), metrics={"r_mean": 1.0, "harmonic_mean": 20.0})
    save_checkpoint(run.path, kept, run.load_model(), {})
    error = refused(capsys, "evaluate", "--run", run.path, "--split", "val", "--metric", "harmonic_mean")
    assert "(31.50, epoch 3) was not kept; of those kept the best has 20.00" in error
    assert "selection.also_keep=[harmonic_mean]" in error
    assert run.best_checkpoint("r_mean") == run.best_checkpoint()
