"""Networks and data that the tests share."""

import collections
import csv
import os

import numpy as np
import pytest
import torch
from hypothesis import Phase, settings
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from sklearn_rails.demo import train_network

# For mutants: the same examples each time, and failures are not made smaller.
settings.register_profile("mutants", phases=[Phase.explicit, Phase.generate], derandomize=True)


class ConvNet(nn.Module):
    """Functional ReLU, pooling and dropout: nothing that its children alone would tell."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 8, 3, padding=1)
        self.fc = nn.Linear(8 * 4 * 4, 10)

    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc(F.dropout(x.flatten(1), 0.5, self.training))


class Scale(nn.Module):
    """Holds parameters, and takes rows of any width."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return x * self.weight


class AnyWidth(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = Scale()
        self.second = Scale()

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.fixture
def conv_net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ConvNet()


@pytest.fixture(scope="session")
def digits():
    X, y = load_digits(return_X_y=True)
    X = (X / 16).astype(np.float32)
    X.flags.writeable = False
    return X, y


@pytest.fixture(scope="session")
def digit_task(digits):
    """A trained network, the 600 images that it was trained on, and 400 new ones."""
    X, y = digits
    X = X.reshape(-1, 1, 8, 8)
    order = np.random.default_rng(0).permutation(len(y))
    X, y = X[order], y[order]
    network = train_network(X[:600], y[:600], max_epochs=8, verbose=0)
    return network.module_, X[:600], y[:600], X[600:1000], y[600:1000]


@pytest.fixture
def report(record_property):
    """Count what a test has tried: added up by name, printed after the run, written by --counts."""

    def record(name, value):
        record_property(f"tested: {name}", value)

    return record


def pytest_addoption(parser):
    parser.addoption("--counts", help="CSV file that what was tested is written to")


def pytest_terminal_summary(terminalreporter, config):
    counts = collections.Counter()
    for result in terminalreporter.stats.get("passed", []):
        for name, value in result.user_properties:
            if name.startswith("tested: "):
                counts[name.removeprefix("tested: ")] += value
    if not counts:
        return
    terminalreporter.section("What was tested")
    for name, value in sorted(counts.items()):
        terminalreporter.line(f"{name}: {value:,}")
    if config.option.counts:
        with open(config.option.counts, "w", newline="") as file:
            rows = ([*name.split(": "), f"{value:,}"] for name, value in sorted(counts.items()))
            csv.writer(file).writerows([("area", "what", "count"), *rows])


def pytest_collection_modifyitems(config, items):
    # One check of scikit-learn's needs SCIPY_ARRAY_API=1, and skips itself without; test_common
    # runs the whole contract with the switch on.
    if os.environ.get("SCIPY_ARRAY_API") != "1":
        only_there = [item for item in items if "check_array_api_input" in item.name]
        config.hook.pytest_deselected(items=only_there)
        items[:] = [item for item in items if item not in only_there]
