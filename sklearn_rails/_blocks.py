"""Work in blocks of samples that fit into scikit-learn's ``working_memory``."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn import get_config
from sklearn.utils import gen_batches

# Arrays of a block's features that are held at a time, the copies that a neighbour search makes
# and the gaps between freed ones included.
BLOCKS_HELD = 8

# Samples of a block at most: more of them gain nothing.
MAX_BLOCK = 1024


def memory_budget(device: torch.device) -> int:
    """Return how much memory the arrays of one block may take on a device.

    Parameters
    ----------
    device : torch.device

    Returns
    -------
    int
        Bytes: scikit-learn's ``working_memory``, or half of what is free on a CUDA device.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    return int(get_config()["working_memory"] * 2**20)


def block_slices(n_samples: int, row_bytes: int, device: torch.device) -> list[slice]:
    """Split samples into blocks whose features fit into memory.

    Parameters
    ----------
    n_samples : int
    row_bytes : int
        Size of the features of one sample, in bytes.
    device : torch.device

    Returns
    -------
    list of slice
    """
    size = max(1, memory_budget(device) // (BLOCKS_HELD * row_bytes))
    return list(gen_batches(n_samples, min(size, MAX_BLOCK)))


def map_blocks(
    compute: Callable[[slice], Sequence[NDArray]],
    n_samples: int,
    row_bytes: int,
    device: torch.device,
) -> list[NDArray]:
    """Compute arrays block by block.

    The arrays are allocated once: small ones that stay between large ones that go would fragment
    the heap, so that memory grows with the number of blocks.

    Parameters
    ----------
    compute : callable
        Takes a slice of the samples and returns a sequence of arrays with an entry for each.
    n_samples : int
    row_bytes : int
        Size of the features of one sample, in bytes.
    device : torch.device

    Returns
    -------
    list of ndarray
        The arrays for all samples.
    """
    whole = None
    for block in block_slices(n_samples, row_bytes, device):
        parts = compute(block)
        if whole is None:
            whole = [np.empty((n_samples, *part.shape[1:]), part.dtype) for part in parts]
        for array, part in zip(whole, parts, strict=True):
            array[block] = part
    return whole
