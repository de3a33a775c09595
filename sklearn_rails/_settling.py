"""Rows that RAILS answers without breeding: by the network's label, or by flocking alone."""

import reprlib

import numpy as np
import torch

from ._blocks import map_blocks
from ._conformal import conformal_p_values, sample_rows, warn_of_few_rows
from .immune.consensus import count_votes, rank_by_affinity, tie_break, top_count
from .neighbors.index import kneighbors_leave_one_out
from .neighbors.votes import class_margin

# Training rows by which the network's labels are judged: enough for a rate of 5 % to be met within
# a point (one standard deviation 0.7).
CALIBRATION_ROWS = 1000


class SettlesRows:
    """The part of RAILS that says which rows are bred, with ``arbitration`` or ``triage``."""

    def _settle(self, rows, X):
        """Give scores without any breeding, for which rows it is needed, and why."""
        if self.triage:
            alarms = check_alarms(self.threat_scorer_.predict(X), len(rows))
            (scores,) = map_blocks(
                lambda block: [self._count_flock(rows[block])],
                len(rows),
                self._features.row_bytes,
                self._features.device,
            )
            return scores, alarms, None
        scores, p_values = self._arbitrate(rows)
        return scores, p_values <= self.arbitration, p_values

    def _count_flock(self, X):
        """Let the fittest flocked neighbours vote."""
        n_plasma = top_count(self.plasma_fraction, self.population_size)
        votes, ties = 0, 0
        for layer, features in self._features(X).items():
            flocked, _ = self._flock(features, layer)
            best = rank_by_affinity(flocked.flatten(1), n_plasma)
            there = flocked.flatten(1).gather(1, best) > -torch.inf
            # A class beyond the last takes the votes of neighbours that are not there.
            classes = torch.where(there, best // flocked.shape[2], len(self.classes_))
            votes = votes + count_votes(classes, len(self.classes_) + 1)[:, :-1]
            ties = ties + tie_break(flocked[..., 0], self.tau_[layer])
        return self._join_votes(votes, ties)

    def _arbitrate(self, X):
        """Give the scores with which the network's labels stand, and the labels' p-values."""
        n_plasma = top_count(self.plasma_fraction, self.population_size)

        def arbitrate(block):
            labels = self._network_labels(X[block])
            votes = len(self.layers_) * count_votes(
                labels[:, None].expand(-1, n_plasma), len(self.classes_)
            )
            against, ties = 0, 0
            for layer, features in self._features(X[block]).items():
                flocked, _ = self._flock(features, layer)
                against = against + class_margin(flocked, labels) / self.tau_[layer]
                ties = ties + tie_break(flocked[..., 0], self.tau_[layer])
            p_values = conformal_p_values(against.cpu().numpy(), self._calibration)
            return self._join_votes(votes, ties), p_values

        return map_blocks(arbitrate, len(X), self._features.row_bytes, self._features.device)

    def _check_triage(self):
        if self.arbitration is not None:
            raise ValueError(
                f"triage=True and arbitration={self.arbitration} both say which rows are bred; "
                "choose one of them."
            )
        if not hasattr(self.threat_scorer, "predict"):
            raise ValueError(
                "triage=True needs a threat_scorer that raises alarms, with predict, got "
                f"threat_scorer={self.threat_scorer!r}."
            )

    def _judge_training_rows(self, X):
        own = sample_rows(len(X), CALIBRATION_ROWS, self.seed_)
        warn_of_few_rows(
            "arbitration",
            self.arbitration,
            len(own),
            f"rows to judge by, but there are {len(own)}: all labels of the network will stand. "
            "Take a larger value, or more training rows (1,000 are used at most).",
        )
        (against,) = map_blocks(
            lambda block: [self._disagreement_without_own(X, own[block])],
            len(own),
            self._features.row_bytes,
            self._features.device,
        )
        return np.sort(against)

    def _disagreement_without_own(self, X, own):
        """Score the network's labels of training rows, each left out of its own neighbours."""
        labels, against = self._network_labels(X[own]), 0
        for layer, features in self._features(X[own]).items():
            flocked = kneighbors_leave_one_out(
                self.neighbors_[layer],
                torch.from_numpy(own).to(self.device_),
                features,
                self.n_neighbors,
                self._recall(layer),
            )
            against = against + class_margin(flocked, labels) / self.tau_[layer]
        return against.cpu().numpy()

    def _check_outputs(self, X):
        """Complain where the network has no answers that could be put to the vote."""
        if not self._features.has_network:
            raise ValueError(
                f"arbitration={self.arbitration} is about a network's labels, but there is no "
                "network: give a feature_extractor, or arbitration=None."
            )
        self._features.check_outputs(X, len(self.classes_), f"arbitration={self.arbitration}")

    def _network_labels(self, X):
        """Return the network's labels; with one class, both of a single output are that class."""
        return self._features.predict(X).clamp(max=len(self.classes_) - 1)


def spread_rows(X, n_rows):
    """Draw positions of some rows at random, the same each time.

    Parameters
    ----------
    X : ndarray or torch.Tensor
    n_rows : int

    Returns
    -------
    torch.Tensor of shape (min(n_rows, len(X)),), int64
    """
    return torch.from_numpy(sample_rows(len(X), n_rows, rng=0))


def check_alarms(predictions, n_samples):
    """Check what a threat scorer's ``predict`` returned.

    Parameters
    ----------
    predictions : array-like of shape (n_samples,)
        -1 for an alarm, else 1.
    n_samples : int

    Returns
    -------
    ndarray of shape (n_samples,), bool
        True for an alarm.

    Raises
    ------
    ValueError
        If the predictions are anything else.
    """
    alarms = _as_numbers(predictions)
    if alarms.shape != (n_samples,) or not ((alarms == -1) | (alarms == 1)).all():
        raise ValueError(
            f"threat_scorer: predict must return -1 (an alarm) or 1 for each of the {n_samples} "
            f"samples, got {_describe(predictions, alarms)}."
        )
    return alarms == -1


def check_threat_scores(scores, n_samples):
    """Check what a threat scorer's ``score_samples`` returned.

    Parameters
    ----------
    scores : array-like of shape (n_samples,)
    n_samples : int

    Returns
    -------
    ndarray of shape (n_samples,), float64

    Raises
    ------
    ValueError
        If the scores are anything else, or NaN.
    """
    numbers = _as_numbers(scores)
    if numbers.shape != (n_samples,) or np.isnan(numbers).any():
        raise ValueError(
            f"threat_scorer: score_samples must return a number, not NaN, for each of the "
            f"{n_samples} samples, got {_describe(scores, numbers)}."
        )
    return numbers


def _as_numbers(values):
    """Return float64, without dimensions where the values are not an array of numbers."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
    try:
        array = np.asarray(values)
    except (TypeError, ValueError):  # lists of unequal lengths
        return np.array(np.nan)
    return array.astype(np.float64) if array.dtype.kind in "iuf" else np.array(np.nan)


def _describe(values, numbers):
    if numbers.ndim == 0:
        return reprlib.repr(values)
    return f"shape {numbers.shape} with values {np.unique(numbers)[:4].tolist()}"


def shares_of(scores):
    """Give scores as shares of their sum.

    Parameters
    ----------
    scores : ndarray of shape (n, n_classes)

    Returns
    -------
    ndarray of shape (n, n_classes)
    """
    return scores / scores.sum(axis=1, keepdims=True)
