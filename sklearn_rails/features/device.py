"""From the ``device`` and ``dtype`` parameters to torch's objects, never silently another."""

import pickle
import random
import threading
from collections import Counter

import numpy as np
import torch

DTYPES = {"float32": torch.float32, "float64": torch.float64}

# torch.OutOfMemoryError came with torch 2.5.
DeviceOutOfMemoryError = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)


def resolve_device(device):
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
        If the name is not a device's, or the device is not there.
    """
    device = str(device)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(_complaint(device, "that is not the name of a device")) from error
    if resolved.type == "cuda":
        n_devices = torch.cuda.device_count()
        if not torch.cuda.is_available():
            raise ValueError(_complaint(device, "torch sees no CUDA device here"))
        if resolved.index is None:
            return torch.device("cuda", torch.cuda.current_device())
        if resolved.index >= n_devices:
            raise ValueError(_complaint(device, f"torch sees only {n_devices} CUDA device(s) here"))
    elif resolved.type == "mps":
        if not torch.backends.mps.is_available():
            raise ValueError(_complaint(device, "torch sees no MPS device here"))
    elif resolved.type != "cpu":
        raise ValueError(_complaint(device, "devices of this kind are not supported"))
    return resolved


def keep_freed_memory():
    """Have the C library keep large blocks that are freed, for the next of their size.

    By default glibc may hand each of them back to the system and fetch fresh memory for the next,
    which can take longer than a convolution. It learns from the largest block up to 32 MiB that
    was freed; elsewhere this does nothing.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


def is_out_of_memory(error):
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
    reports = "DefaultCPUAllocator", "not enough memory", "out of memory", "Storage size"
    return isinstance(error, RuntimeError) and any(report in str(error) for report in reports)


def random_state_of(device):
    """Read the global random states that a network may draw from.

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


def set_random_state(state, device):
    """Set the global random states back to what :func:`random_state_of` read.

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


def same_random_state(state, other):
    """Check whether nothing was drawn between two calls of :func:`random_state_of`."""
    return (
        torch.equal(state["torch"], other["torch"])
        and (state["cuda"] is None or torch.equal(state["cuda"], other["cuda"]))
        and pickle.dumps(state["numpy"]) == pickle.dumps(other["numpy"])
        and state["python"] == other["python"]
    )


class RandomStateGuard:
    """Keep the global random state through calls of a network that draws from it.

    Threads may overlap: the state is read when the first of them enters and set back when the last
    one leaves. With a state of its own, a thread would set back what another one has drawn.

    Parameters
    ----------
    device : torch.device
    """

    _lock = threading.Lock()
    _n_inside = Counter()
    _states = {}

    def __init__(self, device):
        self._device = device

    def __enter__(self):
        with self._lock:
            if self._n_inside[self._device] == 0:
                self._states[self._device] = random_state_of(self._device)
            self._n_inside[self._device] += 1

    def __exit__(self, *exception):
        with self._lock:
            self._n_inside[self._device] -= 1
            if self._n_inside[self._device] == 0:
                set_random_state(self._states.pop(self._device), self._device)


def _complaint(device, why):
    return (
        f"device={device!r} cannot be used: {why}. Use 'auto', 'cpu', 'cuda', 'cuda:<index>', "
        "'mps' or a torch.device."
    )
