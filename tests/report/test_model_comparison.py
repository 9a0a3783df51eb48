"""Models on the same queries: paired differences, and the queries that tell them apart."""

import re

import numpy as np
import pytest
import torch
from drawn_split import make_retrieval, write_split

from harma_ray.errors import UserError
from harma_ray.evaluation import Evaluation, Metrics
from harma_ray.report.comparison import comparison_section, paired_differences, runs_table
from harma_ray.report.image_text import ImageTextEvaluation
from harma_ray.retrieval.by_class import rank_by_class
from harma_ray.retrieval.classes import Classes
from harma_ray.retrieval.composed import ComposedResult, composed_samples
from harma_ray.retrieval.image_text import RetrievalResult, bootstrap_samples, percentile_intervals

METRICS = Metrics(("r_mean",), objective="r_mean", labels={"txt_r1": "image to text R@1"})


def evaluation(noise, captions, seed=0):
    """Makes an evaluation in which a caption is near its image, but for noise."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.eye(len(captions))
    texts = torch.repeat_interleave(images, torch.tensor([len(row) for row in captions]), dim=0)
    retrieval = make_retrieval(images, texts + noise * torch.randn(texts.shape, generator=generator), captions)
    return ImageTextEvaluation(retrieval.result.metrics, retrieval=retrieval)


def half_width(interval):
    return (interval[1] - interval[0]) / 2


@pytest.mark.parametrize("kind", ["image-text", "composed", "by class"])
def test_intervals_of_differences_are_as_wide_as_the_spread_of_the_queries_own_differences(kind):
    """sqrt(var(d) / n) of the normal approximation, d the difference of the hits at each query."""
    generator, num_queries = torch.Generator().manual_seed(3), 400
    draws = torch.randint(0, 3, (2, num_queries), generator=generator)
    draws[1] = torch.where(torch.rand(num_queries, generator=generator) < 0.7, draws[0], draws[1])  # mostly alike
    if kind == "image-text":
        own = torch.arange(num_queries)
        first, other = (bootstrap_samples(RetrievalResult(ranks, ranks, ranks, ranks, own)) for ranks in draws)
        name = "img_r1"
    elif kind == "composed":
        first, other = (composed_samples(ComposedResult(ranks, subset_ranks=ranks)) for ranks in draws)
        name = "recall_at1"
    else:
        labels = ["a", "b"] * (num_queries // 2)
        gallery = torch.eye(2)
        results = []
        for ranks in draws:
            vectors = gallery[(torch.arange(num_queries) + (ranks > 0)) % 2]
            results.append(rank_by_class(vectors, gallery, Classes.of(labels, ["a", "b"]), ks=(1, 2)).resampled())
        (first, other), name = results, "top_1"
    difference = (draws[1] == 0).double() - (draws[0] == 0).double()
    expected = 196 * float(difference.std()) / num_queries**0.5
    (interval,) = percentile_intervals({name: other[name] - first[name]}).values()
    assert half_width(interval) == pytest.approx(expected, rel=0.12)
    shuffled = {name: np.random.default_rng(0).permutation(other[name]) - first[name]}
    unpaired = half_width(percentile_intervals(shuffled)[name])
    assert half_width(interval) < 0.8 * unpaired
    assert 100 * float(difference.mean()) == pytest.approx(sum(interval) / 2, abs=1)


def test_a_model_does_not_differ_from_itself():
    one = evaluation(0.4, [["a", "b"]] * 3 + [["c"]])
    found = paired_differences(one, one)
    assert set(found) == set(one.metrics)
    assert set(found.values()) == {(0.0, (0.0, 0.0))}


def test_models_that_were_asked_other_queries_are_not_compared():
    one, other = evaluation(0.4, [["a"], ["b"]]), evaluation(0.4, [["a"], ["b"], ["c"]])
    with pytest.raises(UserError, match=r"asked the same, got .*'text to image': 2.*'text to image': 3"):
        paired_differences(one, other)
    with pytest.raises(UserError, match="of different kinds of retrieval"):
        paired_differences(one, Evaluation({"r_mean": 1.0}))


def test_what_was_not_resampled_has_no_interval():
    metrics = Metrics(("loss",), objective="loss", lower_is_better=("loss",))
    table = runs_table(metrics, {"a": Evaluation({"loss": 2.0}), "b": Evaluation({"loss": 1.5, "more": 1.0})})
    assert str(table).splitlines()[3].split() == ["loss", "2", "1.5", "-0.5"]


def test_a_page_counts_and_shows_the_queries_that_tell_models_apart(tmp_path):
    captions = [[f"caption {i}"] for i in range(16)]
    pair = {"one": evaluation(0.25, captions, seed=1), "two": evaluation(0.45, captions, seed=2)}
    split = write_split(tmp_path, captions)
    section = comparison_section(runs_table(METRICS, pair), pair, split)
    first, second = (found.retrieval.result.text_to_image_ranks == 0 for found in pair.values())
    cells = {"both": first & second, "one alone": first & ~second, "two alone": second & ~first}
    cells["neither"] = ~(first | second)
    assert cells["one alone"].any()
    part = section.html[section.html.index("<h3>Text to image: one and two") : section.html.index("<h3>Image to text")]
    for title, chosen in cells.items():
        assert re.search(rf"{title}</td><td>{int(chosen.sum())}</td>", part), title
    shown = part[part.index("one has a right answer first") : part.index("By two:")]
    queries = re.findall(r'<div class="query"><p>caption (\d+)</p>', shown)
    assert {int(number) for number in queries} <= set(cells["one alone"].nonzero()[:, 0].tolist())
    lost = pair["two"].retrieval.result.text_to_image_ranks
    worst = sorted(cells["one alone"].nonzero()[:, 0].tolist(), key=lambda query: -int(lost[query]))
    assert [int(number) for number in queries] == worst[:5]
