"""Affinities: how well a cell's features match an antigen's (higher is closer)."""

import torch
from torch.nn.functional import normalize


def paired_affinity(affinity, a, b):
    """Compare features row by row.

    Parameters
    ----------
    affinity : {"euclidean", "cosine", "inner_product"} or callable
        A callable takes two tensors of shape (n, n_features) and gives one of shape (n,).
    a, b : torch.Tensor of shape (n, n_features)

    Returns
    -------
    torch.Tensor of shape (n,)

    Raises
    ------
    ValueError
        If a callable gives something else.
    """
    if affinity == "euclidean":
        return -torch.linalg.vector_norm(a - b, dim=1)
    if affinity == "cosine":
        return (normalize(a, dim=1) * normalize(b, dim=1)).sum(dim=1)
    if affinity == "inner_product":
        return (a * b).sum(dim=1)
    given = affinity(a, b)
    if not isinstance(given, torch.Tensor) or given.shape != (len(a),):
        got = tuple(given.shape) if isinstance(given, torch.Tensor) else type(given).__name__
        raise ValueError(
            f"affinity must give a tensor of shape (n,) for two of shape (n, n_features); for "
            f"n={len(a)} it gave {got}."
        )
    return given.to(a.dtype)
