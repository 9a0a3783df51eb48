import numpy as np
import pytest
import torch

from harma_ray.errors import UserError
from harma_ray.retrieval.groups import Groups
from harma_ray.retrieval.spaces import expand_queries, fit_pca, fit_standardisation, fit_whitening


def unit(array):
    return array / np.linalg.norm(array, axis=1, keepdims=True)


def drawn(seed, rows, width):
    """Unit vectors that vary more along some directions than along others, around a mean that is not zero."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(rows, width)) * np.geomspace(1, 0.1, width) @ rng.normal(size=(width, width)) + 2
    return unit(mixed).astype(np.float32)


def principal(gallery, count):
    """PCA from the definition: eigenvectors of the covariance, the largest first."""
    mean = gallery.astype(np.float64).mean(axis=0)
    values, vectors = np.linalg.eigh(np.cov(gallery.astype(np.float64).T))
    order = np.argsort(values)[::-1][:count]
    return mean, vectors[:, order], values[order]


@pytest.mark.parametrize(("rows", "width", "count"), [(60, 8, 3), (60, 8, 8), (9, 20, 5)])
def test_pca_equals_plain_numpy_up_to_signs(rows, width, count):
    gallery, queries = drawn(0, rows, width), drawn(1, 7, width)
    mean, directions, _ = principal(gallery, count)
    space = fit_pca(torch.from_numpy(gallery), count)
    found, expected = space(torch.from_numpy(queries)).numpy(), unit((queries - mean) @ directions)
    assert found.shape == (7, count)
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-6)
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-5)


def test_whitening_equals_plain_numpy_and_leaves_no_correlation():
    gallery, queries = drawn(2, 300, 6), drawn(3, 5, 6)
    mean, directions, variances = principal(gallery, 4)
    for count, epsilon in ((4, 1e-6), (4, 0.1)):
        space = fit_whitening(torch.from_numpy(gallery), count, epsilon)
        expected = unit((queries - mean) @ directions / np.sqrt(variances + epsilon * variances.max()))
        np.testing.assert_allclose(np.abs(space(torch.from_numpy(queries)).numpy()), np.abs(expected), atol=1e-5)
    moved = (torch.from_numpy(gallery).double() - space.mean) @ fit_whitening(torch.from_numpy(gallery)).matrix
    np.testing.assert_allclose(np.cov(moved.numpy().T), np.eye(6), atol=0.01)


@pytest.mark.parametrize("fit", [fit_whitening, fit_standardisation])
def test_vectors_in_another_scale_or_close_together_are_compared_alike(fit):
    gallery, queries = (torch.from_numpy(drawn(seed, rows, 6)).double() for seed, rows in ((2, 300), (3, 5)))
    expected = fit(gallery)(queries)
    for moved in (lambda x: 1e-6 * x, lambda x: 1e4 * x, lambda x: gallery[0] + 1e-5 * x):
        torch.testing.assert_close(fit(moved(gallery))(moved(queries)).abs(), expected.abs(), rtol=0, atol=1e-4)


def test_whitening_leaves_out_directions_along_which_the_gallery_does_not_vary():
    gallery = torch.zeros(30, 5)
    gallery[:, :3] = torch.from_numpy(drawn(4, 30, 3))
    space = fit_whitening(gallery)
    assert space.width == 3
    outside = torch.tensor([[0.5, 0.1, 0.2, 0.0, 0.0], [0.5, 0.1, 0.2, 3.0, -1.0]])
    torch.testing.assert_close(space(outside)[0], space(outside)[1])


def test_standardisation_equals_plain_numpy_and_keeps_constant_dimensions():
    gallery, queries = drawn(5, 50, 6), drawn(6, 4, 6)
    gallery[:, 2] = 0.25
    found = fit_standardisation(torch.from_numpy(gallery))(torch.from_numpy(queries))
    exact = gallery.astype(np.float64)
    deviation = exact.std(axis=0)
    deviation[2] = 1
    expected = unit((queries - exact.mean(axis=0)) / deviation)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


def test_spaces_rest_on_the_gallery_alone():
    gallery = torch.from_numpy(drawn(7, 40, 6))
    queries = torch.from_numpy(drawn(8, 10, 6))
    for fit in (lambda x: fit_pca(x, 4), lambda x: fit_whitening(x, 4), fit_standardisation):
        space = fit(gallery)
        torch.testing.assert_close(space(queries)[3:4], space(queries[3:4]))
        torch.testing.assert_close(space(queries).norm(dim=1), torch.ones(10))


@pytest.mark.parametrize("alpha", [0.0, 1.0, 3.0])
def test_expanded_queries_equal_plain_numpy(alpha):
    gallery, queries = drawn(9, 25, 5), drawn(10, 6, 5)
    gallery[3] = -queries[0]
    excluded = [[4, 7], [], [0], [], [], [1]]
    found = expand_queries(
        torch.from_numpy(queries), torch.from_numpy(gallery), 20, alpha=alpha, excluded=Groups.from_lists(excluded)
    )
    for row, query in enumerate(queries):
        cosines = gallery @ query
        cosines[excluded[row]] = -np.inf
        items = np.argsort(-cosines)[:20]
        weights = np.maximum(cosines[items], 0) ** alpha
        expected = query + (weights[:, None] * gallery[items]).sum(axis=0)
        np.testing.assert_allclose(found[row].numpy(), expected / np.linalg.norm(expected), atol=1e-5)


def test_the_plain_expansion_is_the_mean_of_the_query_and_its_neighbours():
    gallery, query = torch.eye(3)[:2], torch.tensor([[1.0, 0.0, 0.0]])
    expanded = expand_queries(query, gallery, 1)
    torch.testing.assert_close(expanded, query)
    torch.testing.assert_close(expand_queries(query, gallery, 2)[0], torch.tensor([2.0, 1.0, 0.0]) / 5**0.5)


def test_what_cannot_be_is_one_line():
    gallery = torch.from_numpy(drawn(11, 9, 5))
    with pytest.raises(UserError, match=r"components <= min\(9 gallery images, 5 dimensions\), got 6; use at most 5"):
        fit_pca(gallery, 6)
    with pytest.raises(UserError, match=r"min\(3 gallery images, 5 dimensions\), got 4"):
        fit_whitening(gallery[:3], 4)
    with pytest.raises(UserError, match="different vectors"):
        fit_whitening(torch.ones(4, 3))
    with pytest.raises(UserError, match=r"expanded by 1\.\.9 images, the size of the gallery, but got 10"):
        expand_queries(gallery, gallery, 10)
    with pytest.raises(UserError, match="`alpha` must be at least 0, got -1"):
        expand_queries(gallery, gallery, 2, alpha=-1)
