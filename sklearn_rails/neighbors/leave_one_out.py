"""Neighbours of training samples that are left out of their own neighbours, and their spread."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from .index import ClassNeighbors
from .search import Recompute

# tau="scale" is this share of the standard deviation of affinities within a sample's neighbours.
TAU_SHARE = 0.2


def drop_self(affinity: Tensor, index: Tensor, self_index: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the training samples from their own neighbours, or else the last of these.

    Parameters
    ----------
    affinity, index : torch.Tensor of shape (n, n_classes, n_neighbors)
        As :meth:`ClassNeighbors.kneighbors` returns them.
    self_index : torch.Tensor of shape (n,)
        Each sample's own index among the examples.

    Returns
    -------
    affinity, index : torch.Tensor of shape (n, n_classes, n_neighbors - 1)
    """
    dropped = index == self_index[:, None, None]
    dropped[..., -1] |= ~dropped.any(dim=2)
    # False sorts before True, and stably.
    kept = dropped.to(torch.uint8).sort(dim=2, stable=True).indices[..., :-1]
    return affinity.gather(2, kept), index.gather(2, kept)


def kneighbors_leave_one_out(
    neighbors: ClassNeighbors,
    self_index: Tensor,
    features: Tensor,
    n_neighbors: int,
    recompute: Recompute | None = None,
) -> Tensor:
    """Compute neighbours of training samples as if these were new.

    Parameters
    ----------
    neighbors : ClassNeighbors
    self_index : torch.Tensor of shape (n,), int64
        Each sample's own index among the examples.
    features : torch.Tensor of shape (n, n_features)
    n_neighbors : int
    recompute : callable, default=None
        As :meth:`ClassNeighbors.kneighbors` takes it.

    Returns
    -------
    torch.Tensor of shape (n, n_classes, n_neighbors)
        Affinities, highest first, minus infinity where a class has no more; at most as many as
        the largest class has examples.
    """
    n_neighbors = min(n_neighbors, max(1, int(neighbors.n_samples_.max())))
    affinity, index = neighbors.kneighbors(features, n_neighbors + 1, recompute)
    # Room for one more than the largest class has, so that nothing real is dropped elsewhere.
    missing = n_neighbors + 1 - affinity.shape[2]
    affinity = pad(affinity, (0, missing), value=-torch.inf)
    return drop_self(affinity, pad(index, (0, missing), value=-1), self_index)[0]


def scale_of_affinity(
    neighbors: ClassNeighbors,
    self_index: Tensor,
    features: Tensor,
    n_neighbors: int,
    recompute: Recompute | None = None,
) -> float:
    """Return the value of tau="scale": a share of the affinities' spread among neighbours.

    Parameters
    ----------
    neighbors : ClassNeighbors
    self_index : torch.Tensor of shape (n,), int64
        Index of some training samples among the examples.
    features : torch.Tensor of shape (n, n_features)
        Of these samples.
    n_neighbors : int
    recompute : callable, default=None
        As :meth:`ClassNeighbors.kneighbors` takes it.

    Returns
    -------
    float
        Above 0; 1 where all affinities are equal.
    """
    flocked = kneighbors_leave_one_out(neighbors, self_index, features, n_neighbors, recompute)
    affinity = flocked.flatten(1).cpu().numpy().astype(np.float64)
    affinity[np.isinf(affinity)] = np.nan
    counted = np.isfinite(affinity).sum(axis=1) > 1
    spread = np.nanstd(affinity[counted], axis=1)
    spread = spread[spread > 0]
    # Where all affinities are alike, selection is a fair draw at any temperature.
    return TAU_SHARE * float(np.median(spread)) if len(spread) else 1.0
