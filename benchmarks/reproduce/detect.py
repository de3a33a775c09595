"""How well threat scores tell attacked rows from clean ones: ``python detect.py mnist``.

Detectors learn from clean validation rows, which the network has not seen. Their layers and
numbers of neighbours, and which of our methods are combined, are those with the highest mean AUROC
on attacked and noisy calibration rows, for ours and for other libraries' detectors alike.
Negatives are test rows, and the same with noise of the attack's size, that the network classifies
correctly; positives are successful attacks alone, and inputs that are none of the classes: another
data set, and noise. Clean rows that are flagged are counted among all test rows.

pytorch-ood needs a torchvision that fits torch; ``libraries`` in the settings can do without it.
"""

from itertools import combinations
from math import floor

import numpy as np
from attacks import by_hop_skip_jump, network_attacks
from common import main, predict_network
from detectors import LIBRARIES
from scipy.stats import betabinom
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import LocalOutlierFactor
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
ALPHAS = (0.01, 0.05, 0.1)


class OnFeatures:
    """A library's outlier detector on a layer's features."""

    def __init__(self, task, layer, learn, n_neighbors):
        extractor = TorchFeatureExtractor(task.network, layers=layer, input_shape=task.X.shape[1:])
        self.extract = extractor.fit(task.X[:1]).transform
        self.judge = learn(self.extract(task.X_validation), task.y_validation, n_neighbors)

    def threat(self, X):
        return self.judge(self.extract(X))


class Ours:
    """A threat scorer."""

    def __init__(self, task, layer, methods, n_neighbors):
        factor = LocalOutlierFactor(n_neighbors=n_neighbors, novelty=True)
        self.scorer = ThreatScorer(
            task.network,
            layers=layer,
            method=[factor if m == "local_outlier_factor" else m for m in methods],
            n_neighbors=n_neighbors,
            random_state=0,
        ).fit(task.X_validation, task.y_validation)

    def threat(self, X):
        return -self.scorer.score_samples(X)

    def flagged(self, X, alpha):
        """Return the share of clean rows that are flagged, and what is expected of it."""
        known = np.sort(self.scorer.decision_scores_)
        # One of the n + 1 places of a new score among the known ones.
        n_above = floor(alpha * (len(known) + 1))
        if n_above == 0:
            return ""
        rate = np.mean(self.threat(X) > known[len(known) - n_above])
        low, high = betabinom(len(X), n_above, len(known) + 1 - n_above).interval(0.95)
        bounds = f"{100 * low / len(X):.1f} to {100 * high / len(X):.1f}"
        return f"{100 * rate:.1f} ({bounds} expected)"


def mean_auroc(clean, suspects):
    """Return the mean over kinds of suspects, of their threats against those of clean rows."""
    return np.mean(
        [
            roc_auc_score(np.repeat([0, 1], [len(clean), len(t)]), np.concatenate([clean, t]))
            for t in suspects
        ]
    )


def choose(task, own):
    """Return for each detector how it is made, chosen on calibration rows."""
    n = own["n_search"]
    X, y = task.X_calibration[:n], task.y_calibration[:n]
    clean, suspects = collect(task, X, y, own["attacks"], np.random.default_rng(1))
    suspects = list(suspects.values())
    tried = {}

    def note(name, score, *made_by):
        tried.setdefault(name, []).append((score, made_by))

    methods = [*METHODS, "local_outlier_factor"]
    for layer in own["layers"]:
        for k in own["n_neighbors"]:
            scorer = Ours(task, layer, methods, k).scorer
            columns = [scorer.transform(rows) for rows in (clean, *suspects)]
            for size in range(1, own["max_combined"] + 1):
                for chosen in combinations(range(len(methods)), size):
                    first, *others = (c[:, chosen].sum(axis=1) for c in columns)
                    names = [methods[i] for i in chosen]
                    name = names[0] if size == 1 else "our combination"
                    note(name, mean_auroc(first, others), Ours, layer, names, k)
            for name in own["libraries"]:
                detector = OnFeatures(task, layer, LIBRARIES[name], k)
                threats = [detector.threat(rows) for rows in (clean, *suspects)]
                score = mean_auroc(threats[0], threats[1:])
                note(name, score, OnFeatures, layer, LIBRARIES[name], k)
            print(f"{layer}, {k} neighbours: searched", flush=True)
    return {name: max(found, key=lambda item: item[0]) for name, found in tried.items()}


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


def collect(task, X, y, attacks, rng):
    """Return the negatives, and by name the rows that fool the network, and noise."""
    eps = attack_settings(task.name)[0]
    right = predict_network(task.network, X) == y
    noisy = np.clip(X + rng.uniform(-eps, eps, X.shape), 0, 1).astype(np.float32)
    negatives = np.concatenate([X[right], noisy[predict_network(task.network, noisy) == y]])
    positives = {}
    for name, make in network_attacks(task).items():
        if name in attacks:
            attacked = make(X[right], y[right]).astype(np.float32)
            positives[name] = attacked[predict_network(task.network, attacked) != y[right]]
    positives["noise"] = rng.uniform(size=X.shape).astype(np.float32)
    return negatives, {name: rows for name, rows in positives.items() if len(rows)}


def collect_others(task, own):
    """Return by name the rows that fool the network by its answers, or RAILS, and other data."""
    eps = attack_settings(task.name)[0]
    right = predict_network(task.network, task.X_test) == task.y_test
    X, y = task.X_test[right], task.y_test[right]

    def own_network(rows):
        return predict_network(task.network, rows)

    n = own["n_hop_skip_jump"]
    jumped = by_hop_skip_jump(own_network, X[:n], eps, task.X[:500], max_iter=30)
    jumped = jumped.astype(np.float32)
    n_adaptive = own["n_adaptive"]
    rails = task.fit("RAILS", own["defence"])
    adaptive = task.adaptive_attack(rails, eps).generate(X[:n_adaptive], y[:n_adaptive])
    positives = {
        "HopSkipJump": jumped[own_network(jumped) != y[:n]],
        "adaptive, on RAILS": adaptive[rails.predict(adaptive) != y[:n_adaptive]],
    }
    for name in own["other_data"]:
        other = load_data(name, task.data_home)
        positives[other.name.split(" (")[0]] = like(other.X_test[: len(task.X_test)], X.shape[1:])
    return {name: rows for name, rows in positives.items() if len(rows)}


def rows_of(task, settings):
    own = settings | settings["data"][task.name]
    chosen = choose(task, own)
    negatives, positives = collect(
        task, task.X_test, task.y_test, own["attacks"], np.random.default_rng(0)
    )
    positives |= collect_others(task, own)
    for name, (score, (make, layer, what, k)) in chosen.items():
        detector = make(task, layer, what, k)
        flagged = dict.fromkeys(ALPHAS, "")
        if make is Ours:
            flagged = {alpha: detector.flagged(task.every_X_test, alpha) for alpha in ALPHAS}
        clean = detector.threat(negatives)
        for kind, rows in positives.items():
            is_attacked = np.repeat([0, 1], [len(negatives), len(rows)])
            figures = detection_scores(is_attacked, np.concatenate([clean, detector.threat(rows)]))
            line = {
                "data": task.title,
                "network": task.name,
                "detector": name,
                "methods": " + ".join(what) if make is Ours else "",
                "layers": layer,
                "n_neighbors": k,
                "seed": 0,
                "mean AUROC in the search": f"{score:.3f}",
                **{
                    f"clean test rows flagged at {100 * alpha:.0f} %": rate
                    for alpha, rate in flagged.items()
                },
                "inputs": kind,
                "negatives": len(negatives),
                "positives": len(rows),
                **{key: f"{value:.3f}" for key, value in figures.items()},
            }
            print(*list(line.values())[2:], flush=True)
            yield line


if __name__ == "__main__":
    main(__file__, rows_of)
