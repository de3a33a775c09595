"""A ThreatScorer inside a RAILSClassifier: what it takes over, and predict_with_alarm."""

import pickle

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from sklearn.base import BaseEstimator, clone
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.neighbors import LocalOutlierFactor
from sklearn.svm import OneClassSVM
from torch import nn

from sklearn_rails import FrozenModule, RAILSClassifier, ThreatScorer, TorchFeatureExtractor
from sklearn_rails.attacks import pgd
from sklearn_rails.features.mapping import FeatureMap
from sklearn_rails.immune import Arbitration, Triage

CHEAP = {"population_size": 20, "generations": 1, "random_state": 0}
SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def task(digit_task):
    network, X, y, new, y_new = digit_task
    attacked = pgd(network, new[:60], y_new[:60], eps=0.3, step=0.05, max_iter=10)
    flat = [part.reshape(len(part), -1) for part in (X, new[60:160], attacked)]
    return network, flat[0], y, flat[1], flat[2]


def fit(task, scorer, network=None, **params):
    given, X, y, *_ = task
    params = {"layers": "conv1", "input_shape": SHAPE, "threat_scorer": scorer, **CHEAP, **params}
    return RAILSClassifier(given if network is None else network, **params).fit(X, y)


def test_a_scorer_takes_network_layers_and_shape_of_its_classifier(task):
    network, X, y, clean, attacked = task
    scorer = ThreatScorer()
    rails = fit(task, scorer, layers=["conv1", "conv2"], device="cpu", batch_size=16)
    fitted = rails.threat_scorer_
    assert fitted.feature_extractor is network
    assert fitted.layers_ == ("conv1", "conv2")
    assert fitted.input_shape_ == SHAPE
    assert (fitted.device, fitted.batch_size) == ("cpu", 16)
    assert fitted.methods_ == ("disagreement", "mahalanobis", "feature_squeezing")
    assert repr(scorer) == "ThreatScorer()"
    assert rails.threat_scorer is scorer
    explicit = ThreatScorer(
        network,
        layers=["conv1", "conv2"],
        input_shape=SHAPE,
        batch_size=16,
        random_state=rails.seed_,
    ).fit(X, y)
    assert_array_equal(fitted.score_samples(clean), explicit.score_samples(clean))
    assert (rails.threat_scorer_.predict(attacked) == -1).mean() > 0.8


def test_the_seed_is_that_of_the_classifier_unless_it_has_one(task):
    *_, clean, _ = task
    same = [fit(task, ThreatScorer()).respond(clean).threat for _ in range(2)]
    assert_array_equal(*same)
    other = fit(task, ThreatScorer(), random_state=1).respond(clean).threat
    assert (same[0] != other).any()
    fixed = [fit(task, ThreatScorer(random_state=5), random_state=i) for i in (0, 1)]
    assert_array_equal(*(rails.respond(clean).threat for rails in fixed))


def test_what_a_scorer_sets_itself_is_kept(task):
    network, *_ = task
    scorer = ThreatScorer(layers="input", batch_size=8)
    fitted = fit(task, scorer).threat_scorer_
    assert fitted.layers_ == ("input",)
    assert fitted.feature_extractor is network
    assert fitted.batch_size == 8
    # The same network, in another form: its layers are still those of the classifier.
    fitted = fit(task, ThreatScorer(FrozenModule(network))).threat_scorer_
    assert fitted.layers_ == ("conv1",)
    own = TorchFeatureExtractor(network, layers="conv2")
    assert fit(task, ThreatScorer(own)).threat_scorer_.layers_ == ("conv2",)


def test_an_extractor_passes_its_layers_and_shape_on(task):
    network, *_ = task
    extractor = TorchFeatureExtractor(network, layers="conv2", input_shape=SHAPE)
    fitted = fit(task, ThreatScorer(), extractor, layers=None, input_shape=None).threat_scorer_
    assert fitted.layers_ == ("conv2",)
    assert fitted.input_shape_ == SHAPE
    # The classifier's own come first.
    assert fit(task, ThreatScorer(), extractor).threat_scorer_.layers_ == ("conv1",)


def test_a_scorer_with_another_network_takes_nothing_of_it(task):
    other = nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10))
    fitted = fit(task, ThreatScorer(other)).threat_scorer_
    assert fitted.feature_extractor is other
    assert fitted.layers == "auto"
    assert fitted.input_shape_ == (64,)


def test_a_fitted_scorer_is_used_as_it_is(task):
    network, _, _, clean, attacked = task
    scorer = ThreatScorer(
        network, layers="conv1", method="distance", input_shape=SHAPE, random_state=0
    )
    scorer.fit(clean)
    rails = fit(task, FrozenEstimator(scorer))
    labels, alarms = rails.predict_with_alarm(attacked)
    assert rails.threat_scorer_.estimator is scorer
    assert_array_equal(alarms, scorer.predict(attacked) == -1)
    assert_array_equal(labels, rails.predict(attacked))


def test_partial_fit_fills_the_scorer_again(task):
    _, X, y, clean, _ = task
    rails = fit((task[0], X[:300], y[:300]), ThreatScorer()).partial_fit(X[300:], y[300:])
    at_once = fit(task, ThreatScorer())
    assert_array_equal(rails.respond(clean).threat, at_once.respond(clean).threat)


@pytest.mark.parametrize("gate", [None, Triage(), Arbitration()], ids=str)
def test_labels_and_alarms_are_those_of_predict_and_of_the_scorer(task, gate):
    *_, clean, attacked = task
    rails = fit(task, ThreatScorer(), gate=gate)
    rows = np.concatenate([clean, attacked])
    labels, alarms = rails.predict_with_alarm(rows)
    assert_array_equal(labels, rails.predict(rows))
    assert alarms.dtype == bool
    assert alarms.shape == (160,)
    assert_array_equal(alarms, rails.threat_scorer_.predict(rows) == -1)
    assert alarms[:100].mean() < 0.2 < 0.8 < alarms[100:].mean()
    loaded = pickle.loads(pickle.dumps(rails))
    assert_array_equal(loaded.predict_with_alarm(rows)[1], alarms)


class Counts(BaseEstimator):
    def fit(self, X, y=None):
        self.n_calls_ = 0
        return self

    def score_samples(self, X):
        self.n_calls_ += 1
        return np.zeros(len(X))

    def predict(self, X):
        self.n_calls_ += 1
        return np.where(np.arange(len(X)) % 2, 1, -1)


@pytest.mark.parametrize("gate", [None, Triage()], ids=str)
def test_scorer_and_network_are_asked_once(task, gate, monkeypatch):
    *_, clean, _ = task
    rails = fit(task, Counts(), gate=gate)
    n_samples, run = [], FeatureMap.__call__

    def counting(self, X, *args, **kwargs):
        n_samples.append(len(X))
        return run(self, X, *args, **kwargs)

    monkeypatch.setattr(FeatureMap, "__call__", counting)
    labels, alarms = rails.predict_with_alarm(clean[:10])
    assert rails.threat_scorer_.n_calls_ == 1
    assert sum(n_samples) == 10
    assert_array_equal(alarms, np.arange(10) % 2 == 0)
    assert labels.shape == (10,)


def test_without_alarms_there_is_no_predict_with_alarm(task):
    *_, clean, _ = task
    silent = OneClassSVM()
    silent_scorer = type("Silent", (BaseEstimator,), {"fit": Counts.fit, "score_samples": None})
    for scorer in (None, silent_scorer()):
        for rails in (RAILSClassifier(threat_scorer=scorer), fit(task, None)):
            assert not hasattr(rails, "predict_with_alarm")
            with pytest.raises(AttributeError) as caught:
                rails.predict_with_alarm(clean)
            assert "set one, as in RAILSClassifier(" in str(caught.value.__cause__)
    unfitted = RAILSClassifier(threat_scorer=silent)
    with pytest.raises(NotFittedError):
        unfitted.predict_with_alarm(clean)
    # What was fitted counts.
    rails = fit(task, ThreatScorer(method="distance")).set_params(threat_scorer=None)
    assert rails.predict_with_alarm(clean)[1].shape == (100,)
    assert not hasattr(clone(rails), "predict_with_alarm")


def test_any_outlier_detector_raises_alarms(task):
    *_, attacked = task
    rails = fit(task, LocalOutlierFactor(novelty=True))
    _, alarms = rails.predict_with_alarm(attacked)
    assert_array_equal(alarms, rails.threat_scorer_.predict(attacked) == -1)
