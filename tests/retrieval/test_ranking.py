import math

import pytest
import torch
from chunks import scores_at_a_time

from harma_ray.errors import UserError
from harma_ray.retrieval import ranking
from harma_ray.retrieval.groups import Groups
from harma_ray.retrieval.ranking import _fixed_point

CHUNK_SIZES = (1, 2, 3, 7, 64, None)


def rank_first_relevant(queries, gallery, relevant, chunk_size=None, **how):
    with scores_at_a_time(chunk_size and chunk_size * len(gallery)):
        (ranks,) = ranking.rank_first_relevant(queries, gallery, [relevant], **how)
    return ranks


def top_k(queries, gallery, k, chunk_size=None, **how):
    with scores_at_a_time(chunk_size and chunk_size * len(gallery)):
        return ranking.top_k(queries, gallery, k, **how)


def brute_force_ranks(scores, relevant, excluded=None, candidates=None):
    ranks = []
    for query, row in enumerate(scores):
        left_out = set() if excluded is None else set(excluded[query])
        allowed = set(range(len(row))) if candidates is None else set(candidates[query])
        right = set(relevant[query])
        best = max(row[item] for item in right & allowed - left_out)
        ranks.append(sum(row[item] >= best for item in allowed - left_out - right))
    return ranks


def random_lists(generator, num_queries, num_items, share, *, at_least_one=False):
    drawn = torch.rand(num_queries, num_items, generator=generator) < share
    if at_least_one:
        drawn[torch.arange(num_queries), torch.randint(num_items, (num_queries,), generator=generator)] = True
    return [row.nonzero()[:, 0].tolist() for row in drawn]


def small_integers(generator, *shape):
    """Inner products of these tie often and are exact in any arithmetic."""
    return torch.randint(-1, 2, shape, generator=generator).float()


def test_ranks_of_a_case_worked_out_by_hand():
    gallery = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [-1.0, 0.0]])
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])  # orders 0213, 12(03) and (03)21
    relevant = Groups.from_lists([[3], [0, 2], [3]])
    assert rank_first_relevant(queries, gallery, relevant).tolist() == [3, 1, 1]  # the third ties with item 0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("with_excluded", [False, True])
@pytest.mark.parametrize("with_candidates", [False, True])
def test_ranks_equal_brute_force_amid_ties_whatever_the_chunk_size(seed, with_excluded, with_candidates):
    generator = torch.Generator().manual_seed(seed)
    queries, gallery = small_integers(generator, 23, 6), small_integers(generator, 41, 6)
    relevant = random_lists(generator, 23, 41, 0.08, at_least_one=True)
    excluded = candidates = None
    if with_excluded:
        excluded = random_lists(generator, 23, 41, 0.2)
        excluded = [[item for item in row if item != right[0]] for row, right in zip(excluded, relevant, strict=True)]
    if with_candidates:
        candidates = random_lists(generator, 23, 41, 0.2)
        candidates = [[right[0], *row] for row, right in zip(candidates, relevant, strict=True)]
    expected = brute_force_ranks((queries @ gallery.T).tolist(), relevant, excluded, candidates)
    for chunk_size in CHUNK_SIZES:
        ranks = rank_first_relevant(
            queries,
            gallery,
            Groups.from_lists(relevant),
            excluded=None if excluded is None else Groups.from_lists(excluded),
            candidates=None if candidates is None else Groups.from_lists(candidates),
            chunk_size=chunk_size,
        )
        assert ranks.dtype == torch.int64
        assert ranks.tolist() == expected


def test_several_relevances_rank_as_each_alone():
    generator = torch.Generator().manual_seed(0)
    queries, gallery = torch.randn(9, 5, generator=generator), torch.randn(30, 5, generator=generator)
    relevants = [Groups.from_lists(random_lists(generator, 9, 30, 0.1, at_least_one=True)) for _ in range(3)]
    with scores_at_a_time(4 * 30):
        together = ranking.rank_first_relevant(queries, gallery, relevants)
    for relevant, ranks in zip(relevants, together, strict=True):
        assert torch.equal(ranks, rank_first_relevant(queries, gallery, relevant))


@pytest.mark.parametrize("width", [1, 33, 500, 512])
def test_equal_gallery_rows_tie_wherever_they_stand_and_whatever_the_chunk_size(width):
    generator = torch.Generator().manual_seed(width)
    queries = torch.nn.functional.normalize(torch.randn(37, width, generator=generator), dim=1)
    distinct = torch.nn.functional.normalize(torch.randn(97, width, generator=generator), dim=1)
    original = torch.cat([torch.arange(97), torch.randint(97, (206,), generator=generator)])
    original = original[torch.randperm(303, generator=generator)]  # 303 = 3 x 101: no tile of a matrix product fits it
    copies = torch.bincount(original)
    target = torch.randint(303, (37,), generator=generator)
    scores = queries.double() @ distinct.double().T
    better = scores > scores.gather(1, original[target][:, None]) + 1e-6
    worse = scores < scores.gather(1, original[target][:, None]) - 1e-6
    decided = (better | worse).sum(1) == 96  # queries where only the target itself is near its score
    expected = (better * copies).sum(1) + copies[original[target]] - 1
    assert width == 1 or decided.sum() > 30
    relevant = Groups.from_lists(target[:, None].tolist())
    reference = rank_first_relevant(queries, distinct[original], relevant)
    assert torch.equal(reference[decided], expected[decided])
    for chunk_size in CHUNK_SIZES:
        assert torch.equal(reference, rank_first_relevant(queries, distinct[original], relevant, chunk_size=chunk_size))


@pytest.mark.parametrize("chunk_size", [1, 3, None])
def test_some_of_the_queries_have_the_ranks_they_have_among_all_and_are_named_alike(chunk_size):
    generator = torch.Generator().manual_seed(4)
    queries, gallery = torch.randn(20, 8, generator=generator), torch.randn(30, 8, generator=generator)
    lists = torch.randint(30, (20, 2), generator=generator).tolist()
    every = rank_first_relevant(queries, gallery, Groups.from_lists(lists), chunk_size)
    for rows in (range(7), range(7, 20), range(12, 12)):
        found = rank_first_relevant(queries, gallery, Groups.from_lists(lists), chunk_size, rows=rows)
        assert torch.equal(found, every[rows.start : rows.stop])
    lists[13] = []
    assert torch.equal(
        rank_first_relevant(queries, gallery, Groups.from_lists(lists), chunk_size, rows=range(13)), every[:13]
    )
    with pytest.raises(UserError, match="queries 13 have none"):
        rank_first_relevant(queries, gallery, Groups.from_lists(lists), chunk_size, rows=range(11, 20))
    queries[15] = torch.nan
    with pytest.raises(UserError, match="rows 15 are not"):
        rank_first_relevant(queries, gallery, Groups.from_lists(lists), chunk_size, rows=range(14, 20))


def test_a_gpu_without_room_leaves_the_ranking_to_the_cpu(monkeypatch):
    queries, gallery, relevant = torch.eye(3), torch.eye(3), [Groups.one_each(torch.tensor([0, 2, 1]))]
    work, devices = ranking._ranks, []

    def full(queries, gallery, *others):
        devices.append((queries.device.type, gallery.device.type))
        if len(devices) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return work(torch.eye(3), torch.eye(3), *others)

    monkeypatch.setattr(ranking, "_ranks", full)
    on_device = queries.to("meta"), gallery.to("meta")
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: torch.eye(3) if tensor.is_meta else tensor)
    (ranks,) = ranking.rank_together(*on_device, relevant)
    assert ranks.tolist() == [0, 2, 2]
    assert devices == [("meta", "meta"), ("cpu", "cpu")]


def test_scores_are_equal_to_the_bit_in_any_chunk_and_order_of_the_gallery():
    generator = torch.Generator().manual_seed(1)
    queries, gallery = torch.randn(19, 511, generator=generator), torch.randn(131, 511, generator=generator)
    scores, items = top_k(queries, gallery, 131)
    by_item = torch.empty_like(scores).scatter_(1, items, scores)
    order = torch.randperm(131, generator=generator)
    for chunk_size in CHUNK_SIZES:
        shuffled_scores, shuffled_items = top_k(queries, gallery[order], 131, chunk_size=chunk_size)
        assert torch.equal(by_item, torch.empty_like(scores).scatter_(1, order[shuffled_items], shuffled_scores))


def test_products_of_fixed_point_rows_are_exact_in_any_order_of_summation():
    generator = torch.Generator().manual_seed(3)
    queries = _fixed_point(torch.randn(7, 515, generator=generator), "queries")
    gallery = _fixed_point(1e-3 * torch.randn(11, 515, generator=generator), "gallery")
    exact = [[math.fsum(a * b for a, b in zip(q, g, strict=True)) for g in gallery.tolist()] for q in queries.tolist()]
    assert (queries @ gallery.T).tolist() == exact
    order = torch.randperm(515, generator=generator)
    assert (queries[:, order] @ gallery[:, order].T).tolist() == exact


def test_scores_are_the_inner_products_to_float32_precision():
    generator = torch.Generator().manual_seed(2)
    sizes = 10.0 ** torch.arange(-6, 6)[:, None]  # rows of very different norms in one gallery
    queries, gallery = torch.randn(5, 64, generator=generator), sizes * torch.randn(12, 64, generator=generator)
    scores, items = top_k(queries, gallery, 12)
    for query in range(5):
        for score, item in zip(scores[query].tolist(), items[query].tolist(), strict=True):
            products = [a * b for a, b in zip(queries[query].tolist(), gallery[item].tolist(), strict=True)]
            scale = float(queries[query].norm() * gallery[item].norm())
            assert score == pytest.approx(math.fsum(products), abs=1.2e-7 * scale)


def test_an_embedding_of_zeros_ties_with_everything():
    assert rank_first_relevant(torch.zeros(1, 3), torch.eye(3), Groups.from_lists([[1]])).tolist() == [2]


def test_half_precision_and_gradients_are_accepted():
    queries = torch.eye(3, dtype=torch.bfloat16).requires_grad_()
    assert rank_first_relevant(queries, torch.eye(3), Groups.from_lists([[0], [1], [2]])).tolist() == [0, 0, 0]


def test_inputs_are_left_as_they_were():
    queries = torch.randn(4, 8, dtype=torch.float64)
    before = queries.clone()
    rank_first_relevant(queries, queries, Groups.from_keys([0, 1, 2, 3], [0, 1, 2, 3]))
    assert torch.equal(queries, before)


def test_queries_without_a_usable_relevant_item_are_named():
    queries, gallery = torch.ones(9, 2), torch.ones(4, 2)
    relevant = Groups.from_lists([[0], [], [1], [2], [], [], [], [], []])
    with pytest.raises(UserError, match=r"queries 1, 4, 5, 6, 7, \.\.\. \(6 in all\) have none"):
        rank_first_relevant(queries, gallery, relevant, chunk_size=2)
    relevant = Groups.from_lists([[0, 1]] * 9)
    excluded = Groups.from_lists([[0]] * 7 + [[1, 0], [3]])
    with pytest.raises(UserError, match="queries 7 have none"):
        rank_first_relevant(queries, gallery, relevant, excluded=excluded)
    with pytest.raises(UserError, match="queries 3 have none"):
        rank_first_relevant(queries, gallery, relevant, candidates=Groups.from_lists([[0, 3]] * 3 + [[2]] + [[1]] * 5))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_embeddings_that_have_no_float32_scores_are_named(value):
    broken = torch.ones(4, 3)
    broken[2, 1] = value
    relevant = Groups.from_lists([[0]] * 4)
    with pytest.raises(UserError, match=r"`queries` must be finite .* rows 2 are not"):
        rank_first_relevant(broken, torch.ones(4, 3), relevant)
    with pytest.raises(UserError, match=r"`gallery` must be finite .* rows 2 are not"):
        rank_first_relevant(torch.ones(4, 3), broken, relevant)


def test_inputs_that_do_not_fit_are_refused():
    two, three = torch.ones(2, 3), torch.ones(3, 3)
    with pytest.raises(UserError, match="same width"):
        rank_first_relevant(two, torch.ones(3, 4), Groups.from_lists([[0], [0]]))
    with pytest.raises(UserError, match="one row a query, but got 1 for 2 queries"):
        rank_first_relevant(two, three, Groups.from_lists([[0]]))
    with pytest.raises(UserError, match=r"positions 0\.\.2, but hold 3"):
        rank_first_relevant(two, three, Groups.from_lists([[0], [3]]))


@pytest.mark.parametrize("k", [1, 4, 17])
def test_top_k_equals_a_stable_sort_amid_ties(k):
    generator = torch.Generator().manual_seed(k)
    queries, gallery = small_integers(generator, 13, 4), small_integers(generator, 31, 4)
    excluded = random_lists(generator, 13, 31, 0.1)
    scores = queries @ gallery.T
    for query, items in enumerate(excluded):
        scores[query, items] = -torch.inf
    expected = scores.sort(dim=1, descending=True, stable=True)
    for chunk_size in CHUNK_SIZES:
        found = top_k(queries, gallery, k, excluded=Groups.from_lists(excluded), chunk_size=chunk_size)
        assert torch.equal(found[0], expected.values[:, :k])
        assert torch.equal(found[1], expected.indices[:, :k])


def test_top_k_stays_among_the_candidates_and_refuses_more_than_there_are():
    queries, gallery = torch.tensor([[1.0, 0.0], [0.0, -1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    candidates = Groups.from_lists([[1, 2], [0, 1]])
    assert top_k(queries, gallery, 2, candidates=candidates)[1].tolist() == [[1, 2], [0, 1]]
    with pytest.raises(UserError, match="queries 1 may choose from"):
        top_k(queries, gallery, 2, candidates=candidates, excluded=Groups.from_lists([[], [0]]))
    with pytest.raises(UserError, match=r"`k` must lie in 1\.\.3, the size of the gallery, but got 4"):
        top_k(queries, gallery, 4)


def test_groups_of_lists_pairs_and_keys_agree():
    from_lists = Groups.from_lists([[2, 0], [], [1], [0, 2]])
    from_pairs = Groups.from_pairs(torch.tensor([3, 0, 2, 0, 3, 0]), torch.tensor([2, 2, 1, 0, 0, 2]), num_queries=4)
    from_keys = Groups.from_keys(["a", "none", "b", "a"], ["a", "b", "a"])
    from_tensors = Groups.from_keys(torch.tensor([7, 1, 5, 7]), torch.tensor([7, 5, 7]))
    for groups in (from_lists, from_pairs, from_keys, from_tensors):
        assert groups.sizes.tolist() == [2, 0, 1, 2]
        assert [part.tolist() for part in groups.pairs()] == [[0, 0, 2, 3, 3], [0, 2, 1, 0, 2]]
        assert [part.tolist() for part in groups.chosen(torch.tensor([3, 1, 2])).pairs()] == [[0, 0, 2], [0, 2, 1]]
        assert [part.tolist() for part in groups.pairs(1, 4)] == [[1, 2, 2], [1, 0, 2]]
    assert Groups.from_lists([[], []]).sizes.tolist() == [0, 0]
    assert Groups.from_keys([1, 2], []).sizes.tolist() == [0, 0]
    with pytest.raises(UserError, match="must not be negative"):
        Groups.from_lists([[-1]])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_ranks_on_a_gpu_equal_those_on_the_cpu():
    generator = torch.Generator().manual_seed(3)
    queries, gallery = torch.randn(200, 512, generator=generator), torch.randn(999, 512, generator=generator)
    gallery[500:] = gallery[:499]
    relevant = Groups.from_lists(torch.randint(999, (200, 2), generator=generator).tolist())
    on_gpu = rank_first_relevant(queries.cuda(), gallery.cuda(), relevant, chunk_size=33)
    assert torch.equal(on_gpu, rank_first_relevant(queries, gallery, relevant))
    assert torch.equal(top_k(queries.cuda(), gallery.cuda(), 10)[1], top_k(queries, gallery, 10)[1])
