"""Turn estimators into values that JSON holds, arrays and networks, and back, running no code."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ._conformal import ConformalScale
from ._dknn import DkNNClassifier
from ._extractor import TorchFeatureExtractor
from ._rails import RAILSClassifier
from ._threat import ThreatScorer
from .features import FeatureMap, FrozenModule
from .features.batching import BatchLayout
from .features.follow import FollowedNetwork
from .features.frozen import freeze
from .features.layer_choice import LayerScores
from .features.layouts import Layouts
from .features.truncation import NetworkTraits
from .immune import Arbitration, ImmuneEngine, MemoryBank, Triage
from .immune.domain import Domain
from .immune.layer import ResponseLayer
from .immune.maturation import CellBank, Schedule
from .immune.random import Mutation, RandomStream
from .neighbors import AFFINITIES, ClassNeighbors, ExactNeighbors
from .neighbors.estimators import EstimatorSearch
from .neighbors.exact import AllPairsSearch, ProductSearch
from .neighbors.geometry import Geometry
from .neighbors.order import ClassOrder
from .neighbors.sketch import Sketch
from .neighbors.store import ExampleStore, HalfPrecisionStore
from .sensing import DETECTORS
from .sensing.mahalanobis import Gaussians, ShrunkWhitening
from .sensing.samples import IndexedSamples
from .sensing.scoring import Evidence

ESTIMATORS = (RAILSClassifier, DkNNClassifier, ThreatScorer, TorchFeatureExtractor)

# All classes whose objects a file may hold. Their states are plain values, and setting them runs no
# code but that of this package.
CLASSES: dict[str, type] = {
    cls.__name__: cls
    for cls in (
        *ESTIMATORS,
        *DETECTORS.values(),
        *AFFINITIES.values(),
        AllPairsSearch,
        Arbitration,
        BatchLayout,
        CellBank,
        ClassNeighbors,
        ClassOrder,
        ConformalScale,
        Domain,
        EstimatorSearch,
        Evidence,
        ExactNeighbors,
        ExampleStore,
        FeatureMap,
        FollowedNetwork,
        Gaussians,
        Geometry,
        HalfPrecisionStore,
        ImmuneEngine,
        IndexedSamples,
        LayerScores,
        Layouts,
        MemoryBank,
        Mutation,
        NetworkTraits,
        ProductSearch,
        RandomStream,
        ResponseLayer,
        Schedule,
        ShrunkWhitening,
        Sketch,
        Triage,
    )
}

NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}

# How deep values are nested, at most.
MAX_DEPTH = 100

# The kinds of values that consist of others: their types, and their parts.
PARTS: tuple[tuple[str, tuple[type, ...], Callable[[Any], Any]], ...] = (
    ("tuple", (tuple,), tuple),
    ("size", (torch.Size,), tuple),
    ("set", (set, frozenset), sorted),
    ("slice", (slice,), lambda value: (value.start, value.stop, value.step)),
    ("random_state", (np.random.RandomState,), lambda value: value.get_state()),
)


class Encoder:
    """Turn an estimator into what JSON holds, and lists of arrays and networks.

    Parameters
    ----------
    names : dict of int to str
        Names of the networks, by their ids.

    Attributes
    ----------
    objects : list of dict
    arrays : list of ndarray
    networks : list of (torch.nn.Module, str)
        With their names.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        self.objects: list[dict[str, Any]] = []
        self.arrays: list[NDArray[Any]] = []
        self.networks: list[tuple[nn.Module, str]] = []
        self._known: dict[int, dict[str, int]] = {}
        self._kept: list[Any] = []  # so that no id is used twice
        self._names = names

    def encode(self, value: Any, where: str) -> Any:
        """Return what stands for a value.

        Parameters
        ----------
        value : object
        where : str
            Its name, for errors.

        Returns
        -------
        object
            That JSON holds.

        Raises
        ------
        TypeError
            If the value is of a type that is not saved.
        """
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"float": repr(value)}
        if type(value) is list:
            return [self.encode(item, where) for item in value]
        if id(value) in self._known:
            return self._known[id(value)]
        for kind, types, parts in PARTS:
            if type(value) in types:
                return {kind: [self.encode(part, where) for part in parts(value)]}
        if type(value) is dict:
            return {
                "dict": [
                    [self.encode(key, where), self.encode(item, f"{where}[{key!r}]")]
                    for key, item in value.items()
                ]
            }
        if isinstance(value, np.generic):
            return {"scalar": value.dtype.str, "value": self.encode(value.item(), where)}
        if isinstance(value, torch.device | torch.dtype):
            return {type(value).__name__: str(value).removeprefix("torch.")}
        return self._encode_shared(value, where)

    def _encode_shared(self, value: Any, where: str) -> Any:
        """Encode what may be in several places, and stays one object."""
        if type(value) is np.ndarray and value.dtype.hasobject:
            items = [self.encode(item, where) for item in value.ravel().tolist()]
            return {"items": items, "shape": list(value.shape)}
        if isinstance(value, np.ndarray):
            plain_dtype(value.dtype.str)
            return self._add("array", value, self.arrays, np.ascontiguousarray(value))
        if isinstance(value, torch.Tensor):
            array = value.detach().cpu().numpy()
            return self._add("tensor", value, self.arrays, np.ascontiguousarray(array))
        if isinstance(value, FrozenModule):
            return {"frozen": self.encode(value.module, where)}
        if isinstance(value, nn.Module):
            return self._add(
                "network", value, self.networks, (value, self._names.get(id(value), ""))
            )
        if CLASSES.get(type(value).__name__) is not type(value):
            raise TypeError(
                f"{where} is {value!r:.100}, of type {type(value).__name__}, which cannot be saved "
                "without code. Pickle the estimator instead, or use what the package itself has."
            )
        held: dict[str, Any] = {"class": type(value).__name__}
        reference = self._add("object", value, self.objects, held)
        state: Any = value.__getstate__() or {}
        held["state"] = {
            name: self.encode(item, f"{type(value).__name__}.{name}")
            for name, item in state.items()
        }
        return reference

    def _add(self, kind: str, value: Any, place: list[Any], item: Any) -> dict[str, int]:
        reference = self._known[id(value)] = {kind: len(place)}
        self._kept.append(value)
        place.append(item)
        return reference


class Decoder:
    """Turn what an :class:`Encoder` made into the estimator again.

    Parameters
    ----------
    objects : list of dict
    arrays : callable
        Gives an array by its number.
    networks : list of torch.nn.Module

    Attributes
    ----------
    decoded : dict of int to object
        The objects, by their number.
    """

    def __init__(
        self,
        objects: list[Any],
        arrays: Callable[[int], NDArray[Any]],
        networks: Sequence[nn.Module],
    ) -> None:
        self._objects, self._arrays, self._networks = objects, arrays, networks
        self.decoded: dict[int, Any] = {}
        self._tensors: dict[int, torch.Tensor] = {}

    def decode(self, said: Any, depth: int = 0) -> Any:
        """Return the value that something stands for.

        Parameters
        ----------
        said : object
            As :meth:`Encoder.encode` returns it.
        depth : int, default=0
            Of values around it.

        Returns
        -------
        object

        Raises
        ------
        Exception
            Of any kind, if it was not made by an encoder.
        """
        if said is None or isinstance(said, bool | int | float | str):
            return said
        if depth > MAX_DEPTH:
            raise ValueError("values are nested too deeply")
        if isinstance(said, list):
            return [self.decode(item, depth + 1) for item in said]
        kinds = [kind for kind in said if kind in self._DECODERS]
        if len(kinds) != 1:
            raise ValueError(f"unknown kind of value {list(said)!r:.100}")
        return self._DECODERS[kinds[0]](self, said[kinds[0]], said, depth + 1)

    def _parts(self, parts: Any, depth: int) -> list[Any]:
        if not isinstance(parts, list):
            raise TypeError(f"{parts!r:.100} is no list")
        return [self.decode(part, depth) for part in parts]

    def _dict(self, pairs: Any, said: Any, depth: int) -> dict[Any, Any]:
        return {self.decode(key, depth): self.decode(item, depth) for key, item in pairs}

    def _scalar(self, dtype: Any, said: Any, depth: int) -> Any:
        return plain_dtype(dtype).type(self.decode(said["value"], depth))

    def _items(self, items: Any, said: Any, depth: int) -> NDArray[Any]:
        array = np.empty(len(items), dtype=object)
        array[:] = self._parts(items, depth)
        return array.reshape(said["shape"])

    def _network(self, number: Any, said: Any, depth: int) -> nn.Module:
        return self._networks[as_index(number)]

    def _tensor(self, number: Any, said: Any, depth: int) -> torch.Tensor:
        number = as_index(number)
        if number not in self._tensors:
            self._tensors[number] = torch.from_numpy(self._arrays(number).copy())
        return self._tensors[number]

    def _random_state(self, parts: Any, said: Any, depth: int) -> np.random.RandomState:
        rng = np.random.RandomState(0)
        rng.set_state(tuple(self._parts(parts, depth)))
        return rng

    def _object(self, number: Any, said: Any, depth: int) -> Any:
        number = as_index(number)
        if number in self.decoded:
            return self.decoded[number]
        held = self._objects[number]
        cls = CLASSES[held["class"]]
        value: Any = object.__new__(cls)
        self.decoded[number] = value
        state = {name: self.decode(item, depth) for name, item in held["state"].items()}
        if hasattr(value, "__setstate__"):
            value.__setstate__(state)
        else:
            vars(value).update(state)
        return value

    _DECODERS: dict[str, Callable[..., Any]] = {
        "float": lambda self, text, said, depth: NOT_FINITE[text],
        "tuple": lambda self, parts, said, depth: tuple(self._parts(parts, depth)),
        "size": lambda self, parts, said, depth: torch.Size(self._parts(parts, depth)),
        "set": lambda self, parts, said, depth: set(self._parts(parts, depth)),
        "slice": lambda self, parts, said, depth: slice(*self._parts(parts, depth)),
        "random_state": _random_state,
        "dict": _dict,
        "scalar": _scalar,
        "items": _items,
        "device": lambda self, name, said, depth: torch.device(name),
        "dtype": lambda self, name, said, depth: _torch_dtype(name),
        "array": lambda self, number, said, depth: self._arrays(as_index(number)),
        "tensor": _tensor,
        "network": _network,
        "frozen": lambda self, inner, said, depth: freeze(self.decode(inner, depth)),
        "object": _object,
    }


def as_index(number: Any) -> int:
    """Return a whole number that is not negative, or raise a TypeError."""
    if type(number) is not int or number < 0:
        raise TypeError(f"{number!r:.50} is no index")
    return number


def plain_dtype(name: Any) -> np.dtype[Any]:
    """Return a dtype of numbers or strings, or raise a TypeError."""
    dtype = np.dtype(str(name))
    if dtype.kind not in "biufcSU":
        raise TypeError(f"arrays of {dtype} are not saved")
    return dtype


def _torch_dtype(name: Any) -> torch.dtype:
    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name!r:.50} is no dtype")
    return dtype
