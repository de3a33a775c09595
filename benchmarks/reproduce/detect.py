"""How well threat scores tell attacked rows from clean ones: ``python detect.py mnist``.

Detectors learn from clean validation rows, which the network has not seen. Their layers and
numbers of neighbours, and which of our methods are combined, each in which layer, are those with
the highest mean AUROC on attacked and noisy calibration rows, for ours and for other libraries'
detectors alike. A second combination is the one that is least behind the best library's detector
for any kind of these rows. Negatives are test rows, and the same with noise of the attack's size,
that the network classifies correctly; positives are successful attacks alone, and inputs that are
none of the classes: another data set, and noise. Clean rows that are flagged are counted among all
test rows.

pytorch-ood needs a torchvision that fits torch; ``libraries`` in the settings can do without it.
"""

from itertools import combinations, product
from math import floor

import numpy as np
from attacks import by_hop_skip_jump, network_attacks
from common import describe, main, predict_network
from detectors import LIBRARIES, WITHOUT_NEIGHBORS
from scipy.stats import betabinom, rankdata
from sklearn.neighbors import LocalOutlierFactor
from train import attack_settings, load_data

from sklearn_rails import ThreatScorer, TorchFeatureExtractor
from sklearn_rails.metrics import detection_scores
from sklearn_rails.sensing import DETECTORS

METHODS = [
    "credibility",
    "disagreement",
    "distance",
    "kernel_density",
    "mahalanobis",
    "lid",
    "localoutlierfactor",
    "feature_squeezing",
    "confidence",
]
WITHOUT_LAYERS = [name for name, detector in DETECTORS.items() if not detector.uses_layers]
ALPHAS = (0.01, 0.05, 0.1)


class OnFeatures:
    """A library's outlier detector on a layer's features."""

    def __init__(self, task, layer, name, n_neighbors):
        extractor = TorchFeatureExtractor(task.network, layers=layer, input_shape=task.X.shape[1:])
        self.extract = extractor.fit(task.X[:1]).transform
        learn = LIBRARIES[name]
        self.judge = learn(self.extract(task.X_validation), task.y_validation, n_neighbors)

    def threat(self, X):
        return self.judge(self.extract(X))


class Ours:
    """A threat scorer, whose methods have layers of their own."""

    def __init__(self, task, layers, methods, n_neighbors):
        factor = LocalOutlierFactor(n_neighbors=n_neighbors, novelty=True)
        self.scorer = ThreatScorer(
            task.network,
            layers=layers or "output",  # methods that score no layers have none of their own
            method=[factor if m == "localoutlierfactor" else m for m in methods],
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


def aurocs(clean, suspects):
    """Return the area under the ROC curve for each kind of suspects, against clean rows."""
    n = len(clean)
    # By ranks: roc_auc_score takes ten times as long, and there are thousands of combinations.
    ranks = [rankdata(np.concatenate([clean, threats]))[n:] for threats in suspects]
    return np.array([(r.mean() - (len(r) + 1) / 2) / n for r in ranks])


def combine(evidence, n_methods):
    """Yield the layers of a combination by method, its methods, and the sum of their evidence."""
    by_method = {}
    for (method, layer), threats in evidence.items():
        by_method.setdefault(method, []).append((method, layer, threats))
    for methods in combinations(by_method.values(), n_methods):
        for parts in product(*methods):
            sums = [sum(kinds) for kinds in zip(*(threats for _, _, threats in parts), strict=True)]
            layers = {method: layer for method, layer, _ in parts if layer}
            yield layers, [method for method, _, _ in parts], sums


def choose(task, own):
    """Return for each detector its score and how it is made, chosen on calibration rows."""
    n = own["n_search"]
    X, y = task.X_calibration[:n], task.y_calibration[:n]
    clean, suspects = collect(task, X, y, own["attacks"], np.random.default_rng(1))
    suspects = list(suspects.values())
    tried = {}

    def note(name, areas, *made_by):
        tried.setdefault(name, []).append((areas, made_by))

    for name in own["libraries"]:
        for layer in own["layers"]:
            for k in own["n_neighbors"][: 1 if name in WITHOUT_NEIGHBORS else None]:
                try:
                    detector = OnFeatures(task, layer, name, k)
                    threats = [detector.threat(rows) for rows in (clean, *suspects)]
                except ValueError as error:
                    print(f"{name} fails in {layer}: {error}", flush=True)
                else:
                    note(name, aurocs(threats[0], threats[1:]), OnFeatures, layer, name, k)
        print(f"{name}: searched", flush=True)
    for k in own["n_neighbors"]:
        evidence = {}
        for layer in own["layers"]:
            scorer = Ours(task, layer, METHODS, k).scorer
            columns = [scorer.transform(rows) for rows in (clean, *suspects)]
            for i, method in enumerate(METHODS):
                key = method, "" if method in WITHOUT_LAYERS else layer
                evidence.setdefault(key, [c[:, i] for c in columns])
        for n_methods in range(1, own["max_combined"] + 1):
            for layers, chosen, (first, *others) in combine(evidence, n_methods):
                name = chosen[0] if n_methods == 1 else "our combination"
                note(name, aurocs(first, others), Ours, layers, chosen, k)
        print(f"{k} neighbours: searched", flush=True)
    best = {name: max(found, key=lambda item: item[0].mean()) for name, found in tried.items()}
    # Of the best library for each kind of attack.
    rivals = np.max([best[name][0] for name in own["libraries"]], axis=0)
    best["our combination, least behind"] = max(
        tried["our combination"], key=lambda item: (item[0] - rivals).min()
    )
    return best


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
    for name, (areas, (make, layers, what, k)) in chosen.items():
        detector = make(task, layers, what, k)
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
                "layers": describe(layers),
                "n_neighbors": k,
                "seed": 0,
                "mean AUROC in the search": f"{areas.mean():.3f}",
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
