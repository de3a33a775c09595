import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from problems import make_problem, search_by_hand

from sklearn_rails.neighbors import ClassNeighbors
from sklearn_rails.neighbors.leave_one_out import (
    drop_self,
    kneighbors_leave_one_out,
    scale_of_affinity,
)


def test_a_sample_is_dropped_from_its_own_neighbours():
    X = torch.tensor([[0.0], [0.0], [1.0], [5.0]])
    neighbors = ClassNeighbors().fit(X, np.array([0, 0, 0, 1]), 2)
    self_index = torch.tensor([1, 3])
    affinity, index = drop_self(*neighbors.kneighbors(X[self_index], 3), self_index)
    assert index.tolist() == [[[0, 2], [3, -1]], [[2, 0], [-1, -1]]]
    assert affinity[0, 0].tolist() == [0.0, -1.0]


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(3, 40),
    k=st.integers(1, 50),
    algorithm=st.sampled_from(["auto", "kd_tree"]),
)
def test_neighbours_without_oneself_equal_those_of_an_index_without_the_sample(
    seed, n, k, algorithm
):
    X, y, _ = make_problem(seed, n, 3, 3, on_a_grid=True)
    neighbors = ClassNeighbors(algorithm=algorithm).fit(torch.tensor(X), y, 3)
    k = min(k, int(np.bincount(y).max()))
    found = kneighbors_leave_one_out(neighbors, torch.arange(n), torch.tensor(X), k)
    assert found.shape == (n, 3, k)
    for i in range(n):
        rest = np.arange(n) != i
        distance, _ = search_by_hand(X[rest], y[rest], 3, X[i : i + 1], k)
        assert_allclose(-found[i], distance[0])


def test_scale_is_a_share_of_the_spread_of_the_neighbours():
    # Without itself, each sample has neighbours at distances 1 and 2, or 1 and 1.
    X = torch.tensor([[0.0], [1.0], [2.0]])
    neighbors = ClassNeighbors().fit(X, np.zeros(3, dtype=int), 1)
    assert scale_of_affinity(neighbors, torch.arange(3), X, 2) == pytest.approx(0.2 * 0.5)
    same = ClassNeighbors().fit(X * 0, np.zeros(3, dtype=int), 1)
    assert scale_of_affinity(same, torch.arange(3), X * 0, 2) == 1
