"""Conformity: how well training samples support an input or a label, as votes of neighbours."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .index import ClassNeighbors
from .leave_one_out import drop_self


def neighbor_votes(
    features: Mapping[str, Tensor],
    neighbors: Mapping[str, ClassNeighbors],
    labels: NDArray[np.int64],
    *,
    n_neighbors: int,
    n_classes: int,
    self_index: NDArray[np.int64] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Count the classes of the nearest neighbours in every layer.

    Parameters
    ----------
    features : dict of str to torch.Tensor of shape (n, n_layer_features)
    neighbors : dict of str to ClassNeighbors
        Of all training samples, as one class.
    labels : ndarray of shape (n_train,)
        Classes of the training samples, as integers from 0.
    n_neighbors : int
        At most the number of training samples.
    n_classes : int
    self_index : ndarray of shape (n,), default=None
        Each sample's own index, if these are training samples: none is its own neighbour.

    Returns
    -------
    votes : ndarray of shape (n, n_classes), float64
        Number of neighbours of each class, over all layers.
    tie_break : ndarray of shape (n, n_classes), float64
        Mean over the layers of R / (r + R), with the distance r of the class's nearest neighbour
        and R of the k-th: from 1/2 to 1, and 0 where the class is not among the neighbours.
    """
    n = len(next(iter(features.values())))
    votes = torch.zeros((n, n_classes), dtype=torch.float64)
    tie_break = torch.zeros_like(votes)
    for layer, queries in features.items():
        distance, index = nearest(neighbors[layer], queries, n_neighbors, self_index)
        distance, index = distance.cpu().to(torch.float64), index.cpu()
        # An index of the user's may find fewer neighbours than it is asked for.
        exists = index >= 0
        if not exists.any(dim=1).all():
            raise ValueError("algorithm: kneighbors gave no neighbour at all of some samples.")
        classes = torch.from_numpy(labels)[index.clamp(min=0)]
        counts = torch.zeros_like(votes)
        votes = votes + counts.scatter_add_(1, classes, exists.to(torch.float64))
        nearest_of_class = torch.full_like(counts, torch.inf)
        nearest_of_class.scatter_reduce_(1, classes, distance, "amin")
        farthest = distance.masked_fill(~exists, 0).amax(dim=1, keepdim=True)
        scale = farthest.clamp_min(torch.finfo(torch.float64).tiny)
        tie_break = tie_break + scale / (nearest_of_class + scale) / len(features)
    return votes.numpy(), tie_break.numpy()


def nearest(
    neighbors: ClassNeighbors,
    queries: Tensor,
    n_neighbors: int,
    self_index: NDArray[np.int64] | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the nearest of all training samples.

    Parameters
    ----------
    neighbors : ClassNeighbors
        Of all training samples, as one class.
    queries : torch.Tensor of shape (n, n_features)
    n_neighbors : int
    self_index : ndarray of shape (n,), default=None
        Each query's own index, if these are training samples.

    Returns
    -------
    distance, index : torch.Tensor of shape (n, n_neighbors)
    """
    affinity, index = neighbors.kneighbors(queries, n_neighbors + (self_index is not None))
    if self_index is not None:
        own = torch.as_tensor(self_index, device=index.device)
        affinity, index = drop_self(affinity, index, own)
    return -affinity[:, 0], index[:, 0]


def class_margin(flocked: Tensor, labels: Tensor) -> Tensor:
    """Compute by how much another class's neighbours are nearer than those of the labels.

    Parameters
    ----------
    flocked : torch.Tensor of shape (n, n_classes, n_neighbors)
        Affinities of each class's neighbours, minus infinity where a class has no more.
    labels : torch.Tensor of shape (n,), int64

    Returns
    -------
    torch.Tensor of shape (n,)
        The highest mean affinity of another class's neighbours minus that of the label's class;
        infinite where the label's class has none.
    """
    there = flocked > -torch.inf
    mean = flocked.masked_fill(~there, 0).sum(dim=2) / there.sum(dim=2)
    mean = mean.masked_fill(~there.any(dim=2), -torch.inf)
    column = labels[:, None]
    return mean.scatter(1, column, -torch.inf).amax(dim=1) - mean.gather(1, column)[:, 0]
