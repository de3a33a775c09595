"""Time and peak memory of fit and predict: ``asv run`` in benchmarks/."""

import numpy as np
import torch
from torch import nn

from sklearn_rails import DkNNClassifier, RAILSClassifier, ThreatScorer, TorchFeatureExtractor

LAYERS = {1: ["1"], 2: ["1", "3"]}


def make_problem(n, d):
    rng = np.random.default_rng(0)
    y = rng.integers(10, size=n)
    X = rng.random((n, d), dtype=np.float32) / 2 + y[:, None] / 20
    return X.astype(np.float32), y


def make_network(d):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(d, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())


class Estimator:
    """What all have in common: training rows, features and layers."""

    param_names = ("n", "d", "n_layers")
    params = ([1_000, 10_000], [64, 784], [1, 2])
    n_queries = 100

    def setup(self, n, d, n_layers):
        self.X, self.y = make_problem(n, d)
        self.estimator = self.make(make_network(d), LAYERS[n_layers]).fit(self.X, self.y)

    def time_fit(self, n, d, n_layers):
        self.estimator.fit(self.X, self.y)

    def peakmem_fit(self, n, d, n_layers):
        self.estimator.fit(self.X, self.y)

    def time_predict(self, n, d, n_layers):
        self.estimator.predict(self.X[: self.n_queries])

    def peakmem_predict(self, n, d, n_layers):
        self.estimator.predict(self.X[: self.n_queries])


class RAILS(Estimator):
    def make(self, network, layers):
        return RAILSClassifier(network, layers=layers, random_state=0)


class DkNN(Estimator):
    def make(self, network, layers):
        return DkNNClassifier(network, layers=layers, random_state=0)


class Threat(Estimator):
    def make(self, network, layers):
        return ThreatScorer(network, layers=layers, random_state=0)


class Extractor:
    param_names = ("n", "d", "n_layers")
    params = ([1_000, 10_000], [64, 784], [1, 2])

    def setup(self, n, d, n_layers):
        self.X, _ = make_problem(n, d)
        self.extractor = TorchFeatureExtractor(make_network(d), layers=LAYERS[n_layers]).fit(self.X)

    def time_transform(self, n, d, n_layers):
        self.extractor.transform(self.X)

    def peakmem_transform(self, n, d, n_layers):
        self.extractor.transform(self.X)


class Schedule:
    """RAILS against cells and generations, all of which are bred."""

    param_names = ("population_size", "generations")
    params = ([100, 200, 1_000], [0, 3, 10])

    def setup(self, population_size, generations):
        X, y = make_problem(2_000, 64)
        self.X = X[:50]
        self.rails = RAILSClassifier(
            make_network(64),
            population_size=population_size,
            generations=generations,
            early_stopping=False,
            random_state=0,
        ).fit(X, y)

    def time_predict(self, population_size, generations):
        self.rails.predict(self.X)

    def time_predict_one_row(self, population_size, generations):
        self.rails.predict(self.X[:1])

    def peakmem_predict(self, population_size, generations):
        self.rails.predict(self.X)
