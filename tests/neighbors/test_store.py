import copy
import errno
import os
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from problems import make_problem
from sklearn.base import clone

from sklearn_rails.neighbors import ClassNeighbors, ExactNeighbors, exact
from sklearn_rails.neighbors.allocation import reserve
from sklearn_rails.neighbors.store import ExampleStore


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
    half = ClassNeighbors(affinity, algorithm=ExactNeighbors("float16")).start(y, 3)
    half.add(slice(0, n // 2), X[: n // 2]).add(slice(n // 2, n), X[n // 2 :]).build()
    affinity, index = half.kneighbors(Q, k, lambda i: X[i])
    assert_array_equal(affinity, expected[0])
    assert_array_equal(index, expected[1])


def test_features_that_are_stored_as_differences_lose_nothing():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(200, 3)).astype(np.float32)
    X[:, 0] += 2000
    X[:, 1] = rng.integers(10**6, 10**6 + 50, size=200)
    X[0, 1] = 0
    neighbors = ClassNeighbors().fit(torch.from_numpy(X), np.arange(200) % 2, 2)
    assert neighbors.store.has_shift
    for c in range(2):
        examples, index = neighbors.examples_of(c, torch.device("cpu"))
        assert_array_equal(examples, X[index])
    # Here they would: 0.1 is not a difference from 2000 in float32.
    X[0, 0] = 0.1
    neighbors = ClassNeighbors().fit(torch.from_numpy(X), np.arange(200) % 2, 2)
    assert neighbors.store.shift.tolist()[0] == 0
    assert_array_equal(neighbors.examples_of(0, torch.device("cpu"))[0], X[::2])


def test_a_folder_on_a_full_disk_raises_an_error(monkeypatch, tmp_path):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    neighbors = ClassNeighbors(algorithm=ExactNeighbors(tmp_path))
    with pytest.raises(OSError, match=r"storage=.*cannot take .* MiB of features: No space"):
        neighbors.fit(torch.rand(9, 4), np.zeros(9, dtype=int), 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, None])
def test_a_folder_that_cannot_reserve_space_is_filled(error, monkeypatch, tmp_path):
    def refuse(*args):
        raise OSError(error, os.strerror(error))

    if error is None:
        monkeypatch.delattr(os, "posix_fallocate")
    else:
        monkeypatch.setattr(os, "posix_fallocate", refuse)
    X, y, Q = make_problem(8, 60, 3, 2)
    neighbors = ClassNeighbors(algorithm=ExactNeighbors(tmp_path)).fit(torch.tensor(X), y, 2)
    expected = ClassNeighbors().fit(torch.tensor(X), y, 2).kneighbors(torch.tensor(Q), 3)
    assert_array_equal(neighbors.kneighbors(torch.tensor(Q), 3)[1], expected[1])


def test_half_precision_is_converted_in_pieces_that_stay_in_a_cache(monkeypatch):
    sizes = []
    pieces = ExampleStore.pieces

    def note(self, like, n_bytes):
        for piece in pieces(self, like, n_bytes):
            sizes.append(piece.nbytes)
            yield piece

    X = torch.rand(3000, 500)
    neighbors = ClassNeighbors(algorithm=ExactNeighbors("float16")).fit(X, np.arange(3000) % 3, 3)
    monkeypatch.setattr(ExampleStore, "pieces", note)
    neighbors.kneighbors(X[:1], 5, lambda i: X[i])
    assert max(sizes) <= exact.PIECE_BYTES
    with pytest.raises(ValueError, match="storage='float16'.*recompute"):
        neighbors.kneighbors(X[:1], 5)


@pytest.mark.parametrize("storage", ["memory", "float16"])
def test_inner_products_that_vanish_are_refused_in_every_storage(storage):
    X = torch.from_numpy(np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)) * 1e-22
    neighbors = ClassNeighbors("inner_product", ExactNeighbors(storage)).fit(
        X, np.arange(60) % 2, 2
    )
    with pytest.raises(ValueError, match="affinity='inner_product' .* below what float32 holds"):
        neighbors.kneighbors(X[:5], 3, lambda index: X[index])


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        ("flaot16", "storage='flaot16' must be 'memory', 'float16' or a folder that exists"),
        ("", "storage='' must be"),
        (3, "The 'storage' parameter of ExactNeighbors"),
    ],
)
def test_an_unknown_storage_raises_an_error(storage, message):
    with pytest.raises(ValueError, match=message):
        ClassNeighbors(algorithm=ExactNeighbors(storage)).start(np.zeros(3, dtype=int), 1)


def test_half_precision_needs_an_affinity_with_a_bound():
    neighbors = ClassNeighbors(lambda a, b: (a * b).sum(dim=1), ExactNeighbors("float16"))
    with pytest.raises(ValueError, match="storage='float16' cannot bound .* affinity of your own"):
        neighbors.start(np.zeros(3, dtype=int), 1)


@pytest.mark.parametrize("storage", ["memory", "float16", "folder"])
def test_neighbours_are_the_same_on_disk_and_after_pickling(storage, tmp_path):
    X, y, Q = make_problem(9, 60, 3, 2)
    X, Q = torch.tensor(X + 1000).float(), torch.tensor(Q + 1000).float()
    storage = tmp_path if storage == "folder" else storage
    neighbors = ClassNeighbors(algorithm=clone(ExactNeighbors(storage))).fit(X, y, 2)
    assert neighbors.needs_recompute == (storage == "float16")
    expected = ClassNeighbors().fit(X, y, 2).kneighbors(Q, 3)
    moved = neighbors.on_disk()
    assert moved.store.folder is not None
    assert neighbors.store.folder == (tmp_path if storage == tmp_path else None)
    for found in (neighbors, moved, pickle.loads(pickle.dumps(moved)), copy.deepcopy(moved)):
        for part, whole in zip(found.kneighbors(Q, 3, lambda i: X[i]), expected, strict=True):
            assert_array_equal(part, whole)


def test_a_full_disk_leaves_examples_in_memory(monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    X, y, _ = make_problem(9, 60, 3, 2)
    neighbors = ClassNeighbors().fit(torch.tensor(X), y, 2)
    trees = ClassNeighbors(algorithm="kd_tree").fit(torch.tensor(X), y, 2)
    assert trees.on_disk() is trees
    monkeypatch.setattr(os, "posix_fallocate", full)
    assert neighbors.on_disk() is neighbors


@pytest.mark.parametrize("n_bytes", [1, 1000, 2**20, 2**21 + 7])
def test_space_that_cannot_be_reserved_is_filled_with_as_many_zeros(n_bytes, monkeypatch, tmp_path):
    monkeypatch.delattr(os, "posix_fallocate")
    with (tmp_path / "file").open("w+b") as file:
        reserve(file, n_bytes)
        assert (tmp_path / "file").read_bytes() == bytes(n_bytes)
