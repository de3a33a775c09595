"""Products of few queries and many examples, split over the threads of a CPU if that is faster."""

from __future__ import annotations

import functools
import time

import torch
from torch import Tensor

# Size of the examples that both ways are tried on, more than most caches hold, and how often.
TRIAL_BYTES, N_TRIALS = 2**26, 3


@functools.cache
def split_is_faster(n_features: int, dtype: torch.dtype, n_threads: int) -> bool:
    """Measure whether splitting the examples pays for one query, once in a process.

    With some libraries and processors a product with a single vector uses one thread only, and with
    some it is slow even then.

    Parameters
    ----------
    n_features : int
    dtype : torch.dtype
    n_threads : int

    Returns
    -------
    bool
    """
    query = torch.ones(1, n_features, dtype=dtype)
    examples = torch.ones(max(1, TRIAL_BYTES // query.nbytes), n_features, dtype=dtype)
    offsets = torch.zeros(len(examples), dtype=dtype)
    times = []
    for _ in range(N_TRIALS):
        start = time.perf_counter()
        add_split_product(offsets, query, examples, n_threads)
        middle = time.perf_counter()
        torch.addmm(offsets, query, examples.T)
        times.append((middle - start, time.perf_counter() - middle))
    split, whole = (min(column) for column in zip(*times, strict=True))
    return split < whole


def add_split_product(offsets: Tensor, queries: Tensor, examples: Tensor, n_threads: int) -> Tensor:
    """Return offsets plus the products of queries and examples, split into a part for each thread.

    Parameters
    ----------
    offsets : torch.Tensor of shape (n,)
    queries : torch.Tensor of shape (m, n_features)
    examples : torch.Tensor of shape (n, n_features)
    n_threads : int

    Returns
    -------
    torch.Tensor of shape (m, n)
    """
    n_parts = max(2, n_threads)
    size = len(examples) // n_parts
    n_split = n_parts * size
    parts = examples[:n_split].view(n_parts, size, examples.shape[1])
    products = torch.bmm(parts, queries.T.expand(n_parts, -1, -1)).view(n_split, len(queries)).T
    if n_split < len(examples):
        products = torch.cat([products, queries @ examples[n_split:].T], dim=1)
    return products + offsets
