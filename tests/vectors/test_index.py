import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from harma_ray.errors import UserError
from harma_ray.retrieval.classes import same_images
from harma_ray.retrieval.groups import Groups
from harma_ray.retrieval.ranking import top_k
from harma_ray.vectors.index import INDEX_KINDS, build_index, import_faiss, recall_against

pytest.importorskip("faiss")


def units(seed, rows, width=16):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, width, generator=generator), dim=1)


def clustered(seed, rows, width=16):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(20, width, generator=torch.Generator().manual_seed(0))
    near = centres[torch.randint(20, (rows,), generator=generator)]
    return torch.nn.functional.normalize(near + 0.5 * torch.randn(rows, width, generator=generator), dim=1)


def test_flat_is_the_platforms_exact_ranking():
    queries, gallery = units(0, 40), units(1, 200)
    scores, items = build_index("flat", gallery).search(queries, 7)
    expected = top_k(queries, gallery, 7)
    torch.testing.assert_close(scores, expected[0], rtol=0, atol=1e-6)
    assert torch.equal(items, expected[1])


def test_flat_has_the_order_of_the_exact_ranking_amid_ties_and_duplicates():
    generator = torch.Generator().manual_seed(2)
    queries, gallery = (torch.randint(-1, 2, (n, 4), generator=generator).float() for n in (15, 40))
    gallery[20:30] = gallery[:10]
    index = build_index("flat", gallery)
    excluded = torch.rand(15, 40, generator=generator) < 0.2
    for left_out in (None, Groups.from_lists(row.nonzero()[:, 0].tolist() for row in excluded)):
        most = 40 - (0 if left_out is None else int(left_out.sizes.max()))
        found = index.search(queries, most, excluded=left_out)
        expected = top_k(queries, gallery, most, excluded=left_out)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


def test_flat_is_exact_where_more_images_are_alike_than_float32_tells_apart():
    """Float32 sums of one vector's products differ by where it stands; FAISS's own first k are other ones."""
    queries, gallery = units(8, 30, 200), units(9, 40, 200).repeat(30, 1)
    gallery[600:] = torch.nn.functional.normalize(gallery[600:] + 1e-8 * torch.randn(600, 200), dim=1)
    index, excluded = build_index("flat", gallery), same_images(range(30), [n % 40 for n in range(1200)])
    for k, left_out in itertools.product((1, 5, 100), (None, excluded)):
        found, expected = (
            index.search(queries, k, excluded=left_out),
            top_k(queries, gallery, k, excluded=left_out),
        )
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
    built = import_faiss().knn(queries.numpy(), gallery.numpy(), 5, import_faiss().METRIC_INNER_PRODUCT)[1]
    assert not np.array_equal(built, top_k(queries, gallery, 5)[1].numpy())


def test_many_copies_of_an_image_make_no_other_search_longer():
    gallery = units(10, 2000)
    keys = [max(n, 400) for n in range(2000)]
    gallery[:401] = gallery[0]
    excluded = same_images(keys, keys)
    expected = top_k(gallery, gallery, 3, excluded=excluded)[1]
    for kind, own in (("flat", 0), ("hnsw", 401)):  # a graph is bad at what stands behind 400 equal ones
        _, items = build_index(kind, gallery).search(gallery, 3, excluded=excluded)
        assert recall_against(items[own:], expected[own:]) > (99.9 if kind == "flat" else 95)


def test_a_graph_is_searched_for_more_candidates_the_more_neighbours_are_wanted():
    queries, gallery = units(11, 20), units(12, 3000)
    _, items = build_index("hnsw", gallery).search(queries, 1000)
    assert (items >= 0).all()
    assert recall_against(items, top_k(queries, gallery, 1000)[1]) > 95


@pytest.mark.parametrize("width", [16, 67, 101])
def test_codes_of_any_width_have_almost_64_bytes(width):
    """Widths that no number of pieces divides are filled up with zeros."""
    queries, gallery = clustered(13, 50, width), clustered(14, 1200, width)
    index = build_index("ivfpq", gallery)
    assert int(index.note.partition(" ")[0]) == {16: 16, 67: 34, 101: 51}[width]
    assert recall_against(index.search(queries, 10)[1], top_k(queries, gallery, 10)[1]) > 30


def test_equal_images_of_a_store_are_left_out_by_identity():
    gallery = units(3, 30)
    gallery[10:13] = gallery[:3]
    keys = [str(row % 10 if row in (10, 11, 12) else row) for row in range(30)]
    excluded = same_images(keys, keys)
    _, items = build_index("flat", gallery).search(gallery, 5, excluded=excluded)
    assert torch.equal(items, top_k(gallery, gallery, 5, excluded=excluded)[1])
    for row, found in enumerate(items.tolist()):
        assert keys[row] not in {keys[item] for item in found}


@pytest.mark.parametrize(("kind", "least"), [("flat", 100), ("hnsw", 99), ("ivfpq", 35)])
def test_approximate_indices_find_most_of_what_is_near(kind, least):
    queries, gallery = clustered(4, 100), clustered(5, 1200)
    index = build_index(kind, gallery)
    scores, items = index.search(queries, 10)
    exact = top_k(queries, gallery, 10)[1]
    assert index.is_exact == (kind == "flat")
    assert recall_against(items, exact) >= least
    assert (scores.diff(dim=1) <= 0).all()
    again = build_index(kind, gallery).search(queries, 10)[1]
    assert torch.equal(items, again) or kind == "hnsw"  # whose graph depends on which thread was first


def test_recall_counts_the_exact_neighbours_that_were_found():
    exact, found = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[3, 1, 9], [-1, -1, -1]])
    assert recall_against(found, exact) == pytest.approx(100 * 2 / 6)


def test_what_cannot_be_is_one_line():
    gallery = units(6, 20)
    with pytest.raises(UserError, match=r"one of flat, hnsw, ivfpq, got tree"):
        build_index("tree", gallery)
    with pytest.raises(UserError, match="an ivfpq index needs at least 256 vectors, got 20; use flat"):
        build_index("ivfpq", gallery)
    index = build_index("flat", gallery)
    with pytest.raises(UserError, match=r"1\.\.20, the images that a query may find, but got 21"):
        index.search(gallery, 21)
    with pytest.raises(UserError, match=r"1\.\.19, the images that a query may find, but got 20"):
        index.search(gallery, 20, excluded=same_images(range(20), range(20)))
    with pytest.raises(UserError, match=r"must have width 16, as the index, got \[20, 8\]"):
        index.search(gallery[:, :8], 3)


def test_without_faiss_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r'pip install "harma-ray\[vitp\]"'):
        build_index("flat", units(7, 5))


@pytest.mark.timeout(120)
def test_torch_sklearn_and_faiss_work_with_threads_in_one_process():
    """Each brings an OpenMP of its own."""
    code = f"""
import torch
from sklearn.decomposition import PCA
from harma_ray.retrieval.spaces import fit_pca
from harma_ray.vectors.index import build_index
torch.set_num_threads(2)
x = torch.nn.functional.normalize(torch.randn(600, 32, generator=torch.Generator().manual_seed(0)), dim=1)
for kind in {INDEX_KINDS!r}:
    y = (x @ x.T).softmax(1)
    PCA(8).fit(x.numpy())
    space = fit_pca(x, 8)
    scores, items = build_index(kind, space(x)).search(space(x[:300]), 3)
    assert (items == torch.arange(300)[:, None]).any(1).double().mean() > 0.6, kind
assert torch.get_num_threads() == 2
print("fine")
"""
    waiting = {**os.environ, "OMP_WAIT_POLICY": "passive"}  # busy threads of two libraries would hold up each other
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=waiting)
    assert (result.stdout, result.stderr) == ("fine\n", "")
