"""The state of a network that a pass may change, and what sets it back."""

import copy
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from .contents import CONTAINERS, SCALARS, StateKey, attributes_of

# Value of an attribute that does not exist.
MISSING = object()


def state_of(module: nn.Module) -> dict[StateKey, Any]:
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


def copy_state(value: Any) -> Any:
    """Copy a tensor, or a container without what is in it.

    Parameters
    ----------
    value : object

    Returns
    -------
    object
        Any other value itself.
    """
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    return copy.copy(value) if isinstance(value, (dict, *CONTAINERS)) else value


def same_state(value: Any, other: Any) -> bool:
    """Check whether nothing was written between two calls of :func:`copy_state`.

    Parameters
    ----------
    value, other : object

    Returns
    -------
    bool
    """
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
        pairs: Iterable[tuple[Any, Any]] = zip(
            [*value, *value.values()], [*other, *other.values()], strict=False
        )
    elif isinstance(value, set | frozenset):
        return bool(value == other)
    elif isinstance(value, CONTAINERS):
        pairs = zip(value, other, strict=False)
    else:
        return value is other or (isinstance(value, SCALARS) and bool(value == other))
    return len(value) == len(other) and all(a is b for a, b in pairs)


class VolatileState:
    """Buffers and attributes that a pass changes, with the values that each pass starts from.

    As a context, hold a lock during a pass and restore the values after it.

    Parameters
    ----------
    module : torch.nn.Module or None

    Attributes
    ----------
    values : dict of (layer, place, key) to object
        Empty if no pass changes anything; then there is nothing to lock.
    """

    def __init__(self, module: nn.Module | None) -> None:
        self._module = module
        self._lock = threading.Lock()
        self.values: dict[StateKey, Any] = {}
        self._kept: list[tuple[dict[str, Any], str, Any]] = []

    def keep(self, names: Iterable[Sequence[str]], state: dict[StateKey, Any]) -> None:
        """Set what is restored after each pass.

        Parameters
        ----------
        names : iterable of (layer, place, key)
        state : dict of (layer, place, key) to object
            The values, as :func:`state_of` returns them.
        """
        keys = [(layer, place, key) for layer, place, key in names]
        self.values = {key: state.get(key, MISSING) for key in keys}

    def restore(self) -> None:
        """Set the values in the network back."""
        self._set(self._copies())

    def _copies(self) -> list[tuple[dict[str, Any], str, Any]]:
        """Return where the values are held, under which key, and copies of them."""
        if self._module is None or not self.values:
            return []
        layers: dict[str, Any] = dict(self._module.named_modules())
        copies = []
        for (layer, place, key), value in self.values.items():
            held = vars(layers[layer]) if place == "__dict__" else layers[layer]._buffers
            copies.append((held, key, copy_state(value)))
        return copies

    @staticmethod
    def _set(copies: list[tuple[dict[str, Any], str, Any]]) -> None:
        for held, key, value in copies:
            if value is MISSING:
                held.pop(key, None)
            else:
                held[key] = value

    def __enter__(self) -> None:
        self._lock.acquire()
        try:
            # Before the pass: after it there may be no memory.
            self._kept = self._copies()
        except BaseException:
            self._lock.release()
            raise

    def __exit__(self, *exception: object) -> None:
        try:
            self._set(self._kept)
            self._kept = []
        finally:
            self._lock.release()


def changed_keys(before: dict[StateKey, Any], after: dict[StateKey, Any]) -> tuple[StateKey, ...]:
    """Return the keys of all values that differ between two states of a network.

    Parameters
    ----------
    before, after : dict of (layer, place, key) to object
        As :func:`state_of` returns them.

    Returns
    -------
    tuple of (layer, place, key)
    """
    return tuple(
        key
        for key in {**before, **after}
        if not same_state(before.get(key, MISSING), after.get(key, MISSING))
    )
