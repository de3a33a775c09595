"""The loop of generations on a GPU: on a faked one everywhere, on a real one where there is one."""

import functools
import pickle

import numpy as np
import pytest
import torch
from conftest import ConvNet
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.base import clone
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sklearn_rails import DkNNClassifier, RAILSClassifier, ThreatScorer
from sklearn_rails.features import follow, mapping
from sklearn_rails.immune import Arbitration
from sklearn_rails.immune.domain import Domain
from sklearn_rails.immune.maturation import Schedule, mature
from sklearn_rails.immune.random import Mutation, RandomStream
from sklearn_rails.neighbors import resolve_affinity
from sklearn_rails.sensing import DETECTORS

IMAGE = (1, 8, 8)
SHAPE = (40, 64)


def breed(device, **changes):
    """Breed populations of 6 rows through a network, as RAILSClassifier does."""
    network = mapping.FeatureMap(
        ConvNet(), "conv2", input_shape=IMAGE, device="cpu", dtype="float32", batch_size=32
    )
    network._run_on(device)
    cells = torch.rand(6, *SHAPE, device=device)
    antigens = torch.rand(6, 8 * 64, device=device)
    settings = {"selection": "global", "crossover": "affinity", "early_stopping": False}
    settings |= changes

    return mature(
        cells,
        torch.arange(40, device=device) // 4,
        antigens,
        affinities=functools.partial(
            network.affinities, layer="conv2", affinity=resolve_affinity("euclidean")
        ),
        stream=RandomStream(0, 0, SHAPE, Mutation(0.2, 0.05, 0.15), 1.0),
        tau=0.5,
        settling_lead=2.0,
        schedule=Schedule(population_size=40, generations=3, n_plasma=2, n_memory=10, **settings),
        domain=Domain(1.0, np.zeros(64), np.ones(64)).on(cells),
        n_classes=10,
        keep_cells=True,
    )


class NoWaiting(TorchDispatchMode):
    """Complain of operations that bring numbers from the device to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        devices = {t.device.type for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        if "cuda" in devices and torch.is_tensor(result) and result.device.type == "cpu":
            raise AssertionError(f"{func} waits for the device")
        return result


def take(tensor, index):
    """Index by slices, integers and None: what torch's own cannot do without a CUDA library."""
    parts = index if isinstance(index, tuple) else (index,)
    dim = 0
    for position, part in enumerate(parts):
        if part is None:
            tensor = tensor.unsqueeze(dim)
        elif part is Ellipsis:
            dim = tensor.ndim - sum(later is not None for later in parts[position + 1 :])
            continue
        elif isinstance(part, slice):
            start, stop, step = part.indices(tensor.shape[dim])
            assert step == 1
            tensor = tensor.narrow(dim, start, stop - start)
        elif isinstance(part, int):
            tensor = tensor.select(dim, part)
            continue
        else:
            raise AssertionError(f"indexing by {type(part).__name__} may wait for the device")
        dim += 1
    return tensor


def put(tensor, index, value):
    place = take(tensor, index)
    assert (value.device, value.shape) == (place.device, place.shape)


@pytest.fixture
def faked(monkeypatch):
    """Tensors that have a device and a shape, but no numbers."""
    monkeypatch.setattr(FakeTensor, "__getitem__", take)
    monkeypatch.setattr(FakeTensor, "__setitem__", put)
    # Reads every weight.
    monkeypatch.setattr(follow, "checksum", lambda *_: ("", ""))
    # To ask for a number, or for a shape that depends on numbers, fails; so does an operation on
    # tensors of two devices.
    with FakeTensorMode(allow_non_fake_inputs=True), NoWaiting():
        yield torch.device("cuda:0")


@pytest.mark.parametrize("selection", ["global", "class_balanced"])
@pytest.mark.parametrize("crossover", ["affinity", "uniform"])
def test_a_generation_neither_mixes_devices_nor_waits_for_the_host(faked, selection, crossover):
    population = breed(faked, selection=selection, crossover=crossover)
    for tensor in vars(population).values():
        assert tensor.device == faked


def test_the_check_sees_what_it_is_for(faked):
    x = torch.rand(3, device=faked)
    with pytest.raises(AssertionError, match="waits"):
        x.cpu()
    with pytest.raises(RuntimeError):  # and so does .item()
        bool(x.sum() > 0)
    with pytest.raises(AssertionError, match="indexing by FakeTensor"):
        x[x > 0]
    with pytest.raises(RuntimeError, match="device"):
        x + torch.rand(3)
    with pytest.raises(AssertionError, match="waits"):
        breed(faked, early_stopping=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("early_stopping", [True, False])
def test_predictions_on_a_gpu_equal_those_on_the_cpu(conv_net, digits, early_stopping):
    X, y = digits
    rails = RAILSClassifier(
        conv_net,
        layers=["conv1", "conv2"],
        input_shape=IMAGE,
        population_size=50,
        early_stopping=early_stopping,
        dtype="float64",
        random_state=0,
    )
    dknn = DkNNClassifier(conv_net, layers="conv2", input_shape=IMAGE, random_state=0)
    arbitrating = clone(rails).set_params(gate=Arbitration(0.2))
    for estimator in (rails, arbitrating, dknn):
        on_host = clone(estimator).set_params(device="cpu").fit(X[:300], y[:300])
        on_gpu = clone(estimator).set_params(device="cuda").fit(X[:300], y[:300])
        assert on_gpu.device_.type == "cuda"
        assert_array_equal(on_gpu.predict(X[300:400]), on_host.predict(X[300:400]))
        tensor = torch.tensor(X[300:400], device="cuda")
        assert_array_equal(on_gpu.predict(tensor), on_host.predict(X[300:400]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", DETECTORS)
def test_threat_scores_on_a_gpu_equal_those_on_the_cpu(conv_net, digits, method):
    X, y = digits
    scorer = ThreatScorer(
        conv_net,
        layers=["conv1", "conv2"],
        method=method,
        input_shape=IMAGE,
        dtype="float64",
        random_state=0,
    )
    on_host = clone(scorer).set_params(device="cpu").fit(X[:300], y[:300])
    on_gpu = clone(scorer).set_params(device="cuda").fit(X[:300], y[:300])
    assert_allclose(on_gpu.transform(X[300:]), on_host.transform(X[300:]), rtol=1e-6)
    again = pickle.loads(pickle.dumps(on_gpu))
    assert_allclose(again.transform(X[300:]), on_host.transform(X[300:]), rtol=1e-6)
