"""RAILSClassifier(gate=Arbitration(...)): the network's label stands, or is put to the vote."""

import pickle

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from sklearn import config_context
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from torch import nn

from sklearn_rails import RAILSClassifier, TorchFeatureExtractor, _blocks
from sklearn_rails._conformal import sample_rows
from sklearn_rails.attacks import pgd
from sklearn_rails.features.mapping import FeatureMap
from sklearn_rails.immune import Arbitration
from sklearn_rails.neighbors.votes import class_margin

CHEAP = {"layers": ["conv1", "conv2"], "population_size": 40, "generations": 2, "random_state": 0}


@pytest.fixture(scope="module")
def task(digit_task):
    return digit_task


@pytest.fixture(scope="module")
def attacked(task):
    network, *_, new, y_new = task
    return pgd(network, new[:150], y_new[:150], eps=0.2, step=0.05, max_iter=10)


@pytest.fixture(scope="module")
def arbitrating(task):
    network, X, y, *_ = task
    return RAILSClassifier(network, gate=Arbitration(0.2), **CHEAP).fit(X, y)


def labels_of(network, X):
    with torch.no_grad():
        return network(torch.from_numpy(X)).argmax(dim=1).numpy()


def test_the_network_label_is_kept_unless_its_p_value_is_alpha_or_less(task, arbitrating, attacked):
    network, X, y, *_ = task
    voting = RAILSClassifier(network, **CHEAP).fit(X, y)
    response = arbitrating.respond(attacked)
    stands = response.p_values > 0.2
    assert 0.1 < stands.mean() < 0.9
    votes, own = voting.predict(attacked), labels_of(network, attacked)
    assert (votes != own).mean() > 0.05
    assert_array_equal(arbitrating.predict(attacked), np.where(stands, own, votes))
    scores = arbitrating.decision_function(attacked)
    assert_array_equal(scores[~stands], voting.decision_function(attacked)[~stands])
    # Two plasma cells a layer, and less than half a vote for affinity.
    assert_array_equal(np.floor(scores[stands].max(axis=1)), 4)
    assert_array_equal(np.floor(np.sort(scores[stands], axis=1)[:, :-1]), 0)


def test_arbitration_p_values_equal_a_literal_computation(task):
    network, X, y, new, _ = task
    X, y = X[:300], y[:300]
    rails = RAILSClassifier(
        network, gate=Arbitration(0.2), **CHEAP | {"layers": "conv2", "dtype": "float64"}
    ).fit(X, y)
    extractor = TorchFeatureExtractor(network, layers="conv2", dtype="float64").fit(X)
    features = [extractor.transform(rows) for rows in (X, new[:30])]
    distance = [np.linalg.norm(f[:, None] - features[0], axis=2) for f in features]
    np.fill_diagonal(distance[0], np.inf)

    def nonconformity(distance, labels):
        near = np.stack([np.sort(distance[:, y == c])[:, :10].mean(axis=1) for c in range(10)], 1)
        own = near[np.arange(len(labels)), labels].copy()
        near[np.arange(len(labels)), labels] = np.inf
        return own - near.min(axis=1)

    calibration = nonconformity(distance[0], labels_of(network, X))
    scores = nonconformity(distance[1], labels_of(network, new[:30]))
    expected = (1 + (calibration >= scores[:, None]).sum(axis=1)) / (1 + len(X))
    assert len(np.unique(expected)) > 20
    assert_allclose(rails.respond(new[:30]).p_values, expected, atol=1e-12)


def test_few_clean_and_many_attacked_samples_are_bred(task, arbitrating, attacked):
    network, _, _, new, y_new = task
    clean, moved = (arbitrating.respond(rows).p_values <= 0.2 for rows in (new, attacked))
    # Four standard deviations for 400 rows that are judged by 600.
    assert abs(clean.mean() - 0.2) < 4 * np.sqrt(0.2 * 0.8 * (1 / 400 + 1 / 600))
    fooled = labels_of(network, attacked) != y_new[: len(attacked)]
    assert fooled.mean() > 0.5
    assert moved[fooled].mean() > 0.6


def test_arbitration_is_consistent_across_methods_and_batches(arbitrating, attacked):
    rails, rows = arbitrating, attacked
    shares, response = rails.predict_proba(rows), rails.respond(rows)
    assert_array_equal(response.proba, shares)
    assert_array_equal(response.labels, rails.predict(rows))
    assert_array_equal(rails.predict(rows), rails.classes_[shares.argmax(axis=1)])
    order = np.random.default_rng(1).permutation(len(rows))[:40]
    assert_allclose(rails.predict_proba(rows[order]), shares[order], rtol=1e-12)
    again = pickle.loads(pickle.dumps(rails))
    assert_array_equal(again.predict_proba(rows), shares)


def test_grid_search_over_gate_alpha_and_refit_without_a_gate(task):
    network, X, y, new, y_new = task
    search = GridSearchCV(
        RAILSClassifier(network, **CHEAP),
        {"gate": [None, Arbitration(0.1), Arbitration(0.5)]},
        cv=2,
    ).fit(X, y)
    assert search.best_estimator_.score(new, y_new) > 0.9
    rails = RAILSClassifier(network, gate=Arbitration(0.1), **CHEAP).fit(X, y)
    rails.set_params(gate=None).fit(X, y)
    assert rails.respond(new[:5]).p_values is None
    fresh = clone(rails).fit(X, y)
    assert set(vars(rails)) == set(vars(fresh))
    assert_array_equal(rails.predict_proba(new), fresh.predict_proba(new))


def test_arbitration_with_one_logit_and_with_a_class_of_one_sample(task):
    network, X, y, new, y_new = task
    two = nn.Sequential(network, Odd())
    rails = RAILSClassifier(
        two, gate=Arbitration(0.3), **CHEAP | {"layers": ["0.conv1", "0.conv2"]}
    ).fit(X, y % 2)
    assert rails.score(new, y_new % 2) > 0.9
    stands = rails.respond(new).p_values > 0.3
    own = labels_of(network, new) % 2
    assert 0.5 < stands.mean() < 0.9
    assert_array_equal(rails.predict(new)[stands], own[stands])

    lonely = np.flatnonzero(y != 3)
    lonely = np.append(lonely, np.flatnonzero(y == 3)[0])
    rails = RAILSClassifier(network, gate=Arbitration(0.1), **CHEAP).fit(X[lonely], y[lonely])
    p_values = rails.respond(new).p_values
    assert ((p_values > 0) & (p_values <= 1)).all()


class Odd(nn.Module):
    """One logit, above 0 where the highest of ten outputs is an odd one."""

    def forward(self, outputs):
        return (outputs.argmax(dim=1, keepdim=True) % 2).to(outputs.dtype) - 0.5


def test_class_margin_by_hand():
    flocked = torch.tensor([[[-1.0, -3.0], [-2.0, -4.0], [-5.0, -torch.inf]]])
    assert class_margin(flocked, torch.tensor([0])).item() == -1  # -2 against -3
    assert class_margin(flocked, torch.tensor([1])).item() == 1
    assert class_margin(flocked, torch.tensor([2])).item() == 3
    flocked[0, 2] = -torch.inf
    assert class_margin(flocked, torch.tensor([2])).item() == torch.inf
    assert class_margin(flocked, torch.tensor([0])).item() == -1


def test_arbitration_without_a_suitable_network_raises(task):
    network, X, y, *_ = task
    with pytest.raises(ValueError, match=r"gate=Arbitration\(alpha=0.1\) needs a network"):
        RAILSClassifier(gate=Arbitration(0.1)).fit(X, y)
    rails = RAILSClassifier(network, gate=Arbitration(0.1), **CHEAP)
    with pytest.raises(ValueError, match="it has 10 outputs and y has 9 classes"):
        rails.fit(X[y != 3], y[y != 3])
    assert not hasattr(rails, "classes_")
    rails.set_params(gate=None).fit(X, y).set_params(gate=Arbitration(0.1))
    assert rails.respond(X[:2]).p_values is None  # until the next fit
    rails.set_params(gate=Arbitration(0.0005))
    with pytest.warns(
        UserWarning, match="alpha=0.0005 needs 1999 samples to judge by, but there are 600"
    ) as told:
        rails.fit(X, y)
    assert told[0].filename == __file__
    for wrong in (0, 1, -0.5, "always"):
        with pytest.raises(ValueError, match="'alpha' parameter of Arbitration"):
            RAILSClassifier(network, gate=Arbitration(wrong), **CHEAP).fit(X, y)
    rails.set_params(gate=Arbitration(5e-324))
    with pytest.warns(UserWarning, match=r"alpha=5e-324 needs .* samples to judge by"):
        rails.fit(X, y)


def test_calibration_samples_of_arbitration_are_drawn_at_random():
    """Every tenth row is of a kind of its own, as where each is followed by augmented ones."""
    rng = np.random.default_rng(0)
    y = np.arange(5000) % 10
    X = np.where((y == 0)[:, None], 10.0, 0.0) + rng.normal(size=(5000, 2))
    drawn = sample_rows(len(X), 1000, rng=0)
    assert drawn.dtype == np.int64
    assert abs((y[drawn] == 0).mean() - 0.1) < 5 * np.sqrt(0.1 * 0.9 / 1000)
    assert sample_rows(2**24 + 4, 1000, rng=0).max() < 2**24 + 4
    assert_array_equal(sample_rows(9, 9, rng=0), np.arange(9))
    rows = []
    for seed in (0, 0, 1):
        rails = RAILSClassifier(
            FirstOfTen(),
            layers="input",
            gate=Arbitration(0.1),
            population_size=20,
            random_state=seed,
        )
        rails.fit(X, y)
        rows.append(rails.engine_.gate.calibration_)
        assert len(rows[-1]) == 1000
    assert_array_equal(rows[0], rows[1])
    assert (rows[0] != rows[2]).any()


class FirstOfTen(nn.Module):
    """Ten outputs, of which the first is the highest for rows far from the origin."""

    def forward(self, x):
        other = (x[:, 0] * 4 + x[:, 1] * 3).abs().floor().long() % 9 + 1
        return nn.functional.one_hot(torch.where(x.sum(1) > 10, 0, other), 10).float()


def test_arbitration_holds_the_features_of_one_block_at_a_time(task, monkeypatch):
    network, X, y, new, _ = task
    rails = RAILSClassifier(network, gate=Arbitration(0.2), **CHEAP).fit(X, y)
    expected = rails.respond(new[:60]).p_values
    n_rows, features_of = [], FeatureMap.__call__

    def counting(self, X, *args, **kwargs):
        n_rows.append(len(X))
        return features_of(self, X, *args, **kwargs)

    monkeypatch.setattr(FeatureMap, "__call__", counting)
    row_bytes = rails._features.row_bytes
    with config_context(working_memory=_blocks.BLOCKS_HELD * 25 * row_bytes / 2**20):
        gate = Arbitration(0.2).calibrate(rails.engine_.layers, X.reshape(600, -1), rails.seed_)
        assert_array_equal(gate.calibration_, rails.engine_.gate.calibration_)
        assert_array_equal(rails.respond(new[:60]).p_values, expected)
    assert max(n_rows) == 25


@pytest.mark.parametrize("labels", [np.zeros(40), np.full(40, "only")])
def test_one_class_and_a_network_of_one_output(labels):
    X = np.random.default_rng(0).normal(size=(40, 4))
    rails = RAILSClassifier(nn.Linear(4, 1), gate=Arbitration(0.2), random_state=0).fit(X, labels)
    assert_array_equal(rails.predict(X), labels)
    # No other class can be nearer.
    assert_array_equal(rails.respond(X).p_values, 1)
