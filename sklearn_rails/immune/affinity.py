"""Affinities: how well features match an antigen's (higher is closer)."""

import torch
from torch.nn.functional import normalize

# On a CPU features are compared in pieces of so many bytes.
CACHE_BYTES = 2**20


def affinity_to(affinity, antigens, features):
    """Compare each antigen's features with those of its own candidates.

    Parameters
    ----------
    affinity : {"euclidean", "cosine", "inner_product"} or callable
        A callable takes two tensors of shape (m, n_features) and gives one of shape (m,).
    antigens : torch.Tensor of shape (n, n_features)
    features : torch.Tensor of shape (n, k, n_features)

    Returns
    -------
    torch.Tensor of shape (n, k)

    Raises
    ------
    ValueError
        If a callable gives something else.
    """
    n, k, d = features.shape
    if features.device.type == "cpu" and features.nbytes > CACHE_BYTES and n * k > 1:
        # What is computed on the way stays in the caches, and needs no fresh memory each time.
        axis = int(n == 1)
        halves = zip(
            antigens.chunk(2) if n > 1 else (antigens, antigens),
            features.chunk(2, dim=axis),
            strict=True,
        )
        return torch.cat([affinity_to(affinity, *half) for half in halves], dim=axis)
    if affinity == "euclidean":
        return -torch.linalg.vector_norm(features - antigens[:, None], dim=2)
    if affinity == "cosine":
        return (normalize(features, dim=2) * normalize(antigens, dim=1)[:, None]).sum(dim=2)
    if affinity == "inner_product":
        return (features * antigens[:, None]).sum(dim=2)
    given = affinity(antigens.repeat_interleave(k, dim=0), features.reshape(n * k, d))
    if not isinstance(given, torch.Tensor) or given.shape != (n * k,):
        got = tuple(given.shape) if isinstance(given, torch.Tensor) else type(given).__name__
        raise ValueError(
            f"affinity must give a tensor of shape (n,) for two of shape (n, n_features); for "
            f"n={n * k} it gave {got}."
        )
    return given.to(features.dtype).reshape(n, k)
