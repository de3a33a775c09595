"""Choose between float32 and bfloat16 by a short measurement, for ``dtype="auto"``."""

import statistics
import time
import weakref
from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from .device import AUTOCAST_DEVICES, isolated_pass
from .follow import FollowedNetwork
from .probe import Probe, ProbeResult
from .truncation import TruncatedNetwork

# bfloat16 is chosen if it takes less than this share of the time of float32. Where the processor
# multiplies matrices of bfloat16 it takes 0.2 to 0.6, elsewhere 1 and more.
MAX_SHARE = 0.8

# Both run in turn so often, on this number of samples, or on a share of the training samples if
# these are fewer.
N_TRIALS, N_SAMPLES, SAMPLES_SHARE = 5, 32, 0.05

# network -> {key: share}, so that the folds of a search do not choose differently.
_MEASURED: MutableMapping[nn.Module, dict[Any, float]] = weakref.WeakKeyDictionary()


def prefer_half(
    followed: FollowedNetwork, probe: Probe, found: ProbeResult, X: NDArray[Any] | torch.Tensor
) -> tuple[FollowedNetwork, ProbeResult]:
    """Return the network in bfloat16 and its probe, if it is faster in it, or else what was given.

    Parameters
    ----------
    followed : FollowedNetwork
        In float32.
    probe : Probe
        What probed it.
    found : ProbeResult
        What that found.
    X : ndarray or torch.Tensor of shape (n, n_features)
        The samples to probe by.

    Returns
    -------
    followed : FollowedNetwork
    found : ProbeResult
    """
    device = followed.network.device
    if followed.module is None or device.type not in AUTOCAST_DEVICES:
        return followed, found
    half = followed.in_dtype("bfloat16")
    try:
        found_half = probe.of(half.network).run(X)
    except ValueError:  # an operation that has no bfloat16
        return followed, found
    known = _MEASURED.setdefault(followed.module, {})
    key = probe.layers, probe.start_layer, str(device)
    if key not in known:
        n_samples = max(2, min(N_SAMPLES, int(SAMPLES_SHARE * len(X))))
        x = torch.from_numpy(found.samples).to(device)
        x = x[torch.arange(n_samples, device=device) % len(x)] if not found.is_exact else x
        known[key] = measure_share(half.network, followed.network, x, probe.layers)
    return (half, found_half) if known[key] < MAX_SHARE else (followed, found)


def measure_share(
    first: TruncatedNetwork, second: TruncatedNetwork, x: torch.Tensor, layers: Sequence[str]
) -> float:
    """Return the time that one network takes over that of another, as a median of pairs.

    Parameters
    ----------
    first, second : TruncatedNetwork
    x : torch.Tensor of shape (n, ...)
        A batch of samples.
    layers : sequence of str

    Returns
    -------
    float
    """

    def measure(network: TruncatedNetwork) -> float:
        start = time.perf_counter()
        network(x, layers)
        if x.device.type == "cuda":
            torch.cuda.synchronize(x.device)
        return time.perf_counter() - start

    with torch.no_grad(), isolated_pass(x.device):
        pairs = [(measure(first), measure(second)) for _ in range(N_TRIALS)]
    # The first passes of a shape may take several times as long.
    return statistics.median(a / b for a, b in pairs[1:])
