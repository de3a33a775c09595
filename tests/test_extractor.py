import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import joblib
import numpy as np
import pytest
import torch
from conftest import ConvNet
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from skorch import NeuralNetClassifier
from torch import nn
from torch.nn import functional as F

from sklearn_rails import FrozenModule, TorchFeatureExtractor

IMAGE = (1, 8, 8)


def expected_layers(net, X):
    """Compute the layers of ConvNet as its forward does, in eval mode."""
    net = copy.deepcopy(net).eval()
    x = torch.tensor(np.asarray(X)).reshape(-1, *IMAGE)
    with torch.no_grad():
        conv1 = net.conv1(x)
        conv2 = net.conv2(F.relu(net.norm1(conv1)))
        fc = net.fc(F.max_pool2d(F.relu(conv2), 2).flatten(1))
    return {"conv1": conv1.flatten(1), "conv2": conv2.flatten(1), "fc": fc}


@pytest.fixture
def images(digits):
    return digits[0][:150]


def test_layers_are_those_of_the_network_with_functional_operations(conv_net, images):
    expected = expected_layers(conv_net, images)
    for name, features in expected.items():
        extractor = TorchFeatureExtractor(conv_net, layers=name, input_shape=IMAGE)
        assert_allclose(extractor.fit_transform(images), features, rtol=1e-4, atol=1e-5)
    extractor = TorchFeatureExtractor(conv_net, layers=["conv2", "fc"], input_shape=IMAGE)
    both = torch.cat([expected["conv2"], expected["fc"]], dim=1)
    assert_allclose(extractor.fit_transform(images), both, rtol=1e-4, atol=1e-5)
    output = TorchFeatureExtractor(conv_net, input_shape=IMAGE)
    assert_allclose(output.fit_transform(images), expected["fc"], rtol=1e-4, atol=1e-5)


def test_the_network_stops_at_the_last_layer_asked_for(conv_net, images):
    ran = []
    conv_net.fc.register_forward_hook(lambda *_: ran.append("fc"))
    extractor = TorchFeatureExtractor(conv_net, layers="conv1", input_shape=IMAGE).fit(images)
    ran.clear()
    extractor.transform(images)
    assert ran == []
    TorchFeatureExtractor(conv_net, input_shape=IMAGE).fit_transform(images)
    assert ran


def test_network_and_global_random_state_are_left_as_they_were(conv_net, images):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = conv_net

        def forward(self, x):
            torch.rand(3)
            return self.net(x)

    net = Noisy()
    net.train()
    net.net.conv2.eval()
    before = copy.deepcopy(net.state_dict())
    modes = [m.training for m in net.modules()]
    hooks = [len(m._forward_hooks) for m in net.modules()]
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1]
    TorchFeatureExtractor(net, layers="net.conv2", input_shape=IMAGE).fit_transform(images)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert_array_equal(np.random.get_state()[1], numpy_state)
    assert [m.training for m in net.modules()] == modes
    assert [len(m._forward_hooks) for m in net.modules()] == hooks
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
def test_batch_size_changes_no_feature(conv_net, images, batch_size):
    whole = TorchFeatureExtractor(conv_net, layers="fc", input_shape=IMAGE, dtype="float64")
    cut = clone(whole).set_params(batch_size=batch_size)
    assert_allclose(cut.fit_transform(images), whole.fit_transform(images), rtol=1e-12)


def test_features_do_not_depend_on_the_batch(conv_net, images):
    extractor = TorchFeatureExtractor(conv_net, layers="conv2", input_shape=IMAGE, batch_size=32)
    together = extractor.fit_transform(images)
    alone = np.concatenate([extractor.transform(row[None]) for row in images])
    assert_array_equal(together, alone)


def test_images_may_come_flat_or_in_shape_as_arrays_or_tensors(conv_net, images):
    flat = TorchFeatureExtractor(conv_net, layers="fc", input_shape=IMAGE).fit(images)
    shaped = TorchFeatureExtractor(conv_net, layers="fc").fit(images.reshape(-1, *IMAGE))
    assert shaped.n_features_in_ == flat.n_features_in_ == 64
    assert shaped.input_shape_ == IMAGE
    expected = flat.transform(images)
    assert_array_equal(shaped.transform(images), expected)
    given = shaped.transform(torch.tensor(images).reshape(-1, *IMAGE))
    assert isinstance(given, torch.Tensor)
    assert_array_equal(given, expected)
    reversed_rows = images[::-1]
    assert_array_equal(flat.transform(reversed_rows), expected[::-1])


def test_transform_works_without_fit(conv_net, images):
    extractor = TorchFeatureExtractor(conv_net, layers="fc", input_shape=IMAGE)
    assert_array_equal(extractor.transform(images), clone(extractor).fit_transform(images))
    assert TorchFeatureExtractor().transform(images).shape == images.shape


def test_frames_and_names_out(conv_net, images):
    extractor = TorchFeatureExtractor(conv_net, layers="fc", input_shape=IMAGE)
    frame = extractor.set_output(transform="pandas").fit_transform(images)
    assert list(frame.columns[:2]) == ["torchfeatureextractor0", "torchfeatureextractor1"]


def test_a_fitted_skorch_net_is_a_network(images, digits):
    net = NeuralNetClassifier(
        ConvNet, criterion=nn.CrossEntropyLoss, max_epochs=1, train_split=None, verbose=0
    )
    net.fit(images.reshape(-1, *IMAGE).copy(), digits[1][:150])
    given = TorchFeatureExtractor(net, layers="fc", input_shape=IMAGE).fit_transform(images)
    module = TorchFeatureExtractor(net.module_, layers="fc", input_shape=IMAGE)
    assert_array_equal(given, module.fit_transform(images))
    assert "Conv2d" not in repr(TorchFeatureExtractor(net))
    # Inside an estimator it is shared; by itself scikit-learn's clone unfits it.
    extractor = clone(TorchFeatureExtractor(net, layers="fc", input_shape=IMAGE))
    assert extractor.module is net
    assert_array_equal(extractor.fit_transform(images), given)
    loaded = pickle.loads(pickle.dumps(extractor))
    assert isinstance(loaded.module, FrozenModule)
    assert_array_equal(loaded.transform(images), given)
    with pytest.raises(NotFittedError, match=r"module is a skorch net .* wrap the fitted net"):
        TorchFeatureExtractor(clone(net), input_shape=IMAGE).fit(images)
    with pytest.raises(NotFittedError, match="not fitted"):
        FrozenModule(clone(net).initialize())


def test_clone_shares_a_bare_network_and_pickle_brings_it_back(conv_net, images):
    extractor = TorchFeatureExtractor(conv_net, layers="fc", input_shape=IMAGE).fit(images)
    assert clone(extractor).module is conv_net
    assert isinstance(copy.deepcopy(extractor).module, ConvNet)
    loaded = pickle.loads(pickle.dumps(extractor))
    assert isinstance(loaded.module, ConvNet)
    assert_array_equal(loaded.transform(images), extractor.transform(images))


def test_repr_does_not_print_a_network(conv_net):
    for network in (conv_net, FrozenModule(conv_net)):
        extractor = TorchFeatureExtractor(network)
        assert "Conv2d" not in repr(extractor) + str(extractor)
        assert "ConvNet" in repr(extractor)
        assert extractor.module is network


def test_parameters_trained_further_are_seen_and_pickled(conv_net, images):
    frozen = FrozenModule(conv_net)
    first = joblib.hash(frozen)
    pickle.dumps(frozen)
    with torch.no_grad():
        conv_net.fc.bias += 1
    assert joblib.hash(frozen) != first
    loaded = pickle.loads(pickle.dumps(frozen))
    assert torch.equal(loaded.module.fc.bias, conv_net.fc.bias)


def test_frozen_module_hashes_by_content_and_is_shared(conv_net):
    frozen = FrozenModule(conv_net)
    assert clone(frozen) is frozen
    assert FrozenModule(frozen).module is conv_net
    twin = FrozenModule(copy.deepcopy(conv_net))
    loaded = pickle.loads(pickle.dumps(frozen))
    assert joblib.hash(frozen) == joblib.hash(twin) == joblib.hash(loaded)
    with pytest.raises(TypeError, match="module must be a torch.nn.Module"):
        FrozenModule("resnet18")


def test_a_fitted_estimator_pickles_its_network_once(images):
    wide = nn.Sequential(nn.Linear(64, 2000), nn.ReLU(), nn.Linear(2000, 10))
    extractor = TorchFeatureExtractor(wide, layers="2").fit(images)
    n_bytes = sum(p.numel() * 4 for p in wide.parameters())
    saved = pickle.dumps(extractor)
    assert len(saved) < 1.1 * n_bytes
    loaded = pickle.loads(saved)
    assert loaded._features._followed.module is loaded.module


def test_threads_may_share_an_extractor(conv_net, images):
    extractor = TorchFeatureExtractor(conv_net, layers=["conv1", "fc"], input_shape=IMAGE)
    extractor.fit(images)
    expected = extractor.transform(images)
    with ThreadPoolExecutor(8) as pool:
        for given in pool.map(lambda _: extractor.transform(images), range(32)):
            assert_array_equal(given, expected)


def test_a_failed_fit_leaves_no_trace(conv_net, images):
    extractor = TorchFeatureExtractor(conv_net, layers="fc", input_shape=IMAGE).fit(images)
    expected = extractor.transform(images)
    before = dict(vars(extractor))
    with pytest.raises(ValueError, match="features"):
        extractor.fit(images[:, :60])
    assert vars(extractor) == before
    assert_array_equal(extractor.transform(images), expected)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(64, 2)

    def forward(self, x):
        return [self.inner(x), x]


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(64, 64)
        self.unused = nn.Linear(1, 1)

    def forward(self, x):
        return self.inner(self.inner(x))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"layers": "conv9"}, r"layers='conv9'.*does not have.*'conv1', 'norm1', 'conv2', 'fc'"),
        ({"layers": []}, "at least one layer"),
        ({"layers": ["fc", "fc"]}, "only once"),
        ({"input_shape": (1, 8, 9)}, r"input_shape=\(1, 8, 9\) holds 72 values.*64"),
        ({"input_shape": (4, 4, 4)}, "does not take samples of shape"),
        ({"input_shape": None}, "does not take samples of shape"),
        ({"device": "cuda:99"}, "device='cuda:99' cannot be used"),
        ({"device": "tpu"}, "device='tpu' cannot be used"),
        ({"dtype": "float16"}, "'dtype' parameter"),
        ({"batch_size": 0}, "'batch_size' parameter"),
        ({"module": Pair(), "input_shape": None}, "layers='output': the network gives a list"),
        ({"module": Twice(), "layers": "inner", "input_shape": None}, "runs 2 times"),
        ({"module": Twice(), "layers": "unused", "input_shape": None}, "runs 0 times"),
    ],
)
def test_invalid_parameters_raise(conv_net, images, params, message):
    extractor = TorchFeatureExtractor(conv_net, input_shape=IMAGE).set_params(**params)
    with pytest.raises(ValueError, match=message):
        extractor.fit(images)


def test_invalid_networks_raise():
    with pytest.raises(TypeError, match="module must be .* got int"):
        TorchFeatureExtractor(3).fit(np.ones((2, 2)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_cuda_raises(conv_net, images):
    with pytest.raises(ValueError, match="device='cuda' cannot be used: torch sees no CUDA"):
        TorchFeatureExtractor(conv_net, input_shape=IMAGE, device="cuda").fit(images)


def test_other_image_sizes_nan_and_infinity_are_refused(conv_net, images):
    shaped = images.reshape(-1, *IMAGE)
    extractor = TorchFeatureExtractor(conv_net).fit(shaped)
    with pytest.raises(ValueError, match=r"samples of shape \(1, 4, 16\).*fitted on .*\(1, 8, 8\)"):
        extractor.transform(images.reshape(-1, 1, 4, 16))
    with pytest.raises(ValueError, match=r"input_shape=\(1, 8, 8\) was given"):
        TorchFeatureExtractor(conv_net, input_shape=IMAGE).fit(images.reshape(-1, 1, 4, 16))
    for bad in (np.nan, np.inf):
        spoilt = shaped.copy()
        spoilt[3, 0, 2, 2] = bad
        with pytest.raises(ValueError, match="NaN|infinity"):
            extractor.transform(spoilt)
        with pytest.raises(ValueError, match="NaN|infinity"):
            extractor.transform(torch.tensor(spoilt))


def test_a_network_that_returns_nan_raises(images):
    class Log(nn.Module):
        def forward(self, x):
            return torch.log(x - 0.5)

    extractor = TorchFeatureExtractor(Log())
    with pytest.raises(ValueError, match="layers='output': the network gives NaN or infinity"):
        extractor.fit_transform(images)
