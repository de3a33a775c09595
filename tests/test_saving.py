"""What is in a file, and files of other tools."""

import contextlib
import os
import pickle

import numpy as np
import pytest
import skops.io as sio
import torch
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.base import clone
from torch import nn

from sklearn_rails import (
    DkNNClassifier,
    FrozenModule,
    RAILSClassifier,
    ThreatScorer,
    TorchFeatureExtractor,
)
from sklearn_rails.neighbors import ExactNeighbors
from sklearn_rails.sensing import mahalanobis


@pytest.mark.parametrize(
    "estimator",
    [
        RAILSClassifier(population_size=30, threat_scorer=ThreatScorer(alpha=0.2), random_state=0),
        RAILSClassifier(algorithm=ExactNeighbors("float16"), affinity="cosine", random_state=0),
        DkNNClassifier(random_state=0),
        ThreatScorer(method=["distance", "mahalanobis", "lid", "kernel_density"], alpha=0.2),
        TorchFeatureExtractor(),
    ],
    ids=lambda estimator: type(estimator).__name__,
)
def test_skops_round_trip_of_estimators_without_a_network(estimator):
    rng = np.random.default_rng(0)
    X, y = rng.random((60, 6), dtype=np.float32), np.arange(60) % 3
    saved = sio.dumps(estimator.fit(X, y))
    loaded = sio.loads(saved, trusted=sio.get_untrusted_types(data=saved))
    ask = "predict_proba" if hasattr(estimator, "predict_proba") else "transform"
    assert_array_equal(getattr(loaded, ask)(X), getattr(estimator, ask)(X))


def test_trusting_the_types_in_a_skops_file_runs_no_code_of_a_network(tmp_path):
    class Evil(nn.Module):
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    saved = sio.dumps(TorchFeatureExtractor(FrozenModule(Evil())))
    with contextlib.suppress(Exception):  # it may as well be refused
        sio.loads(saved, trusted=sio.get_untrusted_types(data=saved))
    assert list(tmp_path.iterdir()) == []


WIDE = ThreatScorer(method=["mahalanobis", "distance", "kernel_density"], random_state=0)


def load_again(estimator):
    return pickle.loads(pickle.dumps(estimator))


@pytest.mark.parametrize(
    "estimator",
    [
        RAILSClassifier(population_size=30, threat_scorer=WIDE, random_state=0),
        RAILSClassifier(population_size=30, algorithm="brute", random_state=0),
        DkNNClassifier(algorithm="kd_tree", random_state=0),
        WIDE,
        ThreatScorer(method="mahalanobis", random_state=0),
    ],
    ids=str,
)
@pytest.mark.parametrize(("n", "d"), [(300, 200), (1200, 100)])
def test_a_file_holds_the_features_once(estimator, n, d):
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(n, d)).astype(np.float32), np.arange(n) % 3
    saved = pickle.dumps(clone(estimator).fit(X, y))
    # And the labels, the scores that calibrate, and parameters.
    assert len(saved) < 1.1 * X.nbytes + 16 * n + 20_000


@pytest.mark.parametrize("method", ["mahalanobis", ["mahalanobis", "distance"]])
@pytest.mark.parametrize("share", [0.0, 0.05, 100.0])
def test_what_is_estimated_again_after_loading_is_the_same(method, share, monkeypatch):
    monkeypatch.setattr(mahalanobis, "PICKLED_SHARE", share)
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(90, 40)).astype(np.float32), np.arange(90) % 3
    scorer = ThreatScorer(method=method, random_state=0).fit(X, y)
    loaded = load_again(scorer)
    assert bool(loaded.detectors_["mahalanobis"].estimates_) == (share > 1)
    again = load_again(loaded)  # before anything is estimated
    expected = scorer.transform(X + 1)
    assert_array_equal(loaded.transform(X + 1), expected)
    assert_array_equal(again.transform(X + 1), expected)
    assert_array_equal(load_again(loaded).transform(X + 1), expected)


def make_cells(start_layer=None, **settings):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    rng = np.random.default_rng(0)
    X, y = rng.random((60, 6), dtype=np.float32), np.arange(60) % 3
    rails = RAILSClassifier(
        net, layers="1", start_layer=start_layer, population_size=30, random_state=0, **settings
    )
    return rails.fit(X, y), X, y


def test_a_threat_scorer_shares_the_index_where_it_is_the_same():
    scorer = ThreatScorer(method="distance")
    rails, X, y = make_cells(threat_scorer=scorer)
    (distance,) = rails.threat_scorer_.detectors_.values()
    assert distance.neighbors_["1"] is rails.neighbors_["1"]
    loaded = load_again(rails)
    (distance,) = loaded.threat_scorer_.detectors_.values()
    assert distance.neighbors_["1"] is loaded.neighbors_["1"]
    alone = ThreatScorer(rails.feature_extractor, layers="1", method="distance", random_state=0)
    assert_allclose(
        rails.threat_scorer_.transform(X), alone.fit(X, y).transform(X), rtol=1e-4, atol=1e-4
    )
    for others in (
        {"affinity": "cosine"},
        {"algorithm": ExactNeighbors("float16")},
        {"threat_scorer": clone(scorer).set_params(layers="0")},
        {"threat_scorer": clone(scorer).set_params(dtype="float64")},
        {
            "threat_scorer": clone(scorer).set_params(
                feature_extractor=nn.Linear(6, 3), layers="output"
            )
        },
    ):
        rails, _, _ = make_cells(**{"threat_scorer": scorer, **others})
        (distance,) = rails.threat_scorer_.detectors_.values()
        (neighbors,) = distance.neighbors_.values()
        assert neighbors is not rails.neighbors_["1"]


def test_cells_that_are_features_are_stored_once():
    rng = np.random.default_rng(0)
    X, y = rng.random((60, 6), dtype=np.float32), np.arange(60) % 3
    plain = RAILSClassifier(population_size=30, random_state=0)
    for offset in (0.0, 100.0):  # which the index stores as differences
        rails = clone(plain).fit(X + np.float32(offset), y)
        bank = rails.engine_.layers[0].bank
        assert bank._cells is None
        assert_array_equal(rails.training_data()[0], X + np.float32(offset))
        apart = RAILSClassifier(
            population_size=30, algorithm=ExactNeighbors("float16"), random_state=0
        ).fit(X + np.float32(offset), y)
        assert apart.engine_.layers[0].bank._cells is not None
        new = X[:20] + np.float32(offset + 0.1)
        expected = apart.predict_proba(new)
        assert_array_equal(rails.predict_proba(new), expected)
        assert_array_equal(load_again(rails).predict_proba(new), expected)
    parts = clone(plain).partial_fit(X[:40], y[:40]).partial_fit(X[40:], y[40:])
    assert_array_equal(
        parts.predict_proba(X[:20] + 0.1), clone(plain).fit(X, y).predict_proba(X[:20] + 0.1)
    )
    hidden, _, _ = make_cells(start_layer="1")
    assert hidden.engine_.layers[0].bank._cells is None
    inner, _, _ = make_cells()
    assert inner.engine_.layers[0].bank._cells is not None
