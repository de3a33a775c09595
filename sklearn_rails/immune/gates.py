"""Gates: which samples are bred, and how the others are classified."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, clone

from .._blocks import map_blocks
from .._compat import Interval
from .._conformal import conformal_p_values, sample_rows, warn_of_few_rows
from .._validation import naming
from ..features import FeatureMap
from ..neighbors.leave_one_out import kneighbors_leave_one_out
from ..neighbors.votes import class_margin
from .consensus import count_votes, rank_by_affinity, tie_break
from .layer import Flock, ResponseLayer

# Number of training samples by which the network's predictions are judged: enough for a rate of
# 5 % to be met within a point (one standard deviation is 0.7).
CALIBRATION_SAMPLES = 1000


@dataclass(frozen=True, eq=False)
class Screening:
    """Which samples are bred, and the scores of those that are not.

    Attributes
    ----------
    bred : torch.Tensor of shape (n,), bool
    votes, ties : torch.Tensor of shape (n, n_classes), float64
        As in :class:`LayerResponse`, summed over the layers, of samples that are not bred.
    p_values : ndarray of shape (n,) or None
        The p-values of the network's predictions.
    """

    bred: torch.Tensor
    votes: torch.Tensor
    ties: torch.Tensor
    p_values: NDArray[np.float64] | None = None


class Arbitration(BaseEstimator):
    """Keep the network's prediction unless the neighbours contradict it.

    A sample is bred only if the p-value of the label that the network predicts, by the flocked
    neighbours, is ``alpha`` or less. Not in the paper.

    Parameters
    ----------
    alpha : float, default=0.05
        About the share of clean samples that are bred; between 0 and 1.

    Notes
    -----
    p-values are conformal, as those of deep k-nearest neighbours [1]_. The nonconformity of a label
    is the mean affinity of the best other class's neighbours minus that of its own, in units of
    tau, summed over the layers. It is compared with that of 1,000 training samples, each left out
    of its own neighbours, for the labels that the network predicts. The network's outputs must be
    in the order of ``classes_``.

    References
    ----------
    .. [1] N. Papernot, P. McDaniel, "Deep k-Nearest Neighbors: Towards Confident, Interpretable
       and Robust Deep Learning", 2018, arXiv:1803.04765.

    Examples
    --------
    >>> from torch import nn
    >>> from sklearn_rails import RAILSClassifier
    >>> from sklearn_rails.immune import Arbitration
    >>> rails = RAILSClassifier(
    ...     nn.Linear(4, 3), layers="input", gate=Arbitration(alpha=0.1)
    ... )
    >>> rails.get_params()["gate__alpha"]
    0.1
    """

    _parameter_constraints = {"alpha": [Interval(Real, 0, 1, closed="neither")]}

    needs_network = True
    needs_alarms = False

    def __init__(self, alpha: float = 0.05) -> None:
        self.alpha = alpha

    def calibrate(
        self, layers: Sequence[ResponseLayer], X: NDArray[Any] | torch.Tensor, seed: int
    ) -> Arbitration:
        """Calibrate by the network's predictions for training samples.

        Parameters
        ----------
        layers : sequence of ResponseLayer
            The layers of the engine.
        X : ndarray or torch.Tensor of shape (n, n_features)
            The training samples.
        seed : int
            Seed of the sample that calibrates.

        Returns
        -------
        Arbitration
            A clone with ``calibration_``, nonconformities in ascending order.

        Raises
        ------
        ValueError
            If ``alpha`` is invalid, or there is no network with an output for each class.
        """
        with naming("alpha"):
            self._validate_params()
        features, n_classes = layers[0].features, layers[0].n_classes
        if not features.has_network:
            raise ValueError(
                f"gate={self!r} needs a network whose predictions it can keep: set "
                "feature_extractor, or gate=None."
            )
        features.check_outputs(X, n_classes, f"gate={self!r}")
        chosen = sample_rows(len(X), CALIBRATION_SAMPLES, seed)
        warn_of_few_rows(
            "alpha",
            self.alpha,
            len(chosen),
            f"samples to judge by, but there are {len(chosen)}: gate={self!r} will keep all of the "
            "network's predictions. Use a larger alpha, or more training samples (at most 1,000 "
            "are used).",
        )

        def judge(block: slice) -> list[NDArray[Any]]:
            index = torch.from_numpy(chosen[block]).to(features.device)
            found = features(X[chosen[block]], (*features.layers, features.output))
            labels = _network_labels(features, found, n_classes)
            against: Any = 0
            for layer in layers:
                affinity = kneighbors_leave_one_out(
                    layer.neighbors, index, found[layer.name], layer.n_neighbors, layer.recompute
                )
                against = against + class_margin(affinity, labels) / layer.tau
            return [against.cpu().numpy()]

        (against,) = map_blocks(judge, len(chosen), features.row_bytes, features.device)
        fitted = clone(self)
        fitted.calibration_ = np.sort(against)
        return fitted

    def screen(
        self,
        layers: Sequence[ResponseLayer],
        flocks: Sequence[Flock],
        found: dict[str, torch.Tensor],
        alarms: NDArray[np.bool_] | None,
    ) -> Screening:
        """Select the samples whose network label the neighbours contradict.

        Parameters
        ----------
        layers : sequence of ResponseLayer
            The layers of the engine.
        flocks : sequence of Flock
            Of each layer.
        found : dict of str to torch.Tensor
            The features of the layers, and the network's output.
        alarms : None
            Not used.

        Returns
        -------
        Screening
            Which samples are bred, and the scores of the others.
        """
        n_classes, n_plasma = layers[0].n_classes, layers[0].schedule.n_plasma
        labels = _network_labels(layers[0].features, found, n_classes)
        votes = len(layers) * count_votes(labels[:, None].expand(-1, n_plasma), n_classes)
        against: Any = 0
        ties: Any = 0
        for layer, flock in zip(layers, flocks, strict=True):
            against = against + class_margin(flock.affinity, labels) / layer.tau
            ties = ties + tie_break(flock.affinity[..., 0], layer.tau)
        p_values = conformal_p_values(against.cpu().numpy(), self.calibration_)
        bred = torch.from_numpy(p_values <= self.alpha).to(votes.device)
        return Screening(bred, votes, ties, p_values)


class Triage(BaseEstimator):
    """Breed only the samples that the threat scorer flags.

    The flocked neighbours of highest affinity, as many as there would be plasma cells, vote on all
    other samples: an attack that evades the scorer faces only this nearest-neighbour vote. Not in
    the paper.

    Examples
    --------
    >>> from sklearn_rails import RAILSClassifier, ThreatScorer
    >>> from sklearn_rails.immune import Triage
    >>> rails = RAILSClassifier(gate=Triage(), threat_scorer=ThreatScorer())
    >>> rails.get_params()["gate"]
    Triage()
    """

    _parameter_constraints: dict[str, Any] = {}

    needs_network = False
    needs_alarms = True

    def calibrate(
        self, layers: Sequence[ResponseLayer], X: NDArray[Any] | torch.Tensor, seed: int
    ) -> Triage:
        """Return a clone: there is nothing to calibrate.

        Parameters
        ----------
        layers : sequence of ResponseLayer
            Not used.
        X : ndarray or torch.Tensor of shape (n, n_features)
            Not used.
        seed : int
            Not used.

        Returns
        -------
        Triage
            The clone.
        """
        return clone(self)

    def screen(
        self,
        layers: Sequence[ResponseLayer],
        flocks: Sequence[Flock],
        found: dict[str, torch.Tensor],
        alarms: NDArray[np.bool_],
    ) -> Screening:
        """Select the samples that are flagged.

        Parameters
        ----------
        layers : sequence of ResponseLayer
            The layers of the engine.
        flocks : sequence of Flock
            Of each layer.
        found : dict of str to torch.Tensor
            Not used.
        alarms : ndarray of shape (n,), bool
            Whether the threat scorer flags each sample.

        Returns
        -------
        Screening
            Which samples are bred, and the scores of the others.
        """
        votes: Any = 0
        ties: Any = 0
        for layer, flock in zip(layers, flocks, strict=True):
            votes = votes + vote_of_neighbors(flock.affinity, layer.schedule.n_plasma)
            ties = ties + tie_break(flock.affinity[..., 0], layer.tau)
        return Screening(torch.from_numpy(alarms).to(votes.device), votes, ties)


def vote_of_neighbors(affinity: torch.Tensor, n_votes: int) -> torch.Tensor:
    """Count the classes of the flocked neighbours of highest affinity.

    Parameters
    ----------
    affinity : torch.Tensor of shape (n, n_classes, n_neighbors)
        Minus infinity where a class has no more.
    n_votes : int

    Returns
    -------
    torch.Tensor of shape (n, n_classes), float64
    """
    n_classes, k = affinity.shape[1:]
    best = rank_by_affinity(affinity.flatten(1), n_votes)
    exists = affinity.flatten(1).gather(1, best) > -torch.inf
    # A class beyond the last takes the votes of neighbours that do not exist.
    classes = torch.where(exists, best // k, n_classes)
    return count_votes(classes, n_classes + 1)[:, :-1]


def _network_labels(
    features: FeatureMap, found: dict[str, torch.Tensor], n_classes: int
) -> torch.Tensor:
    # With one class, both labels of a single output are that class.
    return features.label(found[features.output]).clamp(max=n_classes - 1)
