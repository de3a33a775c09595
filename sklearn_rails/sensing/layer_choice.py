"""Choose the layer in which detectors tell attacked training samples from clean ones best."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._conformal import ConformalScale, sample_rows
from ..features.layer_choice import (
    MAX_LAYERS,
    N_HELD_OUT,
    HeldOutAttack,
    LayerScores,
    score_layers,
)
from ..features.mapping import Array, FeatureMap
from .methods import make_detectors
from .samples import CleanSamples
from .scoring import score_clean, score_new

# Maximum number of clean samples that the detectors are fitted and calibrated on, and of features
# of a layer. A covariance of 2,048 features would take seconds for each layer.
MAX_TRAINING = 2000
MAX_FEATURES = 512

# Fewest attacked samples whose prediction an attack must have changed to count.
MIN_CHANGED = 10


def score_detection(
    features: FeatureMap, X: Array, y: NDArray[Any] | None, *, method: Any, n_neighbors: int
) -> LayerScores:
    """Score each layer by how well detectors in it tell attacked samples from clean ones.

    The detectors are fitted and calibrated on other samples than those that are attacked.

    Parameters
    ----------
    features : FeatureMap
        After ``probe`` with the network's output.
    X : array of shape (n, n_features)
        Clean samples.
    y : ndarray of shape (n,), or None
        Their classes; None for those that the network predicts.
    method : str, estimator, or list of these
        As :func:`~sklearn_rails.sensing.make_detectors` takes it; "auto" for those that score each
        layer by default.
    n_neighbors : int

    Returns
    -------
    LayerScores
        Area under the ROC curve, of the samples whose prediction an attack changes. If no detector
        has a score for each layer, the accuracy of neighbours instead.

    Raises
    ------
    NotDifferentiableError
        If the network's output has no gradient.
    """
    if isinstance(method, str) and method == "auto":
        method = ["mahalanobis"]
        n_outputs = features.outputs(X[:1]).shape[1]
        if y is None or len(np.unique(y)) in (n_outputs, n_outputs + (n_outputs == 1)):
            method.append("disagreement")
    y = features.predict(X).cpu().numpy() if y is None else np.unique(y, return_inverse=True)[1]
    rng = np.random.default_rng(0)
    size = min(N_HELD_OUT, len(X) // 2)
    attack = HeldOutAttack(features, X, y, eps=None, n_held_out=size, rng=rng)
    layers = features.find_layers(MAX_LAYERS)
    sampled = features.sample_features(layers, MAX_FEATURES, X, rng)
    others = np.setdiff1d(np.arange(len(X)), attack.index)
    others = others[sample_rows(len(others), MAX_TRAINING, rng)]
    n_neighbors = min(n_neighbors, max(1, len(others) // 4))
    n_classes = int(y.max()) + 1
    half = sample_rows(len(others), len(others) // 2, rng)
    clean = CleanSamples(
        X[others],
        y[others],
        n_classes,
        n_neighbors,
        sampled,
        np.setdiff1d(np.arange(len(others)), half),
    )
    detectors = make_detectors(method, np.random.RandomState(0))
    for detector in detectors.values():
        detector.fit(clean)
    raw = score_clean(detectors, clean, half)
    is_by_layer = [scores.shape[1] == len(layers) for scores in raw]
    if not any(is_by_layer):
        return score_layers(features, X, y)
    scales = [[ConformalScale(column) for column in scores.T] for scores in raw]
    n_scores = [scores.shape[1] for scores in raw]

    def evidence(samples: Array) -> NDArray[np.float64]:
        """Return the evidence in each layer, summed over the detectors, (n, n_layers)."""
        found = score_new(detectors, samples, sampled, n_classes, n_scores)
        return np.sum(
            [
                np.stack([scale(column) for scale, column in zip(s, f.T, strict=True)], axis=1)
                for s, f, used in zip(scales, found, is_by_layer, strict=True)
                if used
            ],
            axis=0,
        )

    placements, radii, reference = [], [], None
    for radius, attacked in zip(attack.radii, attack, strict=True):
        found = evidence(attacked)
        if reference is None:
            reference = found
        elif attack.changed.sum() >= MIN_CHANGED:
            placements.append(_placements(found[attack.changed], reference))
            radii.append(radius)
    if not radii:
        return score_layers(features, X, y)
    attack.warn_if_weak()
    areas = np.stack([p.mean(axis=0) for p in placements])
    best = areas.mean(axis=0).argmax()
    errors = [p[:, best].std() / np.sqrt(len(p)) for p in placements]
    scores = {layer: areas[:, i] for i, layer in enumerate(layers)}
    return LayerScores(scores, np.array(radii), float(np.mean(errors)))


def _placements(attacked: NDArray[np.float64], clean: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the share of clean samples with less evidence, ties halved; the mean is the area."""
    below = (clean < attacked[:, None]).mean(axis=1)
    return below + (clean == attacked[:, None]).mean(axis=1) / 2
