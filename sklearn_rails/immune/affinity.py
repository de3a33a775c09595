"""Affinities: how well features match an antigen's (higher is closer)."""

import torch
from torch.nn.functional import normalize


def affinity_to(affinity, antigens, features, *, overwrite_features=False):
    """Compare each antigen's features with those of its own candidates.

    Parameters
    ----------
    affinity : {"euclidean", "cosine", "inner_product"} or callable
        A callable takes two tensors of shape (m, n_features) and gives one of shape (m,).
    antigens : torch.Tensor of shape (n, n_features)
    features : torch.Tensor of shape (n, k, n_features)
    overwrite_features : bool, default=False
        Whether what is in ``features`` is wanted no more: fresh memory costs more than arithmetic.

    Returns
    -------
    torch.Tensor of shape (n, k)

    Raises
    ------
    ValueError
        If a callable gives something else.
    """
    out = features if overwrite_features else None
    if affinity == "euclidean":
        return -torch.linalg.vector_norm(torch.sub(features, antigens[:, None], out=out), dim=2)
    if affinity == "cosine":
        antigens, features = normalize(antigens, dim=1), normalize(features, dim=2, out=out)
    if affinity in ("cosine", "inner_product"):
        return torch.mul(features, antigens[:, None], out=out).sum(dim=2)
    n, k, d = features.shape
    given = affinity(antigens.repeat_interleave(k, dim=0), features.reshape(n * k, d))
    if not isinstance(given, torch.Tensor) or given.shape != (n * k,):
        got = tuple(given.shape) if isinstance(given, torch.Tensor) else type(given).__name__
        raise ValueError(
            f"affinity must give a tensor of shape (n,) for two of shape (n, n_features); for "
            f"n={n * k} it gave {got}."
        )
    return given.to(features.dtype).reshape(n, k)
