"""The engine against a literal loop over rows, cells and elements, on the same uniform numbers."""

import literal
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from sklearn_rails import RAILSClassifier
from sklearn_rails.immune.random import generation_uniforms

N_FEATURES = 6
CLASS_SIZES = {"bee": 20, "cat": 17, "dog": 3}  # the last has fewer than n_neighbors
SETTINGS = {
    "n_neighbors": 5,
    "population_size": 17,  # does not divide by the number of classes
    "generations": 3,
    "tau": 0.1,
    "rho": 0.3,
    "plasma_fraction": 0.3,
    "memory_fraction": 0.5,
    "early_stopping": False,
    "dtype": "float64",
    "device": "cpu",
    "random_state": 0,
}


def minus_manhattan(a, b):
    """Works on one pair of vectors, and on tensors of pairs."""
    return -abs(a - b).sum(-1)


AFFINITIES = ["euclidean", "cosine", "inner_product", minus_manhattan]


def identity(rows):
    return rows


def run(network):
    def rows_through(rows):
        with torch.no_grad():
            return network(torch.from_numpy(rows)).numpy()

    return rows_through


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    y = rng.permutation(np.repeat(list(CLASS_SIZES), list(CLASS_SIZES.values())))
    return rng.random((len(y), N_FEATURES)), y, rng.random((4, N_FEATURES))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(N_FEATURES, 5), nn.Tanh(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)
    ).double()


def literal_domain(cells, clip):
    """The unit of mutation, and the bounds that cells are clipped to."""
    low, high = cells.min(axis=0), cells.max(axis=0)
    if low.min() >= 0 and high.max() <= 1:
        unit, low, high = 1.0, 0.0, 1.0
    else:
        unit = high - low
    if clip is None:
        return unit, None, None
    return (unit, low, high) if clip == "auto" else (unit, *clip)


def assert_agrees(rails, data, *, start=identity, maps=(identity,)):
    """Fit, respond, and compare all there is; give the literal responses, row by row.

    ``start`` runs rows to the space that cells live in, and ``maps`` cells to each layer.
    """
    X, y, antigens = data
    rails.fit(X, y)
    classes, y = np.unique(y, return_inverse=True)
    cells = start(X)
    unit, low, high = literal_domain(cells, rails.clip)

    def respond(antigen, number, layer, to_layer):
        return literal.respond_in_layer(
            cells,
            to_layer(cells),
            y,
            len(classes),
            to_layer(start(antigen[None]))[0],
            lambda cell: to_layer(cell[None])[0],
            lambda g: generation_uniforms(
                rails.seed_, number, g, rails.population_size, cells.shape[1]
            ),
            k=rails.n_neighbors,
            T=rails.population_size,
            G=rails.generations,
            tau=rails.tau_[layer],
            rho=rails.rho,
            delta_min=rails.delta_min,
            delta_max=rails.delta_max,
            unit=unit,
            low=low,
            high=high,
            affinity=rails.affinity,
            selection=rails.selection,
            crossover=rails.crossover,
            plasma_fraction=rails.plasma_fraction,
            memory_fraction=rails.memory_fraction,
            settling_lead=rails.engine_.layers[number].settling_lead
            if rails.early_stopping
            else None,
        )

    expected = [
        [respond(antigen, *at) for at in zip(range(len(maps)), rails.layers_, maps, strict=True)]
        for antigen in antigens
    ]
    response = rails.respond(antigens)
    _, indices = rails.kneighbors(antigens)
    n_forward = 0
    for number, layer in enumerate(rails.layers_):
        one_layer = [row[number] for row in expected]
        for found, row in zip(indices[layer], one_layer, strict=True):
            assert [[i for i in of_class if i >= 0] for of_class in found.tolist()] == row.neighbors
        for kind in ("plasma", "memory"):
            for suffix, values in (
                ("", "cells"),
                ("_labels", "labels"),
                ("_affinity", "affinities"),
            ):
                wanted = np.array([getattr(row, values)[getattr(row, kind)] for row in one_layer])
                got = getattr(response, kind + suffix)[layer]
                if suffix == "_labels":
                    np.testing.assert_array_equal(got, classes[wanted])
                else:
                    assert_close(got, wanted)
        for curve in ("affinity_curve", "class_curve"):
            assert_close(
                getattr(response, curve)[layer], [getattr(row, curve) for row in one_layer]
            )
        last = [row.n_generations for row in one_layer]
        assert response.n_generations[layer].tolist() == last
        n_forward += rails.population_size * sum(g + 1 for g in last)
    assert response.n_forward == n_forward

    scores, proba = (
        np.array(part)
        for part in zip(*(literal.consensus(row, len(classes)) for row in expected), strict=True)
    )
    assert_close(response.proba, proba)
    assert_close(rails.predict_proba(antigens), proba)
    decision = scores[:, 1] - scores[:, 0] if len(classes) == 2 else scores
    assert_close(rails.decision_function(antigens), decision, largest=scores.max())
    labels = classes[proba.argmax(axis=1)]
    if rails.affinity == "cosine":
        # The search and cells round a cosine in their own ways, so that the same example in two
        # classes need not tie.
        chosen = np.searchsorted(classes, response.labels)[:, None]
        is_best = np.take_along_axis(proba, chosen, axis=1)[:, 0] > proba.max(axis=1) - 1e-12
        labels = np.where(is_best, response.labels, labels)
    np.testing.assert_array_equal(response.labels, labels)
    np.testing.assert_array_equal(rails.predict(antigens), response.labels)
    return expected


def assert_close(got, wanted, *, largest=None):
    # An inner product, a feature or the difference of two scores may come close to 0.
    if largest is None:
        largest = np.abs(wanted, where=np.isfinite(wanted), out=np.zeros(np.shape(wanted))).max()
    np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-12 * largest)


@pytest.mark.parametrize("affinity", AFFINITIES)
@pytest.mark.parametrize("crossover", ["affinity", "uniform"])
@pytest.mark.parametrize("selection", ["global", "class_balanced"])
def test_every_operator_agrees(data, selection, crossover, affinity):
    rails = RAILSClassifier(affinity=affinity, selection=selection, crossover=crossover, **SETTINGS)
    assert_agrees(rails, data)


@pytest.mark.parametrize("affinity", AFFINITIES)
@pytest.mark.parametrize("selection", ["global", "class_balanced"])
def test_two_layers_of_a_network_agree(data, network, selection, affinity):
    rails = RAILSClassifier(
        network, layers=["1", "4"], selection=selection, affinity=affinity, **SETTINGS
    )
    assert_agrees(rails, data, maps=[run(network[:2]), run(network)])


@pytest.mark.parametrize("selection", ["global", "class_balanced"])
def test_cells_that_live_in_a_hidden_layer_agree(data, network, selection):
    rails = RAILSClassifier(
        network, start_layer="1", layers=["2", "output"], selection=selection, **SETTINGS
    )
    assert_agrees(rails, data, start=run(network[:2]), maps=[run(network[2:3]), run(network[2:])])


@pytest.mark.parametrize("clip", ["auto", None, (-5.0, 5.0)])
def test_data_of_any_range_agree(data, clip):
    X, y, antigens = data
    scale, shift = np.array([10.0, 1.0, 100.0, 0.1, 3.0, 0.0]), np.arange(6) - 3.0
    data = X * scale + shift, y, antigens * scale + shift
    assert_agrees(RAILSClassifier(clip=clip, **SETTINGS | {"tau": 5.0}), data)


@pytest.mark.parametrize("clip", [None, (0.2, 0.7)])
def test_other_bounds_for_data_in_the_unit_interval_agree(data, clip):
    assert_agrees(RAILSClassifier(clip=clip, **SETTINGS), data)


@pytest.mark.parametrize("crossover", ["affinity", "uniform"])
@pytest.mark.parametrize("selection", ["global", "class_balanced"])
@pytest.mark.parametrize("tau", [1e-5, 1e-2, 1e3, "scale"])
def test_any_temperature_agrees(data, tau, selection, crossover):
    settings = SETTINGS | {"tau": tau}
    assert_agrees(RAILSClassifier(selection=selection, crossover=crossover, **settings), data)


def test_a_class_that_dies_out_agrees(data):
    X, y, antigens = data
    X = X * np.where(y == "cat", 0.1, 1.0)[:, None]
    expected = assert_agrees(
        RAILSClassifier(**SETTINGS | {"tau": 0.02}), (X, y, 0.8 + 0.2 * antigens)
    )
    assert all(row.class_curve[-1, 1] == 0 for (row,) in expected)


@pytest.mark.parametrize("delta", [0.0, 0.125])
@pytest.mark.parametrize("affinity", ["euclidean", "inner_product", minus_manhattan])
def test_ties_agree(data, affinity, delta):
    # Eighths make all sums exact, so that rows and cells tie within and across classes.
    X, y, antigens = (np.round(a * 4) / 4 if a.dtype == float else a for a in data)
    X = X[:, :2].repeat(3, axis=1)
    rails = RAILSClassifier(
        affinity=affinity, delta_min=delta, delta_max=delta, **SETTINGS | {"rho": 0.1}
    )
    expected = assert_agrees(rails, (X, y, antigens))
    tied = [len(set(row.affinities[row.memory])) < len(row.memory) for (row,) in expected]
    assert any(tied)


@pytest.mark.parametrize("rho", [0.0, 1.0])
def test_mutation_of_nothing_or_everything_agrees(data, rho):
    assert_agrees(RAILSClassifier(**SETTINGS | {"rho": rho}), data)


def test_two_classes_agree(data):
    X, y, antigens = data
    assert_agrees(RAILSClassifier(**SETTINGS), (X, np.where(y == "dog", "cat", y), antigens))


def test_expansion_alone_agrees(data):
    assert_agrees(RAILSClassifier(**SETTINGS | {"generations": 0}), data)


def test_a_share_that_floats_overestimate_agrees(data):
    # 0.07 * 100 is 7.000000000000001.
    settings = SETTINGS | {"population_size": 100, "plasma_fraction": 0.07}
    assert_agrees(RAILSClassifier(**settings), data)


def test_an_early_end_agrees(data):
    X, y, antigens = data
    # One class is far from the others: near it, the clones settle the vote.
    antigens = np.concatenate([antigens, antigens + 3])
    settings = SETTINGS | {"early_stopping": True, "generations": 6}
    expected = assert_agrees(
        RAILSClassifier(**settings), (X + 3.0 * (y == "bee")[:, None], y, antigens)
    )
    assert {-1, 1, 2} <= {row.n_generations for (row,) in expected}


def powers_of_ten(low, high):
    return st.floats(low, high).map(lambda exponent: 10.0**exponent)


@st.composite
def random_settings(draw):
    """A classifier, data, and the map to its layer.

    Ties of different cells are exact in both computations only where all sums are: on a grid of
    eighths, for affinities that add no more than their roundings to it.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n_classes, n_features = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    affinity = draw(st.sampled_from(AFFINITIES))
    kinds = ["unit", "any", "constant", "outlier"]
    if affinity == "cosine":
        n_features += 1  # of one feature, all are 1 or -1, but for their last bit
    else:
        kinds += ["grid", "far"]
    kind = draw(st.sampled_from(kinds))
    n = n_classes * draw(st.integers(1, 5)) + draw(st.integers(0, 4))
    y = rng.permutation(np.arange(n) % n_classes if draw(st.booleans()) else np.arange(n) // 5 % 4)
    rows = rng.random((n + 2, n_features))
    # Smaller changes are lost in the rounding of a cosine.
    deltas = st.just(0.0) | st.floats(1e-3, 1)
    delta = sorted(draw(st.tuples(deltas, deltas)))
    largest = 1.0
    if kind == "grid":
        rows, delta = np.round(rows * 8) / 8, [draw(st.sampled_from([0.0, 0.125]))] * 2
        rows *= 2.0 ** draw(st.integers(-20, 20))
    elif kind != "unit":
        largest = draw(powers_of_ten(-70, 70))
        rows = (rows - 0.5) * largest
        if kind == "constant":
            rows[:, 0] = largest
        elif kind == "outlier":
            rows[0] *= 1e5
        elif kind == "far":
            rows += 1e5 * largest
    if draw(st.booleans()):  # duplicates, in several classes
        rows[rng.integers(n, size=n // 2)] = rows[rng.integers(n, size=n // 2)]
    X, antigens = rows[:n], rows[n:]
    if draw(st.booleans()):  # an example as input
        antigens[0] = X[0]
    spread = float(np.abs(rows).max()) or 1.0
    in_units = spread**2 if affinity == "inner_product" else 1 if affinity == "cosine" else spread
    relative = powers_of_ten(-3, 1).map(lambda tau: tau * in_units)
    clips = ["auto", None] + [(0.25 * largest, 0.75 * largest)] * (kind == "unit")
    rails = RAILSClassifier(
        n_neighbors=draw(st.integers(1, n)),
        population_size=len(np.unique(y)) + draw(st.integers(0, 12)),
        generations=draw(st.integers(0, 4)),
        tau=draw(relative | powers_of_ten(-300, 300) | st.just("scale")),
        rho=draw(st.floats(0, 1)),
        delta_min=delta[0],
        delta_max=delta[1],
        plasma_fraction=draw(st.floats(0.01, 1)),
        memory_fraction=draw(st.floats(0.01, 1)),
        affinity=affinity,
        selection=draw(st.sampled_from(["global", "class_balanced"])),
        crossover=draw(st.sampled_from(["affinity", "uniform"])),
        # Where an element is clipped, cosines of different cells may be one.
        clip=None if affinity == "cosine" else draw(st.sampled_from(clips)),
        early_stopping=draw(st.booleans()),
        dtype="float64",
        device="cpu",
        random_state=draw(st.integers(0, 2**31 - 1)),
    )
    return rails, (X, y, antigens)


def agree_on_random_settings(n):
    tried = []

    @settings(deadline=None, max_examples=n, database=None, suppress_health_check=list(HealthCheck))
    @given(random_settings())
    def agree(problem):
        tried.append(1)
        assert_agrees(*problem)

    agree()
    return len(tried)


@pytest.mark.filterwarnings("ignore:X has values")
def test_random_settings_agree():
    agree_on_random_settings(60)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:X has values")
def test_thousands_of_random_settings_agree(report):
    report("numbers: settings of the engine against float64", agree_on_random_settings(3000))
