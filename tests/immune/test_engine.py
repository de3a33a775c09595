import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn

from sklearn_rails import RAILSClassifier
from sklearn_rails.immune import compiled
from sklearn_rails.immune.domain import Domain
from sklearn_rails.immune.operators import cross_over, mutate_
from sklearn_rails.neighbors import ExactNeighbors


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    return rng.random((60, 5)), np.arange(60) % 3, rng.random((8, 5))


def fit(data, **parameters):
    settings = {"n_neighbors": 4, "population_size": 20, "random_state": 0, "dtype": "float64"}
    network = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for parameter in network.parameters():
            parameter.uniform_(-1, 1)
    return RAILSClassifier(network, layers=["1"], **settings | parameters).fit(*data[:2])


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
