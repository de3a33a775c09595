"""Private copies of networks."""

import copy
import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from .contents import CONTAINERS, plain_module, wrapped_module
from .device import reraise_out_of_memory


def check_ready(module: nn.Module, parameter: str) -> None:
    """Raise an error for a network that cannot be copied and run.

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
        held: list[Any] = []
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
    tensors: list[tuple[str, torch.Tensor]]
    tensors = [*module.named_parameters(), *module.named_buffers()]
    for name, tensor in tensors:
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


def private_copy(
    module: nn.Module, device: torch.device, dtype: torch.dtype, parameter: str
) -> nn.Module:
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
    memo: dict[int, Any] = {}
    parameters = {id(p) for p in module.parameters()}
    for value in reachable(module):
        if isinstance(value, torch.Tensor) and id(value) not in memo:
            memo[id(value)] = _copied(value, device, dtype, is_shared=id(value) in parameters)
    try:
        for layer in module.modules():
            if wrapped_module(layer) is not None and id(layer) not in memo:
                memo[id(layer)] = copy.deepcopy(plain_module(layer), memo)
        twin = _copy_around(module, memo)
    except Exception as error:
        reraise_out_of_memory(error)
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


def halve_weights(module: nn.Module) -> None:
    """Store the weights of convolutions and linear layers in bfloat16.

    Autocast would otherwise convert them in every pass. All other weights stay as they are, since
    autocast leaves what they are used for in their own precision.

    Parameters
    ----------
    module : torch.nn.Module
        A private copy.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd):
            weight = layer._parameters.get("weight")
            if weight is not None:
                weight.data = weight.data.to(torch.bfloat16)


def reachable(module: nn.Module) -> Iterator[Any]:
    """Iterate over the objects that a network's attributes hold, at any depth.

    Parameters
    ----------
    module : torch.nn.Module

    Yields
    ------
    object
        Tensors and other objects, but not the containers themselves.
    """
    seen: set[int] = set()
    stack: list[Any] = [module]
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


def _copied(
    tensor: torch.Tensor, device: torch.device, dtype: torch.dtype, *, is_shared: bool
) -> torch.Tensor:
    copied = tensor.detach().to(device)
    if tensor.is_floating_point():
        copied = copied.to(dtype)
    if not is_shared:
        copied = copied.clone()
    if isinstance(tensor, nn.Parameter):
        # No gradient is ever taken with regard to it.
        return nn.Parameter(copied, requires_grad=False)
    return copied


def _copy_around(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Copy a network, and share the objects in it that cannot be copied."""
    try:
        return copy.deepcopy(module, dict(memo))
    except Exception as error:
        reraise_out_of_memory(error)
        for value in reachable(module):
            if not isinstance(value, torch.Tensor | nn.Module):
                try:
                    copy.deepcopy(value, dict(memo))
                except Exception as refusal:
                    reraise_out_of_memory(refusal)
                    memo[id(value)] = value
        return copy.deepcopy(module, memo)
