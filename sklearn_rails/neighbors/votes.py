"""Conformity: how well training data support an input or a label, as votes of neighbours."""

import torch

from .index import drop_self


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
    tie_break : ndarray of shape (n, n_classes), float64
        Mean over the layers of R / (r + R), with the distance r of the class's nearest neighbour
        and R of the k-th: from 1/2 to 1, and 0 where the class is not among the neighbours.
    """
    votes, tie_break = 0, 0
    for layer, queries in features.items():
        distance, index = nearest(neighbors[layer], queries, n_neighbors, own)
        distance = distance.cpu().to(torch.float64)
        classes = torch.from_numpy(labels)[index.cpu()]
        counts = torch.zeros((len(queries), n_classes), dtype=torch.float64)
        votes = votes + counts.scatter_add_(1, classes, torch.ones_like(distance))
        nearest_of_class = torch.full_like(counts, torch.inf)
        nearest_of_class.scatter_reduce_(1, classes, distance, "amin")
        scale = distance[:, -1:].clamp_min(torch.finfo(torch.float64).tiny)
        tie_break = tie_break + scale / (nearest_of_class + scale) / len(features)
    return votes.numpy(), tie_break.numpy()


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
        affinity, index = drop_self(affinity, index, torch.as_tensor(own, device=index.device))
    return -affinity[:, 0], index[:, 0]


def class_margin(flocked, labels):
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
