"""The demo of CLIP4Cir after its trainings: what it prints, and that models that learnt nothing are no success."""

import re

import pytest
import torch
from random_runs import make_random_run

from harma_ray.cli.demo_composed import BEST, TRAINED, UNTRAINED, require_apart, show
from harma_ray.data.queries import ComposedQueries
from harma_ray.errors import UserError
from harma_ray.recipes import recipe_config
from harma_ray.report.composed import ComposedEvaluation
from harma_ray.retrieval.composed import ComposedRetrieval
from harma_ray.settings import build_config

WAYS = ("combiner", "sum", "image", "text")
QUERIES = 60


def test_combiners_that_nobody_trained_are_printed_and_refused(composed, tmp_path, capsys):
    sizes = {"combiner.projection_dim": 32, "combiner.hidden_dim": 16, "model.pretrained": "random"}
    config = build_config(recipe_config("scenes-cir-combiner"), {"data.path": str(composed), **sizes})
    run = make_random_run(tmp_path, "run", config)
    with pytest.raises(UserError, match=r"intervals of both Combiners' r_mean should not overlap, .* is wrong here"):
        show({TRAINED: run, UNTRAINED: run})
    told = capsys.readouterr().out
    assert "test: 4 queries in 24 images, in percent (95 % interval)" in told
    table = [line for line in told.splitlines() if re.search(r"\d+\.\d \(", line)]
    assert len(table) == 8
    assert [len(re.findall(r"\d+\.\d \(\d+\.\d-\d+\.\d\)", line)) for line in table] == [4] * 8
    assert re.search(r"chance +4\.3 +43\.5 +20\.0", told)  # of 23 images, and of 5 members
    assert re.search(r"random +Combiner +0\.0 +0\.0 to 0\.0", told)


def evaluation(share):
    """An evaluation that finds a share of the targets at once, and has the others last."""
    gallery = torch.eye(2 * QUERIES)
    reference, target = torch.arange(QUERIES), torch.arange(QUERIES, 2 * QUERIES)
    members, names = [[*range(2 * QUERIES)]] * QUERIES, [""] * 2 * QUERIES
    told = [*range(QUERIES)], [["a"]] * QUERIES
    queries = ComposedQueries(*told, reference, target, members, None, None, names, None, "here")
    vectors = torch.where(torch.arange(QUERIES)[:, None] < share * QUERIES, gallery[target], -gallery[target])
    retrieval = ComposedRetrieval.of(gallery, vectors, queries)
    return ComposedEvaluation(retrieval.result.metrics, retrieval=retrieval)


def test_what_the_demo_promises_is_asked_of_every_row(capsys):
    low, high = evaluation(0.2), evaluation(0.9)
    found = {(clip, way): low for clip in (TRAINED, UNTRAINED) for way in WAYS}
    require_apart(found | {BEST: high, (TRAINED, "sum"): high})
    assert re.search(r"random +Combiner +70\.0 +[56]\d\.\d to [78]\d\.\d", capsys.readouterr().out)
    with pytest.raises(UserError, match="not told from trained image alone; something is wrong here"):
        require_apart(found | {BEST: high, (TRAINED, "image"): high})
