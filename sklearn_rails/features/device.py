"""The ``device`` and ``dtype`` parameters, and what passes share with the rest of the process."""

import ctypes
import os
import pickle
import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

# The type of samples, cells and features for each value of the ``dtype`` parameter. With
# "bfloat16" the network computes in half precision; "auto" chooses between that and float32.
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.float32,
    "auto": torch.float32,
}

# Types of device for which torch has an autocast.
AUTOCAST_DEVICES = ("cpu", "cuda")

# torch.OutOfMemoryError came with torch 2.5.
DeviceOutOfMemoryError: type[BaseException] = getattr(
    torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError
)

# What stops glibc from adapting its thresholds, their numbers in malloc.h, and the largest block
# that is kept.
MALLOC_VARIABLES = (
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_MMAP_MAX_",
)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, KEPT_BYTES = -1, -3, 32 * 2**20


def resolve_device(device: str | torch.device) -> torch.device:
    """Turn the ``device`` parameter into a torch device that exists here.

    Parameters
    ----------
    device : {"auto", "cpu", "cuda", "cuda:<i>", "mps"} or torch.device
        ``"auto"`` is the current CUDA device where there is one, else the CPU.

    Returns
    -------
    torch.device

    Raises
    ------
    ValueError
        If there is no such device on this machine, or its kind is not supported.
    """
    name = str(device)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ValueError(_describe_problem(name, "that is not the name of a device")) from error
    if resolved.type == "cuda":
        n_devices = torch.cuda.device_count()
        if not torch.cuda.is_available():
            raise ValueError(_describe_problem(name, "torch sees no CUDA device here"))
        if resolved.index is None:
            return torch.device("cuda", torch.cuda.current_device())
        if resolved.index >= n_devices:
            raise ValueError(
                _describe_problem(name, f"torch sees only {n_devices} CUDA device(s) here")
            )
    elif resolved.type == "mps":
        if not torch.backends.mps.is_available():
            raise ValueError(_describe_problem(name, "torch sees no MPS device here"))
    elif resolved.type != "cpu":
        raise ValueError(_describe_problem(name, "devices of this kind are not supported"))
    return resolved


def keep_freed_memory() -> None:
    """Make the C library reuse large blocks that are freed.

    By default glibc may return each of them to the system and request new memory for the next,
    which can take longer than a convolution. Its threshold follows the largest block up to 32 MiB
    that was freed, unless a variable of the environment sets one of its thresholds, as Dask does
    for its workers: they are then set here. With other C libraries this has no effect.
    """
    try:
        torch.empty(31 * 2**20, dtype=torch.uint8)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return  # less is freed at a time than is worth keeping
    if any(name in os.environ for name in MALLOC_VARIABLES):
        set_option = getattr(ctypes.CDLL(None), "mallopt", None)
        if set_option is not None:
            set_option(M_MMAP_THRESHOLD, KEPT_BYTES)
            set_option(M_TRIM_THRESHOLD, 2 * KEPT_BYTES)


def is_out_of_memory(error: BaseException) -> bool:
    """Check whether an exception reports that memory ran out, on any device.

    Parameters
    ----------
    error : BaseException

    Returns
    -------
    bool
    """
    if isinstance(error, DeviceOutOfMemoryError | MemoryError):
        return True
    # On the CPU and on MPS torch raises a plain RuntimeError.
    reports = (
        "DefaultCPUAllocator",
        "not enough memory",
        "out of memory",
        "Storage size",
        "bad_alloc",
    )
    return isinstance(error, RuntimeError) and any(report in str(error) for report in reports)


@contextmanager
def explain_out_of_memory(advice: str) -> Iterator[None]:
    """Turn errors that report that memory ran out into a MemoryError that says what to do.

    Parameters
    ----------
    advice : str
        One or more sentences.

    Raises
    ------
    MemoryError
        With the error as its cause; one that has a cause is explained already, and stays.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or error.__cause__ is not None:
            raise
        raise MemoryError(f"{advice} ({error})") from error


def reraise_out_of_memory(error: BaseException) -> None:
    """Raise an error again if it reports that memory ran out, before it is taken for another.

    Parameters
    ----------
    error : BaseException
    """
    if is_out_of_memory(error):
        raise error


def random_state_of(device: torch.device) -> dict[str, Any]:
    """Return the global random states that a network may draw from.

    Parameters
    ----------
    device : torch.device

    Returns
    -------
    dict of str to object
        The states of torch (CPU and CUDA), numpy and Python, for :func:`set_random_state`.
    """
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": np.random.get_state(legacy=False),  # noqa: NPY002 (networks may use it)
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore the global random states that :func:`random_state_of` returned.

    Parameters
    ----------
    state : dict of str to object
    device : torch.device
    """
    torch.set_rng_state(state["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    np.random.set_state(state["numpy"])  # noqa: NPY002
    random.setstate(state["python"])


def same_random_state(state: dict[str, Any], other: dict[str, Any]) -> bool:
    """Check whether nothing was drawn between two calls of :func:`random_state_of`.

    Parameters
    ----------
    state, other : dict of str to object

    Returns
    -------
    bool
    """
    return (
        torch.equal(state["torch"], other["torch"])
        and (state["cuda"] is None or torch.equal(state["cuda"], other["cuda"]))
        and pickle.dumps(state["numpy"]) == pickle.dumps(other["numpy"])
        and state["python"] == other["python"]
    )


class RandomStateGuard:
    """Restore the global random state after passes of a network that draws from it.

    Threads may overlap: the state is read when the first of them enters and restored when the last
    one leaves. With a state of its own, a thread would undo the draws of another one.

    Parameters
    ----------
    device : torch.device
    """

    _lock = threading.Lock()
    _n_inside: ClassVar[Counter[torch.device]] = Counter()
    _states: ClassVar[dict[torch.device, dict[str, Any]]] = {}

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> None:
        with self._lock:
            if self._n_inside[self._device] == 0:
                self._states[self._device] = random_state_of(self._device)
            self._n_inside[self._device] += 1

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._n_inside[self._device] -= 1
            if self._n_inside[self._device] == 0:
                set_random_state(self._states.pop(self._device), self._device)


def isolated_pass(
    device: torch.device, *, draws_random: bool = False
) -> AbstractContextManager[object]:
    """Return a context in which passes and the global state do not affect each other.

    An autocast of the caller would change the features of queries, but not those of the index.

    Parameters
    ----------
    device : torch.device
    draws_random : bool, default=False
        Whether the network draws from the global random state, which is then restored.

    Returns
    -------
    context manager
    """
    if draws_random:
        return _restored_random_state(device)
    if device.type in AUTOCAST_DEVICES:
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


@contextmanager
def _restored_random_state(device: torch.device) -> Iterator[None]:
    with isolated_pass(device), RandomStateGuard(device):
        yield


def to_tensor(X: NDArray[Any] | torch.Tensor) -> torch.Tensor:
    """Return an array as a tensor, which shares its memory if torch allows it.

    Parameters
    ----------
    X : ndarray or torch.Tensor

    Returns
    -------
    torch.Tensor
    """
    if isinstance(X, torch.Tensor):
        return X
    # torch warns of read-only arrays, such as memory-mapped ones, and refuses negative strides.
    is_plain = X.flags.writeable and X.flags.c_contiguous and min(X.strides) >= 0
    return torch.from_numpy(X if is_plain else X.copy())


def _describe_problem(name: str, why: str) -> str:
    return (
        f"device={name!r} cannot be used: {why}. Use 'auto', 'cpu', 'cuda', 'cuda:<index>', "
        "'mps' or a torch.device."
    )
