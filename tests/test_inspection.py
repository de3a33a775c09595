import pickle
import sys

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from sklearn.exceptions import NotFittedError
from torch import nn

from sklearn_rails import DkNNClassifier, RAILSClassifier
from sklearn_rails.inspection import ImmuneResponseDisplay

mpl.use("Agg")


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def make_rails(X, y, **parameters):
    parameters = {"population_size": 20, "generations": 2, "random_state": 0} | parameters
    return RAILSClassifier(**parameters).fit(X, y)


def images_and_labels(n, shape, classes=("cat", "cow", "dog")):
    rng = np.random.RandomState(0)
    y = np.array(classes)[np.arange(n) % len(classes)]
    return rng.rand(n, *shape).astype(np.float32), y


@pytest.fixture
def grey():
    X, y = images_and_labels(30, (1, 6, 6))
    return make_rails(X, y), X, y


def shown(ax):
    return np.asarray(ax.images[0].get_array())


def test_each_input_has_a_row_of_images(grey):
    rails, X, y = grey
    queries = 1 - X[:4]
    predicted = rails.predict(queries)
    network_labels = np.where(predicted == "cat", "cow", "cat")
    true = np.where([True, False, True, False], predicted, network_labels)
    display = ImmuneResponseDisplay.from_estimator(
        rails, queries, y=true, network_labels=network_labels, n_plasma=1
    )
    assert display.axes_.shape == (4, 5)
    assert len(display.lines_) == 4
    _, indices = rails.kneighbors(queries)
    response = rails.respond(queries)
    for row, axes in enumerate(display.axes_):
        np.testing.assert_array_equal(shown(axes[0]), queries[row, 0])
        network, label = (
            f"{label} ✗" if label != true[row] else label
            for label in (network_labels[row], predicted[row])
        )
        assert axes[0].get_xlabel() == f"true {true[row]}, network {network}\nRAILS {label}"
        frame = axes[0].spines["left"].get_linestyle()
        assert frame == ("--" if predicted[row] != true[row] else "solid")
        for ax, label in ((axes[1], predicted[row]), (axes[2], network_labels[row])):
            nearest = indices["input"][row, rails.classes_.tolist().index(label), 0]
            np.testing.assert_array_equal(shown(ax), X[nearest, 0])
            assert y[nearest] == label == ax.get_xlabel()
        np.testing.assert_array_equal(shown(axes[3]), response.plasma["input"][row, 0, 0])
        curve = response.affinity_curve["input"][row]
        drawn = axes[4].lines[0].get_ydata()
        np.testing.assert_array_equal(drawn, curve[: len(drawn)])
        assert np.isnan(curve[len(drawn) :]).all()
        assert axes[4].get_ylim() == display.axes_[0, 4].get_ylim()
    assert repr(display) == "ImmuneResponseDisplay(4 responses, layer='input', 2 misclassified)"


def test_the_networks_neighbour_is_hidden_if_the_network_agrees(grey):
    rails, X, _ = grey
    display = ImmuneResponseDisplay.from_estimator(
        rails, X[:3], network_labels=rails.predict(X[:3])
    )
    assert not any(ax.images for ax in display.axes_[:, 2])
    assert display.axes_[0, 2].texts[0].get_text() == "same class"
    assert "network" in display.axes_[0, 2].get_title()


def test_labels_are_optional(grey):
    rails, X, _ = grey
    display = ImmuneResponseDisplay.from_estimator(rails, X[:2], n_plasma=0)
    assert display.axes_.shape == (2, 3)
    assert display.axes_[0, 0].get_xlabel() == f"RAILS {display.response.labels[0]}"


@pytest.mark.parametrize("start_layer", [None, "0"])
def test_a_remembered_cell_is_shown_if_it_is_the_nearest(start_layer):
    X, y = images_and_labels(30, (1, 6, 6))
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(32, 3))
    rails = make_rails(X, y, feature_extractor=network, layers="2", start_layer=start_layer)
    queries = 1 - X[:3]
    rails.remember(rails.respond(queries), confidence=0)
    indices = rails.kneighbors(queries)[1]["2"][:, :, 0]
    classes = rails.classes_.searchsorted(rails.predict(queries))
    nearest = indices[np.arange(3), classes]
    assert (nearest >= 30).any()
    display = ImmuneResponseDisplay.from_estimator(rails, queries, n_plasma=0)
    for row in np.flatnonzero(nearest >= 30):
        image = shown(display.axes_[row, 1])
        if start_layer is None:
            cell = rails.memory_["2"].cells[nearest[row] - 30]
            np.testing.assert_array_equal(image, cell.reshape(6, 6))
        else:
            assert np.ma.getmaskarray(display.axes_[row, 1].images[0].get_array()).all()


def test_classifiers_have_their_training_data():
    X, y = images_and_labels(30, (1, 6, 6))
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(32, 3))
    for fitted in (
        make_rails(X, y),
        make_rails(X, y, feature_extractor=network, layers="2", start_layer="0"),
        make_rails(X[:20], y[:20]).partial_fit(X[20:], y[20:]),
        DkNNClassifier(network, layers="2", random_state=0).fit(X, y),
    ):
        samples, labels = fitted.training_data()
        np.testing.assert_array_equal(samples.reshape(X.shape), X)
        np.testing.assert_array_equal(labels, y)
    loaded = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(loaded.predict(X), fitted.predict(X))
    assert X.tobytes() not in pickle.dumps(fitted)
    with pytest.raises(ValueError, match="A loaded DkNNClassifier .* fit it again"):
        loaded.training_data()


def test_plot_again_on_a_given_figure(grey):
    rails, X, _ = grey
    display = ImmuneResponseDisplay.from_estimator(rails, X[:2])
    first = display.figure_
    whole = plt.figure()
    part, _ = whole.subfigures(1, 2)
    assert display.plot(figure=part, cmap="viridis") is display
    assert display.figure_ is part is not first
    assert display.axes_[0, 0].images[0].get_cmap().name == "viridis"


@pytest.mark.parametrize("as_given", [np.asarray, torch.from_numpy, lambda X: X.reshape(30, -1)])
def test_colour_images_flat_samples_and_tensors(as_given):
    X, y = images_and_labels(30, (3, 5, 4))
    rails = make_rails(X.reshape(30, -1), y, input_shape=(3, 5, 4))
    given = as_given(X)
    display = ImmuneResponseDisplay.from_estimator(rails, given[:2])
    np.testing.assert_array_equal(shown(display.axes_[1, 0]), X[1].transpose(1, 2, 0))
    assert shown(display.axes_[0, -2]).shape == (5, 4, 3)


def test_images_without_a_channel_axis():
    X, y = images_and_labels(30, (5, 4))
    display = ImmuneResponseDisplay.from_estimator(make_rails(X, y), X[:2])
    np.testing.assert_array_equal(shown(display.axes_[1, 0]), X[1])


def test_the_layer_can_be_chosen():
    X, y = images_and_labels(30, (1, 6, 6))
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(32, 3))
    rails = make_rails(X, y, feature_extractor=network, layers=["0", "2"])
    first = ImmuneResponseDisplay.from_estimator(rails, X[:2])
    second = ImmuneResponseDisplay.from_estimator(rails, X[:2], layer="2")
    assert "layer: 0" in first.axes_[0, -1].get_title()
    assert "layer: 2" in second.axes_[0, -1].get_title()
    assert first.lines_[0].get_ydata()[0] != second.lines_[0].get_ydata()[0]
    with pytest.raises(ValueError, match=r"layer='1' is none of the layers \['0', '2'\]"):
        ImmuneResponseDisplay.from_estimator(rails, X[:2], layer="1")


def test_cells_of_a_hidden_layer_are_not_shown():
    X, y = images_and_labels(30, (1, 6, 6))
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(32, 3))
    rails = make_rails(X, y, feature_extractor=network, layers="2", start_layer="0")
    with pytest.raises(ValueError, match="pass n_plasma=0"):
        ImmuneResponseDisplay.from_estimator(rails, X[:2])
    display = ImmuneResponseDisplay.from_estimator(rails, X[:2], n_plasma=0)
    assert display.axes_.shape == (2, 3)


def test_labels_of_another_length_or_class_are_refused(grey):
    rails, X, y = grey
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        ImmuneResponseDisplay.from_estimator(rails, X[:2], y=y)
    with pytest.raises(ValueError, match=r"network_labels has unknown classes: .*emu"):
        ImmuneResponseDisplay.from_estimator(rails, X[:2], network_labels=["emu", "cow"])


def test_samples_that_are_not_images_are_refused():
    X, y = images_and_labels(30, (36,))
    with pytest.raises(ValueError, match=r"shape \(36,\) are not images"):
        ImmuneResponseDisplay.from_estimator(make_rails(X, y), X[:2])


def test_an_unfitted_classifier_is_refused():
    with pytest.raises(NotFittedError):
        ImmuneResponseDisplay.from_estimator(RAILSClassifier(), None)


def test_without_matplotlib_the_error_says_what_to_install(grey, monkeypatch):
    rails, X, _ = grey
    display = ImmuneResponseDisplay.from_estimator(rails, X[:2])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"Display\.from_estimator requires matplotlib"):
        ImmuneResponseDisplay.from_estimator(rails, X[:2])
    with pytest.raises(ImportError, match=r"Display\.plot requires matplotlib"):
        display.plot()
