import pickle

import pytest
import torch
from numpy.testing import assert_array_equal
from sklearn import config_context

from sklearn_rails import RAILSClassifier
from sklearn_rails.features.device import memory_budget, resolve_device


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
