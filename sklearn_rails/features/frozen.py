"""A fitted network as an estimator's parameter: shared by clones, cheap to pickle."""

import io
import sys
import types
import weakref
from collections.abc import Mapping, MutableMapping
from typing import Any

import cloudpickle
import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import NotFittedError
from torch import nn
from torch.nn.utils import parametrize

from .contents import checksum, plain_module
from .device import reraise_out_of_memory

# Checksums of a network and its layers' train/eval flags.
BlobKey = tuple[tuple[str, str], list[bool]]

# The same array object is returned until the network changes, so that
# joblib writes it to disk once for all tasks of a search.
_BLOBS: MutableMapping[nn.Module, tuple[BlobKey, NDArray[np.uint8]]]
_BLOBS = weakref.WeakKeyDictionary()


class _NetworkPickler(cloudpickle.Pickler):
    """Pickle what torch refuses to pickle as it is: parametrized, compiled and scripted modules.

    cloudpickle, so that a class written in a notebook reaches the workers of a search.
    """

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.jit.ScriptModule):
            buffer = io.BytesIO()
            torch.jit.save(obj, buffer)
            return _load_script, (buffer.getvalue(),)
        if isinstance(obj, nn.Module):
            if plain_module(obj) is not obj:
                return _same, (plain_module(obj),)
            if parametrize.is_parametrized(obj):
                attributes: dict[str, Any] = dict(vars(obj), _modules=dict(obj._modules))
                parametrizations = dict(attributes["_modules"].pop("parametrizations").items())
                cls = parametrize.type_before_parametrizations(obj)
                state = attributes, parametrizations
                return object.__new__, (cls,), state, None, None, _restore_parametrized
        return super().reducer_override(obj)


# What torch.save takes as a pickle module.
_NETWORK_PICKLE = types.SimpleNamespace(__name__=__name__, Pickler=_NetworkPickler)


def _same(obj: object) -> object:
    return obj


def _load_script(data: bytes) -> Any:
    return torch.jit.load(io.BytesIO(data), map_location="cpu")


def _restore_parametrized(module: Any, state: tuple[dict[str, Any], dict[str, nn.Module]]) -> None:
    attributes, parametrizations = state
    vars(module).update(attributes)
    for name, parametrization in parametrizations.items():
        # torch makes the property that computes the tensor; the place holder goes with the list.
        module.register_buffer(name, torch.empty(0))
        parametrize.register_parametrization(module, name, nn.Identity(), unsafe=True)
        module.parametrizations[name] = parametrization


def _blob_key(module: nn.Module) -> BlobKey:
    training = [getattr(layer, "training", False) for layer in module.modules()]
    return checksum(module), training


def _to_blob(module: nn.Module) -> NDArray[np.uint8]:
    key = _blob_key(module)
    kept = _BLOBS.get(module)
    if kept is None or kept[0] != key:
        buffer = io.BytesIO()
        try:
            torch.save(plain_module(module), buffer, pickle_module=_NETWORK_PICKLE)
        except Exception as error:
            reraise_out_of_memory(error)
            raise TypeError(
                f"The network {type(module).__name__} cannot be pickled: {error}. Remove the "
                "attribute that cannot be pickled (a lock, an open file, a generator), or define a "
                "__getstate__ without it and a __setstate__ that creates it again."
            ) from error
        kept = _BLOBS[module] = key, np.frombuffer(buffer.getvalue(), dtype=np.uint8)
    return kept[1]


def _from_blob(blob: NDArray[np.uint8]) -> nn.Module:
    module: nn.Module = torch.load(
        io.BytesIO(blob.tobytes()), map_location="cpu", weights_only=False
    )
    _BLOBS[module] = _blob_key(module), blob
    return module


def _load_frozen(blob: NDArray[np.uint8]) -> "FrozenModule":
    return FrozenModule(_from_blob(blob))


class FrozenModule:
    """A fitted network as a parameter of an estimator.

    What :class:`sklearn.frozen.FrozenEstimator` is for estimators: :func:`sklearn.base.clone`
    shares the network instead of copying it, a pickle holds it as one compact array of bytes that
    loads on a machine without a GPU, and :func:`joblib.hash` sees its content. The estimators of
    this package treat a bare network the same way; wrap it where the hash counts (a
    :class:`~sklearn.pipeline.Pipeline` with ``memory``) or where a fitted skorch net is to outlive
    a :func:`~sklearn.base.clone` of its own.

    Parameters
    ----------
    module : torch.nn.Module, fitted skorch net or FrozenModule
        The network. It is not copied, and nothing in it is ever changed.

    Attributes
    ----------
    module : torch.nn.Module
        The network itself.

    Raises
    ------
    TypeError
        If ``module`` is not a network.
    sklearn.exceptions.NotFittedError
        If ``module`` is a skorch net that has not been fitted.

    Notes
    -----
    A pickle needs the network's class to be importable where it is loaded (a class written in a
    script or a notebook travels along), and like any pickle it may run code: load only what you
    trust.

    Examples
    --------
    >>> from torch import nn
    >>> from sklearn.base import clone
    >>> from sklearn_rails import FrozenModule
    >>> frozen = FrozenModule(nn.Linear(3, 2))
    >>> frozen
    FrozenModule(Linear, 8 parameters)
    >>> clone(frozen) is frozen
    True
    """

    def __init__(self, module: object) -> None:
        self.module = as_module(module)

    def __sklearn_clone__(self) -> "FrozenModule":
        return self

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        # Not as a state of bytes: tools that load states without running code (skops) would run
        # what the bytes hold. They pickle the network itself, or refuse it.
        return _load_frozen, (_to_blob(self.module),)

    def __repr__(self) -> str:
        n_parameters = sum(p.numel() for p in self.module.parameters())
        return f"FrozenModule({type(self.module).__name__}, {n_parameters:,} parameters)"


# module's id -> its living handle, so that everything pickled together shares one handle.
_HANDLES: MutableMapping[int, FrozenModule]
_HANDLES = weakref.WeakValueDictionary()


def freeze(module: object) -> FrozenModule:
    """Return the handle of a network, the same one as long as it is in use.

    Parameters
    ----------
    module : torch.nn.Module or fitted skorch net

    Returns
    -------
    FrozenModule
    """
    network = as_module(module)
    handle = _HANDLES.get(id(network))
    if handle is None:
        handle = _HANDLES[id(network)] = FrozenModule(network)
    return handle


def is_network(value: object) -> bool:
    """Check whether an estimator's parameter is a bare network.

    Parameters
    ----------
    value : object

    Returns
    -------
    bool
    """
    return isinstance(value, nn.Module) or _is_skorch_net(value)


def as_module(network: object, parameter: str = "module") -> nn.Module:
    """Return the ``torch.nn.Module`` behind a network in any of its forms.

    Parameters
    ----------
    network : torch.nn.Module, fitted skorch net or FrozenModule
    parameter : str, default="module"
        What the network was given as, for the errors.

    Returns
    -------
    torch.nn.Module

    Raises
    ------
    TypeError
        If it is not a network.
    sklearn.exceptions.NotFittedError
        If it is a skorch net that has not been fitted.
    """
    if isinstance(network, FrozenModule):
        return network.module
    if isinstance(network, nn.Module):
        return network
    if _is_skorch_net(network):
        # An initialized net holds a module too, with random weights.
        if not getattr(network, "history_", None):
            raise NotFittedError(
                f"{parameter} is a skorch net ({type(network).__name__}) that is not fitted. "
                "clone() makes an unfitted net of a fitted one: wrap the fitted net, as in "
                "FrozenModule(net), before it is cloned, or fit it first. If its weights were "
                "loaded with load_params, pass its network, net.module_."
            )
        module: nn.Module = network.module_  # type: ignore[attr-defined]
        return module
    hint = ""
    if isinstance(network, type):
        hint = f" Pass a fitted network, not its class {network.__name__}."
    elif isinstance(network, Mapping):
        hint = " A state_dict holds the weights alone: load it into its module, and pass that."
    raise TypeError(
        f"{parameter} must be a torch.nn.Module, a fitted skorch net or a FrozenModule, got "
        f"{type(network).__name__}.{hint}"
    )


def _is_skorch_net(value: object) -> bool:
    # Importing skorch costs a second; a value can be its net only if somebody has done so.
    skorch = sys.modules.get("skorch")
    return skorch is not None and isinstance(value, skorch.NeuralNet)
