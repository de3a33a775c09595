"""Sketches rule out examples, but never a neighbour."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from sklearn_rails.neighbors import ClassNeighbors, ExactNeighbors, exact, sketch


@pytest.fixture(autouse=True)
def small_features(monkeypatch):
    monkeypatch.setattr(sketch, "MIN_FEATURES", 32)
    monkeypatch.setattr(sketch, "MAX_SHARE", 1 / 16)


def make_flat_problem(seed, *, n=400, d=64, rank=2, noise=0.01, offset=0.0):
    """Draw features near a plane, labels, and 6 queries."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n + 6, rank)) @ rng.normal(size=(rank, d))
    X += noise * rng.normal(size=X.shape) + offset * rng.normal(size=d)
    y = rng.permutation(np.arange(n) % 3)
    return torch.from_numpy(X[:n].astype(np.float32)), y, torch.from_numpy(X[n:].astype(np.float32))


def search_without_sketch(neighbors, *args):
    search = neighbors._search
    kept, search.sketch = search.sketch, None
    try:
        return neighbors.kneighbors(*args)
    finally:
        search.sketch = kept


@settings(deadline=None, max_examples=200)
@given(
    seed=st.integers(0, 10**6),
    n_queries=st.integers(1, 6),
    rank=st.integers(1, 64),
    noise=st.sampled_from([0.0, 1e-4, 0.1]),
    offset=st.sampled_from([0.0, 1.0, 7.0, 1e4]),
    scale=st.sampled_from([1e-30, 1e-20, 1.0, 1e18, 1e30]),
    scaled=st.sampled_from(["all", "one example", "one query"]),
    n_duplicates=st.sampled_from([0, 40]),
    affinity=st.sampled_from(["euclidean", "inner_product"]),
    storage=st.sampled_from(["memory", "float16"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    k=st.integers(1, 9),
)
@example(1, 2, 1, 0.0, 0.0, 1e-30, "all", 0, "euclidean", "float16", torch.float32, 2)
def test_neighbours_are_those_of_a_search_without_sketches(
    seed, n_queries, rank, noise, offset, scale, scaled, n_duplicates, affinity, storage, dtype, k
):
    X, y, Q = make_flat_problem(seed, rank=rank, noise=noise, offset=offset)
    X, Q = X.to(dtype), Q[:n_queries].to(dtype)
    X[:n_duplicates] = X[n_duplicates : 2 * n_duplicates]
    if affinity == "inner_product":
        scale = 1.0  # others are refused
    if scaled == "all":
        X, Q = X * scale, Q * scale
    elif scaled == "one query":
        Q[0] *= scale
    else:
        X[3] *= scale
    with pytest.MonkeyPatch.context() as patch:
        # Whether it pays or not.
        patch.setattr(sketch, "choose_size", lambda basis, *rest: basis.shape[1] + 1)
        neighbors = ClassNeighbors(affinity, ExactNeighbors(storage)).fit(X, y, 3)
    assert neighbors._search.sketch is not None
    recompute = X.__getitem__ if storage == "float16" else None
    found = neighbors.kneighbors(Q, k, recompute)
    expected = search_without_sketch(neighbors, Q, k, recompute)
    for part, whole in zip(found, expected, strict=True):
        assert_array_equal(part, whole)


@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_few_examples_are_compared_in_full(offset, monkeypatch):
    X, y, Q = make_flat_problem(0, n=3000, offset=offset)
    neighbors = ClassNeighbors().fit(X, y, 3)
    read = []
    rank = exact.ProductSearch.exact_affinities
    monkeypatch.setattr(
        exact.ProductSearch,
        "exact_affinities",
        lambda self, queries, places, take: (
            read.append(places.numel()) or rank(self, queries, places, take)
        ),
    )
    monkeypatch.setattr(exact.ProductSearch, "_scores", None)
    neighbors.kneighbors(Q, 5)
    assert len(Q) * 15 <= sum(read) < len(Q) * len(X) / 50


def test_sketches_that_rule_out_little_are_not_kept():
    rng = np.random.default_rng(0)
    X = torch.from_numpy(rng.normal(size=(900, 64)))
    assert ClassNeighbors().fit(X, np.arange(900) % 3, 3)._search.sketch is None
    X, y, _ = make_flat_problem(0)
    assert ClassNeighbors().fit(X, y, 3)._search.sketch is not None
    assert ClassNeighbors().fit(X[:, :31], y, 3)._search.sketch is None
    assert ClassNeighbors("cosine").fit(X, y, 3)._search.sketch is None
    # Of classes that have no sample of their own to judge by.
    assert ClassNeighbors().fit(X, np.arange(400) % 300, 300)._search.sketch is None


def test_queries_that_sketches_rule_out_little_for_are_compared_with_all(monkeypatch):
    monkeypatch.setattr(sketch, "choose_size", lambda basis, *rest: basis.shape[1] + 1)
    X, y, Q = make_flat_problem(0)
    # Half of the examples and the last queries fill all directions, far from the others.
    X, Q = 50 * X, 50 * Q
    rng = np.random.default_rng(0)
    X[200:] = torch.from_numpy(rng.normal(20, 1, size=(200, 64)))
    Q[4:] = torch.from_numpy(rng.normal(20, 1, size=(2, 64)))
    neighbors = ClassNeighbors().fit(X, y, 3)
    full = []
    find = exact.ProductSearch._find_by_product
    monkeypatch.setattr(
        exact.ProductSearch,
        "_find_by_product",
        lambda self, block, *args: full.append(len(block.queries)) or find(self, block, *args),
    )
    neighbors.kneighbors(Q, 5)
    assert full == [2]
    for part, whole in zip(
        neighbors.kneighbors(Q, 5), search_without_sketch(neighbors, Q, 5), strict=True
    ):
        assert_array_equal(part, whole)


def test_saved_and_pooled_neighbours_use_the_same_sketches():
    X, y, Q = make_flat_problem(0)
    neighbors = ClassNeighbors().fit(X, y, 3)
    saved = pickle.loads(pickle.dumps(neighbors))
    assert_array_equal(saved._search.sketch.examples, neighbors._search.sketch.examples)
    assert_array_equal(saved.kneighbors(Q, 4)[1], neighbors.kneighbors(Q, 4)[1])
    pooled = neighbors.pooled(X.device)
    expected = ClassNeighbors().fit(X, y * 0, 1).kneighbors(Q, 4)
    for part, whole in zip(pooled.kneighbors(Q, 4), expected, strict=True):
        assert_array_equal(part, whole)
