"""Certified radii: nothing within them is predicted otherwise."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls

from sklearn_rails import DkNNClassifier
from sklearn_rails.neighbors import ExactNeighbors


def fit(X, y, **parameters):
    calibration = (X[:1], y[:1])  # all samples stay neighbours
    parameters = {"n_neighbors": 1, "layers": "input", "calibration": calibration} | parameters
    return DkNNClassifier(**parameters).fit(X, y)


def nearest_change(x, X, y, label):
    """Find the nearest place with another nearest class, by least-distance programming.

    Lawson and Hanson (1974), chapter 23: minimize ||z|| where G z >= h.
    """
    best, nearest = np.inf, None
    for j in np.flatnonzero(y != label):
        others = np.delete(np.arange(len(X)), j)
        G = 2 * (X[j] - X[others])
        h = ((x - X[j]) ** 2).sum() - ((x - X[others]) ** 2).sum(axis=1)
        scale = np.abs(h).max() or 1
        E = np.vstack([G.T, h[None] / scale])
        target = np.zeros(len(E))
        target[-1] = 1
        u, _ = nnls(E, target)
        residual = E @ u - target
        if abs(residual[-1]) > 1e-9:
            z = -residual[:-1] / residual[-1] * scale
            if np.linalg.norm(z) < best:
                best, nearest = np.linalg.norm(z), x + z
    return best, nearest


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-12, 1.0, 1e12]), st.sampled_from([0, 30]))
def test_the_nearest_change_of_the_prediction_is_no_nearer_than_the_radius(seed, scale, offset):
    rng = np.random.default_rng(seed)
    n, d = rng.integers(2, 15), rng.integers(1, 5)
    X = (rng.normal(size=(n, d)) + offset).astype(np.float32)
    y = np.arange(n) % rng.integers(2, 4)
    x = (rng.normal(size=(1, d)) + offset).astype(np.float32)
    dknn = fit(X * scale, y)
    radius = dknn.certified_radius(x * scale)[0] / scale
    (label,) = dknn.predict(x * scale)
    exact, place = nearest_change(x[0].astype(float), X.astype(float), y, label)
    assert radius <= exact * (1 + 1e-6)
    if radius > 0.01:
        distances = np.linalg.norm(X - place, axis=1)
        tied = pytest.approx(distances[y == label].min(), rel=1e-5)
        assert distances[y != label].min() == tied, "the oracle is wrong"
        within = x + 0.9999 * radius / exact * (place - x)
        assert dknn.predict(within * scale)[0] == label


@pytest.mark.parametrize("storage", ["memory", "folder"])
def test_the_radius_is_the_distance_of_the_bisectors(digits, tmp_path, storage):
    X, y = digits
    storage = tmp_path if storage == "folder" else storage
    dknn = fit(X[:300], y[:300], algorithm=ExactNeighbors(storage=storage))
    new = X[300:350]
    T, labels = X[:300].astype(float), dknn.predict(new)
    for x, label, radius in zip(new, labels, dknn.certified_radius(new), strict=True):
        d = ((T - x) ** 2).sum(axis=1)
        own = np.flatnonzero(y[:300] == label)
        own, others = own[d[own].argsort()[:5]], np.flatnonzero(y[:300] != label)
        between = np.linalg.norm(T[own][:, None] - T[others], axis=2)
        bound = ((d[others] - d[own][:, None]) / (2 * between)).max(axis=0).min()
        assert radius == pytest.approx(bound, rel=1e-3)
        assert radius < bound


def test_no_attack_on_the_line_to_a_sample_of_another_class_gets_within_the_radius(digits):
    X, y = digits
    dknn = fit(X[:500], y[:500])
    new = X[500:520]
    labels, radii = dknn.predict(new), dknn.certified_radius(new)
    assert np.median(radii) > 0.4
    for x, label, radius in zip(new, labels, radii, strict=True):
        steps = X[:500][y[:500] != label] - x
        lengths = np.linalg.norm(steps, axis=1, keepdims=True)
        assert (dknn.predict(x + 0.9999 * radius / lengths * steps) == label).all()
        assert (dknn.predict(x + steps) != label).all()


def test_a_tie_of_two_classes_has_no_radius_and_one_class_every_radius():
    X = np.array([[0.0], [2.0], [2.0]])
    assert fit(X, [0, 1, 0]).certified_radius([[1.0], [2.0], [-1.0]])[:2].tolist() == [0, 0]
    assert fit(X, [0, 0, 0]).certified_radius([[1.0]]) == np.inf


@pytest.mark.parametrize("scale", [1e-30, 1e25, 3e37])
def test_squares_that_overflow_or_vanish_certify_no_more(scale):
    X = np.array([[0.0, 0.0], [2.0, 0.0]])
    (radius,) = fit(X * scale, [0, 1]).certified_radius([[0.5 * scale, 0.0]])
    assert 0.499 * scale < radius <= 0.5 * scale


@pytest.mark.parametrize(
    "parameters",
    [
        {"n_neighbors": 3},
        {"layers": "output"},
        {"algorithm": "kd_tree"},
        {"algorithm": ExactNeighbors(storage="float16")},
    ],
)
def test_there_is_no_certificate_for_other_settings(parameters):
    dknn = DkNNClassifier(**{"n_neighbors": 1, "layers": "input"} | parameters)
    assert not hasattr(dknn, "certified_radius")
    with pytest.raises(AttributeError, match="certified_radius"):
        dknn.certified_radius([[0.0]])
    assert hasattr(DkNNClassifier(n_neighbors=1), "certified_radius")
