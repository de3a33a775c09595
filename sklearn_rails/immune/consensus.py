"""Consensus: the fittest cells become plasma and memory, and the plasma votes."""

import math

import numpy as np
import torch
from numpy.typing import NDArray


def top_count(fraction: float, n_cells: int) -> int:
    """Count the cells in the top ``fraction`` of a population, at least one.

    Parameters
    ----------
    fraction : float
    n_cells : int

    Returns
    -------
    int
    """
    # 0.07 * 100 is 7.000000000000001, and half precision ends at 65504.
    return max(1, math.ceil(round(float(fraction) * int(n_cells), 9)))


def rank_by_affinity(affinity: torch.Tensor, n_fittest: int) -> torch.Tensor:
    """Rank the cells of highest affinity, ties by position.

    Parameters
    ----------
    affinity : torch.Tensor of shape (n, n_cells)
        Cells without an affinity, minus infinity, come last.
    n_fittest : int

    Returns
    -------
    torch.Tensor of shape (n, n_fittest), int64
    """
    return affinity.sort(dim=1, descending=True, stable=True).indices[:, :n_fittest]


def count_votes(labels: torch.Tensor, n_classes: int) -> torch.Tensor:
    """Count each class's votes.

    Parameters
    ----------
    labels : torch.Tensor of shape (n, n_votes), int64
    n_classes : int

    Returns
    -------
    torch.Tensor of shape (n, n_classes), float64
    """
    votes = torch.zeros((len(labels), n_classes), dtype=torch.float64, device=labels.device)
    return votes.scatter_add_(1, labels, torch.ones_like(labels, dtype=torch.float64))


def class_affinity(
    affinity: torch.Tensor, labels: torch.Tensor, flocked: torch.Tensor
) -> torch.Tensor:
    """Compute each class's highest affinity among its cells and its nearest neighbour.

    The neighbour stands in for a class that has died out.

    Parameters
    ----------
    affinity : torch.Tensor of shape (n, n_cells)
    labels : torch.Tensor of shape (n, n_cells), int64
    flocked : torch.Tensor of shape (n, n_classes, n_neighbors)
        Affinities of the flocked neighbours, highest first; minus infinity where there is none.

    Returns
    -------
    torch.Tensor of shape (n, n_classes)
        Minus infinity for a class without cells and neighbours.
    """
    return flocked[..., 0].scatter_reduce(1, labels, affinity, "amax")


def tie_break(affinity: torch.Tensor, tau: float) -> torch.Tensor:
    """Map the classes' affinities to less than half a vote, in the same order.

    The map never levels off, so that scores show a difference where the votes do not.

    Parameters
    ----------
    affinity : torch.Tensor of shape (n, n_classes)
        Minus infinity for a class without any, which changes nothing for the others.
    tau : float

    Returns
    -------
    torch.Tensor of shape (n, n_classes), float64
        Between 0 and 0.5; 0 for a class without an affinity.
    """
    affinity = affinity.to(torch.float64)
    there = affinity > -torch.inf
    # Shares of the mean, since sums may overflow.
    count = there.sum(dim=1, keepdim=True).clamp(min=1)
    affinity = affinity.masked_fill(~there, 0)
    away = affinity / 2 - (affinity / (2 * count)).sum(dim=1, keepdim=True)
    # z / (1 + |z|) for z = away / tau, which may overflow; 0 / 0 is no difference.
    largest = torch.finfo(torch.float64).max
    share = (away / (tau / 2 + away.abs()).clamp(max=largest)).nan_to_num(nan=0.0)
    return (0.25 * (1 + share)).masked_fill(~there, 0)


def normalize_votes(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Divide the classes' scores by their sum.

    Parameters
    ----------
    scores : ndarray of shape (n, n_classes)

    Returns
    -------
    ndarray of shape (n, n_classes)
    """
    return scores / scores.sum(axis=1, keepdims=True)
