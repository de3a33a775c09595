"""Write what every platform and version must predict: ``python tests/reference/make.py``.

The file has the samples and weights too, so that nothing but the package decides the predictions.
Run it again only where predictions are meant to change.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from sklearn_rails import DkNNClassifier, RAILSClassifier, ThreatScorer, TorchFeatureExtractor
from sklearn_rails.immune import Arbitration, Triage
from sklearn_rails.neighbors import ExactNeighbors
from sklearn_rails.sensing import DETECTORS

PATH = Path(__file__).with_name("predictions.npz")
SHAPE, N_CLASSES, N_HIDDEN = (1, 6, 6), 3, 32
LAYERS = ["1", "3"]


def make_network():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.Flatten(), nn.Linear(16, N_HIDDEN), nn.Tanh(),
        nn.Linear(N_HIDDEN, N_CLASSES),
    )  # fmt: skip


def make_inputs():
    """Draw images about three centres, and a network that classifies most of them correctly."""
    rng = np.random.RandomState(0)
    centers = rng.rand(N_CLASSES, *SHAPE)
    y = np.arange(150) % N_CLASSES
    X = 0.3 * centers[y] + 0.7 * rng.rand(len(y), *SHAPE)
    inputs = {"X": X[:120].astype(np.float32), "y": y[:120], "new": X[120:].astype(np.float32)}
    network = make_network()
    weights = {
        name: rng.uniform(-1, 1, value.shape).astype(np.float32) / 2
        for name, value in network.state_dict().items()
    }
    network.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    with torch.no_grad():
        hidden = network[:-1](torch.from_numpy(inputs["X"])).numpy()
    weights["4.bias"] = np.full(N_CLASSES, 0.25, np.float32)
    weights["4.weight"] = np.linalg.lstsq(hidden, np.eye(N_CLASSES)[y[:120]] - 0.25)[0].T
    return inputs | {f"weights/{name}": v.astype(np.float32) for name, v in weights.items()}


def load_network(inputs):
    network = make_network()
    network.load_state_dict(
        {name: torch.from_numpy(inputs[f"weights/{name}"]) for name in network.state_dict()}
    )
    return network


def make_estimators(network):
    """Return the estimators by their names, not fitted."""

    def rails(**settings):
        common = {"layers": "3", "population_size": 60, "random_state": 0, "device": "cpu"}
        return RAILSClassifier(network, **{**common, **settings})

    def dknn(**settings):
        return DkNNClassifier(network, layers=LAYERS, device="cpu", random_state=0, **settings)

    def scorer(**settings):
        common = {"alpha": 0.2, "random_state": 0, "device": "cpu"}
        return ThreatScorer(network, layers=LAYERS, **common, **settings)

    return {
        "RAILS": rails(),
        "RAILS, all generations": rails(early_stopping=False, generations=5),
        "RAILS, two layers": rails(layers=LAYERS, n_neighbors=4, tau=0.05, rho=0.4),
        "RAILS, float64": rails(layers="1", dtype="float64", early_stopping=False),
        "RAILS, input": rails(layers="input", clip=None, delta_min=0.2, delta_max=0.6),
        "RAILS, balanced": rails(selection="class_balanced", crossover="uniform"),
        "RAILS, cosine": rails(affinity="cosine", plasma_fraction=0.2),
        "RAILS, inner product": rails(affinity="inner_product", population_size=47),
        "RAILS, hidden cells": rails(start_layer="1", algorithm=ExactNeighbors("float16")),
        "RAILS, arbitration": rails(gate=Arbitration(alpha=0.3)),
        "RAILS, triage": rails(gate=Triage(), threat_scorer=ThreatScorer(alpha=0.4)),
        "RAILS, memory": rails(memory_capacity=90),
        "DkNN": dknn(),
        "DkNN, leave-one-out": dknn(
            n_neighbors=15, calibration="leave-one-out", p_value="empirical"
        ),
        "DkNN, float64": dknn(n_neighbors=15, dtype="float64", calibration=0.3),
        "ThreatScorer, auto": scorer(),
        **{f"ThreatScorer, {m}": scorer(method=m) for m in DETECTORS},
        "TorchFeatureExtractor": TorchFeatureExtractor(network, layers=LAYERS, device="cpu"),
    }


METHODS = ("predict", "predict_proba", "decision_function", "p_values", "transform")


def predict(inputs):
    """Fit the estimators, and return what their methods answer."""
    X, y, answers = inputs["X"], inputs["y"], {}
    for name, estimator in make_estimators(load_network(inputs)).items():
        estimator.fit(X, y)
        if "memory" in name:
            estimator.remember(estimator.respond(X[::4]), y[::4])
        for method in METHODS:
            if hasattr(estimator, method):
                found = getattr(estimator, method)(inputs["new"])
                is_float = found.dtype.kind == "f"
                answers[f"{name}/{method}"] = found.astype(np.float32) if is_float else found
    return answers


def main():
    inputs = make_inputs()
    np.savez_compressed(PATH, **inputs, **predict(inputs))


if __name__ == "__main__":
    main()
