"""RAILSClassifier(triage=True): only what the threat scorer raises an alarm on is bred."""

import pickle

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from sklearn.ensemble import IsolationForest
from sklearn.exceptions import NotFittedError

from sklearn_rails import RAILSClassifier, ThreatScorer
from sklearn_rails.demo import pgd

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
        RAILSClassifier(network, threat_scorer=scorer, triage=triage, **CHEAP).fit(X, y)
        for triage in (True, False)
    ]


def test_alarms_are_bred_and_neighbours_vote_on_all_else(task, fitted):
    *_, y, rows = task
    screening, breeding = fitted
    alarm = screening.threat_scorer_.predict(rows) == -1
    assert 20 < alarm.sum() < 200  # there are rows of both kinds
    shares = screening.predict_proba(rows)
    assert_array_equal(shares[alarm], breeding.predict_proba(rows)[alarm])
    scores = screening.decision_function(rows)
    distances, indices = screening.kneighbors(rows)
    votes = np.zeros((len(rows), 10))
    for layer in screening.layers_:
        order = distances[layer].reshape(len(rows), -1).argsort(axis=1, kind="stable")
        nearest = np.take_along_axis(indices[layer].reshape(len(rows), -1), order[:, :2], axis=1)
        for column in y[nearest].T:  # a twentieth of 40 cells are two
            votes[np.arange(len(rows)), column] += 1
    assert_array_equal(np.floor(scores[~alarm]), votes[~alarm])
    assert (scores[~alarm].argmax(axis=1) != breeding.predict(rows)[~alarm]).any()


def test_answers_agree_with_each_other(task, fitted):
    *_, rows = task
    screening = fitted[0]
    response = screening.respond(rows)
    assert_array_equal(response.proba, screening.predict_proba(rows))
    assert_array_equal(response.labels, screening.predict(rows))
    assert_array_equal(response.threat, -screening.threat_scorer_.score_samples(rows))
    again = pickle.loads(pickle.dumps(screening))
    assert_array_equal(again.predict_proba(rows), response.proba)


def test_only_alarms_go_through_the_network_as_cells(task, fitted, monkeypatch):
    *_, rows = task
    n_rows = []
    mature = RAILSClassifier._mature

    def counting(self, X, *args, **kwargs):
        n_rows.append(len(X))
        return mature(self, X, *args, **kwargs)

    monkeypatch.setattr(RAILSClassifier, "_mature", counting)
    fitted[0].predict(rows)
    assert sum(n_rows) == (fitted[0].threat_scorer_.predict(rows) == -1).sum()


def test_neighbours_that_are_not_there_have_no_vote():
    X = np.array([[0.0, 0.0], [0.1, 0.0], [1.0, 1.0]])
    rails = RAILSClassifier(
        threat_scorer=IsolationForest(contamination=0.34, random_state=0),
        triage=True,
        n_neighbors=2,
        plasma_fraction=1.0,
        population_size=10,
    ).fit(X, [0, 0, 1])
    assert_array_equal(np.floor(rails._count_flock(np.float32([[0.0, 0.1]]))), [[2, 1]])


def test_what_triage_cannot_do_without_is_told(task):
    network, X, y, rows = task
    with pytest.raises(ValueError, match=r"triage=True needs .* got threat_scorer=None"):
        RAILSClassifier(network, triage=True).fit(X, y)
    both = RAILSClassifier(network, triage=True, arbitration=0.1, threat_scorer=ThreatScorer())
    with pytest.raises(ValueError, match=r"triage=True and arbitration=0.1 both say"):
        both.fit(X, y)
    late = RAILSClassifier(network, **CHEAP).fit(X, y).set_params(triage=True)
    with pytest.raises(NotFittedError, match="threat_scorer was None when RAILSClassifier was"):
        late.predict(rows)
