"""remember, forget and partial_fit."""

import dataclasses
import pickle

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from sklearn_rails import RAILSClassifier, ThreatScorer
from sklearn_rails.immune import Arbitration
from sklearn_rails.immune.response import ImmuneResponse

# Without early stopping, so that every sample leaves cells to remember.
CHEAP = {"population_size": 40, "generations": 2, "early_stopping": False, "random_state": 0}


@pytest.fixture(scope="module")
def split(digits):
    X, y = digits
    order = np.random.default_rng(0).permutation(len(y))
    return X[order[:300]], y[order[:300]], X[order[300:340]], y[order[300:340]]


@pytest.fixture
def rails(split):
    X, y, *_ = split
    return RAILSClassifier(**CHEAP).fit(X, y)


def empty(response):
    """Return a response without any rows."""

    def cut(value):
        if isinstance(value, dict):
            return {layer: cut(v) for layer, v in value.items()}
        return value[:0] if isinstance(value, np.ndarray) else value

    return ImmuneResponse(**{name: cut(value) for name, value in vars(response).items()})


def test_remembered_cells_are_flocked_like_training_samples(split, rails):
    X, y, new, y_new = split
    response = rails.respond(new)
    rails.remember(response, y_new)
    bank = rails.memory_["input"]
    assert len(bank) > 20
    distances, indices = rails.kneighbors(new)
    assert (indices["input"] >= len(X)).any()
    # What training on the cells as well would find.
    every = np.concatenate([X, bank.cells])
    labels = np.concatenate([y, rails.classes_[bank.labels]])
    other = RAILSClassifier(**CHEAP).fit(every, labels)
    expected, expected_indices = other.kneighbors(new)
    assert_allclose(distances["input"], expected["input"], rtol=1e-5)
    assert_array_equal(indices["input"], expected_indices["input"])
    layers = zip(other.engine_.layers, rails.engine_.layers, strict=True)
    other.engine_ = dataclasses.replace(
        other.engine_, layers=tuple(dataclasses.replace(a, tau=b.tau) for a, b in layers)
    )
    assert_array_equal(other.predict_proba(new), rails.predict_proba(new))


def test_samples_whose_vote_is_settled_leave_nothing_to_remember(split):
    X, y, new, _ = split
    rails = RAILSClassifier(**CHEAP | {"early_stopping": True}).fit(X, y)
    own = rails.respond(X[:10])  # their own nearest neighbours
    assert (own.n_generations["input"] == -1).all()
    assert own.n_forward == 0
    assert_array_equal(own.plasma["input"][:, 0], X[:10])
    assert len(rails.remember(own, confidence=0).memory_["input"]) == 0
    response = rails.respond(new)
    bred = response.n_generations["input"] >= 0
    assert 0 < bred.sum() < len(new)
    rails.remember(response, confidence=0)
    kept = {cell.tobytes() for cell in rails.memory_["input"].cells}
    assert kept <= {cell.tobytes() for cell in np.concatenate(response.memory["input"][bred])}
    assert len(kept) > 0


def test_responses_start_from_remembered_cells_too(split, rails):
    _, _, new, _ = split
    before = rails.respond(new)
    rails.remember(before, confidence=0)
    after = rails.respond(new)
    # The plasma is at least as near as the cells that were remembered of the row.
    assert (after.affinity_curve["input"][:, 0] > before.affinity_curve["input"][:, 0]).mean() > 0.9
    assert_array_equal(rails.forget().respond(new).proba, before.proba)
    assert len(rails.memory_["input"]) == 0


@pytest.mark.parametrize("kind", ["confident", "all", "labelled"])
def test_remember_keeps_confident_or_correct_cells(split, rails, kind):
    _, _, new, y_new = split
    blurred = (new + new[::-1]) / 2
    response = rails.respond(blurred)
    plasma, cells = response.plasma_labels["input"], response.memory_labels["input"]
    agreed = (plasma == response.labels[:, None]).mean(axis=1)
    assert 0 < (agreed < 0.9).sum() < len(new)
    labels = y_new if kind == "labelled" else response.labels
    chosen = cells == labels[:, None]
    if kind == "confident":
        rails.remember(response)
        chosen &= (agreed >= 0.9)[:, None]
    else:
        rails.remember(response, *([y_new] if kind == "labelled" else []), confidence=0)
    bank = rails.memory_["input"]
    expected = {
        (cell.tobytes(), label)
        for cell, label in zip(response.memory["input"][chosen], cells[chosen], strict=True)
    }
    held = zip(bank.cells, rails.classes_[bank.labels], strict=True)
    assert {(cell.tobytes(), label) for cell, label in held} == expected


def test_memory_survives_pickling_and_clones_start_without(split, rails):
    X, y, new, _ = split
    rails.remember(rails.respond(new))
    again = pickle.loads(pickle.dumps(rails))
    assert_array_equal(again.predict_proba(new), rails.predict_proba(new))
    assert len(again.memory_["input"]) == len(rails.memory_["input"])
    assert len(clone(rails).fit(X, y).memory_["input"]) == 0
    assert len(rails.fit(X, y).memory_["input"]) == 0


def test_capacity_bounds_each_class(split):
    X, y, new, _ = split
    rails = RAILSClassifier(memory_capacity=20, **CHEAP).fit(X, y)
    rails.remember(rails.respond(new), confidence=0)
    assert np.bincount(rails.memory_["input"].labels).max() == 2


def test_memories_of_an_empty_response_and_of_the_same_one_again(split, rails):
    _, _, new, _ = split
    response = rails.respond(new)
    rails.remember(empty(response))
    assert len(rails.memory_["input"]) == 0
    rails.remember(response)
    bank = rails.memory_["input"]
    rails.remember(response)
    assert_array_equal(rails.memory_["input"].cells, bank.cells)


def test_remember_refuses_a_response_of_another_estimator(split, rails, conv_net):
    X, y, new, y_new = split
    response = rails.respond(new)
    rails.remember(response)
    before = rails.memory_
    shape = {"input_shape": (1, 8, 8)}
    others = [
        RAILSClassifier(conv_net, layers="conv1", **shape, **CHEAP).fit(X, y),  # another layer
        RAILSClassifier(**CHEAP).fit(X[:, :32], y),  # cells of another shape
        RAILSClassifier(**CHEAP).fit(X, y + 1),  # a class that is not known
    ]
    for other in others:
        rows = new[:, : other.n_features_in_]
        with pytest.raises(ValueError, match="response is that of another estimator"):
            rails.remember(other.respond(rows))
    with pytest.raises(
        ValueError, match=r"y has labels that are not among the classes of fit: \[11\]"
    ):
        rails.remember(response, np.full(len(new), 11))
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        rails.remember(response, y_new[:-1])
    with pytest.raises(ValueError, match="confidence=2 must be between 0 and 1"):
        rails.remember(response, confidence=2)
    with pytest.raises(TypeError, match="response must be what respond returned, got ndarray"):
        rails.remember(new)
    assert rails.memory_ == before
    for method, args in (("remember", (response,)), ("forget", ())):
        with pytest.raises(NotFittedError):
            getattr(RAILSClassifier(), method)(*args)


@pytest.mark.parametrize("start_layer", [None, "conv1"])
def test_partial_fit_in_parts_equals_fit_on_all_samples(split, conv_net, start_layer):
    X, y, new, _ = split
    y = np.array(list("abcdefghij"))[y]
    late = np.isin(y, ["b", "i"])  # the first part has no row of these
    order = np.r_[np.flatnonzero(~late), np.flatnonzero(late)]
    X, y = X[order], y[order]
    make = RAILSClassifier(
        conv_net,
        layers="conv2",
        input_shape=(1, 8, 8),
        start_layer=start_layer,
        threat_scorer=ThreatScorer(random_state=0),
        **CHEAP,
    )
    parts = clone(make)
    for rows in (slice(0, 100), slice(100, 200), slice(200, 300)):
        parts.partial_fit(X[rows], y[rows])
    whole = clone(make).fit(X, y)
    assert_array_equal(parts.classes_, whole.classes_)
    assert_array_equal(parts.predict_proba(new), whole.predict_proba(new))
    assert_array_equal(parts.respond(new).threat, whole.respond(new).threat)


class CountsRows(torch.nn.Module):
    n_rows = 0

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        CountsRows.n_rows += len(x)
        return self.inner(x)


@pytest.mark.parametrize("affinity", ["euclidean", "cosine"])
@pytest.mark.parametrize("start_layer", [None, "inner.conv1"])
def test_partial_fit_does_not_run_old_samples_again(split, conv_net, affinity, start_layer):
    X, y, new, _ = split
    network = CountsRows(conv_net)
    settings = {"affinity": affinity, "start_layer": start_layer, "layers": "inner.conv2"}
    rails = RAILSClassifier(network, input_shape=(1, 8, 8), **settings, **CHEAP)
    whole = clone(rails).fit(X, y)
    rails.fit(X[:280], y[:280])
    CountsRows.n_rows = 0
    rails.partial_fit(X[280:], y[280:])
    # The 20 new ones in micro-batches of 16, twice with a start layer, and the probes.
    assert CountsRows.n_rows <= 100
    assert_array_equal(rails.predict_proba(new), whole.predict_proba(new))
    with torch.no_grad():
        conv_net.conv1.weight.mul_(2)
    CountsRows.n_rows = 0
    rails.partial_fit(X[:1], y[:1])
    assert CountsRows.n_rows > 300  # another network, so all features are others
    again = clone(rails).fit(np.concatenate([X, X[:1]]), np.append(y, y[0]))
    assert_array_equal(rails.predict_proba(new), again.predict_proba(new))


def test_memory_survives_partial_fit(split):
    X, y, new, _ = split
    first = y < 8
    rails = RAILSClassifier(**CHEAP).fit(X[first], y[first] * 10)
    rails.remember(rails.respond(new))

    def held():
        bank = rails.memory_["input"]
        labels = rails.classes_[bank.labels]
        return {(cell.tobytes(), c) for cell, c in zip(bank.cells, labels, strict=True)}

    before = held()
    rails.partial_fit(X[~first], y[~first] * 10 - 75)  # two classes among the others
    assert held() == before
    assert (rails.kneighbors(new)[1]["input"] >= len(X)).any()


def test_unknown_classes_raise_and_change_nothing(split):
    X, y, new, _ = split
    rails = RAILSClassifier(**CHEAP)
    with pytest.raises(ValueError, match=r"y has labels that are not among classes: \[9\]"):
        rails.partial_fit(X, y, classes=np.arange(9))
    assert not hasattr(rails, "classes_")
    some = y < 5
    rails.partial_fit(X[some], y[some], classes=np.arange(9))
    before = rails.predict_proba(new)
    with pytest.raises(ValueError, match=r"not among the classes of the first call: \[9\]"):
        rails.partial_fit(X[y == 9], y[y == 9])
    with pytest.raises(ValueError, match=r"y has labels of <U21, but those of fit are of int64"):
        rails.partial_fit(X[some], y[some].astype(str), classes=list("01234"))
    with pytest.raises(ValueError, match="Unknown label type"):
        rails.partial_fit(X[some], y[some] + 0.5, classes=np.arange(10) / 2)
    with pytest.raises(ValueError, match="features"):
        rails.partial_fit(X[some, 1:], y[some])
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        rails.partial_fit(X[some], y[some][1:])
    assert_array_equal(rails.predict_proba(new), before)
    assert_array_equal(rails.classes_, np.arange(9))


def test_a_capacity_below_the_number_of_classes_is_refused(split):
    X, y, *_ = split
    with pytest.raises(ValueError, match="memory_capacity=9 is smaller than the number of classes"):
        RAILSClassifier(memory_capacity=9, **CHEAP).fit(X, y)


def test_remembered_cells_count_towards_the_neighbours_of_a_small_class(split):
    X, y, new, _ = split
    few = np.concatenate([np.flatnonzero(y == c)[:3] for c in range(10)])
    rails = RAILSClassifier(**CHEAP | {"n_neighbors": 5}).fit(X[few], y[few])
    assert rails.kneighbors(new)[1]["input"].shape[2] == 3
    rails.remember(rails.respond(X[:60]), confidence=0)
    distances, indices = (found["input"] for found in rails.kneighbors(new))
    assert indices.shape[2] == 5
    bank = rails.memory_["input"]
    candidates = np.concatenate([X[few], bank.cells])
    labels = np.concatenate([y[few], bank.labels])
    for c in range(10):
        expected = np.sort(np.linalg.norm(new[:, None] - candidates[labels == c], axis=2), axis=1)[
            :, :5
        ]
        assert_allclose(distances[:, c], expected, rtol=1e-4)


@pytest.mark.parametrize("kinds", [(object, str), (str, object), (object, object), (str, "U9")])
def test_strings_are_strings_in_every_form(split, kinds):
    X, y, new, _ = split
    names = np.array([f"digit {c}" for c in range(10)])[y]
    first, second = names.astype(kinds[0]), names.astype(kinds[1])
    rails = RAILSClassifier(**CHEAP).partial_fit(X[:50], first[:50], classes=np.unique(names))
    rails.partial_fit(X[50:], second[50:])
    expected = RAILSClassifier(**CHEAP).fit(X, names).predict(new)
    assert_array_equal(rails.predict(new), expected)


@pytest.mark.parametrize("settings", [{}, {"gate": Arbitration(0.3), "layers": "input"}])
def test_a_class_without_samples_is_known_and_never_predicted(split, settings):
    X, y, new, _ = split
    some = y < 4
    network = torch.nn.Linear(64, 10) if "gate" in settings else None
    rails = RAILSClassifier(network, **CHEAP | settings)
    rails.partial_fit(X[some], y[some], classes=np.arange(10))
    proba = rails.predict_proba(new)
    assert proba.shape == (len(new), 10)
    assert_allclose(proba.sum(axis=1), 1)
    if network is None:
        assert set(rails.predict(new)) <= set(range(4))
        assert (proba[:, 4:] == 0).all()
    rails.partial_fit(X[~some], y[~some])
    assert set(rails.predict(new)) - set(range(4))
    with pytest.raises(ValueError, match=r"not among the classes of the first call: \[11\]"):
        rails.partial_fit(X[:3], [1, 2, 11])
