"""Forward hooks of the network's own that only watch, and are left out of a private copy."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

# Layer and key of a hook.
HookKey = tuple[str, int]


def remove_watchers(module: nn.Module, run: Callable[[], object]) -> tuple[HookKey, ...]:
    """Remove the forward hooks that change nothing in a pass.

    Such hooks collect activations for the user, who does not expect those of an estimator's
    passes. Hooks with a true attribute ``records`` are the private copy's own, and stay.

    Parameters
    ----------
    module : torch.nn.Module
    run : callable
        Runs one pass.

    Returns
    -------
    tuple of (layer, key)
        The hooks that were removed.
    """
    acting: set[HookKey] = set()
    hooks: dict[HookKey, tuple[nn.Module, Callable[..., Any]]] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, torch.jit.ScriptModule):
            continue
        for key, hook in layer._forward_hooks.items():
            if not getattr(hook, "records", False):
                hooks[name, key] = layer, hook
                layer._forward_hooks[key] = _report_if_acting(hook, (name, key), acting)
    try:
        run()
    finally:
        for (_, key), (layer, hook) in hooks.items():
            layer._forward_hooks[key] = hook
    watchers = tuple(name for name in hooks if name not in acting)
    for name in watchers:
        remove_hook(hooks[name][0], name[1])
    return watchers


def _report_if_acting(
    hook: Callable[..., Any], name: HookKey, acting: set[HookKey]
) -> Callable[..., Any]:
    """Wrap a forward hook, to add its name to those that change something."""

    def wrapped(*args: Any) -> Any:
        before = _version(args[-1])
        result = hook(*args)
        if result is not None or _version(args[-1]) != before:
            acting.add(name)
        return result

    return wrapped


def _version(value: object) -> int | None:
    is_counted = isinstance(value, torch.Tensor) and not value.is_inference()
    return value._version if is_counted else None  # type: ignore[attr-defined]


def remove_hook(layer: nn.Module, key: int) -> None:
    """Remove a forward hook from a layer.

    Parameters
    ----------
    layer : torch.nn.Module
    key : int
        Its key among the layer's forward hooks.
    """
    for hooks in (
        layer._forward_hooks,
        layer._forward_hooks_with_kwargs,
        layer._forward_hooks_always_called,
    ):
        hooks.pop(key, None)
