"""From the ``device`` and ``dtype`` parameters to torch's objects, never silently another."""

import torch
from sklearn import get_config

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def resolve_device(device):
    """Turn the ``device`` parameter into a torch device that exists here.

    Parameters
    ----------
    device : {"auto", "cpu", "cuda", "cuda:<i>", "mps"}
        ``"auto"`` is the current CUDA device where there is one, else the CPU.

    Returns
    -------
    torch.device

    Raises
    ------
    ValueError
        If the name is not a device's, or the device is not there.
    """
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


def memory_budget(device):
    """Say how much memory populations may take on a device.

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


def keep_freed_memory():
    """Have the C library keep large blocks that are freed, for the next of their size.

    By default glibc may hand each of them back to the system and fetch fresh memory for the next,
    which can take longer than a convolution. It learns from the largest block up to 32 MiB that
    was freed; elsewhere this does nothing.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


def kept_random_state(device):
    """Keep torch's global random state through calls of a network that may draw from it.

    Parameters
    ----------
    device : torch.device

    Returns
    -------
    context manager
    """
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def _complaint(device, why):
    return (
        f"device={device!r} cannot be used: {why}. Use 'auto', 'cpu', 'cuda', 'cuda:<index>' "
        "or 'mps'."
    )
