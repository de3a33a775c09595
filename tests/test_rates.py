"""Rates that the theory promises: P(p <= alpha) <= alpha on clean data, over many fits.

Samples that are judged by one fit share its calibration, so that the bound of four standard
deviations is the larger of the binomial one and that of the fits' means.
"""

import numpy as np
import pytest
import torch
from sklearn.ensemble import IsolationForest
from sklearn.neighbors import LocalOutlierFactor
from torch import nn

from sklearn_rails import DkNNClassifier, RAILSClassifier, ThreatScorer
from sklearn_rails._conformal import conformal_p_values
from sklearn_rails.immune import Arbitration

LEVELS = (0.05, 0.1, 0.2, 0.5)


def draw(rng, n, kind):
    """Draw samples of overlapping classes, as sorted data sets have them: class by class."""
    if kind == "small classes":
        # Half of the samples are of one class, the others of many classes in places of their own.
        y = rng.choice(41, size=n, p=[0.5] + [0.0125] * 40)
        X = np.where((y == 0)[:, None], 3.0, 0.3) * rng.normal(size=(n, 2))
        X[:, 0] += np.where(y == 0, 0, 20 + 2 * y)
    else:
        shares = {"unbalanced": [0.8, 0.15, 0.05]}.get(kind, [1 / 3] * 3)
        y = rng.choice(3, size=n, p=shares)
        X = 1.5 * MEANS[y] + rng.normal(size=(n, 2))
    if kind == "ties":
        X = X.round()
    order = np.argsort(y, kind="stable")
    return X[order], y[order]


MEANS = np.array([[1.0, 0.0], [-0.5, 0.9], [-0.5, -0.9]])


def network():
    """Return a network whose outputs are highest for the nearest of the means."""
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
    with torch.no_grad():
        module[0].weight.copy_(torch.eye(2))
        module[1].weight.copy_(torch.from_numpy(2 * MEANS))
        module[0].bias.zero_(), module[1].bias.zero_()
    return module


def assert_rate_is_at_most(alpha, flagged):
    """Check the share of flagged samples, an array (n_fits, n_samples)."""
    rates = flagged.mean(axis=1)
    spread = max(alpha * (1 - alpha) / flagged.size, rates.var() / len(rates)) ** 0.5
    assert rates.mean() <= alpha + 4 * spread, f"{rates.mean():.4f} at alpha={alpha}"


def assert_valid(p_values):
    for alpha in LEVELS:
        assert_rate_is_at_most(alpha, p_values <= alpha)


def p_values_of_dknn(calibration, kind, n, n_fits, n_new):
    """Return the p-values of the true classes of new samples, an array (n_fits, n_new)."""
    p_values = np.ones((n_fits, n_new))
    for seed in range(n_fits):
        rng = np.random.default_rng([seed, n])
        X, y = draw(rng, n, kind)
        dknn = DkNNClassifier(n_neighbors=3, calibration=calibration, random_state=seed)
        if calibration == "pair":
            X_cal, y_cal = draw(rng, n, kind)
            known = np.isin(y_cal, y)
            dknn.set_params(calibration=(X_cal[known], y_cal[known]))
        dknn.fit(X, y)
        X_new, y_new = draw(rng, n_new, kind)
        known = np.isin(y_new, dknn.classes_)
        if calibration != "pair":
            # The nonconformity with a class that is not known is the largest there is.
            p_values[seed] = conformal_p_values(dknn.n_neighbors_, dknn._calibration)
        places = np.searchsorted(dknn.classes_, y_new[known])
        p_values[seed, known] = dknn.p_values(X_new[known])[np.arange(known.sum()), places]
    return p_values


def alarms_of_scorer(method, kind, n, alpha, n_fits, n_new):
    """Return which new samples are flagged, an array (n_fits, n_new)."""
    flagged = np.empty((n_fits, n_new), dtype=bool)
    methods = method if isinstance(method, list) else [method]
    module = network() if any(m in methods for m in NEEDS_NETWORK) else None
    layers = ["input", "0"] if module is not None else None
    for seed in range(n_fits):
        rng = np.random.default_rng([seed, n])
        X, y = draw(rng, n, kind)
        scorer = ThreatScorer(module, layers=layers, method=method, alpha=alpha, random_state=seed)
        # Without y the classes are the network's: it has one for each, whatever the draw.
        scorer.fit(X, None if module is not None else y)
        flagged[seed] = scorer.predict(draw(rng, n_new, kind)[0]) == -1
    return flagged


NEEDS_NETWORK = {"disagreement", "feature_squeezing", "confidence"}


def p_values_of_arbitration(kind, n, n_fits, n_new):
    """Return the p-values of the network's labels of new samples, an array (n_fits, n_new)."""
    p_values = np.empty((n_fits, n_new))
    module = network()
    for seed in range(n_fits):
        rng = np.random.default_rng([seed, n])
        # Every class once, since the network has an output for each.
        X, y = draw(rng, n, kind)
        while len(np.unique(y)) < 3:
            X, y = draw(rng, n, kind)
        rails = RAILSClassifier(
            module,
            layers="0",
            gate=Arbitration(0.2),
            n_neighbors=3,
            population_size=10,
            random_state=seed,
        )
        rails.fit(X, y)
        p_values[seed] = rails.engine_.screen(np.float32(draw(rng, n_new, kind)[0]), None)[
            1
        ].p_values
    return p_values


@pytest.mark.parametrize("calibration", [0.3, "pair", "leave-one-out"])
def test_p_values_of_dknn_are_valid_in_a_few_fits(calibration):
    assert_valid(p_values_of_dknn(calibration, "small classes", 40, n_fits=100, n_new=20))


@pytest.mark.parametrize("method", ["kernel_density", ["kernel_density", "mahalanobis"]], ids=str)
def test_alarms_are_rare_in_a_few_fits(method):
    # 4 of 20 p-values are at most 0.2; with 5 of them the test fails.
    flagged = alarms_of_scorer(method, "balanced", 19, 0.2, n_fits=400, n_new=20)
    assert_rate_is_at_most(0.2, flagged)


def test_clean_samples_are_rarely_bred_in_a_few_fits():
    assert_valid(p_values_of_arbitration("unbalanced", 40, n_fits=60, n_new=20))


@pytest.mark.slow
@pytest.mark.parametrize("calibration", [0.1, 0.5, "pair", "leave-one-out"])
@pytest.mark.parametrize(
    ("kind", "n"),
    [("balanced", 10), ("ties", 10), ("unbalanced", 30), ("small classes", 80)],
)
def test_p_values_of_dknn_are_valid(calibration, kind, n):
    p_values = p_values_of_dknn(calibration, kind, n, n_fits=500, n_new=40)
    assert_valid(p_values)
    assert (p_values <= 0.5).any()


METHODS = [
    "credibility",
    "distance",
    "kernel_density",
    "mahalanobis",
    "lid",
    "disagreement",
    "feature_squeezing",
    "confidence",
    ["credibility", "distance"],
    ["distance", "mahalanobis", "lid"],
    ["disagreement", "mahalanobis", "feature_squeezing"],
]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize(
    ("kind", "n", "alpha"),
    [("balanced", 10, 0.2), ("ties", 25, 0.2), ("unbalanced", 60, 0.1)],
)
def test_alarms_on_clean_samples_are_no_more_than_alpha(method, kind, n, alpha):
    flagged = alarms_of_scorer(method, kind, n, alpha, n_fits=300, n_new=70)
    assert_rate_is_at_most(alpha, flagged)
    assert flagged.any()


LOF = LocalOutlierFactor(n_neighbors=5, novelty=True)
FOREST = IsolationForest(n_estimators=10)
OUTLIER_DETECTORS = [LOF, FOREST, [LOF, FOREST], [LOF, "distance"], ["disagreement", FOREST, LOF]]


@pytest.mark.parametrize("method", [LOF, [LOF, "distance"]], ids=str)
def test_alarms_of_outlier_detectors_are_rare_in_a_few_fits(method):
    flagged = alarms_of_scorer(method, "balanced", 38, 0.2, n_fits=100, n_new=20)
    assert_rate_is_at_most(0.2, flagged)
    assert flagged.any()


@pytest.mark.slow
@pytest.mark.parametrize("method", OUTLIER_DETECTORS, ids=str)
@pytest.mark.parametrize(
    ("kind", "n", "alpha"),
    [("balanced", 20, 0.2), ("ties", 50, 0.2), ("unbalanced", 120, 0.1)],
)
def test_alarms_of_outlier_detectors_are_no_more_than_alpha(method, kind, n, alpha):
    flagged = alarms_of_scorer(method, kind, n, alpha, n_fits=300, n_new=70)
    assert_rate_is_at_most(alpha, flagged)
    assert flagged.any()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:alpha=0.05 needs")
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_few_samples_raise_few_alarms(method):
    assert_rate_is_at_most(0.05, alarms_of_scorer(method, "ties", 10, 0.05, n_fits=200, n_new=100))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "n"), [("balanced", 10), ("ties", 30), ("unbalanced", 60)])
def test_clean_samples_are_bred_at_most_at_the_rate_alpha(kind, n):
    p_values = p_values_of_arbitration(kind, n, n_fits=500, n_new=40)
    assert_valid(p_values)
    assert (p_values <= 0.5).any()
