"""What a search holds at a time, and that it finds the same however it is divided."""

import numpy as np
import pytest
import sklearn
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from problems import make_problem

from sklearn_rails.neighbors import (
    ClassNeighbors,
    Euclidean,
    ExactNeighbors,
    exact,
    index,
    order,
    sketch,
)


@settings(deadline=None, max_examples=80)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(sum),
    n=st.integers(1, 4),
    n_best=st.integers(1, 50),
    ruled_out=st.sampled_from([0.0, 0.3, 0.9]),
    seed=st.integers(0, 1000),
)
def test_the_highest_scores_of_grouped_classes_are_those_of_each(sizes, n, n_best, ruled_out, seed):
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(len(sizes)), sizes)
    classes = order.ClassOrder(y, len(sizes))
    # Without ties, which may go either way.
    scores = torch.from_numpy(rng.permuted(np.tile(np.arange(len(y)) - 9.0, (n, 1)), axis=1))
    scores[torch.from_numpy(rng.random(scores.shape) < ruled_out)] = -torch.inf
    top, places = order.find_top_scores(scores, classes, n_best)
    assert top.shape == places.shape == (n, len(sizes), n_best)
    for c in range(len(sizes)):
        members = np.flatnonzero(y == c)
        for i, row in enumerate(scores.numpy()):
            left = members[row[members] > -np.inf]
            best = left[np.argsort(-row[left])[:n_best]]
            found = len(best)
            assert_array_equal(places[i, c, :found], best)
            assert_array_equal(top[i, c, :found], row[best])
            assert (places[i, c, found:] == -1).all()
            assert (top[i, c, found:] == -torch.inf).all()


def test_a_few_queries_are_searched_without_a_loop_over_classes(monkeypatch):
    X, y, Q = make_problem(0, 3000, 4, 300)
    neighbors = ClassNeighbors().fit(torch.tensor(X), y, 300)
    calls = []
    topk = torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, "topk", lambda *a, **k: calls.append(1) or topk(*a, **k))
    found = neighbors.kneighbors(torch.tensor(Q[:1]), 5)
    assert len(calls) <= 8
    calls.clear()
    monkeypatch.setattr(order, "PADDED_SCORES", 0)
    expected = neighbors.kneighbors(torch.tensor(Q[:1]), 5)
    assert len(calls) == 300
    for part, whole in zip(found, expected, strict=True):
        assert_array_equal(part, whole)


@pytest.mark.parametrize("storage", ["memory", "float16"])
@pytest.mark.parametrize("affinity", ["euclidean", "cosine", "inner_product"])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_a_query_has_the_same_neighbours_alone_and_among_others(storage, affinity, offset):
    X, _, Q = make_problem(1, 600, 12, 4)
    y = np.arange(600) ** 2 // 90_000
    # The centre is far from zero, and features do not take differences without a loss.
    X, Q = torch.tensor(X + offset).float(), torch.tensor(Q + offset).float()
    neighbors = ClassNeighbors(affinity, ExactNeighbors(storage)).fit(X, y, 4)
    whole = neighbors.kneighbors(Q, 7, X.__getitem__)
    # Compared with every example.
    search = neighbors._search
    every = exact.AllPairsSearch.find(
        search,
        search.prepare(Q),
        7,
        search.reader(Q, X.__getitem__ if storage == "float16" else None),
    )
    assert_array_equal(whole[0], every[0])
    assert_array_equal(whole[1], neighbors.index[every[1]])
    for i in range(40):
        alone = neighbors.kneighbors(Q[i : i + 1], 7, X.__getitem__)
        for part, expected in zip(alone, whole, strict=True):
            assert_array_equal(part[0], expected[i])


def test_scores_take_no_more_than_the_working_memory(monkeypatch):
    X, y, Q = make_problem(2, 2000, 5, 4)
    X, Q = torch.tensor(X), torch.tensor(np.tile(Q, (10, 1)))
    for affinity in ("euclidean", lambda a, b: -(a - b).abs().sum(dim=1)):
        neighbors = ClassNeighbors(affinity).fit(X, y, 4)
        n_queries = len(Q) if affinity == "euclidean" else 100
        expected = neighbors.kneighbors(Q[:n_queries], 3)
        held = []
        rank = exact.ProductSearch.rank

        def note(self, queries, places, *args, held=held, rank=rank):
            n_values = len(X) if hasattr(self, "_offsets") else 0
            held.append(queries.element_size() * len(queries) * n_values + 4 * places.nbytes)
            return rank(self, queries, places, *args)

        with monkeypatch.context() as patch, sklearn.config_context(working_memory=2):
            patch.setattr("sklearn_rails.neighbors.search.Search.rank", note)
            found = neighbors.kneighbors(Q[:n_queries], 3)
        assert len(held) > 1
        assert max(held) <= 2 * 2**20
        for part, whole in zip(found, expected, strict=True):
            assert_array_equal(part, whole)


@pytest.mark.parametrize("storage", ["memory", "float16"])
def test_examples_are_stored_in_blocks(storage, monkeypatch):
    X, y, Q = (torch.tensor(a) for a in make_problem(3, 1000, 8, 3))
    # The first block is not typical of all.
    X[:100] *= 1e-4
    whole = ClassNeighbors(algorithm=ExactNeighbors(storage)).fit(X, y.numpy(), 3)
    sizes = []
    prepare = Euclidean.prepare
    monkeypatch.setattr(index, "BLOCK_BYTES", 100 * X[0].nbytes)
    monkeypatch.setattr(
        Euclidean, "prepare", lambda self, rows: sizes.append(len(rows)) or prepare(self, rows)
    )
    blocks = ClassNeighbors(algorithm=ExactNeighbors(storage)).fit(X, y.numpy(), 3)
    assert max(sizes[1:]) == 100
    assert sum(sizes[1:]) == 1000
    assert blocks.store.scale == whole.store.scale
    for part, expected in zip(
        blocks.kneighbors(Q, 4, X.__getitem__), whole.kneighbors(Q, 4, X.__getitem__), strict=True
    ):
        assert_array_equal(part, expected)


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 10**6),
    n_features=st.sampled_from([1, 3, 30, 300]),
    affinity=st.sampled_from(["euclidean", "inner_product"]),
    storage=st.sampled_from(["memory", "float16"]),
    offset=st.sampled_from([0.0, 1.0, 1000.0]),
    far=st.sampled_from([1.0, 1e-4, 1e4]),
    of=st.sampled_from(["examples", "queries"]),
)
def test_scores_err_by_less_than_their_bound(seed, n_features, affinity, storage, offset, far, of):
    rng = np.random.default_rng(seed)
    X, Q = (rng.normal(size=(n, n_features)).astype(np.float32) for n in (60, 5))
    (X if of == "examples" else Q)[::2] *= np.float32(far)
    X, Q = X + np.float32(offset), Q + np.float32(offset)
    X[0] = 1e-3  # so that not all can be stored as differences
    neighbors = ClassNeighbors(affinity, ExactNeighbors(storage)).fit(
        torch.from_numpy(X), np.zeros(60, dtype=int), 1
    )
    search, geometry = neighbors._search, neighbors._search.geometry
    moved = search._move_queries(torch.from_numpy(Q))
    scores = search._scores(moved).numpy().astype(np.longdouble)

    def place(rows):
        return (rows.astype(np.longdouble) - geometry.origin.numpy()) * geometry.query_scale

    q, x = place(Q), place(X)
    center = geometry.center.numpy().astype(np.longdouble) * geometry.unit
    exact = q @ (x + center).T
    if affinity == "euclidean":
        exact -= (x**2).sum(axis=1) / 2
    lengths = np.sqrt((q**2).sum(axis=1, keepdims=True)).astype(float)
    bound = search._score_error(moved, lengths, scores.astype(float))
    assert (np.abs(scores - exact) <= bound).all()
    # Nor is it much more than products round, and half precision the examples.
    sizes = lengths + np.sqrt((x**2).sum(axis=1))
    rounding = np.finfo(np.float32).eps * (sizes + np.sqrt((center**2).sum())) * sizes
    rounding += sizes * geometry.max_rounding_error + geometry.max_rounding_error**2
    reach = rounding.max(axis=1, keepdims=True) if affinity == "inner_product" else rounding
    assert (bound <= 100 * n_features**0.5 * reach + 1e-30).all()
    for i in range(len(Q)):
        one = search._score_error(moved[i : i + 1], float(lengths[i, 0]), float(scores[i].min()))
        assert np.abs(scores - exact)[i].max() <= one <= 1.01 * bound[i].max()


@pytest.mark.parametrize("algorithm", ["brute", "kd_tree"])
def test_large_examples_are_found_among_many_that_are_all_the_same(algorithm):
    X = torch.zeros(20, 1, dtype=torch.float64)
    X[:8, 0] = 1e154 * torch.arange(-4, 4, dtype=torch.float64)
    neighbors = ClassNeighbors(algorithm=algorithm).fit(X, np.zeros(20, int), n_classes=1)
    affinity, index = neighbors.kneighbors(X[:1] - 1e153, 3)
    assert index.tolist() == [[[0, 1, 2]]]
    np.testing.assert_allclose(affinity, [[[-1e153, -1.1e154, -2.1e154]]])


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_bound_beyond_the_numbers_has_every_example_compared(monkeypatch):
    monkeypatch.setattr(sketch, "MIN_FEATURES", 32)
    monkeypatch.setattr(sketch, "MAX_SHARE", 1 / 4)
    monkeypatch.setattr(sketch, "choose_size", lambda basis, *rest: basis.shape[1] + 1)
    # Most examples are 1e170 times as near to the centre as the others.
    rng = np.random.default_rng(0)
    X, Q = rng.normal(size=(2, 46, 32)) * 1e-184
    X[::3] *= 1e183 * 10.0 ** rng.uniform(-15, 0, size=(16, 1))
    y = np.zeros(46, dtype=int)
    neighbors = ClassNeighbors().fit(torch.from_numpy(X), y, 1)
    found, _ = neighbors.kneighbors(torch.from_numpy(Q), 40)
    distance = np.linalg.norm(X[None] * 1e150 - Q[:, None] * 1e150, axis=2) / 1e150
    expected = np.sort(distance, axis=1)[:, :40]
    np.testing.assert_allclose(-found[:, 0].numpy(), expected, rtol=1e-12)
