import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from skorch import NeuralNetClassifier
from torch import nn

from sklearn_rails import FrozenModule, TorchFeatureExtractor
from sklearn_rails.attacks import pgd
from sklearn_rails.datasets import load_digit_images
from sklearn_rails.demo import train_network


@pytest.fixture(scope="module")
def task():
    data = load_digit_images()
    network = train_network(data.X_train, data.y_train, max_epochs=8, verbose=0)
    return network, data.X_test[:50], data.y_test[:50]


def by_art(network, X, y, **parameters):
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    target = PyTorchClassifier(
        network.module_.eval(),
        loss=nn.CrossEntropyLoss(),
        input_shape=X.shape[1:],
        nb_classes=10,
        clip_values=(0, 1),
        device_type="cpu",
    )
    return ProjectedGradientDescentPyTorch(target, verbose=False, **parameters).generate(X, y)


@pytest.mark.parametrize("eps", [0.05, 60 / 255])
def test_it_is_the_attack_of_the_adversarial_robustness_toolbox(task, eps):
    network, X, y = task
    attacked = pgd(network, X, y, eps=eps, step=eps / 5, max_iter=10)
    expected = by_art(network, X, y, eps=eps, eps_step=eps / 5, max_iter=10)
    # A gradient that is almost zero may have another sign.
    assert np.mean(np.abs(attacked - expected) < 1e-5) > 0.995
    assert network.score(attacked, y) == pytest.approx(network.score(expected, y), abs=0.021)


def test_attacked_samples_are_in_the_ball_and_in_the_range(task):
    network, X, y = task
    attacked = pgd(network, X, y, eps=0.2)
    assert attacked.shape == X.shape
    assert attacked.dtype == np.float32
    assert np.abs(attacked - X).max() == pytest.approx(0.2, abs=1e-6)
    assert attacked.min() == 0
    assert attacked.max() == 1
    assert network.score(attacked, y) < 0.2 < 0.9 < network.score(X, y)
    unbounded = pgd(network, X, y, eps=0.2, clip=None)
    assert unbounded.min() < 0
    assert_array_equal(pgd(network, X, y, eps=0), X)


def test_the_default_step_reaches_the_edge_of_the_ball_from_its_other_side():
    X = np.array([[0.5, 0.5]], dtype=np.float32)
    network = nn.Linear(2, 2)
    nn.init.eye_(network.weight)
    for max_iter in (1, 4):
        attacked = pgd(network, X, [0], eps=0.1, max_iter=max_iter)
        np.testing.assert_allclose(attacked, [[0.4, 0.6]], atol=1e-6)
    np.testing.assert_allclose(pgd(network, X, [0], eps=0.1, step=0.02, max_iter=2), [[0.46, 0.54]])


def test_a_network_in_any_form_and_samples_in_any_shape(task):
    network, X, y = task
    module, flat = network.module_, X.reshape(len(X), -1)
    expected = pgd(network, X, y, eps=0.1, max_iter=5)
    setting = {"eps": 0.1, "max_iter": 5}
    for form in (module, FrozenModule(module), TorchFeatureExtractor(module, layers="conv1")):
        assert_array_equal(pgd(form, X, y, **setting), expected)
    extractor = TorchFeatureExtractor(module, input_shape=(1, 8, 8))
    for of_flat in (
        pgd(module, flat, y, input_shape=(1, 8, 8), **setting),
        pgd(extractor, flat, y, **setting),
    ):
        assert_array_equal(of_flat, expected.reshape(flat.shape))
    tensor = torch.from_numpy(X).double().requires_grad_()
    of_tensor = pgd(module, tensor, torch.from_numpy(y), **setting)
    assert (of_tensor.dtype, of_tensor.requires_grad) == (torch.float32, False)
    assert_array_equal(of_tensor.numpy(), expected)
    assert_array_equal(pgd(module, X.tolist(), y.tolist(), **setting), expected)


def test_batches_make_no_difference(task):
    network, X, y = task
    expected = pgd(network, X, y, eps=0.1, max_iter=3)
    for batch_size in (1, 7, 64):
        attacked = pgd(network, X, y, eps=0.1, max_iter=3, batch_size=batch_size)
        assert np.mean(np.abs(attacked - expected) < 1e-5) > 0.99


def test_without_labels_the_predictions_are_attacked(task):
    network, X, _ = task
    assert_array_equal(
        pgd(network, X, eps=0.1, max_iter=3),
        pgd(network, X, network.predict(X), eps=0.1, max_iter=3),
    )


def test_a_single_logit_is_that_of_the_second_of_two_classes():
    network = nn.Linear(2, 1, bias=False)
    nn.init.constant_(network.weight, 1.0)
    X = np.full((2, 2), 0.5, dtype=np.float32)
    attacked = pgd(network, X, [0, 1], eps=0.1)
    np.testing.assert_allclose(attacked, [[0.6, 0.6], [0.4, 0.4]], atol=1e-6)


class Surer(nn.Module):
    """A network whose logits are 1,000 times as large."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return 1000 * self.network(x)


def test_the_margin_moves_samples_of_which_the_network_is_too_sure_for_the_cross_entropy(task):
    network, X, y = task
    sure = Surer(network.module_)
    with pytest.warns(
        UserWarning, match=r"is 0 for \d+ of 50 samples.*loss='margin' may move them"
    ):
        attacked = pgd(sure, X, y, eps=0.2)
    is_correct = network.predict(X) == y
    moved = (attacked != X).any(axis=(1, 2, 3))
    assert 0 < moved.sum() < 25
    assert (network.predict(attacked) == y)[is_correct & ~moved].all()
    by_margin = pgd(sure, X, y, eps=0.2, loss="margin")
    assert network.score(by_margin, y) < 0.1
    assert_array_equal(by_margin, pgd(network, X, y, eps=0.2, loss="margin"))


def test_the_margin_of_a_single_logit_is_its_sign():
    network = nn.Linear(2, 1, bias=False)
    network.weight.data[:] = torch.tensor([[1.0, -1000.0]])
    X = np.full((2, 2), 0.5)
    attacked = pgd(network, X, [0, 1], eps=0.1, loss="margin")
    np.testing.assert_allclose(attacked, [[0.6, 0.4], [0.4, 0.6]], rtol=1e-6)


def test_random_starts_follow_the_seed(task):
    network, X, y = task
    setting = {"eps": 0.1, "step": 1e-3, "max_iter": 1, "random_start": True}
    first, again, other = (pgd(network, X, y, random_state=s, **setting) for s in (0, 0, 1))
    assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1
    assert np.abs(first - X).max() <= np.float32(0.1)  # NumPy 1 compares with a float in float64
    assert first.min() >= 0


def test_the_network_and_the_process_are_left_unchanged():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3))
    network.train()
    X = torch.rand(20, 4)
    network(X).sum().backward()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    gradients = [p.grad.clone() for p in network.parameters()]
    state = torch.get_rng_state()
    with torch.no_grad():
        first = pgd(network, X, eps=0.1)
    with torch.inference_mode():
        assert torch.equal(pgd(network, X, eps=0.1), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert network.training
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert all(torch.equal(g, p.grad) for g, p in zip(gradients, network.parameters(), strict=True))


class Detached(nn.Module):
    def forward(self, x):
        return x.detach()


class Root(nn.Module):
    def forward(self, x):
        return (x - x).sqrt()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"network": None}, TypeError, "network must be a torch.nn.Module"),
        ({"network": TorchFeatureExtractor()}, TypeError, "network must be a torch.nn.Module"),
        ({"network": nn.Embedding(5, 3)}, ValueError, "given as network does not take samples"),
        (
            {"network": nn.Sequential(nn.Embedding(9, 3), nn.Flatten()), "X": [[1, 2], [3, 4]]},
            TypeError,
            "network takes integers",
        ),
        ({"network": Detached()}, ValueError, "network cannot .* its output is detached"),
        ({"network": Root()}, ValueError, "network cannot .* some are NaN"),
        ({"eps": -1}, ValueError, "'eps' parameter of pgd"),
        ({"eps": np.inf}, ValueError, "'eps' parameter of pgd"),
        ({"step": 0}, ValueError, "'step' parameter of pgd"),
        ({"max_iter": 0}, ValueError, "'max_iter' parameter of pgd"),
        ({"batch_size": 0}, ValueError, "'batch_size' parameter of pgd"),
        ({"device": "abacus"}, ValueError, "device='abacus' cannot be used"),
        ({"clip": "auto"}, ValueError, "'clip' parameter of pgd"),
        ({"clip": (1, 0)}, ValueError, "clip=.1, 0."),
        ({"clip": (0, 0.1)}, ValueError, "clip=.0, 0.1. does not hold X, .* from"),
        ({"X": np.full((4, 3), np.nan)}, ValueError, "Input X contains NaN"),
        ({"X": np.full((4, 3), 1e300), "clip": None}, ValueError, "X"),
        ({"input_shape": (2, 2)}, ValueError, r"input_shape=\(2, 2\) was given, .* shape \(3,\)"),
        ({"input_shape": (-1,)}, ValueError, "input_shape=.* must hold positive integers"),
        ({"y": [0, 1, 2, 3]}, ValueError, r"y must hold integers from 0 to 2, .* got \[0, 1, 2, 3"),
        ({"y": ["a", "b", "a", "b"]}, ValueError, "y must hold integers from 0 to 2"),
        ({"y": np.eye(4)}, ValueError, "y must be one-dimensional"),
        ({"y": [0, 1]}, ValueError, "inconsistent numbers of samples"),
    ],
)
def test_errors_name_the_parameter(change, error, message):
    X = np.random.default_rng(0).random((4, 3))
    given = {"network": nn.Linear(3, 3), "X": X, "eps": 0.1} | change
    with pytest.raises(error, match=message):
        pgd(**given)


def test_an_unfitted_skorch_net_is_refused():
    with pytest.raises(ValueError, match="network is a skorch net .* that is not fitted"):
        pgd(NeuralNetClassifier(nn.Linear), np.zeros((2, 3)), eps=0.1)


@pytest.mark.parametrize("dtype", [">f4", ">f8", np.longdouble, np.float16, object])
def test_arrays_of_types_that_torch_does_not_read(task, dtype):
    network, X, y = task
    X = X.astype(np.float16).astype(np.float32)
    assert_array_equal(pgd(network, X.astype(dtype), y, eps=0.1), pgd(network, X, y, eps=0.1))


def test_a_network_that_overwrites_what_its_gradient_needs_is_refused_by_name():
    class Overwrites(nn.Linear):
        def forward(self, x):
            hidden = super().forward(x).tanh()
            return hidden.mul_(2) * 1

    with pytest.raises(ValueError, match="network cannot be attacked by gradients: torch says"):
        pgd(Overwrites(4, 3), np.ones((5, 4)), eps=0.1)
