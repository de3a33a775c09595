"""Samples to search among, and the search by hand."""

import numpy as np


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
    """Draw samples, their classes and as many queries."""
    rng = np.random.default_rng(seed)
    X, Q = rng.normal(size=(2, n, n_features))
    if on_a_grid:  # many ties, and duplicates
        X, Q = X.round(), Q.round()
    y = rng.integers(n_classes, size=n)
    y[:n_classes] = np.arange(n_classes)
    return X, y, Q
