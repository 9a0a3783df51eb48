"""A data set whose rows are of the wrong kind is one clear line, whatever the command, before anything has begun."""

import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from command_line import done, refused
from random_runs import make_random_run

from harma_ray.data.convert.shards import write_table
from harma_ray.data.kinds.images import IMAGE_VECTOR_SCHEMA
from harma_ray.data.kinds.triplets import TRIPLET_VECTOR_SCHEMA
from harma_ray.data.manifest import MANIFEST_NAME
from harma_ray.data.splits import open_split
from harma_ray.errors import UserError
from harma_ray.on_ray.workers import evaluate_on_workers
from harma_ray.recipes import make_task, recipe_config
from harma_ray.resources import Cluster
from harma_ray.settings import build_config

SPACE = """
recipe: {recipe}
fixed: {{model.pretrained: random, train.global_batch_size: 8}}
space: {{optim.learning_rate: {{type: float, low: 1e-6, high: 1e-2, log: true}}}}
limits: {{trials: 1}}
"""
SMALL = {"train.global_batch_size": 8, "train.epochs": 1}
STAGES = ("scenes-cir-finetune", "scenes-cir-combiner")


def with_vectors(data, name, schema, folder):
    """Writes a split with random vectors in place of its images; queries beside it stay."""
    split = open_split(data, name)
    shutil.copytree(split.path, folder / name, ignore=shutil.ignore_patterns("part-*"))
    vectors = np.random.default_rng(0).normal(size=(split.manifest.rows, 64)).astype(np.float32)
    rows = split.read(split.kind.light_columns)
    for field in schema:
        if field.name not in rows.column_names:
            each = [[v.tobytes()] if pa.types.is_list(field.type) else v.tobytes() for v in vectors]
            rows = rows.append_column(field.name, pa.array(each, field.type))
    kind = f"{split.manifest.kind.removesuffix('s')} vectors"
    shard = write_table(rows.select(schema.names).cast(schema), folder / name / "part-0.parquet")
    (folder / name / MANIFEST_NAME).write_text(replace(split.manifest, kind=kind, shards=(shard,)).to_json())


@pytest.fixture(scope="module")
def places(scenes, composed, tmp_path_factory):
    """Data sets by the kinds of their train and val."""
    root = tmp_path_factory.mktemp("kinds")
    with_vectors(composed, "train", TRIPLET_VECTOR_SCHEMA, root / "triplet vectors")
    for name in ("val", "test"):
        with_vectors(composed, name, IMAGE_VECTOR_SCHEMA, root / "triplet vectors")
    shutil.copytree(composed / "train", root / "triplets, vectors" / "train")
    shutil.copytree(root / "triplet vectors" / "val", root / "triplets, vectors" / "val")
    for name in ("train", "val"):
        with_vectors(scenes, name, IMAGE_VECTOR_SCHEMA, root / "image vectors")
    return {"images": scenes, "triplets": composed, **{folder.name: folder for folder in root.iterdir()}}


@pytest.fixture(scope="module")
def runs(scenes, composed, tmp_path_factory):
    """A run with random weights of each recipe."""
    folder = tmp_path_factory.mktemp("runs")
    sizes = {"combiner.projection_dim": 64, "combiner.hidden_dim": 32}
    made = {}
    for recipe, data in (("harma-scenes", scenes), *((stage, composed) for stage in STAGES)):
        changes = {"data.path": str(data), "model.pretrained": "random", **SMALL}
        config = build_config(recipe_config(recipe), {**changes, **(sizes if recipe.endswith("combiner") else {})})
        made[recipe] = make_random_run(folder, recipe, config)
    return made


def sets(changes):
    return [word for name, value in changes.items() for word in ("--set", f"{name}={value}")]


@pytest.mark.parametrize(("recipe", "place", "why"), [
    ("harma-scenes", "triplets", "recipe harma-scenes needs images, but {}/train holds triplets"),
    ("harma-scenes", "image vectors", "recipe harma-scenes needs images, but {}/train holds image vectors"),
    ("harma-scenes", "triplet vectors", "recipe harma-scenes needs images, but {}/train holds triplet vectors"),
    ("scenes-cir-finetune", "images", "recipe scenes-cir-finetune needs triplets, but {}/train holds images"),
    ("scenes-cir-finetune", "triplet vectors", "-finetune needs triplets, but {}/train holds triplet vectors"),
    ("scenes-cir-finetune", "triplets, vectors", "trained on triplets, needs images, but {}/val holds image vectors"),
    ("scenes-cir-combiner", "images", "-combiner needs triplets or triplet vectors, but {}/train holds images"),
    ("scenes-cir-combiner", "image vectors", "triplets or triplet vectors, but {}/train holds image vectors"),
    ("scenes-cir-combiner", "triplets, vectors", "trained on triplets, needs images, but {}/val holds image vectors"),
])  # fmt: skip
def test_what_cannot_be_trained_is_refused_before_ray_starts(capsys, places, recipe, place, why, tmp_path):
    data, runs, space = places[place], tmp_path / "runs", tmp_path / "space.yaml"
    space.write_text(SPACE.format(recipe=recipe))
    train = ("train", "--recipe", recipe, "--data", data, "--runs", runs, "--set", "model.pretrained=random")
    for command in (train, (*train, "--check"), ("tune", space, "--data", data, "--runs", runs)):
        assert why.format(data) in refused(capsys, *command)
    assert not runs.exists()


EVALUATED = [
    ("harma-scenes", "triplets", "train", "evaluating recipe harma-scenes needs images, but {}/train holds triplets"),
    ("harma-scenes", "image vectors", "val", "recipe harma-scenes needs images, but {}/val holds image vectors"),
    ("harma-scenes", "triplet vectors", "train", "needs images, but {}/train holds triplet vectors"),
    *(
        (stage, place, "train", f"evaluating recipe {stage} needs images or image vectors, but {{}}/train holds {kind}")
        for stage in STAGES
        for place, kind in (("triplets", "triplets"), ("triplet vectors", "triplet vectors"))
    ),
    *((stage, "images", "val", "{}/val has no queries of composed retrieval") for stage in STAGES),
    *((stage, "image vectors", "val", "{}/val has no queries of composed retrieval") for stage in STAGES),
]


@pytest.mark.parametrize(("recipe", "place", "split", "why"), EVALUATED)
def test_what_cannot_be_evaluated_is_one_clear_line(capsys, places, runs, recipe, place, split, why, tmp_path):
    there = ("--data", places[place], "--split", split)
    sources = [("--run", runs[recipe].path)]
    if recipe != "scenes-cir-combiner":
        sources.append(("--zero-shot", "--recipe", recipe, "--set", "model.pretrained=random"))
    for source in sources:
        assert why.format(places[place]) in refused(capsys, "evaluate", *source, *there)
        if recipe in STAGES:
            out = tmp_path / "out"
            assert why.format(places[place]) in refused(
                capsys, "predict", "cirr-test", *source, *there, "--out", out, "--cpu"
            )
            assert not out.exists()


def test_workers_are_not_started_for_what_cannot_be_evaluated(places, runs):
    run = runs["harma-scenes"]
    config = build_config(run.config, {"data.path": str(places["triplets"])})
    with pytest.raises(UserError, match=r"evaluating recipe harma-scenes needs images, but .*train holds triplets"):
        evaluate_on_workers(config, run.path, "train", Cluster(2, 0, 1, "", ""))


@pytest.mark.parametrize("place", ["image vectors", "triplet vectors"])
def test_vectors_cannot_be_looked_at(capsys, places, place):
    told = refused(capsys, "inspect", places[place])
    assert told.endswith(f"inspect needs images or triplets or talks, but {places[place]}/train holds {place}")


def test_a_combiner_without_stored_features_evaluates_vectors_of_its_encoders(places):
    """There the vectors may come from anywhere: whether they fit the encoders shows with the model."""
    config = build_config(
        recipe_config("scenes-cir-combiner"), {"model.pretrained": "random", "features.cached": False}
    )
    split = open_split(places["triplets, vectors"], "val")
    make_task(config).check(open_split(places["triplets"], "train"), [split])


def test_a_batch_is_checked_for_the_workers_that_are_asked_for(capsys, scenes):
    small = {"model.pretrained": "random", "adapter.width": 16, "train.global_batch_size": 20}
    check = ("train", "--recipe", "harma-scenes", "--data", scenes, "--check", *sets(small))
    assert "must divide by the number of workers, got 20 and 7; use 14 or 21" in refused(capsys, *check, "--workers", 7)
    assert "got a gradient" in done(capsys, *check, "--workers", 2)
