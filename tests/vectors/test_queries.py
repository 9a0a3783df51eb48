"""What a store tells of composed retrieval is enough to measure it, and is what evaluation measures."""

import numpy as np
import pytest
import torch
from random_runs import make_random_run
from raw_composed import cirr_split, draw_cirr, draw_fashioniq, fashioniq_split
from stored_queries import brute_force_ranks

from harma_ray.api import load_encoder
from harma_ray.data.splits import open_split
from harma_ray.data.stream import Worker, local_batches
from harma_ray.recipes import recipe_config
from harma_ray.settings import build_config
from harma_ray.training.step import evaluate_split
from harma_ray.vectors.job import JobSettings, _Process
from harma_ray.vectors.parts import _lines
from harma_ray.vectors.queries import composed_requests

pytestmark = [
    pytest.mark.ray,  # an encoder asks Ray for the CPUs of its node
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.usefixtures("ray_cluster"),
]
SMALL = {"combiner.projection_dim": 32, "combiner.hidden_dim": 16, "model.pretrained": "random"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return draw_fashioniq(draw_cirr(tmp_path_factory.mktemp("raw")))


@pytest.fixture(scope="module")
def data(root, tmp_path_factory):
    out = tmp_path_factory.mktemp("data")
    for split in ("train", "val", "test1"):
        cirr_split(root, split, out / "cirr")
    for split in ("train", "val"):
        fashioniq_split(root, split, out / "fashioniq")
    return out


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """A run of each stage, with random weights, by its data."""
    folder = tmp_path_factory.mktemp("runs")
    recipes = {"fashioniq": ("scenes-cir-finetune", {}), "cirr": ("scenes-cir-combiner", SMALL)}
    return {
        kind: make_random_run(
            folder, kind, build_config(recipe_config(recipe), {"data.path": str(data / kind), **sizes})
        )
        for kind, (recipe, sizes) in recipes.items()
    }


def stored(run, split, query):
    """Returns what a store of a split holds, encoded in this process."""
    process = _Process(lambda device: load_encoder(run, run.best_checkpoint(), device), "cpu", 1)
    requests = composed_requests(open_split(run.config.data.path, split), query, JobSettings(batch_size=4), 0)
    return [line for request in requests for line in _lines(process(request))]


@pytest.mark.parametrize(("kind", "query"), [("fashioniq", "sum"), ("cirr", "combiner")])
def test_ranks_in_a_store_by_brute_force_are_those_of_evaluation(runs, kind, query):
    run = runs[kind]
    found = evaluate_split(run.task, run.config, run.load_model(), "val", worker=Worker(), loader=local_batches)
    assert found.query == query
    rows, result = stored(run, "val", query), found.retrieval.result
    ranks, among = zip(*brute_force_ranks(rows), strict=True)
    assert list(ranks) == result.ranks.tolist()
    assert len({*ranks}) > 2
    if kind == "cirr":
        assert list(among) == result.subset_ranks.tolist()
    vectors = torch.tensor(np.array([row["vector"] for row in rows if row["kind"] == "query"]))
    torch.testing.assert_close(vectors, found.retrieval.query_embeddings)
    assert len({row["id"] for row in rows}) == len(rows)


def test_triplets_give_each_image_once_and_tell_references_and_targets(runs):
    rows = stored(runs["cirr"], "train", "sum")
    images = [row["id"] for row in rows if row["kind"] == "image"]
    split = open_split(runs["cirr"].config.data.path, "train")
    triplets = split.read(["pair_id", "reference", "target", "captions"]).to_pylist()
    assert sorted(images) == sorted({f"train/{row[side]}" for row in triplets for side in ("reference", "target")})
    told = [(row["id"], row["reference"], row["target"], row["text"]) for row in rows if row["kind"] == "query"]
    assert told == [
        (f"train/query-{row['pair_id']}", f"train/{row['reference']}", f"train/{row['target']}", row["captions"][0])
        for row in triplets
    ]


def test_queries_without_a_known_target_say_so(runs):
    rows = [row for row in stored(runs["cirr"], "test1", "image") if row["kind"] == "query"]
    assert [row["target"] for row in rows] == [None] * 6
