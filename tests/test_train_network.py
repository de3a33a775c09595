"""A skorch net that is trained inside of fit, so that cross-validation is honest."""

import pickle

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler
from skorch import NeuralNetClassifier
from torch import nn

from sklearn_rails import DkNNClassifier, RAILSClassifier, ThreatScorer, save
from sklearn_rails.inspection import LayerDisplay
from sklearn_rails.metrics import make_robust_scorer

N_SEEN = []


class Small(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.flatten = nn.Flatten()
        self.first = nn.Linear(16, width)
        self.last = nn.Linear(width, 3)

    def forward(self, x):
        if self.training:
            N_SEEN.append(len(x))
        return self.last(torch.relu(self.first(self.flatten(x))))


def make_net():
    return NeuralNetClassifier(
        Small, criterion=nn.CrossEntropyLoss, max_epochs=3, train_split=None, verbose=0, lr=0.5
    )


@pytest.fixture
def problem():
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    y = np.array(["a", "b", "c"])[rng.integers(3, size=120)]
    X = rng.random((120, 16)) / 2 + (np.unique(y, return_inverse=True)[1] / 4)[:, None]
    return X.astype(np.float32), y


RAILS = {"layers": "first", "population_size": 30, "train_network": True, "random_state": 0}


@pytest.mark.parametrize(
    "estimator",
    [
        RAILSClassifier(make_net(), **RAILS),
        DkNNClassifier(
            make_net(), layers="first", n_neighbors=9, train_network=True, random_state=0
        ),
    ],
    ids=lambda estimator: type(estimator).__name__,
)
@pytest.mark.parametrize("shape", [None, (1, 4, 4)])
def test_the_net_is_trained_on_the_samples_of_fit(estimator, shape, problem):
    X, y = problem
    X = X if shape is None else X.reshape(-1, *shape)
    estimator = clone(estimator)
    N_SEEN.clear()
    estimator.fit(X[:90], y[:90])
    assert sum(N_SEEN) == 3 * 90
    assert isinstance(estimator.network_, Small)
    assert not hasattr(estimator.feature_extractor, "module_")
    assert estimator.score(X[90:], y[90:]) > 0.8
    loaded = pickle.loads(pickle.dumps(estimator))
    assert_array_equal(loaded.predict(X), estimator.predict(X))
    assert "NeuralNetClassifier" in repr(estimator)
    assert "Small" in estimator._repr_html_()
    assert estimator.feature_extractor is not clone(estimator).feature_extractor
    clone(estimator)._repr_html_()
    with pytest.raises(TypeError, match="feature_extractor is "):
        save(estimator, "nowhere/model")


def test_each_fold_trains_its_own_net(problem):
    X, y = problem
    rails = make_pipeline(MinMaxScaler(), RAILSClassifier(make_net(), **RAILS))
    N_SEEN.clear()
    assert cross_val_score(rails, X, y, cv=3).mean() > 0.8
    assert sum(N_SEEN) == 3 * 3 * 80


def test_parameters_of_the_net_can_be_searched(problem):
    X, y = problem
    net = make_net()
    rails = RAILSClassifier(net, **RAILS)
    search = GridSearchCV(rails, {"feature_extractor__max_epochs": [1, 4]}, cv=2).fit(X, y)
    assert search.best_params_["feature_extractor__max_epochs"] in (1, 4)
    assert net.max_epochs == 3
    scorer = make_robust_scorer(lambda network, X, y: X + 0.01)
    assert scorer(search.best_estimator_, X, y) > 0.5


def test_a_threat_scorer_uses_the_trained_net(problem):
    X, y = problem
    rails = RAILSClassifier(
        make_net(), **RAILS, threat_scorer=ThreatScorer(method="distance", alpha=0.2)
    ).fit(X, y)
    assert rails.threat_scorer_.network_ is rails.network_
    (detector,) = rails.threat_scorer_.detectors_.values()
    assert detector.neighbors_["first"] is rails.neighbors_["first"]
    network = rails.network_
    rails.partial_fit(X[:9], y[:9])
    assert rails.network_ is network
    LayerDisplay.from_estimator(rails, X[:60], y[:60], lambda X, y: X)


@pytest.mark.parametrize("network", [None, Small(), "net"])
def test_what_cannot_be_trained_is_refused(network, problem):
    with pytest.raises(
        TypeError, match=r"train_network=True trains a clone .* must be a skorch net"
    ):
        RAILSClassifier(network, **RAILS).fit(*problem)


def test_without_train_network_the_net_must_be_fitted(problem):
    with pytest.raises(NotFittedError):
        RAILSClassifier(make_net(), layers="first").fit(*problem)
