"""Approximate indexes against the exact search: ``python benchmarks/bench_approximate.py``.

Prints the share of the 10 nearest neighbours of each class that an index finds (recall@10), the
time of a query, and the time to build it, on clustered features. ``--sizes``, ``--features`` and
``--queries`` set the sizes. Needs faiss-cpu, pynndescent, or both.
"""

import argparse
import importlib.util
import platform
import time

import numpy as np
import torch
from sklearn.base import BaseEstimator

from sklearn_rails.neighbors import ClassNeighbors

SEED, N_CLASSES, N_NEIGHBORS = 0, 10, 10


class HNSW(BaseEstimator):
    """An approximate index of faiss, with the methods of ``sklearn.neighbors.NearestNeighbors``."""

    def __init__(self, n_links=32, ef_search=64):
        self.n_links = n_links
        self.ef_search = ef_search

    def fit(self, X, y=None):
        import faiss

        self.index_ = faiss.IndexHNSWFlat(X.shape[1], self.n_links)
        self.index_.hnsw.efSearch = self.ef_search
        self.index_.add(np.ascontiguousarray(X, dtype=np.float32))
        return self

    def kneighbors(self, X, n_neighbors=5, return_distance=True):
        squares, index = self.index_.search(np.ascontiguousarray(X, dtype=np.float32), n_neighbors)
        return (np.sqrt(squares), index) if return_distance else index


class NNDescentNeighbors(BaseEstimator):
    """The same for pynndescent."""

    def fit(self, X, y=None):
        from pynndescent import NNDescent

        self.index_ = NNDescent(X, random_state=SEED, n_jobs=torch.get_num_threads())
        self.index_.prepare()
        return self

    def kneighbors(self, X, n_neighbors=5, return_distance=True):
        index, distance = self.index_.query(X, k=n_neighbors)
        return (distance, index) if return_distance else index


INDEXES = {"faiss": HNSW(), "pynndescent": NNDescentNeighbors()}


def make_features(n, d, n_queries):
    """Draw features as a network gives them: of 20 clusters a class, near a 12-dimensional set."""
    rng = np.random.default_rng(SEED)
    centers = 2 * rng.standard_normal((N_CLASSES, 20, 12))
    mixing = rng.standard_normal((12, d)) / 12**0.5
    y = rng.integers(N_CLASSES, size=n + n_queries)
    latent = centers[y, rng.integers(20, size=len(y))] + rng.standard_normal((len(y), 12))
    features = np.maximum(latent @ mixing, 0) + 0.1 * rng.standard_normal((len(y), d))
    features = torch.from_numpy(features.astype(np.float32))
    return features[:n], y[:n], features[n:]


def measure(algorithm, X, y, Q):
    """Return the neighbours, and the seconds to build an index and to search one query."""
    start = time.perf_counter()
    neighbors = ClassNeighbors(algorithm=algorithm).fit(X, y, N_CLASSES)
    built = time.perf_counter() - start
    neighbors.kneighbors(Q[:1], N_NEIGHBORS)
    start = time.perf_counter()
    found = [neighbors.kneighbors(query[None], N_NEIGHBORS)[1] for query in Q]
    return torch.cat(found), built, (time.perf_counter() - start) / len(Q)


def recall(found, exact):
    """Return the share of exact neighbours that were found, for each class."""
    same = (found[..., None] == exact[..., None, :]).any(dim=3)
    return same.double().mean(dim=(0, 2))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", type=int, default=[20_000, 100_000])
    parser.add_argument("--features", nargs="+", type=int, default=[64, 512])
    parser.add_argument("--queries", type=int, default=100)
    options = parser.parse_args()
    available = [name for name in INDEXES if importlib.util.find_spec(name)]
    print(f"{platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}")
    for name in set(INDEXES) - set(available):
        print(f"{name} cannot be imported, and is left out")
    header = f"{'n':>8} {'d':>4} {'index':<12} {'recall@10':>9}"
    print(f"{header} {'worst':>6} {'query':>9} {'build':>8}")
    for n in options.sizes:
        for d in options.features:
            X, y, Q = make_features(n, d, options.queries)
            exact, built, seconds = measure("auto", X, y, Q)
            rows = [("exact", torch.ones(N_CLASSES), seconds, built)]
            for name in available:
                found, built, seconds = measure(INDEXES[name], X, y, Q)
                rows.append((name, recall(found, exact), seconds, built))
            for name, share, seconds, built in rows:
                print(
                    f"{n:>8,} {d:>4} {name:<12} {share.mean():>9.3f} {share.min():>6.3f} "
                    f"{1e3 * seconds:>6.2f} ms {built:>6.1f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
