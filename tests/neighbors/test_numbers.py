"""Nearest neighbours against sorting all affinities in extended precision, on random settings."""

from contextlib import ExitStack
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from sklearn.neighbors import NearestNeighbors

from sklearn_rails.neighbors import ClassNeighbors, ExactNeighbors, exact, order, search, sketch
from sklearn_rails.neighbors.leave_one_out import kneighbors_leave_one_out
from sklearn_rails.neighbors.norms import norm

# A search that handles an overflow does not report it.
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


def minus_manhattan(a, b):
    return -(a - b).abs().sum(dim=-1)


AFFINITIES = {
    "euclidean": lambda Q, X: -np.sqrt(((Q[:, None] - X) ** 2).sum(axis=2)),
    "cosine": lambda Q, X: unit(Q) @ unit(X).T,
    "inner_product": lambda Q, X: Q @ X.T,
    minus_manhattan: lambda Q, X: -np.abs(Q[:, None] - X).sum(axis=2),
    "unit_length": lambda Q, X: AFFINITIES["euclidean"](unit(Q), unit(X)),
}


def unit(rows):
    largest = np.abs(rows).max(axis=1, keepdims=True)
    rows = rows / np.where(largest > 0, largest, 1)
    return rows / np.maximum(np.sqrt((rows**2).sum(axis=1, keepdims=True)), 1)


@st.composite
def problems(draw):
    """Examples, queries, and a search.

    On a grid all sums are exact, so that ties are, and their order is known.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    affinity = draw(st.sampled_from(list(AFFINITIES)[:-1]))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    is_wide = draw(st.integers(0, 4)) == 0
    d = draw(st.integers(32, 48) if is_wide else st.integers(1, 8))
    n, n_queries = draw(st.integers(1, 90)), draw(st.integers(1, 6))
    n_classes = draw(st.integers(1, 5))
    kind = draw(st.sampled_from(["normal", "grid", "far", "outlier", "flat", "rows", "columns"]))
    rows = rng.normal(size=(n + n_queries, d))
    if kind == "grid":
        rows = rows.round()
    elif kind == "flat":
        rows = rows[:, :1] @ rng.normal(size=(1, d)) + 0.01 * rows
    rows[:, d // 2] = rows[0, d // 2] if draw(st.booleans()) else rows[:, d // 2]  # constant
    if draw(st.booleans()):
        rows[rng.random(len(rows)) < 0.3] = 0
    if draw(st.booleans()):  # duplicates, in several classes, and among the queries
        rows = rows[rng.integers(len(rows), size=len(rows))]
    # What products of two are within the range of the dtype.
    reach = (30 if dtype == np.float32 else 280) * (0.4 if affinity == "inner_product" else 1)
    reach = draw(st.floats(-reach, reach))
    if kind == "grid":
        rows *= 2.0 ** round(reach)
    elif kind == "far":
        rows = (rows + 10.0 ** draw(st.integers(0, 6))) * 10 ** (reach / 2)
    elif kind == "outlier":
        rows[rng.integers(len(rows))] *= 10**reach
    elif kind in ("rows", "columns"):
        shape = (len(rows), 1) if kind == "rows" else d
        rows *= 10 ** (reach * rng.random(shape))
    else:
        rows *= 10**reach
    storages = ["memory", "folder"] + ["float16"] * isinstance(affinity, str)
    algorithms = [None]
    if affinity in ("euclidean", "cosine") and kind in ("normal", "grid", "far", "flat"):
        algorithms += ["brute", "kd_tree", "ball_tree"]
        algorithms += [NearestNeighbors()] * (kind == "grid" and abs(reach) < 10)
    return SimpleNamespace(
        affinity=affinity,
        X=rows[:n].astype(dtype),
        Q=rows[n:].astype(dtype),
        y=rng.integers(n_classes, size=n),
        n_classes=n_classes + draw(st.integers(0, 1)),
        n_neighbors=draw(st.integers(1, n + 1)),
        algorithm=draw(st.sampled_from(algorithms)),
        storage=draw(st.sampled_from(storages)),
        leave_one_out=draw(st.booleans()),
        pooled=draw(st.sampled_from(["", "", "as they are", "by length"])),
        in_parts=draw(st.booleans()),
        in_blocks=draw(st.booleans()),
        split=draw(st.booleans()),
        is_exact=kind == "grid" and affinity != "cosine",
    )


def fit(p, folder):
    storage = str(folder) if p.storage == "folder" else p.storage
    algorithm = ExactNeighbors(storage) if p.algorithm is None else p.algorithm
    X = torch.from_numpy(p.X)
    neighbors = ClassNeighbors(p.affinity, algorithm)
    if not p.in_parts:
        return neighbors.fit(X, p.y, p.n_classes)
    half = len(X) // 2
    neighbors.start(p.y, p.n_classes)
    if half and p.storage == "memory":
        first = ClassNeighbors(p.affinity).fit(X[:half], p.y[:half], p.n_classes)
        neighbors.add_index(first)
    elif half:
        neighbors.add(slice(0, half), X[:half])
    return neighbors.add(slice(half, len(X)), X[half:]).build()


def check(p, folder):
    """Search as the problem says, and compare."""
    X, Q, y, affinity = torch.from_numpy(p.X), torch.from_numpy(p.Q), p.y, p.affinity
    recompute = X.__getitem__ if p.storage == "float16" and p.algorithm is None else None
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(sketch, "MIN_FEATURES", 32)
        patch.setattr(sketch, "MAX_SHARE", 1 / 4)
        patch.setattr(sketch, "choose_size", lambda basis, *rest: basis.shape[1] + 1)
        if p.in_blocks:
            patch.setattr(exact, "BLOCK_BYTES", 4000)
            patch.setattr(search, "CACHE_BYTES", 400)
            patch.setattr(order, "PADDED_SCORES", 0)
        if p.split:
            patch.setattr(exact, "MIN_SPLIT_BYTES", 0)
            patch.setattr(exact, "split_is_faster", lambda *args: True)
        neighbors = fit(p, folder)
        if p.pooled and recompute is None and p.algorithm is None:
            lengths = None
            if p.pooled == "by length" and neighbors.is_default and p.storage == "memory":
                lengths = norm(X)[neighbors.index]
                lengths, affinity = lengths.masked_fill(lengths == 0, torch.inf), "unit_length"
            neighbors, y = neighbors.pooled(X.device, lengths), y * 0
        if p.leave_one_out:
            own = torch.arange(len(X))
            found, Q = kneighbors_leave_one_out(neighbors, own, X, p.n_neighbors, recompute), X
            index = None
        else:
            own = None
            found, index = neighbors.kneighbors(Q, p.n_neighbors, recompute)
    n_classes = found.shape[1]
    assert found.shape == (len(Q), n_classes, min(p.n_neighbors, np.bincount(y).max()))

    wide = Q.numpy().astype(np.longdouble), p.X.astype(np.longdouble)
    scores = AFFINITIES[affinity](*wide)
    info = np.finfo(p.X.dtype)
    rtol, atol = (20 + p.X.shape[1]) * info.eps, info.tiny
    if affinity == "inner_product":
        lengths = [np.sqrt((rows**2).sum(axis=1)) for rows in wide]
        atol = rtol * np.outer(*lengths).max(axis=1)[:, None]
    elif affinity in ("cosine", "unit_length"):
        atol = rtol
    if own is not None:
        scores[own, own] = -np.inf
    for c in range(n_classes):
        members = np.flatnonzero(y == c)
        ranking = members[np.argsort(-scores[:, members], axis=1, kind="stable")]
        ranking = ranking[:, : found.shape[2]]
        expected = np.full((len(Q), found.shape[2]), -np.inf, dtype=np.longdouble)
        expected[:, : ranking.shape[1]] = np.take_along_axis(scores, ranking, axis=1)
        got = found[:, c].numpy()
        assert_close(got, expected, rtol, atol)
        if index is None:
            continue
        places = index[:, c].numpy()
        assert_array_equal(places >= 0, np.isfinite(expected))
        places, got = places[:, : ranking.shape[1]], got[:, : ranking.shape[1]]
        assert all(len(set(row)) == len(row) for row in places.tolist())
        assert np.isin(places, members).all()
        chosen = np.take_along_axis(scores, places, axis=1)
        assert_close(got, chosen, rtol, atol)
        tied = got[:, 1:] == got[:, :-1]
        assert (np.diff(places, axis=1)[tied] > 0).all()
        if p.is_exact and p.algorithm is None and affinity == p.affinity:
            assert_array_equal(places, ranking)


def assert_close(got, expected, rtol, atol):
    assert (got[:, 1:] <= got[:, :-1]).all()
    there = np.isfinite(expected)
    assert_array_equal(np.isfinite(got), there)
    error = np.abs(got[there].astype(np.longdouble) - expected[there])
    limit = rtol * np.abs(expected) + atol
    assert (error <= limit[there]).all(), (error / limit[there]).max()


def agree_on_random_problems(n, folder):
    tried = []

    @settings(deadline=None, max_examples=n, database=None, suppress_health_check=list(HealthCheck))
    @given(problems())
    def agree(problem):
        tried.append(1)
        check(problem, folder)

    agree()
    return len(tried)


def test_random_searches_agree_with_sorting_all_affinities(tmp_path):
    agree_on_random_problems(100, tmp_path)


@pytest.mark.slow
def test_thousands_of_random_searches_agree_with_sorting_all_affinities(tmp_path, report):
    n = agree_on_random_problems(6000, tmp_path)
    report("numbers: neighbour searches against float64", n)
