"""Whether the layers of a network can be used, and what a pass changes in it."""

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from .device import reraise_out_of_memory
from .hooks import remove_watchers
from .outputs import LayerError
from .truncation import INPUT, NetworkTraits, TruncatedNetwork
from .volatile import changed_keys, state_of

# Features of one sample in two batches may differ by this share of the largest feature before they
# count as different: rounding, also of networks that compute in half precision inside; and with
# dtype="bfloat16", whose numbers have 8 bits.
BATCH_TOLERANCE, HALF_TOLERANCE = 1e-4, 0.05

# Number of features by which outputs of two layers are found to be the same.
COMPARED_FEATURES = 4096


def check_layers(
    network: TruncatedNetwork, x: torch.Tensor, layers: Sequence[str], start: str | None = None
) -> dict[str, torch.Tensor]:
    """Run a few inputs and raise an error for layers that cannot be used.

    Sets the network's ``traits``, which later passes need.

    Parameters
    ----------
    network : TruncatedNetwork
    x : torch.Tensor of shape (n, ...)
        A few inputs; the first and the last should differ.
    layers : sequence of str
        The layers to check.
    start : str, default=None
        The layer from which they are to be reached.

    Returns
    -------
    dict of str to torch.Tensor of shape (n, ...)
        The outputs of the layers and of ``start``.

    Raises
    ------
    ValueError
        If a layer is not run, runs more than once, returns something other than a float tensor with
        an entry for each input, depends on the other inputs of the batch, or depends on more than
        the output of ``start``.
    """
    removed = network.traits.watchers
    traits = NetworkTraits(integer_input=not x.is_floating_point(), watchers=removed)
    network.adopt(traits, {})
    asked = tuple(dict.fromkeys((*layers, *([] if start is None else [start]))))
    if network.module is not None:
        before = state_of(network.module)
        watchers = remove_watchers(network.module, lambda: _check_counts(network, x, asked))
        volatile = changed_keys(before, state_of(network.module))
        network.adopt(replace(traits, volatile=volatile, watchers=(*removed, *watchers)), before)
        network.volatile.restore()
    outputs = network(x, asked)
    if network.module is not None:
        _check_batch_independence(network, x, asked, outputs)
    if start is not None and start in network.layers:
        _check_start(network, layers, start, outputs)
    return outputs


def find_layers(
    network: TruncatedNetwork,
    x: torch.Tensor,
    start: str | None = None,
    max_layers: int | None = None,
) -> tuple[str, ...]:
    """Return the layers that run once and return one float tensor, in the order in which they run.

    The network's input comes first, if ``start`` is None, and its output last. Of layers with the
    same output, such as a block and its last layer, only the outermost is returned.

    Parameters
    ----------
    network : TruncatedNetwork
        After :func:`check_layers`.
    x : torch.Tensor of shape (n, ...)
        A few inputs that differ.
    start : str, default=None
        The layer after which the others must run.
    max_layers : int, default=None
        If there are more, modules within modules are left out first, and of those at one depth
        some at equal distances. None returns all.

    Returns
    -------
    tuple of str
    """
    counts: dict[str, int] = {}
    outputs: dict[str, torch.Tensor] = {}

    def record(name: str, output: Any) -> None:
        counts[name] = counts.get(name, 0) + 1
        with contextlib.suppress(LayerError):
            outputs[name] = _abridge(network.tensor_of(name, output, len(x)))

    output = network.forward(x.clone(), record)
    names = [name for name in outputs if counts[name] == 1]
    if start is not None:
        names = names[names.index(start) + 1 :] if start in names else []
    elif INPUT not in network.layers:
        names.insert(0, INPUT)
        outputs[INPUT] = _abridge(x.to(network.dtype))
    with contextlib.suppress(LayerError):
        outputs[network.output] = _abridge(network.tensor_of(network.output, output, len(x)))
        names.append(network.output)
    kept: list[str] = []
    for name in sorted(names, key=lambda n: (n not in (INPUT, network.output), n.count("."))):
        same = (k for k in kept if outputs[k].shape == outputs[name].shape)
        if not any(torch.equal(outputs[k], outputs[name]) for k in same):
            kept.append(name)
    names = [name for name in names if name in kept]
    return tuple(names) if max_layers is None else _thin(names, max_layers, network.output)


def is_usable(
    network: TruncatedNetwork, x: torch.Tensor, layers: Sequence[str], start: str | None = None
) -> bool:
    """Check whether :func:`check_layers` raises no error for layers, and they are finite.

    Parameters
    ----------
    network, x, layers, start
        As :func:`check_layers` takes them.

    Returns
    -------
    bool
    """
    try:
        outputs = check_layers(network, x, layers, start)
    except LayerError:
        return False
    return all(bool(torch.isfinite(outputs[layer]).all()) for layer in layers)


def _thin(names: Sequence[str], size: int, output: str) -> tuple[str, ...]:
    """Return at most ``size`` names: outer modules before inner ones."""
    kept = [name for name in names if name in (INPUT, output)]
    for depth in range(1 + max((name.count(".") for name in names), default=0)):
        level = [name for name in names if name.count(".") == depth and name not in kept]
        if len(level) > size - len(kept):
            if len(kept) > size // 2:
                break
            places = np.linspace(0, len(level) - 1, size - len(kept)).round().astype(int)
            level = [level[i] for i in places]
        kept += level
    return tuple(name for name in names if name in kept)


def _abridge(output: torch.Tensor) -> torch.Tensor:
    """Return some of a layer's features and their number, to compare layers by."""
    flat = output.detach().reshape(len(output), -1)
    step = max(1, flat.shape[1] // COMPARED_FEATURES)
    return torch.cat([flat[:, ::step], flat.new_full((len(flat), 1), flat.shape[1])], dim=1).clone()


def batch_tolerance(network: TruncatedNetwork) -> float:
    """Return the share of the largest feature by which rounding may change features."""
    return HALF_TOLERANCE if network.half else BATCH_TOLERANCE


def _check_counts(network: TruncatedNetwork, x: torch.Tensor, layers: Sequence[str]) -> None:
    """Check that each layer runs once, and returns one tensor."""
    counts = {name: 0 for name in layers if name in network.layers}

    def count(name: str, output: Any) -> None:
        if name in counts:
            counts[name] += 1
            network.tensor_of(name, output, len(x))

    output = network.forward(x.clone(), count)
    if network.output in layers and network.output not in network.layers:
        network.tensor_of(network.output, output, len(x))
    for name, n_calls in counts.items():
        if n_calls != 1:
            raise LayerError(
                f"layers={name!r}: this layer runs {n_calls} times in one pass of the network, "
                "but it must run exactly once. Name the module around it, or give each use a "
                "module of its own (torch.nn.Identity after the operation)."
            )


def _check_batch_independence(
    network: TruncatedNetwork,
    x: torch.Tensor,
    layers: Sequence[str],
    outputs: dict[str, torch.Tensor],
) -> None:
    """Compare outputs for inputs in other places, beside others and beside their copies."""
    flipped = network(x.flip(0), layers)
    pairs = [(outputs[name], flipped[name].flip(0), name) for name in layers]
    for place in (0, -1):
        alone = network(x[[place]].expand_as(x), layers)
        pairs += [(outputs[name][[place]], alone[name], name) for name in layers]
    for expected, found, name in pairs:
        if not torch.isfinite(expected).all():
            continue
        largest = torch.maximum(expected.abs().max(), found.abs().max())
        if (expected - found).abs().max() > batch_tolerance(network) * largest:
            raise LayerError(
                f"layers={name!r}: the network gives the same input other features in another "
                "batch, so predictions would depend on the batch. Usual reasons are batch "
                "normalization without running statistics, dropout that stays on in eval mode, "
                "dynamic quantization, a recurrent layer that takes samples for time steps "
                "(batch_first=False), and observers of quantization-aware training. Name a "
                f"layer before it, or change the network given as {network.parameter}."
            )


def _check_start(
    network: TruncatedNetwork,
    layers: Sequence[str],
    start: str,
    expected: dict[str, torch.Tensor],
) -> None:
    """Check that the layers depend on the output of ``start`` alone."""
    reason = f"start_layer={start!r}: the network cannot be run from there to {list(layers)}, "
    # Code behind the start layer may take the number of inputs from the network's input.
    for n_blanks in (1, None):
        network.traits = replace(network.traits, n_blanks=n_blanks)
        try:
            found = network(expected[start], layers, start)
            break
        except Exception as error:  # the shapes of a path around start_layer do not fit
            reraise_out_of_memory(error)
            if n_blanks is None:
                raise LayerError(reason + f"it stops with: {error}") from error
    for name in layers:
        if not torch.allclose(found[name], expected[name], rtol=1e-3, atol=1e-4, equal_nan=True):
            raise LayerError(
                reason + f"since {name!r} depends on more than the output of that layer (a "
                "connection goes around it). Start from a layer that all paths go through."
            )
