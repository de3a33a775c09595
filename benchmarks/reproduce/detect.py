"""How well threat scores tell attacked rows from clean ones: ``python detect.py mnist``.

Detectors learn from clean validation rows, which the network has not seen; how often they flag
clean rows is counted on others of these, and on all test rows. Negatives are test rows, and the
same with noise of the attack's size, that the network classifies correctly; positives are
successful attacks alone, and inputs that are none of the classes: another data set, and noise.

pytorch-ood needs a torchvision that fits torch; ``libraries`` in the settings can do without it.
"""

import numpy as np
from attacks import by_hop_skip_jump, network_attacks
from common import main, predict_network, share
from detectors import LIBRARIES
from train import attack_settings, load_data

from sklearn_rails import ThreatScorer, TorchFeatureExtractor
from sklearn_rails.metrics import detection_scores

METHODS = [
    "credibility",
    "disagreement",
    "distance",
    "kernel_density",
    "mahalanobis",
    "lid",
    "feature_squeezing",
]


class OnFeatures:
    """A library's outlier detector on the same layers' features."""

    def __init__(self, extractor, learn, n_neighbors):
        self.extractor = extractor
        self.learn = learn
        self.n_neighbors = n_neighbors

    def fit(self, X, y):
        self.judge = self.learn(self.extractor.fit(X).transform(X), y, self.n_neighbors)
        return self

    def threat(self, X):
        return self.judge(self.extractor.transform(X))


def make_detectors(task, own):
    """Give the detectors by name, each with what gives its threat scores."""
    layers, k = own["layers"], own["n_neighbors"]
    extractor = TorchFeatureExtractor(task.network, layers=layers)
    lists = {"all methods": METHODS, " + ".join(own["combined"]): own["combined"]}
    for name, method in ({m: m for m in METHODS} | lists).items():
        yield (
            name,
            ThreatScorer(task.network, layers=layers, method=method, n_neighbors=k, random_state=0),
        )
    for name in own["libraries"]:
        yield name, OnFeatures(extractor, LIBRARIES[name], k)


def threat_of(detector, X):
    """Give threat scores, higher for more suspect."""
    if isinstance(detector, ThreatScorer):
        return -detector.score_samples(X)
    return detector.threat(X)


def like(images, shape):
    """Bring images of another data set to a shape: their grey values, cut or framed."""
    channels, height, width = shape
    if images.shape[1] != channels:
        images = np.repeat(images.mean(axis=1, keepdims=True), channels, axis=1)
    for axis, size in ((2, height), (3, width)):
        lacking = max(0, size - images.shape[axis])
        frame = [(0, 0)] * 4
        frame[axis] = (lacking // 2, lacking - lacking // 2)
        images = np.pad(images, frame)
        first = (images.shape[axis] - size) // 2
        images = images.take(range(first, first + size), axis=axis)
    return np.ascontiguousarray(images, dtype=np.float32)


def collect(task, own):
    """Give the negatives, and the positives by name."""
    X, y = task.X_test, task.y_test
    eps = attack_settings(task.name)[0]
    rng = np.random.default_rng(0)
    right = predict_network(task.network, X) == y
    noisy = np.clip(X + rng.uniform(-eps, eps, X.shape), 0, 1).astype(np.float32)
    negatives = np.concatenate([X[right], noisy[predict_network(task.network, noisy) == y]])

    def successful(attacked, predict, labels):
        attacked = attacked.astype(np.float32)
        return attacked[predict(attacked) != labels]

    def own_network(rows):
        return predict_network(task.network, rows)

    X, y = X[right], y[right]
    positives = {}
    for name, make in network_attacks(task).items():
        if name in own["attacks"]:
            positives[name] = successful(make(X, y), own_network, y)
    n = own["n_hop_skip_jump"]
    jumped = by_hop_skip_jump(own_network, X[:n], eps, task.X[:500], max_iter=30)
    positives["HopSkipJump"] = successful(jumped, own_network, y[:n])
    n = own["n_adaptive"]
    rails = task.fit("RAILS", own["defence"])
    positives["adaptive, on RAILS"] = successful(
        task.attack_adaptively(rails, X[:n], y[:n], eps), rails.predict, y[:n]
    )
    for name in own["other_data"]:
        other = load_data(name, task.data_home)
        positives[other.name.split(" (")[0]] = like(other.X_test[: len(task.X_test)], X.shape[1:])
    positives["noise"] = rng.uniform(size=task.X_test.shape).astype(np.float32)
    return negatives, {name: rows for name, rows in positives.items() if len(rows)}


def rows_of(task, settings):
    own = settings | settings["data"][task.name]
    negatives, positives = collect(task, own)
    for name, detector in make_detectors(task, own):
        detector.fit(task.X_validation, task.y_validation)
        flagged = dict.fromkeys(("held-out", "test"), "")
        if isinstance(detector, ThreatScorer):
            clean_rows = {"held-out": task.X_calibration, "test": task.every_X_test}
            flagged = {k: share(detector.predict(rows) == -1) for k, rows in clean_rows.items()}
        clean = threat_of(detector, negatives)
        for kind, rows in positives.items():
            is_attacked = np.repeat([0, 1], [len(negatives), len(rows)])
            figures = detection_scores(
                is_attacked, np.concatenate([clean, threat_of(detector, rows)])
            )
            line = {
                "data": task.title,
                "network": task.name,
                "layers": " ".join(own["layers"]),
                "detector": name,
                "seed": 0,
                **{f"clean {kind} rows flagged at 5 %": rate for kind, rate in flagged.items()},
                "inputs": kind,
                "negatives": len(negatives),
                "positives": len(rows),
                **{key: f"{value:.3f}" for key, value in figures.items()},
            }
            print(*list(line.values())[3:], flush=True)
            yield line


if __name__ == "__main__":
    main(__file__, rows_of)
