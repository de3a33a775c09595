"""What newcomers get wrong, and that the error says what to do."""

import numpy as np
import pytest
import torch
from torch import nn

from sklearn_rails import DkNNClassifier, RAILSClassifier, ThreatScorer, TorchFeatureExtractor
from sklearn_rails.attacks import pgd

X = np.random.default_rng(0).random((30, 1, 8, 8), dtype=np.float32)
FLAT = X.reshape(30, -1)
Y = np.arange(30) % 3


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 2, 3)
        self.fc = nn.Linear(72, 3)

    def forward(self, x):
        return self.fc(self.conv1(x).flatten(1))


NETWORK = Network()
NUMBERED = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 3))


def dknn(network=NETWORK, **parameters):
    return DkNNClassifier(network, **({"layers": "conv1", "random_state": 0} | parameters))


@pytest.mark.parametrize(
    "estimator", [DkNNClassifier(), RAILSClassifier(), ThreatScorer(), TorchFeatureExtractor()]
)
@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        (1, TypeError, "layers must name layers by strings, such as '1', .* got int: 1. The"),
        (["0", 2], TypeError, "such as '2', .* got int: 2. The network has: .'0', '1', '2', 'inp"),
        (7, TypeError, "such as '0', .* got int: 7"),
        (NUMBERED, TypeError, "such as '0', .* got Sequential. The network"),
        ([NUMBERED[0]], TypeError, "such as '0', .* got Conv2d. The network"),
        ("Out_put", ValueError, "does not have: .'Out_put'.. Did you mean 'output'. It has: "),
        (["output", "somewhere"], ValueError, r"not have: \['somewhere'\]. It has"),
    ],
)
def test_layers_that_are_not_names(estimator, layers, error, message):
    network = "module" if isinstance(estimator, TorchFeatureExtractor) else "feature_extractor"
    estimator.set_params(**{network: NUMBERED, "layers": layers})
    with pytest.raises(error, match=message):
        estimator.fit(X, Y)


@pytest.mark.parametrize(
    ("single", "message"),
    [
        (X[0], r"single sample: pass X\[None\]"),
        (torch.from_numpy(X[0]), r"single sample: pass X\[None\]"),
        (FLAT[0], r"single sample: pass X\[None\]"),
        (torch.from_numpy(FLAT[0]), r"single sample: pass X\[None\]"),
        (X[0, 0], r"pass X\[None, None\]"),
        (X[0].transpose(1, 2, 0), r"pass X.transpose\(2, 0, 1\)\[None\]"),
    ],
)
def test_a_single_sample(single, message):
    fitted = dknn().fit(X, Y)
    with pytest.raises(ValueError, match=message):
        fitted.predict(single)
    if single.ndim == 1:
        with pytest.raises(ValueError, match=message):
            DkNNClassifier(random_state=0).fit(FLAT, Y).predict(single)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: dknn(Network).fit(X, Y), TypeError, "got type. Pass a .* not its class Network"),
        (lambda: dknn(NETWORK.state_dict()).fit(X, Y), TypeError, "state_dict holds the weights"),
        (
            lambda: dknn().fit(X[0], Y[:1]),
            ValueError,
            r"single image, pass X\[None\]; if it has no",
        ),
        (lambda: pgd(NETWORK, X[0], eps=0.1), ValueError, r"single image, pass X\[None\]"),
        (lambda: dknn().fit(FLAT, Y), ValueError, r"input_shape sets .* such as \(1, 28, 28\)"),
        (
            lambda: dknn(input_shape=X.shape).fit(X, Y),
            ValueError,
            r"without their number: pass input_shape=\(1, 8, 8\)",
        ),
        (lambda: dknn().fit((x for x in X), Y), TypeError, "X must .* got a generator.$"),
        (
            lambda: dknn().fit(FLAT[0], Y[:1]),
            ValueError,
            r"shape \(64,\). A single sample is X\[No",
        ),
        (lambda: dknn().fit(Y, X), ValueError, r"labels come second, as in fit\(X, y\)"),
        (lambda: dknn().fit(X, np.eye(3)[Y]), ValueError, r"one-hot labels, pass y.argmax\(axis=1"),
        (
            lambda: dknn().fit(torch.from_numpy(X), torch.eye(3)[Y]),
            ValueError,
            r"got an array of shape \(30, 3\) .* pass y.argmax",
        ),
    ],
)
def test_other_mistakes(call, error, message):
    with pytest.raises(error, match=message):
        call()
