import pickle

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from problems import make_problem

from sklearn_rails.neighbors import (
    AFFINITIES,
    Affinity,
    CallableAffinity,
    ClassNeighbors,
    Cosine,
    Euclidean,
    InnerProduct,
    resolve_affinity,
)
from sklearn_rails.neighbors.geometry import Geometry
from sklearn_rails.neighbors.norms import norm, normalize_rows

SCALES = [1e-42, 1e-30, 1e-26, 1.0, 1e25, 1e30, 1e37]


@pytest.mark.parametrize("scale", SCALES)
def test_distances_and_cosines_are_right_at_any_scale(scale):
    # Small whole numbers, which numbers below 1e-38 hold too.
    rng = np.random.default_rng(0)
    features = rng.integers(-9, 9, size=(3, 7, 5)) * 1000
    antigens = rng.integers(-9, 9, size=(3, 5)) * 1000
    features[0, 0], features[1, 1] = antigens[0], 0
    a, f = (torch.tensor(x * (scale / 1000), dtype=torch.float32) for x in (antigens, features))
    wide_a, wide_f = a.double().numpy(), f.double().numpy()
    distance = np.linalg.norm(wide_f - wide_a[:, None], axis=2)
    assert_allclose(-Euclidean()(a, f).double(), distance, rtol=1e-6, atol=2e-45)
    lengths = np.linalg.norm(wide_f, axis=2) * np.linalg.norm(wide_a, axis=1)[:, None]
    cosine = (wide_f * wide_a[:, None]).sum(axis=2) / np.where(lengths > 0, lengths, 1)
    for overwrite in (False, True):
        found = Cosine()(a, f.clone(), overwrite_features=overwrite)
        assert_allclose(found, cosine, atol=1e-6)
    assert found[1, 1] == 0


def test_a_few_samples_of_another_scale_do_not_change_the_others():
    features = torch.rand(1, 50, 8)
    expected = Euclidean()(torch.zeros(1, 8), features)
    cosine = Cosine()(torch.ones(1, 8), features)
    features[0, 3] *= 1e30
    features[0, 4] *= 1e-30
    found = Euclidean()(torch.zeros(1, 8), features)
    assert_allclose(found[0, 3:5], expected[0, 3:5] * torch.tensor([1e30, 1e-30]), rtol=1e-5)
    kept = [i for i in range(50) if i not in (3, 4)]
    assert_array_equal(found[0, kept], expected[0, kept])
    assert_allclose(Cosine()(torch.ones(1, 8), features), cosine, rtol=1e-5)


def test_norms_have_a_gradient_and_any_shape():
    vectors = torch.tensor([[3e-25, 4e-25], [3.0, 4.0]], requires_grad=True)
    norm(vectors).sum().backward()
    assert_allclose(vectors.grad, [[0.6, 0.8], [0.6, 0.8]], rtol=1e-6)
    assert norm(torch.tensor([3e30, 4e30])).item() == pytest.approx(5e30)
    assert norm(torch.zeros(0, 4)).shape == (0,)
    assert norm(torch.tensor([[torch.nan, 1.0]])).isnan().all()


def test_normalised_rows_have_length_1_or_are_zero():
    rows = torch.tensor([[3e-26, 4e-26], [3e25, 4e25], [3e38, 3e38], [0, 0]])
    found = normalize_rows(rows)
    assert_allclose(found, [[0.6, 0.8], [0.6, 0.8], [0.5**0.5] * 2, [0, 0]], rtol=1e-6)


def test_a_callable_that_returns_nan_for_finite_features_raises_an_error():
    def ratio(a, b):
        return (a / b).sum(dim=1)

    features = torch.ones(2, 3, 2)
    CallableAffinity(ratio)(torch.ones(2, 2), features)
    with pytest.raises(ValueError, match=r"affinity=<function .*ratio.* gave NaN"):
        CallableAffinity(ratio)(torch.zeros(2, 2), features * 0)
    # NaN for features that are NaN is for the rule about cells.
    features[0, 1] = torch.nan
    assert CallableAffinity(ratio)(torch.ones(2, 2), features).isnan().sum() == 1


class Chebyshev(Affinity):
    """Minus the largest difference in a feature."""

    def __call__(self, antigens, features, *, overwrite_features=False):
        return -(features - antigens[:, None]).abs().amax(dim=2)


class WrongShape(Affinity):
    """Affinities with an axis too many, which would broadcast."""

    def __call__(self, antigens, features, *, overwrite_features=False):
        return features.sum(dim=2)[:, :1]


def test_one_class_and_one_line_in_the_table_add_an_affinity(monkeypatch):
    # ClassNeighbors is where RAILSClassifier looks affinities up.
    monkeypatch.setitem(AFFINITIES, "chebyshev", Chebyshev)
    X, y, Q = make_problem(0, 60, 4, 2)
    neighbors = ClassNeighbors("chebyshev").fit(torch.tensor(X), y, 2)
    assert neighbors.affinity == Chebyshev()
    assert neighbors.affinity.name == "chebyshev"
    for found in (neighbors, pickle.loads(pickle.dumps(neighbors))):
        affinity, index = found.kneighbors(torch.tensor(Q), 5)
        scores = -np.abs(Q[:, None] - X).max(axis=2)
        for c in range(2):
            members = np.flatnonzero(y == c)
            best = members[np.argsort(-scores[:, members], axis=1, kind="stable")[:, :5]]
            assert_array_equal(index[:, c], best)
            assert_allclose(affinity[:, c], np.take_along_axis(scores, best, axis=1))
    with pytest.raises(ValueError, match="'kd_tree'.*affinity='chebyshev' does not give"):
        ClassNeighbors("chebyshev", "kd_tree").fit(torch.tensor(X), y, 2)
    with pytest.raises(ValueError, match="affinity='chebyshev' .* is NaN"):
        neighbors.kneighbors(torch.tensor(Q) * torch.nan, 5)


def test_an_affinity_of_the_wrong_shape_raises_an_error():
    X, y, Q = make_problem(0, 60, 4, 2)
    neighbors = ClassNeighbors(WrongShape()).fit(torch.tensor(X), y, 2)
    with pytest.raises(ValueError, match=r"affinity='wrong_shape' must give a tensor of shape"):
        neighbors.kneighbors(torch.tensor(Q), 5)


def test_affinities_are_resolved_compared_and_pickled():
    euclidean, cosine, inner = (resolve_affinity(name) for name in AFFINITIES)
    assert [type(a) for a in (euclidean, cosine, inner)] == [Euclidean, Cosine, InnerProduct]
    assert [a.is_distance for a in (euclidean, cosine, inner)] == [True, True, False]
    assert all(a.permutation_invariant for a in (euclidean, cosine, inner))
    assert euclidean == Euclidean() != cosine
    assert len({euclidean, Euclidean(), cosine}) == 2
    assert resolve_affinity(cosine) is cosine
    own = resolve_affinity(torch.dist)
    assert own == CallableAffinity(torch.dist) != CallableAffinity(torch.dot)
    assert not own.permutation_invariant
    assert "dist" in repr(own)
    assert repr(euclidean) == "Euclidean()"
    for affinity in (euclidean, cosine, inner):
        assert pickle.loads(pickle.dumps(affinity)) == affinity
    for unknown in ("manhattan", 3):
        with pytest.raises(ValueError, match=f"affinity={unknown!r} must be one of .'cosine'"):
            resolve_affinity(unknown)
    with pytest.raises(NotImplementedError, match="Affinity needs a method __call__"):
        Affinity()(torch.ones(1, 2), torch.ones(1, 1, 2))


def test_a_callable_that_returns_complex_numbers_raises_an_error():
    with pytest.raises(ValueError, match="must give real numbers, it gave torch.complex64"):
        CallableAffinity(lambda a, b: (a * 1j).sum(dim=1))(torch.ones(1, 2), torch.ones(1, 3, 2))


@pytest.mark.parametrize("center_norm", [0.0, 3.0])
@pytest.mark.parametrize("max_norm", [1.0, 50.0, 1e25])
def test_the_bound_of_one_query_is_that_of_many(max_norm, center_norm):
    center = torch.tensor([center_norm, 0.0])
    where = center, center, center_norm, 1.0, 1.0, max_norm, 0.5
    queries = torch.tensor([[3.0, 4.0], [6.0, 8.0]])
    norms, scores = np.array([[5.0], [10.0]]), np.array([[-7.0, 10.0], [-2e5, -3e5]])
    bound = Euclidean().score_error(Geometry(*where), queries, norms, scores)
    plain = Geometry(*where[:-1], 0.0)
    rounding = 4 * np.finfo(np.float32).eps * np.sqrt(2)
    near = np.minimum(4 * norms, max_norm)
    far = np.abs(scores - center_norm * np.array([[3.0], [6.0]])) - 3 * norms**2
    expected = rounding * ((norms + near) * near + norms * center_norm + 40 * np.maximum(far, 0))
    assert_allclose(Euclidean().score_error(plain, queries, norms, scores), expected)
    distance = np.sqrt(np.maximum(norms**2 - 2 * scores, 0))
    assert_allclose(bound, expected + 0.5 * (distance + 0.5))
    for i in range(2):
        lowest = float(scores[i].min())
        one = Euclidean().score_error(Geometry(*where), queries[i : i + 1], norms[i].item(), lowest)
        assert_allclose(one, bound[i].max())


def test_an_affinity_has_the_name_of_its_class_in_snake_case():
    class SumOfProducts(Affinity):
        pass

    class Other(Affinity):
        name = "mine"

    assert SumOfProducts.name == "sum_of_products"
    assert SumOfProducts().parameter == "affinity='sum_of_products'"
    assert Other.name == "mine"
    with pytest.raises(NotImplementedError, match="SumOfProducts needs a method __call__"):
        SumOfProducts()(torch.zeros(1, 1), torch.zeros(1, 1, 1))


@pytest.mark.parametrize("with_zeros", [False, True])
def test_angles_whose_unit_has_no_square_are_compared(with_zeros):
    # All but the angle of a few rows is of the order of 1e-160.
    rng = np.random.default_rng(0)
    rows = np.stack([np.ones(40), 1e-160 * rng.normal(size=40)], axis=1)
    rows[::4] *= -1
    if with_zeros:
        rows[::5] = 0
    features, labels = torch.from_numpy(rows), np.arange(40) % 2
    neighbors = ClassNeighbors("cosine").fit(features, labels, 2)
    found, _ = neighbors.kneighbors(features, 20)
    for c in range(2):
        members = features[labels == c]
        cosine = Cosine()(features, members.expand(40, -1, -1)).sort(dim=1, descending=True).values
        torch.testing.assert_close(found[:, c], cosine)
