import pickle
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from sklearn import config_context
from torch import nn

from sklearn_rails import DkNNClassifier, RAILSClassifier
from sklearn_rails._blocks import memory_budget
from sklearn_rails.features.device import (
    DeviceOutOfMemoryError,
    is_out_of_memory,
    resolve_device,
)
from sklearn_rails.immune import layer


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 4000))


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def test_auto_takes_the_current_gpu_where_there_is_one(two_gpus):
    assert resolve_device("auto") == torch.device("cuda", 1)
    assert resolve_device("cuda") == torch.device("cuda", 1)
    assert resolve_device("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(ValueError, match=r"device='cuda:2' .* only 2 CUDA"):
        resolve_device("cuda:2")
    assert memory_budget(torch.device("cuda", 0)) == 500


def test_nothing_else_is_taken_silently(no_gpu):
    assert resolve_device("auto") == torch.device("cpu")
    for device in ("cuda", "cuda:0", "mps", "xpu", "gpu", "vulkan"):
        with pytest.raises(ValueError, match=f"device='{device}' cannot be used"):
            resolve_device(device)


def test_the_budget_on_a_cpu_is_scikit_learns():
    with config_context(working_memory=3):
        assert memory_budget(torch.device("cpu")) == 3 * 2**20


def test_what_was_fitted_on_a_gpu_loads_without_one(no_gpu, digits, conv_net):
    X, y = digits
    rails = RAILSClassifier(conv_net, layers="conv1", input_shape=(1, 8, 8), random_state=0)
    rails.fit(X[:100], y[:100])
    expected = rails.predict(X[100:110])
    rails._features._device_name = "cuda:1"
    with pytest.warns(UserWarning, match="'cuda:1' cannot be used.*runs on the CPU"):
        loaded = pickle.loads(pickle.dumps(rails))
    assert loaded.device_ == torch.device("cpu")
    assert_array_equal(loaded.predict(X[100:110]), expected)


def test_too_little_memory_is_recognized_on_every_device():
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        torch.empty(2**55, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    for error in (DeviceOutOfMemoryError("x"), MemoryError(), RuntimeError("MPS out of memory")):
        assert is_out_of_memory(error)
    for error in (RuntimeError("shapes do not fit"), ValueError("out of memory"), KeyError()):
        assert not is_out_of_memory(error)


def test_batches_and_populations_beyond_memory_are_halved_or_explained(monkeypatch):
    X, y = np.random.default_rng(0).random((60, 4)), np.arange(60) % 3
    plain = torch.cat

    def scarce(tensors, dim=0):
        if sum(len(t) for t in tensors) > 1000:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")
        return plain(tensors, dim)

    monkeypatch.setattr(torch, "cat", scarce)
    dknn = DkNNClassifier(nn.Linear(4, 3), batch_size=10**6, random_state=0).fit(X, y)
    assert dknn.predict(X).shape == (60,)
    rails = RAILSClassifier(population_size=10**6, random_state=0).fit(X, y)
    monkeypatch.setattr(layer, "mature", lambda *_, **__: scarce([X] * 100))
    with pytest.raises(MemoryError, match="smaller population_size"):
        rails.predict(X[:1])


class Draws(nn.Module):
    """Draws from every global generator, without using the numbers."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(12, 3)

    def forward(self, x):
        torch.rand(1000), np.random.rand(), random.random()
        return self.inner(x)


def global_state():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


def test_threads_that_predict_leave_the_global_random_state():
    X = np.random.default_rng(0).random((200, 12))
    dknn = DkNNClassifier(Draws(), random_state=0, n_neighbors=5, batch_size=4)
    dknn.fit(X, np.arange(200) % 3)
    before = global_state()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: dknn.predict(X[:100]), range(24)))
    assert global_state() == before


def test_a_network_that_draws_nothing_leaves_other_threads_their_numbers():
    class Watches(nn.Linear):
        def forward(self, x):
            other_thread()
            return super().forward(x)

    other_thread = int
    X = np.random.default_rng(0).random((20, 12))
    dknn = DkNNClassifier(Watches(12, 3), layers="output", random_state=0, n_neighbors=5)
    dknn.fit(X, np.arange(20) % 2)
    other_thread = lambda: torch.rand(1)  # noqa: E731 (as if training went on elsewhere)
    torch.manual_seed(0)
    expected = torch.rand(3)[2]
    torch.manual_seed(0)
    dknn.predict(X[:1])
    dknn.predict(X[:1])
    assert torch.rand(1) == expected
