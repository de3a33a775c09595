"""Private copies of networks, and a checksum that notices when a network changes."""

import collections
import copy
import functools
import hashlib
import types
import zlib
from dataclasses import is_dataclass

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

# Words of eight bytes that are added up column by column: a prime number, so that exchanged rows
# of a weight matrix change the sums.
CHECKSUM_COLUMNS = 251

CONTAINERS = (list, tuple, set, frozenset, collections.deque)

SCALARS = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)

# What every module has, and what torch.compile adds.
MODULE_ATTRIBUTES = {*vars(nn.Module()), "_compiled_call_impl"}


def plain_module(module):
    """Return the network inside ``torch.compile`` and data-parallel wrappers.

    Parameters
    ----------
    module : torch.nn.Module

    Returns
    -------
    torch.nn.Module
        Its layers have the names that the user gave them.
    """
    while (inner := _wrapped(module)) is not None:
        module = inner
    return module


def _wrapped(module):
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return module.module
    # What torch.compile returns; its class is private to torch.
    return getattr(module, "_orig_mod", None)


def checksum(module, ignored=()):
    """Summarize what decides on a network's outputs: its structure, settings and weights.

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
        The same on every device and in every process. Hooks stand alone, since some only watch.
    """
    return _summarize(module, {tuple(name) for name in ignored}, set())


def _summarize(module, ignored, seen):
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


def attributes_of(layer):
    """Iterate over a layer's buffers and attributes, as (place, key, value).

    What every module has (its parameters, submodules, hooks) is left out.
    """
    if isinstance(layer, torch.jit.ScriptModule):
        for key, value in layer.named_buffers(recurse=False):
            yield "_buffers", key, value
        return
    for key, value in list(layer._buffers.items()):
        yield "_buffers", key, value
    for key, value in list(vars(layer).items()):
        if key not in MODULE_ATTRIBUTES:
            yield "__dict__", key, value


def state_of(module):
    """Copy the buffers and attributes of all layers, as far as a forward pass may write to them.

    Parameters
    ----------
    module : torch.nn.Module

    Returns
    -------
    dict of (layer, place, key) to object
    """
    return {
        (name, place, key): copy_state(value)
        for name, layer in module.named_modules()
        if not isinstance(layer, torch.jit.ScriptModule)
        for place, key, value in attributes_of(layer)
    }


def copy_state(value):
    """Copy a tensor, or a container without what is in it."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    return copy.copy(value) if isinstance(value, (dict, *CONTAINERS)) else value


def same_state(value, other):
    """Check whether nothing was written between two calls of :func:`copy_state`."""
    if type(value) is not type(other):
        return False
    if isinstance(value, torch.Tensor):
        return (
            value.shape == other.shape
            and value.dtype == other.dtype
            and value.layout == other.layout
            and (value.layout != torch.strided or torch.equal(value, other))
        )
    if isinstance(value, dict):
        pairs = zip([*value, *value.values()], [*other, *other.values()], strict=False)
    elif isinstance(value, set | frozenset):
        return value == other
    elif isinstance(value, CONTAINERS):
        pairs = zip(value, other, strict=False)
    else:
        return value is other or (isinstance(value, SCALARS) and value == other)
    return len(value) == len(other) and all(a is b for a, b in pairs)


def _describe(value, seen):
    """Describe a value by its content, alike in every process."""
    if isinstance(value, SCALARS) or value is None:
        return repr(value)
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)} {_sum_of_content(value.detach()).hex()}"
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape} {zlib.crc32(np.ascontiguousarray(value).data)}"
    if id(value) in seen:
        return ""
    if isinstance(value, nn.Module):  # in a plain list
        return " ".join(_summarize(value, (), seen))
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


def _named_layers(module, prefix=""):
    """Iterate over a network's layers by the names that they have without wrappers."""
    module = plain_module(module)
    yield prefix, module
    for name, child in module.named_children():
        yield from _named_layers(child, f"{prefix}.{name}" if prefix else name)


def _sum_of_content(tensor):
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


def check_ready(module, parameter):
    """Raise an error for a network that cannot be run, or not without running another.

    Parameters
    ----------
    module : torch.nn.Module
    parameter : str
        The estimator's parameter, for the error.

    Raises
    ------
    ValueError
        If a parameter or buffer is lazy or on the meta device, or the ``forward`` of a layer was
        replaced by a function that holds on to the original layers: a copy would run these.
    """
    layers = dict(module.named_modules())
    for name, layer in layers.items():
        forward = vars(layer).get("forward")
        held = []
        if isinstance(forward, types.FunctionType):
            held = [cell.cell_contents for cell in forward.__closure__ or ()]
            held += [forward.__globals__.get(name) for name in forward.__code__.co_names]
        held = [getattr(value, "__self__", value) for value in held]
        if any(value is layer for value in held for layer in layers.values()):
            raise ValueError(
                f"{parameter}: the forward of layer {name!r} was replaced by a function that holds "
                "the network itself, so that a copy would run the original. Define forward as a "
                "method of its class, or bind the function with functools.partial or "
                "types.MethodType."
            )
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if is_lazy(tensor):
            raise ValueError(
                f"{parameter} has lazy layers without weights ({name!r} has no shape yet): run the "
                "network once on a batch of its inputs, and train it, before fit."
            )
        if tensor.is_meta:
            raise ValueError(
                f"{parameter} has weights on the meta device ({name!r}), which hold no values: "
                "load its weights on a real device before fit."
            )


def private_copy(module, device, dtype, parameter):
    """Copy a network in eval mode, so that running it changes nothing in the original.

    Parameters share their memory with the original where device and dtype allow it; everything
    that a forward pass may write to (buffers, tensors and containers kept as attributes) is copied.
    Objects that cannot be copied, such as locks and open files, are shared.

    Parameters
    ----------
    module : torch.nn.Module
    device : torch.device
    dtype : torch.dtype
        Of its floating-point tensors.
    parameter : str
        The estimator's parameter, for the errors.

    Returns
    -------
    torch.nn.Module
        Without wrappers of ``torch.compile`` and data parallelism.

    Raises
    ------
    TypeError
        If the network cannot be copied.
    """
    module = plain_module(module)
    check_ready(module, parameter)
    memo = {}
    parameters = {id(p) for p in module.parameters()}
    for value in reachable(module):
        if isinstance(value, torch.Tensor) and id(value) not in memo:
            memo[id(value)] = _copied(value, device, dtype, is_shared=id(value) in parameters)
    try:
        for layer in module.modules():
            if _wrapped(layer) is not None and id(layer) not in memo:
                memo[id(layer)] = copy.deepcopy(plain_module(layer), memo)
        twin = _copy_around(module, memo)
    except Exception as error:
        raise TypeError(
            f"{parameter} cannot be copied, and fit works on a copy so that the network stays as "
            f"it is: {type(error).__name__}: {error}"
        ) from error
    if twin is module:
        raise TypeError(
            f"{parameter} cannot be copied, since its __deepcopy__ returns the network itself."
        )
    for layer in twin.modules():
        if isinstance(layer, torch.jit.ScriptModule):  # its tensors are not Python's to replace
            layer.to(device=device, dtype=dtype)
    twin.eval()  # which need not return the network
    return twin


def reachable(module):
    """Iterate over the objects that a network's attributes hold, at any depth.

    Parameters
    ----------
    module : torch.nn.Module

    Yields
    ------
    object
        Tensors and other objects, but not the containers themselves.
    """
    seen, stack = set(), [module]
    while stack:
        value = stack.pop()
        if id(value) in seen or isinstance(value, type | types.ModuleType):
            continue
        seen.add(id(value))
        if isinstance(value, torch.jit.ScriptModule):
            continue
        if isinstance(value, dict):
            stack.extend(value.values())
        elif isinstance(value, CONTAINERS):
            stack.extend(value)
        elif isinstance(value, types.MethodType):
            stack.append(value.__self__)
        elif isinstance(value, functools.partial):
            stack.extend((value.func, *value.args, *value.keywords.values()))
        elif isinstance(value, torch.Tensor):
            yield value
        elif not isinstance(value, types.FunctionType):
            yield value
            stack.append(getattr(value, "__dict__", None) or ())


def _copied(tensor, device, dtype, *, is_shared):
    copied = tensor.detach().to(device)
    if tensor.is_floating_point():
        copied = copied.to(dtype)
    if not is_shared:
        copied = copied.clone()
    if isinstance(tensor, nn.Parameter):
        # No gradient is ever taken with regard to it.
        return nn.Parameter(copied, requires_grad=False)
    return copied


def _copy_around(module, memo):
    """Copy a network, and share the objects in it that cannot be copied."""
    try:
        return copy.deepcopy(module, dict(memo))
    except Exception:
        for value in reachable(module):
            if not isinstance(value, torch.Tensor | nn.Module):
                try:
                    copy.deepcopy(value, dict(memo))
                except Exception:
                    memo[id(value)] = value
        return copy.deepcopy(module, memo)
