import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.neighbors import KNeighborsTransformer, NearestNeighbors

from sklearn_rails.immune import flocking
from sklearn_rails.immune.flocking import ClassNeighbors, drop_own


def search_by_hand(X, y, n_classes, Q, k):
    """Sort all distances, ties by index."""
    distance = np.full((len(Q), n_classes, k), np.inf)
    index = np.full((len(Q), n_classes, k), -1)
    for i, q in enumerate(Q):
        for c in range(n_classes):
            rows = np.flatnonzero(y == c)
            d = np.sqrt(((X[rows] - q) ** 2).sum(axis=1))
            best = np.lexsort((rows, d))[:k]
            distance[i, c, : len(best)] = d[best]
            index[i, c, : len(best)] = rows[best]
    return distance, index


def make_problem(seed, n, n_features, n_classes, *, on_a_grid=False):
    rng = np.random.default_rng(seed)
    X, Q = rng.normal(size=(2, n, n_features))
    if on_a_grid:  # many ties, and duplicates
        X, Q = X.round(), Q.round()
    y = rng.integers(n_classes, size=n)
    y[:n_classes] = np.arange(n_classes)
    return X, y, Q


@pytest.mark.parametrize("algorithm", ["auto", "brute", "kd_tree", "ball_tree"])
def test_neighbours_are_those_of_sorting_all_distances(algorithm):
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


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(3, 200),
    n_features=st.integers(1, 30),
    k=st.integers(1, 12),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    affinity=st.sampled_from(["euclidean", "inner_product"]),
    on_a_grid=st.booleans(),
)
def test_half_precision_loses_no_neighbour(seed, n, n_features, k, scale, affinity, on_a_grid):
    X, y, Q = make_problem(seed, n, n_features, 3, on_a_grid=on_a_grid)
    # A shift beside which the differences are small, and examples far out, put last.
    X, Q = torch.tensor(X * scale + 20 * scale), torch.tensor(Q * scale + 20 * scale)
    X[-2:] *= 1000
    expected = ClassNeighbors(affinity).fit(X, y, 3).kneighbors(Q, k)
    half = ClassNeighbors(affinity, storage="float16").begin(y, 3)
    half.put(slice(0, n // 2), X[: n // 2]).put(slice(n // 2, n), X[n // 2 :]).finish()
    affinity, index = half.kneighbors(Q, k, lambda i: X[i])
    assert_array_equal(affinity, expected[0])
    assert_array_equal(index, expected[1])


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
    monkeypatch.setattr(flocking, "BLOCK_BYTES", 2000)
    for part, expected in zip(neighbors.kneighbors(torch.tensor(Q), 5), whole, strict=True):
        assert_array_equal(part, expected)


def test_other_affinities_rank_by_themselves():
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


def test_a_callable_affinity_of_the_wrong_shape_is_named():
    X, y, Q = make_problem(6, 20, 3, 2)
    neighbors = ClassNeighbors(lambda a, b: a @ b.T).fit(torch.tensor(X), y, 2)
    with pytest.raises(ValueError, match=r"affinity must give a tensor of shape \(n,\)"):
        neighbors.kneighbors(torch.tensor(Q), 2)


def test_a_row_is_dropped_from_its_own_neighbours():
    X = torch.tensor([[0.0], [0.0], [1.0], [5.0]])
    neighbors = ClassNeighbors().fit(X, np.array([0, 0, 0, 1]), 2)
    own = torch.tensor([1, 3])
    affinity, index = drop_own(*neighbors.kneighbors(X[own], 3), own)
    assert index.tolist() == [[[0, 2], [3, -1]], [[2, 0], [-1, -1]]]
    assert affinity[0, 0].tolist() == [0.0, -1.0]


def test_saved_neighbours_answer_as_before():
    X, y, Q = make_problem(7, 50, 3, 2)
    for algorithm in ("auto", "ball_tree"):
        neighbors = ClassNeighbors(algorithm=algorithm).fit(torch.tensor(X), y, 2)
        expected = neighbors.kneighbors(torch.tensor(Q), 3)
        for saved in (pickle.loads(pickle.dumps(neighbors)), copy.deepcopy(neighbors)):
            for part, whole in zip(saved.kneighbors(torch.tensor(Q), 3), expected, strict=True):
                assert_array_equal(part, whole)
