"""Rows that RAILS answers without breeding: by the network's label, or by flocking alone."""

import math
import warnings

import numpy as np
import torch
from sklearn.utils import gen_batches
from sklearn.utils.validation import check_is_fitted

from .immune.conformity import conformal_p_values, disagreement
from .immune.consensus import count_votes, fittest, n_elite, tie_break
from .immune.flocking import flock_without_own

# Rows whose features are computed together, where they need no population.
FIT_ROWS = 1024

# Training rows by which the network's labels are judged: enough for a rate of 5 % to be met within
# a point (one standard deviation 0.7).
CALIBRATION_ROWS = 1000


class SettlesRows:
    """The part of RAILS that says which rows are bred, with ``arbitration`` or ``triage``."""

    def _settle(self, rows, X):
        """Give scores without any breeding, for which rows it is needed, and why."""
        if self.triage:
            check_is_fitted(
                self,
                "threat_scorer_",
                msg="threat_scorer was None when %(name)s was fitted: fit it again.",
            )
            scores = [self._count_flock(rows[part]) for part in gen_batches(len(rows), FIT_ROWS)]
            return np.concatenate(scores), self.threat_scorer_.predict(X) == -1, None
        scores, p_values = self._arbitrate(rows)
        return scores, p_values <= self.arbitration, p_values

    def _count_flock(self, X):
        """Let the fittest flocked neighbours vote."""
        n_plasma = n_elite(self.plasma_fraction, self.population_size)
        votes, ties = 0, 0
        for layer, features in self._features(X).items():
            flocked, _ = self._flock(features, layer)
            best = fittest(flocked.flatten(1), n_plasma)
            there = flocked.flatten(1).gather(1, best) > -torch.inf
            # A class beyond the last takes the votes of neighbours that are not there.
            classes = torch.where(there, best // flocked.shape[2], len(self.classes_))
            votes = votes + count_votes(classes, len(self.classes_) + 1)[:, :-1]
            ties = ties + tie_break(flocked[..., 0], self.tau_[layer])
        return self._join_votes(votes, ties)

    def _arbitrate(self, X):
        """Give the scores with which the network's labels stand, and the labels' p-values."""
        check_is_fitted(
            self, "_calibration", msg="arbitration was None when %(name)s was fitted: fit it again."
        )
        n_plasma = n_elite(self.plasma_fraction, self.population_size)
        scores, p_values = [], []
        for rows in gen_batches(len(X), FIT_ROWS):
            labels = self._features.predict(X[rows])
            votes = len(self.layers_) * count_votes(
                labels[:, None].expand(-1, n_plasma), len(self.classes_)
            )
            against, ties = 0, 0
            for layer, features in self._features(X[rows]).items():
                flocked, _ = self._flock(features, layer)
                against = against + disagreement(flocked, labels) / self.tau_[layer]
                ties = ties + tie_break(flocked[..., 0], self.tau_[layer])
            scores.append(self._join_votes(votes, ties))
            p_values.append(conformal_p_values(against.cpu().numpy(), self._calibration))
        return np.concatenate(scores), np.concatenate(p_values)

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
        own = spread_rows(X, CALIBRATION_ROWS)
        if self.arbitration * (len(own) + 1) < 1:
            warnings.warn(
                f"arbitration={self.arbitration} needs {math.ceil(1 / self.arbitration) - 1} rows "
                f"to judge by, but there are {len(own)}: all labels of the network will stand. "
                "Take a larger value, or more training rows (1,000 are used at most).",
                stacklevel=6,
            )
        rows = X[own.tolist()]
        labels, against = self._features.predict(rows), 0
        for layer, features in self._features(rows).items():
            flocked = flock_without_own(
                self.neighbors_[layer],
                own.to(self.device_),
                features,
                self.n_neighbors,
                self._recall(layer),
            )
            against = against + disagreement(flocked, labels) / self.tau_[layer]
        return np.sort(against.cpu().numpy())

    def _check_outputs(self, X):
        """Complain where the network has no answers that could be put to the vote."""
        if not self._features.has_network:
            raise ValueError(
                f"arbitration={self.arbitration} is about a network's labels, but there is no "
                "network: give a feature_extractor, or arbitration=None."
            )
        self._features.check_outputs(X, len(self.classes_), f"arbitration={self.arbitration}")


def spread_rows(X, n_rows):
    """Give positions of some rows, from all over.

    Parameters
    ----------
    X : ndarray or torch.Tensor
    n_rows : int

    Returns
    -------
    torch.Tensor of shape (min(n_rows, len(X)),) at most, int64
    """
    return torch.linspace(0, len(X) - 1, min(n_rows, len(X))).long().unique()


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
