import random
import statistics

import numpy as np
import pytest
import torch
from call_count import num_calls
from chunks import scores_at_a_time
from torch.nn import functional as F

from harma_ray.data.queries import ComposedQueries
from harma_ray.errors import UserError
from harma_ray.retrieval import composed
from harma_ray.retrieval.composed import ComposedResult, bootstrap_composed

SEVEN = [f"recall_at{k}" for k in (1, 5, 10, 50)] + [f"group_recall_at{k}" for k in (1, 2, 3)]
MEANS = ["mean(R@5+R_s@1)", "arithmetic_mean", "harmonic_mean", "geometric_mean", "r_mean"]


def asked(reference, target, gallery_size, *, categories=None, gallery_categories=None, members=None):
    names, protocol = [""] * gallery_size, (members, categories, gallery_categories)
    return ComposedQueries([], [], reference, target, *protocol, names, text_vectors=None, origin="here")


def composed_recalls(vectors, gallery, reference, target, **protocol):
    return composed.composed_recalls(vectors, gallery, asked(reference, target, len(gallery), **protocol))


def chance_composed_recalls(reference, target, gallery_size, **protocol):
    return composed.chance_composed_recalls(asked(reference, target, gallery_size, **protocol))


# The protocols from their plain definitions: sorted lists of gallery positions, a target behind all that tie with it.


def place(scores, target, candidates):
    return sorted(candidates, key=lambda item: (-scores[item], item == target)).index(target)


def share_below(places, k):
    return 100 * sum(found < k for found in places) / len(places)


def by_category(scores, target, categories, gallery_categories):
    places = {}
    for row, wanted, category in zip(scores, target, categories, strict=True):
        candidates = [item for item, other in enumerate(gallery_categories) if other == category]
        places.setdefault(category, []).append(place(row, wanted, candidates))
    metrics = {
        f"{category}_recall_at{k}": share_below(found, k) for category, found in places.items() for k in (10, 50)
    }
    for k in (10, 50):
        metrics[f"average_recall_at{k}"] = sum(metrics[f"{category}_recall_at{k}"] for category in places) / len(places)
    mean = (metrics["average_recall_at10"] + metrics["average_recall_at50"]) / 2
    return metrics | {"average_recall": mean, "r_mean": mean}


def with_members(scores, reference, target, members):
    rows = list(zip(scores, reference, target, members, strict=True))
    places = [place(row, wanted, [i for i in range(len(row)) if i != own]) for row, own, wanted, _ in rows]
    among = [place(row, wanted, [i for i in few if i != own]) for row, own, wanted, few in rows]
    metrics = {f"recall_at{k}": share_below(places, k) for k in (1, 5, 10, 50)}
    metrics |= {f"group_recall_at{k}": share_below(among, k) for k in (1, 2, 3)}
    seven = list(metrics.values())
    metrics["mean(R@5+R_s@1)"] = (metrics["recall_at5"] + metrics["group_recall_at1"]) / 2
    metrics["arithmetic_mean"] = metrics["r_mean"] = statistics.fmean(seven)
    metrics["harmonic_mean"] = statistics.harmonic_mean(seven)
    metrics["geometric_mean"] = statistics.geometric_mean(seven) if min(seven) > 0 else 0.0
    return metrics


def near(count, gallery, target, seed, noise):
    """Queries near their targets."""
    drawn = torch.randn(count, gallery.shape[1], generator=torch.Generator().manual_seed(seed), dtype=gallery.dtype)
    return F.normalize(gallery[target] + noise * drawn, dim=1)


def unit_gallery(size, seed, width=6):
    drawn = torch.randn(size, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(drawn, dim=1)


def categories_case(seed, num_queries=60):
    """Queries of three categories, in no order, over galleries of unequal size in no order."""
    drawn = random.Random(seed)
    names = ["dress"] * 30 + ["shirt"] * 55 + ["toptee"] * 70
    drawn.shuffle(names)
    items = {name: [i for i, other in enumerate(names) if other == name] for name in set(names)}
    categories = [drawn.choice(["shirt", "dress", "toptee"]) for _ in range(num_queries)]
    reference, target = zip(*(drawn.sample(items[category], 2) for category in categories), strict=True)
    gallery = unit_gallery(len(names), seed)
    reference, target = torch.tensor(reference), torch.tensor(target)
    return near(num_queries, gallery, target, seed, 0.9), gallery, reference, target, categories, names


def members_case(seed, num_queries=50, gallery_size=70):
    drawn = random.Random(seed)
    members = [drawn.sample(range(gallery_size), drawn.choice([3, 6, 6, 6])) for _ in range(num_queries)]
    reference, target = zip(*(drawn.sample(few, 2) for few in members), strict=True)
    gallery = unit_gallery(gallery_size, seed)
    reference, target = torch.tensor(reference), torch.tensor(target)
    queries = F.normalize(near(num_queries, gallery, target, seed, 0.5) + 0.8 * gallery[reference], dim=1)
    return queries, gallery, reference, target, members


@pytest.mark.parametrize("seed", range(3))
def test_recalls_by_category_equal_sorted_lists(seed):
    queries, gallery, reference, target, categories, names = categories_case(seed)
    expected = by_category((queries @ gallery.T).tolist(), target.tolist(), categories, names)
    for count in (None, 70):
        with scores_at_a_time(count):
            result = composed_recalls(
                queries, gallery, reference, target, categories=categories, gallery_categories=names
            )
        assert result.metrics == pytest.approx(expected)
    assert 0 < result.metrics["average_recall"] < 100
    assert (result.ranks.dtype, result.subset_ranks, result.categories) == (torch.int64, None, categories)


@pytest.mark.parametrize("seed", range(3))
def test_recalls_with_members_equal_sorted_lists(seed):
    queries, gallery, reference, target, members = members_case(seed)
    expected = with_members((queries @ gallery.T).tolist(), reference.tolist(), target.tolist(), members)
    for count in (None, 70):
        with scores_at_a_time(count):
            result = composed_recalls(queries, gallery, reference, target, members=members)
        assert result.metrics == pytest.approx(expected)
    assert list(result.metrics) == SEVEN + MEANS
    assert 0 < result.metrics["recall_at1"] < result.metrics["recall_at50"]
    assert all(type(value) is float for value in result.metrics.values())


def test_reference_is_taken_out_with_members_alone():
    gallery = torch.eye(4)
    queries = torch.tensor([[0.9, 0.5, 0.1, 0.0], [0.4, 0.3, 0.9, 0.5]])  # nearest to the reference
    reference, target = torch.tensor([0, 2]), torch.tensor([1, 3])
    assert composed_recalls(queries, gallery, reference, target).ranks.tolist() == [1, 1]
    result = composed_recalls(queries, gallery, reference, target, members=[[0, 1, 3], [1, 2, 3]])
    assert result.ranks.tolist() == result.subset_ranks.tolist() == [0, 0]


def test_without_categories_there_is_one_called_all():
    queries, gallery, reference, target, _ = members_case(4)
    result = composed_recalls(queries, gallery, reference, target)
    assert list(result.metrics) == [
        *(
            "all_recall_at10",
            "all_recall_at50",
            "average_recall_at10",
            "average_recall_at50",
            "average_recall",
            "r_mean",
        )
    ]
    expected = by_category((queries @ gallery.T).tolist(), target.tolist(), ["all"] * 50, ["all"] * 70)
    assert result.metrics == pytest.approx(expected)


def test_a_category_is_not_ranked_among_the_images_of_another():
    gallery = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    position = torch.tensor([1])
    options = {"categories": ["shirt"], "gallery_categories": ["dress", "shirt", "dress"]}
    assert composed_recalls(gallery[:1], gallery, position, position, **options).ranks.tolist() == [0]
    assert composed_recalls(gallery[:1], gallery, position, position).ranks.tolist() == [2]


@pytest.mark.parametrize("protocol", ["categories", "members"])
def test_ties_count_against_the_model(protocol):
    drawn = torch.Generator().manual_seed(0)
    gallery = torch.randint(-1, 2, (70, 3), generator=drawn).double()
    queries = torch.randint(-1, 2, (50, 3), generator=drawn).double()
    _, _, reference, target, members = members_case(5)
    scores = (queries @ gallery.T).tolist()
    if protocol == "members":
        result = composed_recalls(queries, gallery, reference, target, members=members)
        assert result.metrics == pytest.approx(with_members(scores, reference.tolist(), target.tolist(), members))
        collapsed = composed_recalls(torch.ones(50, 2), torch.ones(70, 2), reference, target, members=members)
        assert collapsed.metrics["recall_at50"] == 0
    else:
        result = composed_recalls(queries, gallery, reference, target)
        assert result.metrics == pytest.approx(by_category(scores, target.tolist(), ["all"] * 50, ["all"] * 70))
        collapsed = composed_recalls(torch.ones(50, 2), torch.ones(70, 2), reference, target)
        assert set(collapsed.metrics.values()) == {0.0}


def test_a_recall_of_zero_makes_harmonic_and_geometric_mean_zero():
    metrics = ComposedResult(torch.tensor([3, 7]), torch.tensor([0, 1])).metrics
    assert metrics["recall_at1"] == metrics["harmonic_mean"] == metrics["geometric_mean"] == 0.0
    assert metrics["arithmetic_mean"] == metrics["r_mean"] == pytest.approx((0 + 50 + 100 + 100 + 50 + 100 + 100) / 7)
    assert metrics["mean(R@5+R_s@1)"] == 50
    nothing = ComposedResult(torch.tensor([99]), torch.tensor([3]))
    assert set(nothing.metrics.values()) == {0.0}
    assert set(bootstrap_composed(nothing, num_samples=5).values()) == {(0.0, 0.0)}


def test_recalls_beyond_the_gallery_are_full():
    gallery, position = torch.eye(20), torch.arange(20)
    metrics = composed_recalls(gallery, gallery, (position + 1) % 20, position).metrics
    assert metrics["all_recall_at50"] == 100
    members = [[row, (row + 1) % 20] for row in range(20)]
    metrics = composed_recalls(-gallery, gallery, (position + 1) % 20, position, members=members).metrics
    assert (metrics["recall_at10"], metrics["recall_at50"], metrics["group_recall_at1"]) == (0, 100, 100)


# Errors.


def refused(message, **changes):
    """Expects an error for three good queries over a gallery of five, with some arguments replaced."""
    arguments = {"vectors": torch.ones(3, 2), "gallery": torch.ones(5, 2)}
    arguments |= {"reference": torch.tensor([0, 1, 2]), "target": torch.tensor([1, 2, 3])}
    arguments |= changes
    with pytest.raises(UserError, match=message):
        composed_recalls(**arguments)
    arguments.pop("vectors")
    gallery_size = len(arguments.pop("gallery"))
    with pytest.raises(UserError, match=message):
        chance_composed_recalls(gallery_size=gallery_size, **arguments)


def test_positions_outside_the_gallery_are_refused_with_their_queries():
    refused(
        r"a reference must lie in the gallery, 0\.\.4.*queries \[2\] \(1 in all\)", reference=torch.tensor([0, 1, 5])
    )
    refused(r"a target must lie in the gallery.*queries \[0, 1\] \(2 in all\)", target=torch.tensor([-1, 9, 0]))
    many = {"vectors": torch.ones(8, 2), "reference": torch.arange(8) % 5, "target": torch.arange(8) + 4}
    refused(r"queries \[1, 2, 3, 4, 5\] \(7 in all\)", **many)


def test_positions_of_another_category_are_refused():
    names = {"categories": ["a", "b", "b"], "gallery_categories": ["a", "a", "b", "b", "b"]}
    refused(r"a reference must be of its query's category.*queries \[1\]", **names)
    refused(
        r"a target .* category.*queries \[0\]",
        **names,
        reference=torch.tensor([0, 2, 2]),
        target=torch.tensor([4, 2, 3]),
    )
    names["categories"] = ["unknown", "b", "b"]
    refused(r"category.*queries \[0, 1\]", **names)


def test_members_that_do_not_fit_are_refused():
    members = [[0, 1, 4], [1, 2, 4], [2, 3, 4]]
    refused(r"must not be its query's reference.*queries \[1\]", members=members, target=torch.tensor([1, 1, 3]))
    refused(r"reference must be one of its members.*queries \[0\]", members=[[1, 4], *members[1:]])
    refused(r"target must be one of its members.*queries \[1, 2\]", members=[members[0], [1, 4], [2]])
    refused(r"members must lie in the gallery, 0\.\.4.*queries \[0, 2\]", members=[[0, 1, 5], members[1], [2, 3, -1]])


def test_lengths_that_do_not_fit_are_refused():
    refused("`reference` must have 3 entries, but has 2", reference=torch.tensor([0, 1]))
    refused("`members` must have 3 entries, but has 1", members=[[0, 1]])
    refused("`categories` must have 3 entries, but has 1", categories=["a"], gallery_categories=["a"] * 5)
    refused("`gallery_categories` must have 5 entries, but has 1", categories=["a"] * 3, gallery_categories=["a"])
    refused("must be given together", categories=["a"] * 3)
    empty = torch.empty(0, dtype=torch.int64)
    refused("at least one query", vectors=torch.ones(0, 2), reference=empty, target=empty)
    with pytest.raises(UserError, match="3 queries and 2 targets"):
        composed_recalls(torch.ones(3, 2), torch.ones(5, 2), empty, torch.tensor([0, 1]))


# Chance.


def average_of_random_rankings(metrics_of, num_queries, gallery_size, rounds=300):
    drawn, sums = random.Random(0), {}
    for _ in range(rounds):
        scores = [[drawn.random() for _ in range(gallery_size)] for _ in range(num_queries)]
        for name, value in metrics_of(scores).items():
            sums[name] = sums.get(name, 0.0) + value / rounds
    return sums


def test_chance_by_category_agrees_with_random_rankings():
    _, _, reference, target, categories, names = categories_case(6, num_queries=20)
    chance = chance_composed_recalls(reference, target, len(names), categories=categories, gallery_categories=names)
    average = average_of_random_rankings(
        lambda scores: by_category(scores, target.tolist(), categories, names), 20, len(names)
    )
    assert set(chance) == set(average)
    assert chance == pytest.approx(average, abs=4)  # three standard errors of the widest, about 1.3
    assert chance["dress_recall_at10"] == pytest.approx(100 / 3)
    assert chance["dress_recall_at50"] == 100


def test_chance_with_members_agrees_with_random_rankings_and_leaves_out_what_is_not_linear():
    _, _, reference, target, members = members_case(7, num_queries=20)
    chance = chance_composed_recalls(reference, target, 70, members=members)
    average = average_of_random_rankings(
        lambda scores: with_members(scores, reference.tolist(), target.tolist(), members), 20, 70
    )
    assert set(chance) == set(average) - {"harmonic_mean", "geometric_mean"}
    assert chance == pytest.approx({name: average[name] for name in chance}, abs=2)  # three standard errors
    assert chance["recall_at10"] == pytest.approx(1000 / 69)


# Intervals.


def slow_intervals(result, groups, num_samples, seed, level):
    """Resamples the ranks themselves, one sample at a time; all samples of a category before the next category's."""
    generator = np.random.default_rng(seed)
    drawn = [[rows[generator.integers(len(rows), size=len(rows))] for _ in range(num_samples)] for rows in groups]
    samples = []
    for sample in range(num_samples):
        rows = torch.from_numpy(np.concatenate([of_group[sample] for of_group in drawn]))
        categories = result.categories and [result.categories[row] for row in rows]
        subset_ranks = None if result.subset_ranks is None else result.subset_ranks[rows]
        samples.append(ComposedResult(result.ranks[rows], subset_ranks, categories).metrics)
    tails = [(1 - level) / 2, (1 + level) / 2]
    return {name: tuple(np.quantile([metrics[name] for metrics in samples], tails)) for name in result.metrics}


@pytest.fixture(params=["categories", "members"])
def result_and_groups(request):
    if request.param == "members":
        queries, gallery, reference, target, members = members_case(8)
        return composed_recalls(queries, gallery, reference, target, members=members), [np.arange(50)]
    queries, gallery, reference, target, categories, names = categories_case(8)
    result = composed_recalls(queries, gallery, reference, target, categories=categories, gallery_categories=names)
    groups = [
        np.array([row for row, other in enumerate(categories) if other == name]) for name in dict.fromkeys(categories)
    ]
    return result, groups


def test_intervals_equal_a_slow_loop(result_and_groups):
    result, groups = result_and_groups
    intervals = bootstrap_composed(result, num_samples=40, seed=3)
    assert list(intervals) == list(result.metrics)
    for name, expected in slow_intervals(result, groups, 40, 3, 0.95).items():
        assert intervals[name] == pytest.approx(expected)


def test_intervals_hold_the_point_estimate_and_repeat_with_the_seed(result_and_groups):
    result, _ = result_and_groups
    intervals = bootstrap_composed(result, num_samples=300, seed=4)
    for name, (low, high) in intervals.items():
        assert low <= result.metrics[name] + 1e-9
        assert result.metrics[name] <= high + 1e-9
    assert 0 < intervals["r_mean"][1] - intervals["r_mean"][0] < 30
    assert bootstrap_composed(result, num_samples=300, seed=4) == intervals
    assert bootstrap_composed(result, num_samples=300, seed=5) != intervals


def test_queries_are_resampled_within_their_categories():
    # One category is always right, the other never: the average of the two never moves.
    result = ComposedResult(torch.tensor([0, 99] * 10), categories=["right", "wrong"] * 10)
    assert bootstrap_composed(result, num_samples=50)["average_recall"] == (50.0, 50.0)


def test_intervals_of_a_large_split_call_no_more_functions_than_those_of_a_small_one():
    ranks = [torch.arange(size) % 90 for size in (90, 6000)]
    few, many = (num_calls(bootstrap_composed, ComposedResult(r, r % 5), num_samples=20) for r in ranks)
    assert few <= many <= few + 50
