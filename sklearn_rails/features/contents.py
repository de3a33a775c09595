"""What a network consists of, without wrappers: layers, attributes, and a checksum of them."""

import collections
import functools
import hashlib
import types
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

# Words of eight bytes that are added up column by column: a prime number, so that exchanged rows
# of a weight matrix change the sums.
CHECKSUM_COLUMNS = 251

# Layer, place ("_buffers" or "__dict__") and key of an attribute.
StateKey = tuple[str, str, str]

CONTAINERS = (list, tuple, set, frozenset, collections.deque)

SCALARS = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)

# What every module has, and what torch.compile adds.
MODULE_ATTRIBUTES = {*vars(nn.Module()), "_compiled_call_impl"}


def plain_module(module: nn.Module) -> nn.Module:
    """Return the network inside ``torch.compile`` and data-parallel wrappers.

    Parameters
    ----------
    module : torch.nn.Module

    Returns
    -------
    torch.nn.Module
        Its layers have the names that the user gave them.
    """
    while (inner := wrapped_module(module)) is not None:
        module = inner
    return module


def wrapped_module(module: nn.Module) -> nn.Module | None:
    """Return the network inside one wrapper, or None if there is no wrapper."""
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        wrapped: nn.Module = module.module
        return wrapped
    # What torch.compile returns; its class is private to torch.
    return getattr(module, "_orig_mod", None)


def attributes_of(layer: nn.Module) -> Iterator[tuple[str, str, Any]]:
    """Iterate over a layer's buffers and attributes, as (place, key, value).

    What every module has (its parameters, submodules, hooks) is left out.

    Parameters
    ----------
    layer : torch.nn.Module

    Yields
    ------
    place, key : str
    value : object
    """
    if isinstance(layer, torch.jit.ScriptModule):
        yield from (("_buffers", *named) for named in layer.named_buffers(recurse=False))
        return
    for key, value in list(layer._buffers.items()):
        yield "_buffers", key, value
    for key, value in list(vars(layer).items()):
        if key not in MODULE_ATTRIBUTES:
            yield "__dict__", key, value


def checksum(module: nn.Module, ignored: Iterable[Sequence[str]] = ()) -> tuple[str, str]:
    """Summarize what determines a network's outputs: its structure, settings and weights.

    Reading every weight costs about as much as the memory traffic of one micro-batch. Versions and
    addresses of tensors would be cheaper, but writes through ``.data`` or a numpy view change
    neither.

    Parameters
    ----------
    module : torch.nn.Module
    ignored : sequence of (layer, place, key)
        Attributes that a forward pass changes, as :func:`state_of` names them.

    Returns
    -------
    network, hooks : str
        The same on every device and in every process. Hooks have one of their own, since some of
        them only watch.
    """
    keys = {(layer, place, key) for layer, place, key in ignored}
    return _summarize(module, keys, set())


def _summarize(module: nn.Module, ignored: set[StateKey], seen: set[int]) -> tuple[str, str]:
    network, hooks = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
    for name, layer in _named_layers(module):
        if id(layer) in seen:
            continue
        seen.add(id(layer))
        network.update(f"{name} {type(layer).__qualname__}".encode())
        for key, tensor in layer.named_parameters(recurse=False):
            network.update(f" {key} {_describe(tensor, seen)}".encode())
        is_dropout = isinstance(layer, nn.modules.dropout._DropoutNd)
        for place, key, value in () if is_dropout else attributes_of(layer):
            if (name, place, key) not in ignored:
                network.update(f" {key} {_describe(value, seen)}".encode())
        if not isinstance(layer, torch.jit.ScriptModule):
            held = [*layer._forward_hooks.values(), *layer._forward_pre_hooks.values()]
            hooks.update(f"{name} {_describe(held, seen)}".encode())
    return network.hexdigest(), hooks.hexdigest()


def _describe(value: Any, seen: set[int]) -> str:
    """Describe a value by its content, in the same way in every process."""
    if isinstance(value, SCALARS) or value is None:
        return repr(value)
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)} {_sum_of_content(value.detach()).hex()}"
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape} {zlib.crc32(np.ascontiguousarray(value).data)}"
    if id(value) in seen:
        return ""
    if isinstance(value, nn.Module):  # in a plain list
        return " ".join(_summarize(value, set(), seen))
    seen = seen | {id(value)}
    if isinstance(value, dict):
        return " ".join(f"{key!r}:{_describe(v, seen)}" for key, v in value.items())
    if isinstance(value, CONTAINERS):
        parts = [_describe(v, seen) for v in value]
        return " ".join(sorted(parts) if isinstance(value, set | frozenset) else parts)
    if isinstance(value, functools.partial):
        return _describe([value.func, value.args, value.keywords], seen)
    if isinstance(value, types.MethodType):
        return _describe(value.__func__, seen)
    if isinstance(value, types.FunctionType):
        code = value.__code__
        held = [cell.cell_contents for cell in value.__closure__ or ()]
        plain = [part for part in (*code.co_consts, *held) if isinstance(part, SCALARS)]
        return f"{value.__qualname__} {code.co_code.hex()} {_describe(plain, seen)}"
    name = getattr(value, "__qualname__", None) or type(value).__qualname__
    if isinstance(value, types.SimpleNamespace) or is_dataclass(value):
        return f"{name} {_describe(vars(value), seen)}"
    return name


def _named_layers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Iterate over a network's layers by the names that they have without wrappers."""
    module = plain_module(module)
    yield prefix, module
    for name, child in module.named_children():
        yield from _named_layers(child, f"{prefix}.{name}" if prefix else name)


def _sum_of_content(tensor: torch.Tensor) -> bytes:
    if tensor.is_meta:
        return b""
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce()
        return _sum_of_content(tensor.indices()) + _sum_of_content(tensor.values())
    if tensor.layout != torch.strided:
        return _sum_of_content(tensor.to_dense())
    if tensor.is_quantized:
        tensor = tensor.int_repr()
    content = tensor.contiguous().flatten().view(torch.uint8)
    if content.storage_offset() % 8:
        content = content.clone()
    n_summed = content.numel() // (8 * CHECKSUM_COLUMNS) * (8 * CHECKSUM_COLUMNS)
    sums = content[:n_summed].view(torch.int64).view(-1, CHECKSUM_COLUMNS).sum(dim=0)
    return sums.cpu().numpy().tobytes() + content[n_summed:].cpu().numpy().tobytes()
