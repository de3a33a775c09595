"""Conformity: how well training data support an input or a label, as votes and p-values."""

import numpy as np
import torch
from torch.nn.functional import one_hot

from .flocking import drop_own

# Scores beyond this are all alike, so that infinite ones can be reckoned with.
LARGEST = 1e150


def neighbor_votes(features, neighbors, labels, *, n_neighbors, n_classes, own=None):
    """Let the nearest neighbours in every layer vote.

    Parameters
    ----------
    features : dict of str to torch.Tensor of shape (n, n_layer_features)
    neighbors : dict of str to ClassNeighbors
        Of all training rows, as one class.
    labels : ndarray of shape (n_train,)
        Classes of the training rows, as integers from 0.
    n_neighbors : int
        Not more than there are training rows.
    n_classes : int
    own : ndarray of shape (n,), default=None
        Each row's index among the training rows, if it is one of them: a row is not its own
        neighbour.

    Returns
    -------
    votes : ndarray of shape (n, n_classes), float64
        Neighbours of each class, over all layers.
    closeness : ndarray of shape (n, n_classes), float64
        Mean over the layers of R / (r + R), with the distance r of the class's nearest neighbour
        and R of the k-th: from 1/2 to 1, and 0 where the class is not among the neighbours.
    """
    votes, closeness = 0, 0
    for layer, queries in features.items():
        distance, index = nearest(neighbors[layer], queries, n_neighbors, own)
        classes = torch.from_numpy(labels).to(index.device)[index]
        votes = votes + one_hot(classes, n_classes).sum(dim=1)
        nearest_of_class = torch.full((len(queries), n_classes), torch.inf, dtype=torch.float64)
        distance = distance.cpu().to(torch.float64)
        nearest_of_class.scatter_reduce_(1, classes.cpu(), distance, "amin")
        scale = distance[:, -1:].clamp_min(torch.finfo(torch.float64).tiny)
        closeness = closeness + scale / (nearest_of_class + scale) / len(features)
    return votes.cpu().numpy().astype(np.float64), closeness.numpy()


def nearest(neighbors, queries, n_neighbors, own=None):
    """Find the nearest of all training rows.

    Parameters
    ----------
    neighbors : ClassNeighbors
        Of all training rows, as one class.
    queries : torch.Tensor of shape (n, n_features)
    n_neighbors : int
    own : ndarray of shape (n,), default=None
        Each query's index among the training rows, if it is one of them.

    Returns
    -------
    distance, index : torch.Tensor of shape (n, n_neighbors)
    """
    affinity, index = neighbors.kneighbors(queries, n_neighbors + (own is not None))
    if own is not None:
        affinity, index = drop_own(affinity, index, torch.as_tensor(own, device=index.device))
    return -affinity[:, 0], index[:, 0]


def conformal_p_values(scores, calibration, *, count_own=True):
    """Compare nonconformity scores with those of calibration rows.

    Parameters
    ----------
    scores : ndarray
        Higher conforms less.
    calibration : ndarray of shape (n_calibration,)
        Scores of the calibration rows, in ascending order.
    count_own : bool, default=True
        Count the row itself, (count + 1) / (n_calibration + 1), as a valid p-value does.

    Returns
    -------
    ndarray, float64
        Of the shape of ``scores``: share of the calibration rows that conform no better.
    """
    at_least = len(calibration) - np.searchsorted(calibration, scores, side="left")
    return (at_least + count_own) / (len(calibration) + count_own)


def disagreement(flocked, labels):
    """Tell by how much another class's flock is nearer than that of the labels.

    Parameters
    ----------
    flocked : torch.Tensor of shape (n, n_classes, n_neighbors)
        Affinities of each class's neighbours, minus infinity where a class has no more.
    labels : torch.Tensor of shape (n,), int64

    Returns
    -------
    torch.Tensor of shape (n,)
        The highest mean affinity of another class's neighbours minus that of the own class's;
        infinite where the own class has none.
    """
    there = flocked > -torch.inf
    mean = flocked.masked_fill(~there, 0).sum(dim=2) / there.sum(dim=2)
    mean = mean.masked_fill(~there.any(dim=2), -torch.inf)
    own = labels[:, None]
    return mean.scatter(1, own, -torch.inf).amax(dim=1) - mean.gather(1, own)[:, 0]


class ConformalScale:
    """Turn scores into evidence, minus the log of their conformal p-value on clean rows.

    Between the calibration scores the p-value is interpolated, and beyond the largest it goes on
    falling, so that the evidence grows with the score and orders rows that lie outside of all that
    has been seen.

    Parameters
    ----------
    calibration : ndarray of shape (n_calibration,)
        Scores of clean rows; higher is more suspect.
    """

    def __init__(self, calibration):
        ordered = np.sort(np.clip(calibration, -LARGEST, LARGEST))
        self._scores, first = np.unique(ordered, return_index=True)
        self._p_values = (len(ordered) - first + 1) / (len(ordered) + 1)
        spread = self._scores[-1] - np.median(ordered)
        self._width = spread if spread > 0 else 1.0

    def __call__(self, scores):
        """Give the evidence of some scores.

        Parameters
        ----------
        scores : ndarray of shape (n,)

        Returns
        -------
        ndarray of shape (n,), float64
            0 for the least suspect.
        """
        scores = np.clip(scores, -LARGEST, LARGEST)
        inside = np.interp(scores, self._scores, self._p_values)
        beyond = np.maximum(scores - self._scores[-1], 0) / self._width
        return np.log1p(beyond) - np.log(inside)
