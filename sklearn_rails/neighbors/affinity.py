"""Affinities: how well features match an antigen's (higher is closer).

Non-finite affinities follow one rule everywhere. A cell whose features or affinity are NaN has an
affinity of minus infinity: it is not selected, not a parent and does not vote while other cells
have one. Plus infinity counts as the largest number of the dtype. A neighbour search refuses NaN,
and distances or products that the dtype cannot represent, since training examples and inputs are
finite.
"""

import torch


def affinity_to(affinity, antigens, features, *, overwrite_features=False):
    """Compare each antigen's features with those of its own candidates.

    Parameters
    ----------
    affinity : {"euclidean", "cosine", "inner_product"} or callable
        A callable takes two tensors of shape (m, n_features) and returns one of shape (m,).
    antigens : torch.Tensor of shape (n, n_features)
    features : torch.Tensor of shape (n, k, n_features)
    overwrite_features : bool, default=False
        Whether ``features`` may be used as scratch space, which avoids an allocation.

    Returns
    -------
    torch.Tensor of shape (n, k)
        The cosine with a vector of zeros is 0. Distances that the dtype can represent are right
        where their squares cannot be represented.

    Raises
    ------
    ValueError
        If a callable returns something else, or NaN for finite features.
    """
    out = features if overwrite_features else None
    if affinity == "euclidean":
        return -norm(torch.sub(features, antigens[:, None], out=out))
    if affinity == "cosine":
        lengths = norm(features)
        if not _within(lengths, torch.finfo(lengths.dtype).eps ** 4):
            features, lengths = normalize_rows(features), 1
        products = torch.mul(features, normalize_rows(antigens)[:, None], out=out)
        return products.sum(dim=2) / lengths
    if affinity == "inner_product":
        return torch.mul(features, antigens[:, None], out=out).sum(dim=2)
    n, k, d = features.shape
    antigens, features = antigens.repeat_interleave(k, dim=0), features.reshape(n * k, d)
    given = affinity(antigens, features)
    if not isinstance(given, torch.Tensor) or given.shape != (n * k,):
        got = tuple(given.shape) if isinstance(given, torch.Tensor) else type(given).__name__
        raise ValueError(
            f"affinity must give a tensor of shape (n,) for two of shape (n, n_features); for "
            f"n={n * k} it gave {got}."
        )
    if given.is_complex():
        raise ValueError(f"affinity={affinity!r} must give real numbers, it gave {given.dtype}.")
    missing = given.isnan()
    if missing.any() and (antigens[missing].isfinite() & features[missing].isfinite()).all(1).any():
        raise ValueError(
            f"affinity={affinity!r} gave NaN for features that are finite; it must give a number "
            "for any two rows, also for two that are the same."
        )
    return given.to(features.dtype).reshape(n, k)


def norm(vectors):
    """Compute Euclidean norms whose squares may overflow or underflow.

    Parameters
    ----------
    vectors : torch.Tensor of shape (..., n_features)

    Returns
    -------
    torch.Tensor of shape (...)
    """
    if vectors.ndim == 1:
        return norm(vectors[None])[0]
    if vectors.is_cuda:
        # Sums in double precision cost nothing there, and a look at the result would wait for it.
        norms = torch.linalg.vector_norm(vectors, dim=-1, dtype=torch.float64)
        if vectors.dtype != torch.float64:
            return norms.to(vectors.dtype)
    else:
        norms = torch.linalg.vector_norm(vectors, dim=-1)
    info = torch.finfo(norms.dtype)
    smallest = (vectors.shape[-1] * info.tiny / info.eps) ** 0.5
    if _within(norms, smallest):
        return norms
    extreme = ~((norms > smallest) & (norms < torch.inf))
    few = vectors[extreme]
    largest = few.abs().amax(dim=-1)
    largest = torch.where((largest > 0) & largest.isfinite(), largest, 1)
    exact = torch.linalg.vector_norm(few / largest[:, None], dim=-1) * largest
    return norms.index_put((extreme,), exact)


def normalize_rows(vectors):
    """Divide vectors by their Euclidean norms, however large or small they are.

    Parameters
    ----------
    vectors : torch.Tensor of shape (..., n_features)

    Returns
    -------
    torch.Tensor of shape (..., n_features)
        Zeros where the vector is zero.
    """
    lengths = norm(vectors)
    if _within(lengths, torch.finfo(lengths.dtype).eps ** 4):
        return vectors / lengths[..., None]
    largest = vectors.abs().amax(dim=-1, keepdim=True)
    scaled = vectors / torch.where(largest > 0, largest, 1)
    lengths = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return scaled / torch.where(lengths > 0, lengths, 1)


def _within(norms, smallest):
    """Check that all norms are larger than a number, and finite."""
    if norms.numel() == 0:
        return True
    low, high = torch.aminmax(norms)
    return low.item() > smallest and high.item() < torch.inf


def replace_non_finite(affinity):
    """Apply the rule for non-finite affinities: minus infinity for NaN, no plus infinity.

    Parameters
    ----------
    affinity : torch.Tensor

    Returns
    -------
    torch.Tensor
    """
    return affinity.nan_to_num(
        nan=-torch.inf, posinf=torch.finfo(affinity.dtype).max, neginf=-torch.inf
    )
