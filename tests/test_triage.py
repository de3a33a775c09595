"""RAILSClassifier(gate=Triage()): only what the threat scorer raises an alarm on is bred."""

import pickle

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from sklearn.base import BaseEstimator
from sklearn.ensemble import IsolationForest

from sklearn_rails import RAILSClassifier, ThreatScorer
from sklearn_rails.attacks import pgd
from sklearn_rails.immune import Triage, layer
from sklearn_rails.immune.alarms import check_threat_scores

CHEAP = {"layers": ["conv1", "conv2"], "population_size": 40, "generations": 2, "random_state": 0}


@pytest.fixture(scope="module")
def task(digit_task):
    network, X, y, new, y_new = digit_task
    attacked = pgd(network, new[:100], y_new[:100], eps=0.2, step=0.05, max_iter=10)
    return network, X, y, np.concatenate([new[:300], attacked])


@pytest.fixture(scope="module")
def fitted(task):
    network, X, y, _ = task
    scorer = ThreatScorer(network, layers="conv1", method="disagreement", alpha=0.1, random_state=0)
    return [
        RAILSClassifier(network, threat_scorer=scorer, gate=gate, **CHEAP).fit(X, y)
        for gate in (Triage(), None)
    ]


def test_triage_breeds_flagged_samples_and_lets_neighbours_vote_on_the_rest(task, fitted):
    *_, y, rows = task
    screening, breeding = fitted
    alarm = screening.threat_scorer_.predict(rows) == -1
    assert 20 < alarm.sum() < 200  # there are rows of both kinds
    shares = screening.predict_proba(rows)
    assert_array_equal(shares[alarm], breeding.predict_proba(rows)[alarm])
    scores = screening.decision_function(rows)
    distances, indices = screening.kneighbors(rows)
    votes = np.zeros((len(rows), 10))
    for name in screening.layers_:
        order = distances[name].reshape(len(rows), -1).argsort(axis=1, kind="stable")
        nearest = np.take_along_axis(indices[name].reshape(len(rows), -1), order[:, :2], axis=1)
        for column in y[nearest].T:  # a twentieth of 40 cells are two
            votes[np.arange(len(rows)), column] += 1
    assert_array_equal(np.floor(scores[~alarm]), votes[~alarm])
    assert (scores[~alarm].argmax(axis=1) != breeding.predict(rows)[~alarm]).any()


def test_triage_is_consistent_across_methods(task, fitted):
    *_, rows = task
    screening = fitted[0]
    response = screening.respond(rows)
    assert_array_equal(response.proba, screening.predict_proba(rows))
    assert_array_equal(response.labels, screening.predict(rows))
    assert_array_equal(response.threat, -screening.threat_scorer_.score_samples(rows))
    again = pickle.loads(pickle.dumps(screening))
    assert_array_equal(again.predict_proba(rows), response.proba)


def test_triage_breeds_only_flagged_samples(task, fitted, monkeypatch):
    *_, rows = task
    n_rows = []
    clone_neighbors = layer.clone_neighbors

    def counting(index, *args):
        n_rows.append(len(index))
        return clone_neighbors(index, *args)

    monkeypatch.setattr(layer, "clone_neighbors", counting)
    fitted[0].predict(rows)
    n_alarms = (fitted[0].threat_scorer_.predict(rows) == -1).sum()
    assert sum(n_rows) == len(fitted[0].layers_) * n_alarms


def test_missing_neighbours_have_no_vote():
    X = np.array([[0.0, 0.0], [0.1, 0.0], [1.0, 1.0]])
    rails = RAILSClassifier(
        threat_scorer=IsolationForest(contamination=0.34, random_state=0),
        gate=Triage(),
        n_neighbors=2,
        plasma_fraction=1.0,
        population_size=10,
    ).fit(X, [0, 0, 1])
    scores = rails.engine_.scores(np.float32([[0.0, 0.1]]), alarms=np.array([False]))
    assert_array_equal(np.floor(scores), [[2, 1]])


def test_triage_without_a_threat_scorer_raises(task):
    network, X, y, rows = task
    with pytest.raises(ValueError, match=r"gate=Triage\(\) needs .* got threat_scorer=None"):
        RAILSClassifier(network, gate=Triage()).fit(X, y)
    late = RAILSClassifier(network, **CHEAP).fit(X, y)
    expected = late.predict(rows[:9])
    assert_array_equal(late.set_params(gate=Triage()).predict(rows[:9]), expected)
    with pytest.raises(ValueError, match=r"gate=Triage\(\) needs .* got threat_scorer=None"):
        late.fit(X, y)


class Scripted(BaseEstimator):
    """A threat scorer that answers what it is told to."""

    def __init__(self, answer):
        self.answer = answer

    def fit(self, X, y=None):
        self.fitted_ = True
        return self

    def score_samples(self, X):
        return np.zeros(len(X))

    def predict(self, X):
        return self.answer


def on_two_classes(answer):
    X, y = np.arange(24.0).reshape(12, 2), np.arange(12) % 2
    rails = RAILSClassifier(
        threat_scorer=Scripted(answer), gate=Triage(), population_size=20, random_state=0
    )
    return rails.fit(X, y).predict_proba(X[:4])


@pytest.mark.parametrize(
    "answer",
    [
        [-1, 1, -1, 1],
        (-1.0, 1.0, -1.0, 1.0),
        np.array([-1, 1, -1, 1], dtype=np.int8),
        torch.tensor([-1, 1, -1, 1]),
    ],
    ids=["list", "tuple of floats", "int8", "tensor"],
)
def test_predictions_of_a_scorer_may_be_any_sequence_of_numbers(answer):
    assert_array_equal(on_two_classes(answer), on_two_classes(np.array([-1, 1, -1, 1])))
    assert (on_two_classes(answer) != on_two_classes(np.ones(4))).any()


@pytest.mark.parametrize(
    "answer",
    [
        None,
        -1,
        np.int64(1),
        [-1, 1, -1],
        [[-1], [1], [-1], [1]],
        [-1, 1, np.nan, 1],
        [0, 1, 1, 0],
        [True, True, True, True],
        ["-1", "1", "1", "1"],
        [None] * 4,
        [[-1], [1, 1], 1, 1],
        "1111",
        [-1, 1, 0.5, 1],
    ],
    ids=str,
)
def test_invalid_predictions_of_a_scorer_raise(answer):
    with pytest.raises(
        ValueError, match=r"threat_scorer: predict must return -1 .* for each of the 4 samples, got"
    ):
        on_two_classes(answer)


def test_what_is_not_a_number_for_each_sample_is_shown():
    with pytest.raises(ValueError, match=r"got '1111'\.$"):
        on_two_classes("1111")


def test_invalid_threat_scores_raise():
    assert_array_equal(check_threat_scores([1, -np.inf, np.inf], 3), [1, -np.inf, np.inf])
    for wrong in (None, 1.0, [1.0], [[1.0]] * 3, [1, 2, np.nan], ["1", "2", "3"]):
        with pytest.raises(ValueError, match="threat_scorer: score_samples must return a number"):
            check_threat_scores(wrong, 3)
