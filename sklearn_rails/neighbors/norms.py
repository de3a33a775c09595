"""Norms of vectors however large or small."""

import torch
from torch import Tensor


def norm(vectors: Tensor) -> Tensor:
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
        norms: Tensor = torch.linalg.vector_norm(vectors, dim=-1, dtype=torch.float64)
        if vectors.dtype != torch.float64:
            return norms.to(vectors.dtype)
    else:
        norms = torch.linalg.vector_norm(vectors, dim=-1)
    info = torch.finfo(norms.dtype)
    smallest = (vectors.shape[-1] * info.tiny / info.eps) ** 0.5
    if is_within(norms, smallest):
        return norms
    extreme = ~((norms > smallest) & (norms < torch.inf))
    few = vectors[extreme]
    largest = few.abs().amax(dim=-1)
    largest = torch.where((largest > 0) & largest.isfinite(), largest, 1)
    exact = torch.linalg.vector_norm(few / largest[:, None], dim=-1) * largest
    return norms.index_put((extreme,), exact)


def normalize_rows(vectors: Tensor) -> Tensor:
    """Return vectors divided by their Euclidean norms, however large or small they are.

    Parameters
    ----------
    vectors : torch.Tensor of shape (..., n_features)

    Returns
    -------
    torch.Tensor of shape (..., n_features)
        Zeros where the vector is zero.
    """
    lengths = norm(vectors)
    if is_within(lengths, torch.finfo(lengths.dtype).eps ** 4):
        return vectors / lengths[..., None]
    largest = vectors.abs().amax(dim=-1, keepdim=True)
    scaled = vectors / torch.where(largest > 0, largest, 1)
    lengths = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return scaled / torch.where(lengths > 0, lengths, 1)


def is_within(norms: Tensor, smallest: float) -> bool:
    """Check that all norms are larger than a number, and finite.

    Parameters
    ----------
    norms : torch.Tensor
    smallest : float

    Returns
    -------
    bool
    """
    if norms.numel() == 0:
        return True
    if norms.numel() == 1:
        return smallest < norms.item() < torch.inf
    low, high = torch.aminmax(norms)
    return low.item() > smallest and high.item() < torch.inf


def dtype_name(tensor: Tensor) -> str:
    """Return the name of a tensor's dtype, such as ``"float32"``.

    Parameters
    ----------
    tensor : torch.Tensor

    Returns
    -------
    str
    """
    return str(tensor.dtype).removeprefix("torch.")
