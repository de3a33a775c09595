import pickle
import re
import warnings

import joblib
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn

from sklearn_rails import RAILSClassifier, ThreatScorer
from sklearn_rails.immune import Arbitration, Triage, compiled, engine, maturation
from sklearn_rails.immune.domain import Domain
from sklearn_rails.immune.operators import cross_over, mutate_
from sklearn_rails.neighbors import ExactNeighbors


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    return rng.random((60, 5)), np.arange(60) % 3, rng.random((8, 5))


def fit(data, **parameters):
    settings = {"layers": "1", "n_neighbors": 4, "population_size": 20, "random_state": 0}
    settings["dtype"] = "float64"
    network = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for parameter in network.parameters():
            parameter.uniform_(-1, 1)
    return RAILSClassifier(network, **settings | parameters).fit(*data[:2])


def test_an_engine_with_another_seed_is_that_of_a_classifier_with_it(data):
    first, second = (fit(data, random_state=seed, rho=0.5) for seed in (0, 1))
    expected = [rails.engine_.scores(data[2]) for rails in (first, second)]
    assert not np.array_equal(*expected)
    assert_array_equal(first.engine_.with_seed(second.seed_).scores(data[2]), expected[1])
    assert_array_equal(first.engine_.scores(data[2]), expected[0])


@pytest.mark.parametrize("start_layer", [None, "0"])
def test_half_precision_changes_no_response(data, start_layer):
    plain, half = (
        fit(data, start_layer=start_layer, algorithm=ExactNeighbors(storage))
        for storage in ("memory", "float16")
    )
    # Features that are computed anew, in another batch, may differ in the last bit.
    assert half.tau_ == pytest.approx(plain.tau_, rel=1e-12)
    scores = (rails.decision_function(data[2]) for rails in (half, plain))
    assert_allclose(*scores, rtol=1e-12)


def test_a_response_is_described_in_a_line(data):
    response = fit(data, generations=0, early_stopping=False).respond(data[2])
    assert (
        repr(response) == "ImmuneResponse(8 samples, layers ['1'], 160 cells through the network)"
    )


@pytest.mark.parametrize("bounds", [(None, None), (0.25, 0.75), (torch.rand(3) / 2, torch.ones(3))])
def test_one_pass_crosses_over_and_mutates_as_the_operators_do(monkeypatch, bounds):
    monkeypatch.setattr(compiled, "_compiled", lambda: compiled._breed)
    cells, q = torch.rand(4, 6, 3), torch.rand(4, 6)
    first, second = torch.randint(6, (2, 4, 6))
    uniforms, steps, domain = torch.rand(6, 3), torch.randn(6, 3), Domain(1.0, *bounds)
    expected = mutate_(cross_over(cells, first, second, q, uniforms), steps, domain)
    out = torch.empty_like(cells)
    found = compiled.breed(cells, first, second, q, uniforms, steps, domain, out)
    assert found is out
    assert torch.equal(out, expected)


def test_every_kind_of_population_is_compiled_before_the_first_one(monkeypatch):
    shapes = []

    def breed(cells, first, second, q, uniforms, steps, low, high, out):
        tensors = [cells, first, second, q, uniforms, steps, out]
        assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)
        assert (low, high) == (0.0, 1.0)
        shapes.append([tuple(tensor.shape) for tensor in tensors])

    monkeypatch.setattr(compiled, "_compiled", lambda: breed)
    compiled.prepare_compiler(torch.rand(9, 3), 6, Domain(1.0, 0.0, 1.0))
    for n, found in zip((1, 3), shapes, strict=True):
        assert found == [(n, 6, 3)] + [(n, 6)] * 3 + [(6, 3)] * 2 + [(n, 6, 3)]

    def fail():
        raise RuntimeError("\nno g++ found\nand more")

    monkeypatch.setattr(compiled, "_compiled", fail)
    with pytest.raises(ValueError, match="compile=True needs.*RuntimeError: no g\\+\\+ found$"):
        compiled.prepare_compiler(torch.rand(9, 3), 6, Domain(1.0, 0.0, 1.0))


@pytest.mark.parametrize("early_stopping", [False, True])
def test_a_response_does_not_depend_on_blocks_or_on_the_compiler(data, monkeypatch, early_stopping):
    monkeypatch.setattr(compiled, "_compiled", lambda: compiled._breed)
    expected = vars(fit(data, early_stopping=early_stopping).respond(data[2]))
    monkeypatch.setattr(maturation, "CACHE_BYTES", 3 * 20 * 5 * 8)
    monkeypatch.setattr(engine, "CPU_BYTES", 5 * 20 * 5 * 8)
    for compile in (False, True):
        rails = fit(data, early_stopping=early_stopping, compile=compile)
        for name, value in vars(rails.respond(data[2])).items():
            for part, whole in zip(*map(in_layer, (value, expected[name])), strict=True):
                assert_array_equal(part, whole)


def in_layer(value):
    return list(value.values()) if isinstance(value, dict) else [value]


@pytest.mark.parametrize("gate", [None, Triage(), Arbitration(0.3)])
@pytest.mark.parametrize("method", ["scores", "respond"])
def test_every_sample_and_population_is_counted_once(data, monkeypatch, gate, method):
    counts = {}

    class Counter:
        def __init__(self, n_samples, n_layers, verbose):
            counts.update(total=n_samples, layers=n_layers, verbose=verbose, done=0, decided=0)

        def add_samples(self, n):
            counts["done"] += n

        def add_populations(self, n):
            counts["decided"] += n

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            pass

    scorer = ThreatScorer(method="distance", alpha=0.5)
    rails = fit(data, gate=gate, threat_scorer=scorer if gate is not None else None)
    monkeypatch.setattr(engine, "Progress", Counter)
    monkeypatch.setattr(engine, "CPU_BYTES", 3 * 20 * 5 * 8)
    alarms = np.arange(8) % 2 == 0
    _, screening = rails.engine_.screen(torch.from_numpy(data[2]), alarms)
    n_bred = int(screening.bred.sum())
    assert n_bred == 8 if gate is None else 0 < n_bred < 8
    args = (data[2],) if method == "scores" else (data[2], rails.classes_)
    found = getattr(rails.engine_, method)(*args, alarms=alarms, verbose=1)
    if method == "respond":
        assert (found.p_values is None) == (not isinstance(gate, Arbitration))
    decided = n_bred if method == "scores" else 8
    assert counts == {"total": 8, "layers": 1, "verbose": 1, "done": 8, "decided": decided}


@pytest.mark.parametrize("storage", ["memory", "float16"])
def test_remembered_cells_are_neighbours_like_training_samples(data, storage):
    X, y, Q = data
    rails = fit(data, algorithm=ExactNeighbors(storage), n_neighbors=100, gate=None)
    cells = np.float64(Q[:2] + 0.01)
    bank = rails.engine_.memory["1"].with_cells(cells, np.array([2, 0]))
    remembering = rails.engine_.with_memory({"1": bank})
    ((affinity, index),) = remembering.kneighbors(Q)
    longer = fit((np.concatenate([X, cells]), np.append(y, [2, 0]), Q), n_neighbors=100)
    ((expected, places),) = longer.engine_.kneighbors(Q)
    assert_array_equal(index, places)
    assert_allclose(affinity, expected, rtol=1e-9, atol=1e-15)
    assert len(rails.engine_.memory["1"]) == 0
    flock = remembering.layers[0].flock(rails.feature_map_(torch.from_numpy(Q))["1"])
    found = remembering.layers[0].take_cells(flock.index.clamp(min=0))
    assert_array_equal(found, np.concatenate([X, cells])[index.clip(min=0)])


@pytest.mark.parametrize("layers", ["input", "1"])
@pytest.mark.parametrize("algorithm", ["auto", "kd_tree", ExactNeighbors("float16")])
def test_a_pickled_engine_answers_alike(data, layers, algorithm):
    rails = fit(data, layers=layers, algorithm=algorithm)
    bank = rails.engine_.memory[layers].with_cells(data[2][:2], np.array([2, 0]))
    expected = rails.engine_.with_memory({layers: bank})
    loaded = pickle.loads(pickle.dumps(expected))
    assert_array_equal(loaded.scores(data[2]), expected.scores(data[2]))
    for part, whole in zip(loaded.kneighbors(data[2]), expected.kneighbors(data[2]), strict=True):
        assert_array_equal(part, whole)


def test_fit_shows_how_many_samples_it_has_indexed(data, capsys):
    fit(data, verbose=1)
    assert re.search(r"fit: 100%.* 60/60 .*sample", capsys.readouterr().err)
    fit(data)
    assert capsys.readouterr().err == ""


def test_a_backend_of_processes_is_not_used_and_one_warning_says_so(data):
    engine = fit(data).engine_
    with joblib.parallel_config("loky"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for n_jobs in (1, 2, 2):
            engine.scores(data[2], n_jobs=n_jobs)
    assert ["LokyBackend is not used" in str(warning.message) for warning in caught] == [True]
    with joblib.parallel_config("threading"), warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(data).engine_.scores(data[2], n_jobs=2)


def test_a_sample_whose_p_value_is_alpha_is_bred(data):
    rails = fit(data, gate=Arbitration(0.3))
    p_values = rails.respond(data[2]).p_values
    rails.engine_.gate.alpha = float(np.sort(p_values)[4])
    bred = rails.engine_.screen(torch.from_numpy(data[2]), None)[1].bred
    assert_array_equal(bred, p_values <= rails.engine_.gate.alpha)
