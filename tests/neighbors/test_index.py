import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from problems import make_problem, search_by_hand
from sklearn.base import BaseEstimator
from sklearn.neighbors import KNeighborsTransformer, NearestNeighbors

from sklearn_rails.neighbors import ClassNeighbors, ExactNeighbors, exact
from sklearn_rails.neighbors.index import merge_flocks
from sklearn_rails.neighbors.leave_one_out import kneighbors_leave_one_out
from sklearn_rails.neighbors.norms import norm, normalize_rows
from sklearn_rails.neighbors.search import Search


@pytest.mark.parametrize("algorithm", ["auto", "brute", "kd_tree", "ball_tree"])
def test_neighbours_equal_those_of_sorting_all_distances(algorithm):
    X, y, Q = make_problem(0, 200, 5, 3)
    neighbors = ClassNeighbors(algorithm=algorithm).fit(torch.tensor(X), y, 3)
    affinity, index = neighbors.kneighbors(torch.tensor(Q), 7)
    expected_distance, expected_index = search_by_hand(X, y, 3, Q, 7)
    assert_array_equal(index, expected_index)
    assert_allclose(-affinity, expected_distance)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(3, 60),
    n_features=st.integers(1, 4),
    k=st.integers(1, 12),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_ties_and_duplicates_go_by_index(seed, n, n_features, k, dtype):
    X, y, Q = make_problem(seed, n, n_features, 3, on_a_grid=True)
    neighbors = ClassNeighbors().fit(torch.tensor(X, dtype=dtype), y, 3)
    affinity, index = neighbors.kneighbors(torch.tensor(Q, dtype=dtype), k)
    # Not more columns than the largest class has examples.
    k = min(k, np.bincount(y).max())
    expected_distance, expected_index = search_by_hand(X, y, 3, Q, k)
    assert_array_equal(index, expected_index)
    assert_allclose(-affinity, expected_distance, rtol=1e-6)


def test_a_border_within_duplicates_goes_by_index():
    X = torch.tensor([[1.0, 2.0], [0.0, 0.0]]).repeat(100, 1)
    y = np.tile([0, 1], 100)
    _, index = ClassNeighbors().fit(X, y, 2).kneighbors(X[:2] + 0.1, 3)
    assert index.tolist() == [[[0, 2, 4], [1, 3, 5]]] * 2


def test_rounding_in_the_matrix_product_misplaces_no_neighbour():
    # Far from the origin, and the neighbours close together: the product alone errs by more than
    # the distances.
    X, y, Q = make_problem(1, 300, 20, 2)
    X, Q = 1000 + X.astype(np.float32) / 30, 1000 + Q.astype(np.float32) / 30
    X, Q = X.astype(np.float32), Q.astype(np.float32)
    neighbors = ClassNeighbors().fit(torch.tensor(X), y, 2)
    _, index = neighbors.kneighbors(torch.tensor(Q), 5)
    _, expected = search_by_hand(X.astype(np.float64), y, 2, Q.astype(np.float64), 5)
    assert (index.numpy() == expected).mean() > 0.999


def test_blocks_change_nothing(monkeypatch):
    X, y, Q = make_problem(2, 100, 4, 3)
    neighbors = ClassNeighbors().fit(torch.tensor(X), y, 3)
    whole = neighbors.kneighbors(torch.tensor(Q), 5)
    monkeypatch.setattr(exact, "BLOCK_BYTES", 2000)
    for part, expected in zip(neighbors.kneighbors(torch.tensor(Q), 5), whole, strict=True):
        assert_array_equal(part, expected)


def test_other_affinities_sort_by_themselves():
    X, y, Q = make_problem(3, 80, 4, 2)
    rows = [np.flatnonzero(y == c) for c in range(2)]
    unit = lambda a: a / np.linalg.norm(a, axis=-1, keepdims=True)  # noqa: E731
    scores = {
        "cosine": unit(Q) @ unit(X).T,
        "inner_product": Q @ X.T,
        "manhattan": -np.abs(Q[:, None] - X).sum(axis=2),
    }
    for name, score in scores.items():
        affinity = (lambda a, b: -(a - b).abs().sum(dim=1)) if name == "manhattan" else name
        given, index = (
            ClassNeighbors(affinity).fit(torch.tensor(X), y, 2).kneighbors(torch.tensor(Q), 6)
        )
        for c in range(2):
            best = rows[c][np.argsort(-score[:, rows[c]], axis=1, kind="stable")[:, :6]]
            assert_array_equal(index[:, c], best, err_msg=name)
            assert_allclose(given[:, c], np.take_along_axis(score, best, axis=1), err_msg=name)


def test_an_estimator_with_kneighbors_is_cloned_for_every_class():
    X, y, Q = make_problem(4, 90, 3, 3)
    template = NearestNeighbors(algorithm="kd_tree", leaf_size=5)
    neighbors = ClassNeighbors(algorithm=template).fit(torch.tensor(X), y, 3)
    expected = ClassNeighbors().fit(torch.tensor(X), y, 3).kneighbors(torch.tensor(Q), 4)
    assert_array_equal(neighbors.kneighbors(torch.tensor(Q), 4)[1], expected[1])
    assert not hasattr(template, "n_samples_fit_")
    assert isinstance(KNeighborsTransformer(), NearestNeighbors) is False
    other = ClassNeighbors(algorithm=KNeighborsTransformer()).fit(torch.tensor(X), y, 3)
    assert_array_equal(other.kneighbors(torch.tensor(Q), 4)[1], expected[1])


def test_an_affinity_without_a_distance_needs_the_matrix_product():
    X, y, _ = make_problem(5, 20, 3, 2)
    with pytest.raises(ValueError, match="algorithm='kd_tree'.*affinity='inner_product'"):
        ClassNeighbors("inner_product", "kd_tree").fit(torch.tensor(X), y, 2)


def test_a_callable_that_returns_the_wrong_shape_raises_an_error():
    X, y, Q = make_problem(6, 20, 3, 2)
    neighbors = ClassNeighbors(lambda a, b: a @ b.T).fit(torch.tensor(X), y, 2)
    with pytest.raises(ValueError, match=r"affinity must give a tensor of shape \(n,\)"):
        neighbors.kneighbors(torch.tensor(Q), 2)


def test_saved_and_copied_neighbours_find_the_same():
    X, y, Q = make_problem(7, 50, 3, 2)
    for algorithm in ("auto", "ball_tree"):
        neighbors = ClassNeighbors(algorithm=algorithm).fit(torch.tensor(X), y, 2)
        size = len(pickle.dumps(neighbors))
        expected = neighbors.kneighbors(torch.tensor(Q), 3)
        assert len(pickle.dumps(neighbors)) == size
        for saved in (pickle.loads(pickle.dumps(neighbors)), copy.deepcopy(neighbors)):
            for part, whole in zip(saved.kneighbors(torch.tensor(Q), 3), expected, strict=True):
                assert_array_equal(part, whole)


SCALES = [1e-30, 1e-26, 1.0, 1e25, 1e30]


def sorted_affinities(affinity, X, y, n_classes, Q, k):
    """The highest affinities of each class in extended precision, highest first."""
    X, Q = X.astype(np.longdouble), Q.astype(np.longdouble)
    if affinity == "euclidean":
        scores = -np.sqrt(((Q[:, None] - X) ** 2).sum(axis=2))
    else:
        X, Q = (a / np.where(a.any(axis=1), np.abs(a).max(axis=1), 1)[:, None] for a in (X, Q))
        lengths = [np.sqrt((a**2).sum(axis=1)) for a in (Q, X)]
        scores = Q @ X.T / np.where(np.outer(*lengths) > 0, np.outer(*lengths), 1)
    found = np.full((len(Q), n_classes, k), -np.inf)
    for c in range(n_classes):
        best = -np.sort(-scores[:, y == c], axis=1)[:, :k]
        found[:, c, : best.shape[1]] = best
    return found


def test_an_index_that_was_given_is_not_fitted_again_after_loading(monkeypatch):
    X, y, Q = make_problem(0, 60, 3, 2)
    queries = torch.from_numpy(Q)
    neighbors = ClassNeighbors(algorithm=NearestNeighbors()).fit(torch.from_numpy(X), y, 2)
    expected = neighbors.kneighbors(queries, 4)
    saved = pickle.loads(pickle.dumps(neighbors))
    monkeypatch.setattr(NearestNeighbors, "fit", lambda self, X: pytest.fail("fitted again"))
    for found, wanted in zip(saved.kneighbors(queries, 4), expected, strict=True):
        assert torch.equal(found, wanted)


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 100),
    n_features=st.integers(1, 8),
    k=st.integers(1, 8),
    affinity=st.sampled_from(["euclidean", "cosine"]),
    storage=st.sampled_from(["memory", "float16"]),
    dtype=st.sampled_from([np.float32, np.float64]),
    offset=st.sampled_from([0.0, 2000.0, 1e6]),
    scaled=st.sampled_from(["all", "rows", "columns", "one example", "one query"]),
    scale=st.sampled_from(SCALES),
    zeros=st.booleans(),
)
@example(97126, 53, 5, 4, "cosine", "float16", np.float32, 0.0, "columns", 1e-30, True)
@example(4, 4, 4, 1, "cosine", "memory", np.float32, 0.0, "columns", 1e-30, True)
def test_neighbours_are_exact_at_any_offset_and_scale(
    seed, n, n_features, k, affinity, storage, dtype, offset, scaled, scale, zeros
):
    rng = np.random.default_rng(seed)
    X, Q, y = rng.normal(size=(n, n_features)), rng.normal(size=(4, n_features)), np.arange(n) % 3
    X[:, 0] += offset
    Q[:, 0] += offset
    if zeros:
        X[rng.random(n) < 0.3], Q[0] = 0, 0
    if scaled == "all":
        X, Q = X * scale, Q * scale
    elif scaled == "columns":
        factors = rng.choice(SCALES, size=n_features)
        X, Q = X * factors, Q * factors
    elif scaled == "rows":
        X, Q = X * rng.choice(SCALES, size=(n, 1)), Q * rng.choice(SCALES, size=(4, 1))
    elif scaled == "one example":
        X[rng.integers(n)] *= scale
    else:
        Q[1] *= scale
    X, Q = X.astype(dtype), Q.astype(dtype)
    neighbors = ClassNeighbors(affinity, algorithm=ExactNeighbors(storage)).fit(
        torch.from_numpy(X), y, 3
    )
    recompute = (lambda i: torch.from_numpy(X)[i]) if storage == "float16" else None
    found, index = neighbors.kneighbors(torch.from_numpy(Q), k, recompute)
    expected = sorted_affinities(affinity, X, y, 3, Q, found.shape[2])
    tolerance = 20 * np.finfo(dtype).eps
    atol = tolerance if affinity == "cosine" else np.finfo(dtype).tiny
    assert_allclose(found.numpy().astype(np.longdouble), expected, rtol=tolerance, atol=atol)
    assert_array_equal(index >= 0, expected > -np.inf)


@pytest.mark.parametrize("affinity", ["euclidean", "cosine"])
@pytest.mark.parametrize("scaled", ["offset", "one example far out", "a missing value"])
def test_no_more_examples_are_compared_one_by_one(affinity, scaled, monkeypatch):
    compared = []
    plain = Search.exact_affinities

    def count(self, queries, places, take):
        compared.append(places.numel())
        return plain(self, queries, places, take)

    monkeypatch.setattr(Search, "exact_affinities", count)
    X, y, Q = make_problem(0, 2000, 16, 4)
    for moved in (False, True):
        if moved and scaled == "one example far out":
            X[5] *= 1e30
        elif moved:
            X[:, 0] += 2000
            Q[:, 0] += 2000
            X[:3, 0] = 0 if scaled == "a missing value" else X[:3, 0]
        compared.append(0)
        rows = torch.tensor(X, dtype=torch.float32)
        neighbors = ClassNeighbors(affinity).fit(rows, y, 4)
        neighbors.kneighbors(torch.tensor(Q[:50], dtype=torch.float32), 5)
    moved = sum(compared[compared.index(0, 1) :])
    assert moved <= 1.5 * 50 * 4 * (5 + exact.SLACK)


def test_samples_of_zeros_have_a_cosine_of_0():
    X = np.array([[0, 0], [1, 0.1], [-1, 0], [0, 0], [0.1, 1]], dtype=np.float32)
    rows, y = torch.from_numpy(X), np.zeros(5, dtype=int)
    for algorithm in ("auto", "brute", "kd_tree", NearestNeighbors()):
        neighbors = ClassNeighbors("cosine", algorithm).fit(rows, y, 1)
        affinity, index = neighbors.kneighbors(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), 5)
        assert index.tolist() == [[[1, 4, 0, 3, 2]], [[0, 1, 2, 3, 4]]]
        assert affinity[0, 0, 2:4].tolist() == [0, 0]
        assert affinity[1].tolist() == [[0] * 5]


@pytest.mark.parametrize("precision", ["medium", "high"])
def test_neighbours_are_exact_where_products_are_rounded(precision, monkeypatch):
    # What a processor with bfloat16 does with these settings.
    rng = np.random.default_rng(0)
    X = torch.tensor(rng.normal(size=(3000, 2)) @ rng.normal(size=(2, 32)), dtype=torch.float32)
    expected = ClassNeighbors().fit(X, np.zeros(3000, dtype=int), 1).kneighbors(X[:20] + 0.01, 8)

    def rounded(product):
        def multiply(*matrices):
            if torch.get_float32_matmul_precision() == "highest":
                return product(*matrices)
            half = (m.bfloat16().to(m) if m.dtype == torch.float32 else m for m in matrices)
            return product(*half)

        return multiply

    monkeypatch.setattr(torch, "addmm", rounded(torch.addmm))
    monkeypatch.setattr(torch, "mm", rounded(torch.mm))
    torch.set_float32_matmul_precision(precision)
    try:
        found = ClassNeighbors().fit(X, np.zeros(3000, dtype=int), 1).kneighbors(X[:20] + 0.01, 8)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert_array_equal(found[1], expected[1])
    assert_array_equal(found[0], expected[0])


def test_neighbours_are_the_same_under_autocast():
    X, y, Q = (torch.tensor(a).float() for a in make_problem(3, 300, 16, 2))
    neighbors = ClassNeighbors().fit(X, y.long().numpy(), 2)
    expected = neighbors.kneighbors(Q, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = neighbors.kneighbors(Q, 5)
    for part, whole in zip(found, expected, strict=True):
        assert_array_equal(part, whole)


@pytest.mark.parametrize("storage", ["memory", "float16"])
def test_a_class_without_examples_has_no_neighbours(storage):
    X, y, Q = make_problem(4, 30, 3, 2)
    X, Q = torch.tensor(X), torch.tensor(Q)
    for n_classes, labels in ((5, 2 * y), (3, y + 1)):
        neighbors = ClassNeighbors(algorithm=ExactNeighbors(storage)).fit(X, labels, n_classes)
        affinity, index = neighbors.kneighbors(Q, 4, lambda i: X[i])
        expected = ClassNeighbors().fit(X, y, 2).kneighbors(Q, 4)
        present = np.unique(labels)
        assert_array_equal(affinity[:, present], expected[0])
        assert_array_equal(index[:, present], expected[1])
        empty = np.setdiff1d(np.arange(n_classes), present)
        assert (affinity[:, empty] == -torch.inf).all()
        assert (index[:, empty] == -1).all()


def test_many_classes_and_more_neighbours_than_examples():
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(400, 3)), rng.permutation(np.arange(400) % 300)
    neighbors = ClassNeighbors().fit(torch.tensor(X), y, 300)
    _, index = neighbors.kneighbors(torch.tensor(X[:5]), 10**30)
    assert index.shape == (5, 300, 2)
    _, expected = search_by_hand(X, y, 300, X[:5], 2)
    assert_array_equal(index, expected)
    one = ClassNeighbors().fit(torch.tensor(X[:1]), y[:1] * 0, 1)
    assert one.kneighbors(torch.tensor(X[:2]), 5)[1].tolist() == [[[0]]] * 2
    own = torch.arange(5)
    left_out = kneighbors_leave_one_out(neighbors, own, torch.tensor(X[:5]), 10**9)
    assert (left_out[own, y[:5]].isfinite().sum(dim=1) == np.bincount(y)[y[:5]] - 1).all()


class Given(BaseEstimator):
    """An index that returns what a function computes."""

    def __init__(self, found=None):
        self.found = found

    def fit(self, X, y=None):
        self.n_ = len(X)
        return self

    def kneighbors(self, X, n_neighbors=5, return_distance=True):
        return self.found(len(X), n_neighbors, self.n_)


def find_first(n, k, n_samples):
    return np.tile(np.arange(k), (n, 1))


def test_an_index_may_find_fewer_neighbours():
    X, _, Q = make_problem(5, 40, 3, 2)
    y = (np.arange(40) % 3 > 0).astype(int)

    def two(n, k, n_samples):
        return np.where(np.arange(k) < 2, find_first(n, k, n_samples), -1)

    def same(n, k, n_samples):
        return np.zeros((n, k), dtype=int)

    def none_in_one_class(n, k, n_samples):
        return find_first(n, k, n_samples) if n_samples == (y == 0).sum() else np.full((n, k), -1)

    first = np.array([np.flatnonzero(y == c)[:2] for c in range(2)])
    for found, expected in (
        (two, [[sorted(i) for i in first]]),
        (same, [[[i[0]] for i in first]]),
        (none_in_one_class, None),
    ):
        neighbors = ClassNeighbors(algorithm=Given(found)).fit(torch.tensor(X), y, 2)
        affinity, index = neighbors.kneighbors(torch.tensor(Q[:1]), 3)
        assert ((index >= 0) == affinity.isfinite()).all()
        kept = [[sorted(i for i in of_class if i >= 0) for of_class in index[0].tolist()]]
        if expected is None:
            assert (index[0, 1] == -1).all()
            assert (index[0, 0] >= 0).all()
        else:
            assert kept == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found + 1000, "positions from 0"),
        (lambda found: found - 2, "positions from 0"),
        (lambda found: found[:, :1], "whole numbers of shape"),
        (lambda found: found[0], "whole numbers of shape"),
        (lambda found: found * 1.0, "whole numbers of shape"),
    ],
)
def test_an_index_that_returns_no_positions_raises_an_error(change, message):
    X, y, Q = make_problem(5, 40, 3, 2)
    template = Given(lambda n, k, n_samples: change(find_first(n, k, n_samples)))
    neighbors = ClassNeighbors(algorithm=template).fit(torch.tensor(X), y, 2)
    with pytest.raises(ValueError, match=rf"algorithm=Given\(.*\): kneighbors.*{message}"):
        neighbors.kneighbors(torch.tensor(Q), 3)


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_inner_products_that_cannot_be_represented_are_refused(scale):
    X, y, Q = (torch.tensor(a).float() for a in make_problem(6, 40, 3, 2))
    neighbors = ClassNeighbors("inner_product").fit(X * scale, y.long().numpy(), 2)
    with pytest.raises(ValueError, match=r"affinity='inner_product'.*scale X.*dtype='float64'"):
        neighbors.kneighbors(Q * scale, 3)
    wide = ClassNeighbors("inner_product").fit(X.double() * scale, y.long().numpy(), 2)
    assert_array_equal(
        wide.kneighbors(Q.double() * scale, 3)[1],
        ClassNeighbors("inner_product").fit(X, y.long().numpy(), 2).kneighbors(Q, 3)[1],
    )


def test_distances_that_cannot_be_represented_are_refused():
    neighbors = ClassNeighbors().fit(torch.full((3, 2), 3e38), np.zeros(3, dtype=int), 1)
    with pytest.raises(ValueError, match=r"affinity='euclidean'.*scale X"):
        neighbors.kneighbors(torch.full((1, 2), -3e38), 2)
    with pytest.raises(ValueError, match=r"affinity='euclidean'.*not finite"):
        neighbors.kneighbors(torch.tensor([[torch.nan, 0.0]]), 2)
    with pytest.raises(ValueError, match="training rows are not finite"):
        ClassNeighbors().fit(torch.tensor([[0.0], [torch.nan]]), np.zeros(2, dtype=int), 1)


def test_an_infinite_affinity_is_the_highest_there_is():
    X = torch.tensor([[1.0], [2.0], [3.0]])
    neighbors = ClassNeighbors(lambda a, b: 1 / (a - b).norm(dim=1)).fit(X, np.zeros(3, int), 1)
    affinity, index = neighbors.kneighbors(X[1:2] + 0, 3)
    assert index.tolist() == [[[1, 0, 2]]]
    assert affinity[0, 0].tolist() == [torch.finfo(torch.float32).max, 1, 1]


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_pooled_neighbours_are_those_of_one_class(offset):
    rng = np.random.default_rng(0)
    # Duplicates in different classes, and rows of zeros.
    X = np.tile(rng.normal(size=(50, 4)).round(1) + np.eye(4)[0] * offset, (4, 1)).astype(
        np.float32
    )
    X[::17] = 0
    X, y = torch.from_numpy(X), rng.integers(6, size=200)
    Q = torch.cat([X[:20], X[:20] + 0.3, torch.zeros(1, 4)])
    neighbors = ClassNeighbors().fit(X, y, 7)
    lengths = norm(X)[neighbors.index]
    lengths = lengths.masked_fill(lengths == 0, torch.inf)
    for view, rows, queries in (
        (neighbors.pooled(X.device), X, Q),
        (neighbors.pooled(X.device, lengths), normalize_rows(X), normalize_rows(Q)),
    ):
        found = view.kneighbors(Q, 30)
        distance, _ = search_by_hand(rows.double().numpy(), y * 0, 1, queries.double().numpy(), 30)
        assert_allclose(-found[0], distance, atol=2e-6 * max(1, offset / 10))
        exact = ClassNeighbors().fit(rows, y * 0, 1).kneighbors(queries, 30)
        assert_array_equal(found[1], exact[1])
    assert_array_equal(neighbors.kneighbors(Q, 3)[1][:, 6], -1)


@pytest.mark.parametrize("algorithm", ["auto", "brute", "kd_tree", "ball_tree"])
@pytest.mark.parametrize("offset", [0, 1e8])
def test_every_algorithm_is_exact_far_from_zero(algorithm, offset):
    rng = np.random.default_rng(0)
    X = torch.from_numpy(rng.normal(size=(300, 6)) + offset)
    neighbors = ClassNeighbors(algorithm=algorithm).fit(X, np.arange(300) % 2, 2)
    affinity, index = neighbors.kneighbors(X[:40], 1)
    assert (index[np.arange(40), np.arange(40) % 2, 0] == torch.arange(40)).all()
    distance = torch.cdist(X[:40] - offset, X - offset)
    for c in range(2):
        assert_allclose(-affinity[:, c, 0], distance[:, c::2].amin(dim=1), atol=1e-7)


@pytest.mark.parametrize("algorithm", ["auto", "brute", "kd_tree", "ball_tree"])
@pytest.mark.parametrize("scale", [1e-250, 1e184, 1e290])
def test_every_algorithm_is_exact_at_any_scale(algorithm, scale):
    X, y, Q = make_problem(0, 200, 5, 3)
    neighbors = ClassNeighbors(algorithm=algorithm).fit(torch.tensor(X * scale), y, 3)
    affinity, index = neighbors.kneighbors(torch.tensor(Q * scale), 7)
    expected_distance, expected_index = search_by_hand(X, y, 3, Q, 7)
    assert_array_equal(index, expected_index)
    assert_allclose(-affinity / scale, expected_distance)


def test_merged_neighbours_are_the_nearest_of_both_and_ties_go_to_the_first():
    first = torch.tensor([[[-1.0, -3.0]]]), torch.tensor([[[4, 5]]])
    second = torch.tensor([[[-1.0, -2.0]]]), torch.tensor([[[6, 7]]])
    affinity, index = merge_flocks(first, second, 3)
    assert affinity.tolist() == [[[-1, -1, -2]]]
    assert index.tolist() == [[[4, 6, 7]]]


def test_the_representation_tells_the_sizes():
    neighbors = ClassNeighbors().fit(torch.rand(6, 2), np.arange(6) % 3, 3)
    assert repr(neighbors) == "ClassNeighbors(6 examples of 3 classes)"
