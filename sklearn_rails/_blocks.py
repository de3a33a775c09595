"""Work in blocks of samples that fit into memory, side by side, with a progress bar."""

import threading
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
import torch
from joblib import Parallel, delayed, effective_n_jobs
from numpy.typing import NDArray
from sklearn import get_config
from tqdm.auto import tqdm

from .features.device import explain_out_of_memory, is_out_of_memory

# Arrays of a block's features that are held at a time, the copies that a neighbour search makes
# and the gaps between freed ones included.
BLOCKS_HELD = 8

# What the errors for a sample, and for the answers of all, that do not fit into memory say.
SAMPLE_ADVICE = (
    "Memory is too small for a single sample. Free memory, or use device='cpu', fewer layers or "
    "fewer training samples."
)
ANSWERS_ADVICE = "Memory is too small for the answers of all samples: pass fewer of X at a time."

# Maximum number of samples in a block: more of them gain nothing.
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


def block_slices(
    n_samples: int, row_bytes: int, device: torch.device, *, n_threads: int = 1
) -> list[slice]:
    """Split samples into blocks whose features fit into memory.

    Parameters
    ----------
    n_samples : int
    row_bytes : int
        Size of the features of one sample, in bytes.
    device : torch.device
    n_threads : int, default=1
        Number of blocks that are held at the same time.

    Returns
    -------
    list of slice
        Of about the same number of blocks for each thread.
    """
    size = memory_budget(device) // (BLOCKS_HELD * row_bytes * n_threads)
    size = max(1, min(size, MAX_BLOCK, -(-n_samples // n_threads)))
    # scikit-learn's gen_batches takes 0.1 ms to check its parameters: 3 % of a single prediction.
    return [slice(i, min(i + size, n_samples)) for i in range(0, n_samples, size)]


def for_blocks(
    act: Callable[[slice], object], n_samples: int, row_bytes: int, device: torch.device
) -> None:
    """Do something with all samples, block by block.

    Parameters
    ----------
    act : callable
        Takes a slice of the samples. Where memory runs out it is called again, with the halves.
    n_samples, row_bytes, device
        As :func:`block_slices` takes them.

    Raises
    ------
    MemoryError
        If a single sample does not fit into memory.
    """
    for block in block_slices(n_samples, row_bytes, device):
        halve_until_it_fits(act, block)


def map_blocks(
    compute: Callable[[slice], Sequence[NDArray[Any]]],
    n_samples: int,
    row_bytes: int,
    device: torch.device,
    *,
    n_jobs: int | None = 1,
) -> list[NDArray[Any]]:
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
    n_jobs : int or None, default=1
        Number of threads, each of which computes blocks of its own.

    Returns
    -------
    list of ndarray
        The arrays for all samples.

    Raises
    ------
    MemoryError
        If a single sample does not fit into memory.
    """
    n_threads = effective_n_jobs(n_jobs)
    blocks = block_slices(n_samples, row_bytes, device, n_threads=n_threads)
    whole: list[NDArray[Any]] = []
    lock = threading.Lock()

    def fill(block: slice) -> None:
        for part, arrays in halve_until_it_fits(compute, block):
            with lock:
                if not whole:
                    shapes = [((n_samples, *a.shape[1:]), a.dtype) for a in arrays]
                    try:
                        whole.extend([np.empty(*shape) for shape in shapes])
                    except MemoryError:
                        with explain_out_of_memory(ANSWERS_ADVICE):
                            raise
            for array, values in zip(whole, arrays, strict=True):
                array[part] = values

    if n_threads == 1:
        for block in blocks:
            fill(block)
    else:
        Parallel(n_jobs=n_jobs, require="sharedmem")(delayed(fill)(block) for block in blocks)
    return whole


def halve_until_it_fits(
    compute: Callable[[slice], Any], block: slice, *, advice: str = SAMPLE_ADVICE
) -> list[tuple[slice, Any]]:
    """Compute a block, or where memory runs out its halves, and so on.

    Parameters
    ----------
    compute : callable
        Takes a slice of the samples.
    block : slice
    advice : str
        What the error for a single sample says.

    Returns
    -------
    list of (slice, result)

    Raises
    ------
    MemoryError
        If a single sample does not fit.
    """
    n_samples = block.stop - block.start
    try:
        return [(block, compute(block))]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if n_samples == 1:
            with explain_out_of_memory(advice):
                raise
    # Not while the error holds on to what did not fit.
    middle = block.start + n_samples // 2
    halves = slice(block.start, middle), slice(middle, block.stop)
    return [part for half in halves for part in halve_until_it_fits(compute, half, advice=advice)]


class Progress:
    """A progress bar over samples, with the share of their populations that is decided.

    Parameters
    ----------
    n_samples : int
    n_layers : int
        Number of populations of each sample.
    verbose : int
        0 shows nothing.
    """

    def __init__(self, n_samples: int, n_layers: int, verbose: int) -> None:
        self._n_populations = n_samples * n_layers
        self._n_decided = 0
        self._bar = tqdm(total=n_samples, unit="sample", disable=not verbose)

    def add_samples(self, n_samples: int) -> None:
        """Count samples that are done."""
        self._bar.update(n_samples)

    def add_populations(self, n_populations: int) -> None:
        """Count populations that are decided."""
        self._n_decided += n_populations
        share = self._n_decided / self._n_populations
        self._bar.set_postfix_str(f"{share:.0%} of populations decided")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
