import pickle
import sys
from functools import partial

import matplotlib as mpl
import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from torch import nn

from sklearn_rails import DkNNClassifier, RAILSClassifier, ThreatScorer, TorchFeatureExtractor
from sklearn_rails.attacks import pgd
from sklearn_rails.immune import Triage
from sklearn_rails.inspection import LayerDisplay

mpl.use("Agg")

X_TRAIN = np.random.RandomState(0).rand(60, 1, 4, 4).astype(np.float32)
Y_TRAIN = np.array(["cat", "cow", "dog"])[np.arange(60) % 3]
X, Y = X_TRAIN[:12] + 0.01, Y_TRAIN[:12]


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    mpl.pyplot.close("all")


class Network(nn.Module):
    """The layer "twice" runs twice and cannot be used; "never" does not run."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.twice = nn.ReLU()
        self.hidden = nn.Linear(12, 5)
        self.never = nn.Linear(5, 5)
        self.fc = nn.Linear(5, 3)

    def forward(self, x):
        return self.fc(self.twice(self.hidden(self.twice(self.conv(x)).flatten(1))))


@pytest.fixture(scope="module")
def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Network()


def rails(network, **parameters):
    parameters = {"layers": "hidden", "population_size": 20, "generations": 1} | parameters
    return RAILSClassifier(network, random_state=0, **parameters)


def dknn(network, **parameters):
    parameters = {"layers": "hidden", "n_neighbors": 3} | parameters
    return DkNNClassifier(network, random_state=0, **parameters)


@pytest.mark.parametrize("make", [rails, dknn])
def test_each_layer_is_measured_by_a_clone_on_it_alone(network, make):
    fitted = make(network).fit(X_TRAIN, Y_TRAIN)
    attacked = 1 - X
    before = pickle.dumps(fitted)
    display = LayerDisplay.from_estimator(fitted, X, Y, attacked)
    assert display.layers == ("input", "conv", "hidden", "output")
    for i, layer in enumerate(display.layers):
        alone = clone(fitted).set_params(layers=layer).fit(X_TRAIN, Y_TRAIN)
        assert display.clean_accuracy[i] == alone.score(X, Y)
        assert display.attacked_accuracy[i] == alone.score(attacked, Y)
    assert (display.seconds > 0).all()
    assert (display.seconds < 1).all()
    assert pickle.dumps(fitted) == before


def test_the_figure_has_the_layers_in_order_and_marks_those_in_use():
    display = LayerDisplay(
        ["input", "conv", "fc"],
        clean_accuracy=np.array([0.9, 0.8, 0.95]),
        attacked_accuracy=np.array([0.5, 0.7, 0.0]),
        seconds=np.array([1e-4, 2e-3, 0.25]),
        used=["conv"],
    )
    _, ax = mpl.pyplot.subplots()
    assert display.plot(ax=ax) is display
    assert display.ax_ is ax
    assert display.figure_ is ax.figure
    labels = ax.get_yticklabels()
    assert [label.get_text() for label in labels] == ["input", "conv (used)", "fc"]
    assert [label.get_fontweight() for label in labels] == ["normal", "bold", "normal"]
    assert ax.yaxis_inverted()  # the input on top
    _, clean, attacked = ax.collections
    assert_array_equal(clean.get_offsets().T, [[0.9, 0.8, 0.95], [0, 1, 2]])
    assert_array_equal(attacked.get_offsets().T, [[0.5, 0.7, 0.0], [0, 1, 2]])
    assert [text.get_text() for text in ax.texts][1:] == ["0.1", "2", "250"]
    assert repr(display).split("\n")[2].split() == ["conv", "*", "0.800", "0.700", "2.000"]


def test_an_attack_may_be_a_function(network):
    fitted = dknn(network).fit(X_TRAIN, Y_TRAIN)
    classes = np.searchsorted(fitted.classes_, Y)
    expected = LayerDisplay.from_estimator(
        fitted, X, Y, pgd(network, X, classes, eps=0.3, clip=None)
    )

    def attack(X, y):
        return pgd(network, X, np.searchsorted(fitted.classes_, y), eps=0.3, clip=None)

    display = LayerDisplay.from_estimator(fitted, X, Y, attack)
    assert_array_equal(display.attacked_accuracy, expected.attacked_accuracy)


def test_layers_can_be_named(network):
    fitted = dknn(network).fit(X_TRAIN, Y_TRAIN)
    display = LayerDisplay.from_estimator(fitted, X, Y, X, layers=["fc", "input"])
    assert display.layers == ("fc", "input")
    assert LayerDisplay.from_estimator(fitted, X, Y, X, layers="fc").layers == ("fc",)
    for layers, message in (("twice", "runs 2 times"), ("nope", "nope"), ([], "has no layer")):
        with pytest.raises(ValueError, match=message):
            LayerDisplay.from_estimator(fitted, X, Y, X, layers=layers)


def test_any_classifier_of_the_package(network):
    only_input = RAILSClassifier(population_size=20, random_state=0).fit(X_TRAIN, Y_TRAIN)
    assert LayerDisplay.from_estimator(only_input, X, Y, X).layers == ("input",)
    embedded = rails(network, start_layer="conv").fit(X_TRAIN, Y_TRAIN)
    later = LayerDisplay.from_estimator(embedded, X, Y, X).layers
    assert later[-2:] == ("hidden", "output")
    assert "input" not in later
    extractor = TorchFeatureExtractor(network, layers=["conv"], input_shape=(1, 4, 4))
    flat, flat_train = X.reshape(len(X), -1), X_TRAIN.reshape(60, -1)
    for make in (rails, dknn):
        fitted = make(extractor, layers=None).fit(flat_train, Y_TRAIN)
        display = LayerDisplay.from_estimator(fitted, flat, Y, flat, layers=["conv", "fc"])
        assert display.used == ("conv",)
    scored = rails(
        network,
        gate=Triage(),
        threat_scorer=ThreatScorer(network, layers="conv", method="distance", random_state=0),
    ).fit(X_TRAIN, Y_TRAIN)
    assert "hidden" in LayerDisplay.from_estimator(scored, X, Y, X).layers


def test_parameters_set_after_fit_make_no_difference(network):
    fitted = dknn(network).fit(X_TRAIN, Y_TRAIN)
    expected = LayerDisplay.from_estimator(fitted, X, Y, 1 - X)
    fitted.set_params(n_neighbors=40, layers="conv")
    display = LayerDisplay.from_estimator(fitted, X, Y, 1 - X)
    assert_array_equal(display.attacked_accuracy, expected.attacked_accuracy)
    assert display.used == ("hidden",)


def test_errors_name_the_argument(network):
    fitted = dknn(network).fit(X_TRAIN, Y_TRAIN)
    show = partial(LayerDisplay.from_estimator, fitted)
    for given, error, message in (
        ((X, Y[:3], X), ValueError, "inconsistent numbers of samples"),
        ((X, Y, X[:3]), ValueError, "inconsistent numbers of samples"),
        ((X[0], Y[:1], X), ValueError, "X has invalid samples"),
        ((X, Y, X[:, :, :3]), ValueError, "attack has invalid samples"),
        ((X, Y, lambda X, y: X * np.nan), ValueError, "attack has invalid samples: .*NaN"),
    ):
        with pytest.raises(error, match=message):
            show(*given)
    with pytest.raises(TypeError, match="estimator must be a fitted DkNNClassifier or RAILS"):
        LayerDisplay.from_estimator(LogisticRegression(), X, Y, X)
    with pytest.raises(NotFittedError):
        LayerDisplay.from_estimator(DkNNClassifier(), X, Y, X)
    with pytest.raises(ValueError, match="fit it again"):
        LayerDisplay.from_estimator(pickle.loads(pickle.dumps(fitted)), X, Y, X)


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"LayerDisplay\.from_estimator requires matplotlib"):
        LayerDisplay.from_estimator(None, X, Y, X)
