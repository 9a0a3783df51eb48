import itertools

import numpy as np
import pytest
import torch
from chunks import scores_at_a_time

from harma_ray.errors import UserError
from harma_ray.retrieval.by_class import (
    ByClassResult,
    ByClassRetrieval,
    expected_precision,
    judge_neighbours,
    rank_by_class,
)
from harma_ray.retrieval.classes import Classes, same_images
from harma_ray.retrieval.groups import Groups
from harma_ray.retrieval.ranking import top_k


def small_integers(generator, *shape):
    """Inner products of these tie often and are exact in any arithmetic."""
    return torch.randint(-1, 2, shape, generator=generator).float()


def case(seed, num_queries=19, num_items=37, num_classes=4):
    """Vectors that tie, some of them equal, classes of different sizes, and items left out for some queries."""
    generator = torch.Generator().manual_seed(seed)
    queries, gallery = small_integers(generator, num_queries, 5), small_integers(generator, num_items, 5)
    gallery[20:30] = gallery[:10]
    labels = [f"class {min(n, 3)}" for n in torch.randint(num_classes + 2, (num_items,), generator=generator).tolist()]
    labels[:num_classes] = [f"class {n}" for n in range(num_classes)]
    own = [f"class {n}" for n in torch.randint(num_classes, (num_queries,), generator=generator).tolist()]
    drawn = torch.rand(num_queries, num_items, generator=generator) < 0.1
    drawn[:, :num_classes] = False  # so that every query keeps a right one
    return queries, gallery, own, labels, [row.nonzero()[:, 0].tolist() for row in drawn]


def brute_force(scores, own, labels, excluded, ks):
    """Metrics from the plain definition: a full sort in which wrong items stand before right ones of equal score."""
    hits, precisions, nearest = {k: [] for k in ks}, [], []
    for query, row in enumerate(scores):
        kept = [item for item in range(len(labels)) if item not in excluded[query]]
        order = sorted(kept, key=lambda item: (-row[item], labels[item] == own[query], labels[item]))
        right = [labels[item] == own[query] for item in order]
        for k in ks:
            hits[k].append(any(right[:k]))
        at = [place for place, is_right in enumerate(right) if is_right]
        precisions.append(sum(sum(right[: place + 1]) / (place + 1) for place in at) / len(at))
        nearest.append(labels[order[0]])
    found = {f"top_{k}": 100 * np.mean(values) for k, values in hits.items()}
    return {**found, "map": 100 * np.mean(precisions)}, precisions, nearest


@pytest.mark.parametrize("seed", range(6))
def test_figures_equal_brute_force_amid_ties_and_duplicates_whatever_the_chunk_size(seed):
    queries, gallery, own, labels, excluded = case(seed)
    classes = Classes.of(own, labels)
    scores = (queries @ gallery.T).tolist()
    metrics, precisions, nearest = brute_force(scores, own, labels, excluded, (1, 2, 6))
    for rows in (1, 2, 7, None):
        with scores_at_a_time(rows and rows * len(gallery)):
            result = rank_by_class(queries, gallery, classes, excluded=Groups.from_lists(excluded), ks=(1, 2, 6))
        assert result.metrics == pytest.approx(metrics)
        assert result.precisions.tolist() == pytest.approx(precisions)
        assert [classes.names[number] for number in result.nearest.tolist()] == nearest


def test_the_order_of_the_gallery_does_not_matter():
    queries, gallery, own, labels, _ = case(7)
    order = torch.randperm(len(gallery), generator=torch.Generator().manual_seed(0))
    shuffled = Classes.of(own, [labels[place] for place in order.tolist()])
    one, other = (
        rank_by_class(queries, gallery, Classes.of(own, labels)),
        rank_by_class(queries, gallery[order], shuffled),
    )
    assert one.metrics == other.metrics
    assert torch.equal(one.nearest, other.nearest)


def test_a_case_worked_out_by_hand():
    gallery = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.0]])
    classes = Classes.of(["sea", "sea"], ["field", "sea", "sea", "field"])
    result = rank_by_class(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), gallery, classes, ks=(1, 2))
    assert result.ranks.tolist() == [1, 0]
    assert result.precisions.tolist() == pytest.approx([(1 / 2 + 2 / 3) / 2, 1.0])
    assert result.metrics == pytest.approx({"top_1": 50.0, "top_2": 100.0, "map": 100 * (7 / 12 + 1) / 2})
    assert result.confusion().tolist() == [[0, 0], [1, 1]]
    (figures,) = result.by_class()
    assert (figures.name, figures.num_queries, figures.taken_for) == ("sea", 2, (("field", 1),))


def test_equal_vectors_of_all_images_are_as_bad_as_can_be():
    labels = ["a"] * 4 + ["b"] * 4
    itself = same_images(range(8), range(8))
    found = rank_by_class(torch.ones(8, 3), torch.ones(8, 3), Classes.of(labels, labels), excluded=itself)
    assert found.ranks.tolist() == [4] * 8
    assert found.metrics["top_1"] == 0


def test_top_k_is_that_of_the_platforms_ranking_without_ties():
    generator = torch.Generator().manual_seed(1)
    queries, gallery = torch.randn(30, 8, generator=generator), torch.randn(50, 8, generator=generator)
    own, labels = [str(n % 5) for n in range(30)], [str(n % 5) for n in range(50)]
    _, items = top_k(queries, gallery, 5)
    result = rank_by_class(queries, gallery, Classes.of(own, labels))
    for k in (1, 3, 5):
        hits = [own[query] in {labels[item] for item in row[:k]} for query, row in enumerate(items.tolist())]
        assert result.metrics[f"top_{k}"] == pytest.approx(100 * np.mean(hits))


def test_what_an_index_found_is_judged_as_the_whole_ranking_is():
    queries, gallery, own, labels, excluded = case(3)
    classes, left_out = Classes.of(own, labels), Groups.from_lists(excluded)
    exact = rank_by_class(queries, gallery, classes, excluded=left_out)
    count = len(gallery) - max(map(len, excluded))
    scores, items = top_k(queries, gallery, count, excluded=left_out)
    result = judge_neighbours(scores, items, classes, excluded=left_out)
    assert torch.equal(result.ranks.clamp(max=count), exact.ranks.clamp(max=count))
    assert torch.equal(result.nearest, exact.nearest)
    assert set(result.metrics) == {"top_1", "top_3", "top_5"} == set(result.chance())
    nothing = judge_neighbours(torch.full_like(scores, -torch.inf), torch.full_like(items, -1), classes)
    assert nothing.metrics["top_5"] == 0
    assert not nothing.confusion().any()


def test_queries_in_the_gallery_never_find_themselves_or_their_copies():
    vectors = torch.nn.functional.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    vectors[3] = vectors[0]
    hashes, labels = ["x", "y", "z", "x", "u"], ["a", "b", "a", "b", "a"]
    vectors, excluded = vectors[:5], same_images(hashes, hashes)
    result = rank_by_class(vectors, vectors, Classes.of(labels, labels), excluded=excluded, ks=(1, 2))
    assert result.num_items.tolist() == [3, 4, 4, 3, 4]
    assert result.num_right.tolist() == [2, 1, 2, 1, 2]
    found = ByClassRetrieval(vectors, vectors, excluded, result, torch.arange(5))
    for query in range(5):
        _, items = found.neighbours([query], 3)
        assert not {hashes[item] for item in items[0].tolist()} & {hashes[query]}
    assert same_images(["x"], hashes).pairs()[1].tolist() == [0, 3]


def test_copies_of_an_image_take_memory_once_and_are_counted_by_class():
    keys, numbers = [max(n, 20_000) for n in range(30_000)], torch.arange(30_000) % 3  # 400 million pairs
    excluded, labels = same_images(keys, keys), [f"class {n}" for n in numbers.tolist()]
    assert len(excluded.indices) == 30_000
    right, total = Classes.of(labels, labels).sizes(excluded)
    assert (total[:20_001] == 9_999).all()
    assert (total[20_001:] == 29_999).all()
    for row in (0, 1, 20_000, 20_001, 29_999):
        same = torch.tensor(keys) == keys[row]
        assert right[row] == ((numbers == numbers[row]) & ~same).sum()


@pytest.mark.parametrize(("size", "right"), [(1, 1), (5, 1), (6, 2), (7, 4), (5, 5)])
def test_expected_precision_equals_the_mean_over_all_rankings(size, right):
    every = [
        sum((j + 1) / (place + 1) for j, place in enumerate(places)) / right
        for places in itertools.combinations(range(size), right)
    ]
    assert float(expected_precision(torch.tensor([right]), size)) == pytest.approx(np.mean(every))


def test_chance_equals_the_mean_over_random_rankings():
    generator = torch.Generator().manual_seed(0)
    labels = [str(min(n, 2)) for n in range(12)]
    keys = [str(max(n, 1)) for n in range(12)]
    totals: dict[str, list[float]] = {}
    for _ in range(400):
        queries, gallery = torch.eye(12), torch.rand(12, 12, generator=generator).T
        classes, excluded = Classes.of(labels, labels), same_images(keys, keys)
        kept = (classes.sizes(excluded)[0] > 0).nonzero()[:, 0]
        excluded = same_images([keys[row] for row in kept.tolist()], keys)
        result = rank_by_class(queries[kept], gallery, classes.chosen(kept), excluded=excluded)
        for name, value in result.metrics.items():
            totals.setdefault(name, []).append(value)
    expected = result.chance()
    assert expected == pytest.approx({name: np.mean(values) for name, values in totals.items()}, abs=1.0)


def test_intervals_hold_the_figures_and_repeat():
    queries, gallery, own, labels, _ = case(2, num_queries=200)
    result = rank_by_class(queries, gallery, Classes.of(own, labels))
    intervals = result.intervals(num_samples=300)
    assert set(intervals) == {*ByClassResult.METRICS} == {*result.metrics} == {*ByClassResult.LABELS}
    for name, (low, high) in intervals.items():
        assert low <= result.metrics[name] <= high
    share = result.metrics["top_1"] / 100
    deviation = 100 * (share * (1 - share) / 200) ** 0.5
    low, high = intervals["top_1"]
    assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.15)
    assert result.intervals(num_samples=300) == intervals


def test_classes_are_listed_with_the_worst_first():
    queries, gallery, own, labels, _ = case(5)
    result = rank_by_class(queries, gallery, Classes.of(own, labels))
    figures = result.by_class()
    assert [row.metrics["top_1"] for row in figures] == sorted(row.metrics["top_1"] for row in figures)
    assert sum(row.num_queries for row in figures) == len(queries)
    for name in result.metrics:
        mean = sum(row.metrics[name] * row.num_queries for row in figures) / len(queries)
        assert mean == pytest.approx(result.metrics[name])
    assert int(result.confusion().sum()) == len(queries)


def test_what_cannot_be_measured_is_one_line():
    vectors, labels = torch.eye(4), ["a", "b", "a", "b"]
    classes = Classes.of(labels, labels)
    with pytest.raises(UserError, match=r"at least two classes, but all 3 images are of class `a`"):
        Classes.of(["a"], ["a", "a", "a"])
    with pytest.raises(UserError, match=r"every gallery image needs a class, but 2 of 3 have none \(rows 1, 2\)"):
        Classes.of(["a"], ["a", "", None])
    with pytest.raises(UserError, match="at least one query"):
        Classes.of([], ["a", "b"])
    with pytest.raises(UserError, match=r"1 <= k <= 4, .* got \[5\]"):
        rank_by_class(vectors, vectors, classes, ks=(5,))
    excluded = same_images(range(4), range(4))
    with pytest.raises(UserError, match=r"1 <= k <= 3, .* got \[4\]"):
        rank_by_class(vectors, vectors, classes, excluded=excluded, ks=(4,))
    with pytest.raises(UserError, match=r"but 1 of 2 have none \(rows 1\); leave them out"):
        rank_by_class(vectors[:2], vectors, Classes.of(["a", "c"], labels), ks=(1,))
    with pytest.raises(UserError, match=r"`gallery` must be finite .* rows 1 are not"):
        rank_by_class(vectors, torch.tensor([[0.0] * 4, [torch.nan] * 4, [0.0] * 4, [0.0] * 4]), classes, ks=(1,))
