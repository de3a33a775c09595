"""Scores of several detectors together, and their evidence."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .._blocks import map_blocks
from .._conformal import ConformalScale, sample_rows
from ..features.mapping import FeatureMap
from .base import Detector
from .samples import CleanSamples, Query


def any_needs_outputs(detectors: Mapping[str, Detector]) -> bool:
    """Check whether any detector depends on the network's outputs or predicted labels.

    Parameters
    ----------
    detectors : dict of str to Detector

    Returns
    -------
    bool
    """
    return any(d.needs_labels or d.needs_outputs for d in detectors.values())


def score_clean(
    detectors: Mapping[str, Detector], clean: CleanSamples, self_index: NDArray[np.int64]
) -> list[NDArray[np.float64]]:
    """Score clean samples as if they were new: each is left out.

    Parameters
    ----------
    detectors : dict of str to Detector
        Fitted to the clean samples.
    clean : CleanSamples
    self_index : ndarray of shape (n,)
        Positions of those that are scored.

    Returns
    -------
    list of ndarray of shape (n, n_scores), float64
        The scores of each detector.
    """
    feature_map = clean.feature_map
    has_outputs = any_needs_outputs(detectors) and feature_map.has_network

    def score(block: slice) -> list[NDArray[np.float64]]:
        drawn = self_index[block]
        X = clean.X[drawn]
        features = {layer: clean.features_of(layer, drawn) for layer in clean.neighbors}
        outputs = feature_map.outputs(X) if has_outputs else None
        query = Query(X, features, feature_map, drawn, outputs=outputs, n_classes=clean.n_classes)
        return [detector(query) for detector in detectors.values()]

    return map_blocks(score, len(self_index), feature_map.row_bytes, feature_map.device)


def score_new(
    detectors: Mapping[str, Detector],
    X: NDArray[Any] | torch.Tensor,
    feature_map: FeatureMap,
    n_classes: int,
    n_scores: list[int],
) -> list[NDArray[np.float64]]:
    """Score new samples.

    Parameters
    ----------
    detectors : dict of str to Detector
    X : ndarray or torch.Tensor of shape (n, n_features)
    feature_map : FeatureMap
    n_classes : int
        Of the clean samples.
    n_scores : list of int
        Number of scores of each detector.

    Returns
    -------
    list of ndarray of shape (n, n_scores), float64
        The scores of each detector, NaN where the network gives NaN or infinity.
    """
    has_outputs = any_needs_outputs(detectors) and feature_map.has_network
    layers = feature_map.layers
    # One pass through the network for both.
    wanted = (*layers, feature_map.output) if has_outputs else layers

    def score(block: slice) -> list[NDArray[np.float64]]:
        samples = X[block]
        found, changed = _run_with_variants(detectors, samples, feature_map, wanted)
        finite = torch.ones(len(samples), dtype=torch.bool, device=feature_map.device)
        for values in found.values():
            finite &= torch.isfinite(values).all(dim=1)
        scores = [np.full((len(samples), n), np.nan) for n in n_scores]
        if finite.any():
            # A slice where it can be, since it copies nothing.
            kept = slice(None) if finite.all() else finite.nonzero()[:, 0].cpu().numpy()
            query = Query(
                samples[kept],
                {layer: found[layer][kept] for layer in layers},
                feature_map,
                outputs=found[feature_map.output][kept] if has_outputs else None,
                variants={d: [outputs[kept] for outputs in o] for d, o in changed.items()},
                n_classes=n_classes,
            )
            for array, detector in zip(scores, detectors.values(), strict=True):
                array[kept] = detector(query)
        return scores

    return map_blocks(score, len(X), feature_map.row_bytes, feature_map.device)


def _run_with_variants(
    detectors: Mapping[str, Detector],
    X: NDArray[Any] | torch.Tensor,
    feature_map: FeatureMap,
    wanted: tuple[str, ...],
) -> tuple[dict[str, torch.Tensor], dict[Detector, list[torch.Tensor]]]:
    """Run samples, together with the variants of all detectors if they are less than a micro-batch.

    Returns
    -------
    features : dict of str to torch.Tensor of shape (n, n_layer_features)
        What is wanted of the samples.
    outputs : dict of Detector to list of torch.Tensor of shape (n, n_outputs)
        For the variants that ran with them.
    """
    n, size = len(X), feature_map.batch_size
    if feature_map.output not in wanted or 2 * n > size or isinstance(X, torch.Tensor):
        return feature_map(X, wanted, check_finite=False), {}
    variants = {detector: detector.variants(X) for detector in detectors.values()}
    rows = np.concatenate([X, *(rows for changed in variants.values() for rows in changed)])
    found = feature_map(rows, wanted, check_finite=False)
    parts = iter(found[feature_map.output][n:].split(n))
    known = {d: [next(parts) for _ in changed] for d, changed in variants.items() if changed}
    return {name: values[:n] for name, values in found.items()}, known


class Evidence:
    """Turn the scores of several detectors into evidence, by those of clean samples.

    Attributes
    ----------
    n_scores : list of int
        Number of scores of each detector.
    """

    def fit(
        self, scores: list[NDArray[np.float64]], rng: np.random.RandomState
    ) -> NDArray[np.float64]:
        """Set the scales by the scores of clean samples.

        Parameters
        ----------
        scores : list of ndarray of shape (n, n_scores)
            The scores of each detector for clean samples.
        rng : numpy.random.RandomState
            Draws the half of the samples that sets the scales, if there is more than one score.

        Returns
        -------
        ndarray of shape (n_calibration,), float64
            The summed evidence of the clean samples that may set a threshold for it.
        """
        n_samples = len(scores[0])
        self.n_scores = [raw.shape[1] for raw in scores]
        for_scales = for_threshold = np.arange(n_samples)
        if sum(self.n_scores) > 1:
            # A sum of the logs of p-values is no longer one of a p-value: its threshold is set by
            # samples that did not set the scales.
            for_scales = sample_rows(n_samples, n_samples // 2, rng)
            for_threshold = np.setdiff1d(for_threshold, for_scales)
        self._scales = [[ConformalScale(c, for_scales) for c in raw.T] for raw in scores]
        threat: NDArray[np.float64] = self([raw[for_threshold] for raw in scores]).sum(axis=1)
        return threat

    def __call__(self, scores: list[NDArray[np.float64]]) -> NDArray[np.float64]:
        """Compute the evidence of each detector, summed over its scores.

        Parameters
        ----------
        scores : list of ndarray of shape (n, n_scores)

        Returns
        -------
        ndarray of shape (n, n_detectors), float64
        """
        columns = [
            sum(scale(column) for scale, column in zip(scales, raw.T, strict=True))
            for scales, raw in zip(self._scales, scores, strict=True)
        ]
        return np.stack(columns, axis=1)
