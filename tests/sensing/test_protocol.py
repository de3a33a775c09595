"""A detector is one class and one line in the table."""

import pickle

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from sklearn.base import clone
from torch import nn

from sklearn_rails import ThreatScorer
from sklearn_rails.sensing import DETECTORS, Detector, NeighborDetector, SoftQuery


class FromMean(Detector):
    """Distance from the mean of all clean samples, a sample itself left out."""

    def fit(self, clean):
        self.n_samples = len(clean.labels)
        self.means = {layer: clean.examples(layer)[0].mean(dim=0) for layer in clean.neighbors}
        return self

    def score(self, query):
        columns = [(f - self.means[layer]).norm(dim=1) for layer, f in query.features.items()]
        scores = torch.stack(columns, dim=1).double().numpy()
        if query.self_index is not None:
            scores *= self.n_samples / (self.n_samples - 1)
        return scores


class Choosy(FromMean):
    needs_outputs = True
    needs_float_input = True
    min_neighbors = 3


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def test_a_detector_of_your_own_needs_one_class_and_one_line(monkeypatch):
    with pytest.raises(ValueError, match="method='mine' must be one of"):
        ThreatScorer(method="mine").fit(np.eye(4))
    monkeypatch.setitem(DETECTORS, "mine", FromMean)
    rng = np.random.default_rng(0)
    X, new, outliers = (rng.normal(size=(400, 4)) for _ in range(3))
    outliers += 6
    scorer = ThreatScorer(method="mine", random_state=0).fit(X)
    assert (scorer.predict(outliers) == -1).all()
    assert (scorer.predict(new) == -1).mean() < 0.1
    assert list(scorer.get_feature_names_out()) == ["threat_mine"]
    assert isinstance(scorer.detectors_["mine"], FromMean)
    loaded = pickle.loads(pickle.dumps(scorer))
    assert_array_equal(loaded.score_samples(new), scorer.score_samples(new))
    # Beside those of the package, and flagged like theirs where features are not finite.
    scorer = ThreatScorer(method=["mine", "distance"], random_state=0).fit(X)
    assert scorer.transform(new).shape == (400, 2)
    with np.errstate(over="ignore"):
        assert scorer.predict([[3e38] * 4]) == -1


def test_the_score_of_a_clean_sample_leaves_it_out(monkeypatch):
    monkeypatch.setitem(DETECTORS, "mine", FromMean)
    X = np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32)
    scorer = ThreatScorer(method="mine", alpha=0.1, random_state=0).fit(X)
    others = [np.delete(X, i, 0).mean(axis=0) for i in range(60)]
    clean = np.sort(np.linalg.norm(X - others, axis=1))
    new = np.random.default_rng(1).normal(size=(200, 2)).astype(np.float32)
    distance = np.linalg.norm(new - X.mean(axis=0), axis=1)
    p_values = (1 + (clean >= distance[:, None]).sum(axis=1)) / 61
    assert_array_equal(scorer.predict(new) == -1, p_values <= 0.1)


def test_what_a_detector_needs_is_checked_before_anything_is_computed(net, monkeypatch):
    monkeypatch.setitem(DETECTORS, "mine", Choosy)
    X = np.random.default_rng(0).normal(size=(40, 4))
    with pytest.raises(ValueError, match="method='mine' depends on a network's outputs"):
        ThreatScorer(method="mine").fit(X)
    with pytest.raises(ValueError, match="method='mine' needs 3 neighbours or more"):
        ThreatScorer(net, method="mine", n_neighbors=2).fit(X)
    embedding = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(16, 3))
    tokens = np.random.default_rng(0).integers(9, size=(40, 4))
    with pytest.raises(ValueError, match="method='mine' .* takes integers such as token ids"):
        ThreatScorer(embedding, method="mine").fit(tokens)
    scorer = ThreatScorer(net, layers="0", method="mine").fit(X)
    assert (scorer.predict(X + 20) == -1).all()


def test_a_detector_without_a_fit_or_a_score_raises():
    for ask in (Detector().fit, Detector().score):
        with pytest.raises(NotImplementedError):
            ask(None)
    assert repr(FromMean()) == "FromMean()"


def soft_query(scorer, X):
    def class_scores(affinity, layer, features):
        assert affinity in ("euclidean", "cosine")
        return -torch.cdist(features, torch.eye(3, features.shape[1]))

    return SoftQuery(X, scorer.feature_map_, class_scores)


def test_soft_threats_are_differentiable_and_add_up_over_layers(net):
    X = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    scorer = ThreatScorer(net, layers=["0", "1"], method=list(DETECTORS), random_state=0).fit(X)
    points = torch.from_numpy(X[:7]).requires_grad_()
    for method, detector in scorer.detectors_.items():
        query = soft_query(scorer, points)
        threat = detector.soft_threat(query)
        assert threat.shape == (7,)
        (slope,) = torch.autograd.grad(threat.sum(), points)
        assert slope.abs().sum() > 0, method
        if isinstance(detector, NeighborDetector):
            parts = [
                detector.soft_score(
                    query.class_scores(detector.affinity, layer), query.probabilities
                )
                for layer in ("0", "1")
            ]
            assert torch.equal(threat, parts[0] + parts[1])
    logs = [scorer.detectors_["mahalanobis"].squared_distances(n, query.features[n]) for n in "01"]
    expected = sum(squares.amin(dim=1).log() for squares in logs)
    torch.testing.assert_close(scorer.detectors_["mahalanobis"].soft_threat(query), expected)
    alone = soft_query(clone(scorer).set_params(layers="1").fit(X), points)
    for detector in scorer.detectors_.values():
        threat = detector.soft_threat(query.in_layers(["1"]))
        assert torch.equal(threat, detector.soft_threat(alone))


def test_soft_threats_without_a_network_are_those_of_the_nearest_class():
    X = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
    scorer = ThreatScorer(method=["kernel_density", "lid", "distance"], random_state=0).fit(X)
    query = soft_query(scorer, torch.from_numpy(X[:5]))
    expected = -query.class_scores("euclidean", "input").amax(dim=1)
    for detector in scorer.detectors_.values():
        assert torch.equal(detector.soft_threat(query), expected)
    disagreement = DETECTORS["disagreement"]().soft_score(-torch.eye(3), None)
    assert_array_equal(disagreement, np.zeros(3))


def test_a_detector_without_a_soft_threat_says_what_to_define():
    scorer = ThreatScorer(random_state=0).fit(np.random.default_rng(0).normal(size=(60, 3)))
    query = SoftQuery(torch.zeros(2, 3), scorer.feature_map_)
    with pytest.raises(NotImplementedError, match=r"FromMean .* define its soft_threat\(query\)"):
        FromMean().soft_threat(query)
    with pytest.raises(ValueError, match="needs class_scores"):
        scorer.detectors_["credibility"].soft_threat(query)
