"""The maps f_l from samples to layers' features, as a fitted estimator keeps them."""

import functools
import math
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .._validation import find_user_level
from .batching import BatchLayout, PopulationAffinity, run_populations, run_samples
from .checks import find_layers, is_usable
from .device import (
    AUTOCAST_DEVICES,
    DTYPES,
    isolated_pass,
    reraise_out_of_memory,
    resolve_device,
    to_tensor,
)
from .follow import FollowedNetwork
from .layouts import Layouts
from .outputs import LayerError
from .precision import prefer_half
from .probe import Probe

Array = NDArray[Any] | torch.Tensor
Samples = TypeVar("Samples", NDArray[Any], torch.Tensor)

# Values outside the range of fit by more than this many times its width are probably in another
# unit, such as pixels from 0 to 255 after a fit on 0 to 1.
RANGE_MARGIN = 3

# The same for values whose range is smaller than that of fit by this factor, such as pixels from 0
# to 1 after a fit on 0 to 255.
RANGE_RATIO = 100


class FeatureMap:
    """The maps f_l from samples to layers' features, on one device and in one dtype.

    Parameters
    ----------
    module : torch.nn.Module or None
        None passes samples through as the layer ``"input"``.
    layers : None, str or sequence of str
        Names of the layers; None for the network's output.
    input_shape : tuple of int
        Shape of one sample.
    device, dtype, batch_size
        As the estimators take them.
    start_layer : str, default=None
        The layer that :meth:`embed_cells` runs to and populations live in.
    parameter : str, default="feature_extractor"
        The parameter that holds the network, for the errors.

    Attributes
    ----------
    layers : tuple of str
    start_layer : str or None
    input_shape : tuple of int
    cell_shape : tuple of int
        Shape of one cell: that of the start layer's output, or of a sample.
    device : torch.device
    integer_input : bool
        Whether the network takes integers, such as token ids; known after :meth:`probe`.
    n_features_out : int
        Number of features of all layers together; known after :meth:`probe`.

    Raises
    ------
    TypeError, ValueError
        If the network, a layer or the device cannot be used.

    Notes
    -----
    Samples ``X`` are arrays or tensors of shape (n, n_features), cells are tensors of shape
    (n, n_start_features): samples, or flat outputs of the start layer.
    """

    n_features_out: int

    def __init__(
        self,
        module: nn.Module | None,
        layers: str | Sequence[str] | None,
        *,
        input_shape: Sequence[int],
        device: str | torch.device,
        dtype: str,
        batch_size: int | Literal["auto"],
        start_layer: str | None = None,
        parameter: str = "feature_extractor",
    ) -> None:
        self._parameter = parameter
        self._device_name, self._chooses_dtype = str(device), dtype == "auto"
        self.input_shape = tuple(int(size) for size in input_shape)
        self.integer_input = self._draws_random = False
        self._value_range: tuple[float, float] | None = None
        self._warned: set[str] = set()
        self._columns: dict[str, torch.Tensor] = {}
        self.device = resolve_device(device)
        if self.device.type == "mps" and dtype in ("float64", "bfloat16"):
            raise ValueError(f"dtype={dtype!r} is not available on device='mps'; use 'float32'.")
        self._batch_size = batch_size if batch_size == "auto" else int(batch_size)
        shape = self.input_shape
        self._layouts = Layouts(self._batch_size, shape, self.device)
        known = "float32" if dtype == "auto" else dtype
        self._followed = FollowedNetwork(module, self.device, known, shape, parameter)
        self.layers = self._followed.network.resolve_layers(layers, "layers")
        self.start_layer = start_layer
        if start_layer is not None:
            self._followed.network.resolve_layers(start_layer, "start_layer")
        self.cell_shape = self.input_shape

    def _run_on(self, device: torch.device) -> None:
        self.device = device
        self._layouts.run_on(device)
        self._followed.run_on(device)

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of features and cells."""
        return DTYPES[self.network_dtype]

    @property
    def network_dtype(self) -> str:
        """In which type the network computes; known after :meth:`probe` for ``dtype="auto"``."""
        return self._followed.dtype

    @property
    def module(self) -> nn.Module | None:
        """The network, as it was given."""
        return self._followed.module

    @property
    def has_network(self) -> bool:
        """Whether there is a network, and not the input alone."""
        return self._followed.module is not None

    @property
    def output(self) -> str:
        """The name of the network's own output."""
        return self._followed.network.output

    @property
    def batch_size(self) -> int:
        """Number of samples that go through the network together."""
        return self._layouts.of_samples.batch_size

    @functools.cached_property
    def row_bytes(self) -> int:
        """Size of the features of one sample, in bytes; known after :meth:`probe`."""
        return self.n_features_out * self.dtype.itemsize

    @functools.cached_property
    def cell_bytes(self) -> int:
        """Size of one cell, in bytes; known after :meth:`probe`."""
        return math.prod(self.cell_shape) * self.dtype.itemsize

    def warn_once(self, topic: str, message: str) -> None:
        """Warn of each topic only once, until the network changes."""
        if topic not in self._warned:
            self._warned.add(topic)
            warnings.warn(message, stacklevel=find_user_level())

    def follow_network(self, *, consequence: str | None = None) -> None:
        """Use the network as it is now, and warn once if it has changed since fit.

        Parameters
        ----------
        consequence : str, default=None
            What the change does to the estimator; None does not warn.

        Raises
        ------
        ValueError
            If the network does not have the layers any more, or they have other shapes.
        """
        if self._followed.follow():
            self._warned = set()
        if consequence and self._followed.has_changed:
            self.warn_once(
                "network",
                f"The network given as {self._parameter} has changed since fit (trained further, "
                f"cast to another type, or edited): {consequence} Call fit again.",
            )

    @property
    def network_has_changed(self) -> bool:
        """Whether the network, as last followed, computes something else than in fit."""
        return self._followed.has_changed

    @property
    def identity(self) -> tuple[Any, ...] | None:
        """What determines the outputs, as a key; None if that is not known."""
        source = self._source
        if self.module is None or source is None:
            return None
        return source, self.start_layer, self.batch_size

    @property
    def _source(self) -> tuple[Any, ...] | None:
        settings = self.network_dtype, str(self.device), self.input_shape
        followed = self._followed
        if followed.module is None:
            return settings
        # The checksum has the names of classes, which may be defined anew.
        types = tuple(type(layer) for layer in followed.module.modules())
        return None if followed.checksum is None else (followed.checksum, types, settings)

    def computes_as(self, other: "FeatureMap") -> bool:
        """Check whether another map gives the same features in the layers that both have.

        Parameters
        ----------
        other : FeatureMap

        Returns
        -------
        bool
            True if network, type, device and shape are the same. Batches may be of other sizes.
        """
        source = self._source
        return source is not None and source == other._source

    def rebased(self) -> "FeatureMap":
        """Return a map of the network as it is now, for an index that is built again."""
        self.follow_network()
        renewed = object.__new__(FeatureMap)
        vars(renewed).update(vars(self), _followed=self._followed.rebased(), _warned=set())
        return renewed

    def probe(self, X: Array, *, with_output: bool = False) -> None:
        """Run two samples, raise an error for layers that cannot be used, and learn the shapes.

        Parameters
        ----------
        X : array of samples
        with_output : bool, default=False
            Whether the network's output will be needed as well.

        Raises
        ------
        MemoryError
            If a single sample does not fit into memory.
        ValueError
            If the network does not take the samples, or a layer cannot be used.
        """
        layers = self.layers
        if with_output and self.has_network and self.output not in layers:
            layers = (*layers, self.output)
        probe = Probe(self._followed.network, layers, self.start_layer, self._batch_size)
        found = probe.run(X)
        if self._chooses_dtype:
            self._followed, found = prefer_half(self._followed, probe, found, X)
            self._chooses_dtype = False
        self._followed.start(found, self.layers, self.start_layer)
        self.integer_input, self._draws_random = found.integer_input, found.draws_random
        self._layouts = Layouts(
            self._batch_size, self.input_shape, self.device, found, n_samples=len(X)
        )
        if self.start_layer is not None:
            self.cell_shape = found.shapes[self.start_layer]
        self.__dict__.pop("cell_bytes", None)
        self.n_features_out = sum(found.features[name].shape[1] for name in self.layers)

    def find_layers(self, max_layers: int | None = None) -> tuple[str, ...]:
        """Return the layers that can be used, in the order in which they run; after :meth:`probe`.

        Parameters
        ----------
        max_layers : int, default=None
            If there are more, inner layers are left out: modules within modules first, and those of
            one depth at equal distances. None returns all.

        Returns
        -------
        tuple of str
            With the network's input first, unless there is a start layer, and its output last.
        """
        network, start = self._followed.network, self.start_layer
        x = torch.from_numpy(self._followed.samples).to(self.device)
        with torch.no_grad(), self._isolated_pass():
            names = find_layers(network, x, start, max_layers)
            if is_usable(network, x, names, start):
                return names
            return tuple(name for name in names if is_usable(network, x, (name,), start))

    def use_layers(self, layers: Sequence[str], X: Array, *, with_output: bool = False) -> None:
        """Use other layers from now on; the arguments are those of the class and :meth:`probe`."""
        self.layers = self._followed.network.resolve_layers(layers, "layers")
        self.__dict__.pop("row_bytes", None)
        self.probe(X, with_output=with_output)

    def sample_features(
        self, layers: Sequence[str], max_features: int, X: Array, rng: np.random.Generator
    ) -> "FeatureMap":
        """Return a map to some features of each layer, drawn at random, to compare layers by.

        Parameters
        ----------
        layers : sequence of str
        max_features : int
            Maximum number of features of a layer.
        X : array of samples
            The first is run to learn the layers' sizes.
        rng : numpy.random.Generator

        Returns
        -------
        FeatureMap
        """
        sizes = {name: f.shape[1] for name, f in self(X[:1], layers, check_finite=False).items()}
        columns = {
            name: torch.from_numpy(np.sort(rng.permutation(size)[:max_features]))
            for name, size in sizes.items()
        }
        sampled = object.__new__(FeatureMap)
        vars(sampled).update(
            vars(self), layers=tuple(layers), n_features_out=sum(sizes.values()), _columns=columns
        )
        vars(sampled).pop("row_bytes", None)
        return sampled

    def to_device(self, X: Array) -> torch.Tensor:
        """Convert samples or cells to the map's device and dtype.

        Integers stay integers (int64) where the network takes them.
        """
        x = X if isinstance(X, torch.Tensor) else to_tensor(X)
        keeps_integers = self.integer_input and not x.is_floating_point()
        return x.to(device=self.device, dtype=torch.int64 if keeps_integers else self.dtype)

    def cast(self, X: Samples) -> Samples:
        """Convert validated samples to the type in which the estimator keeps them."""
        dtype = torch.int64 if self.integer_input else self.dtype
        if isinstance(X, torch.Tensor):
            return X.to(dtype)
        return X.astype(str(dtype).removeprefix("torch."), copy=False)

    def learn_range(self, X: Array) -> None:
        """Store the range of the training samples, for :meth:`check_range`."""
        self._value_range = float(X.min()), float(X.max())

    def check_range(self, X: Array) -> None:
        """Warn once of samples far outside the range of fit, or in a small part of it."""
        if self._value_range is None:
            return
        low, high = self._value_range
        smallest, largest = float(X.min()), float(X.max())
        margin = RANGE_MARGIN * (high - low)
        if margin > 0 and (smallest < low - margin or largest > high + margin):
            self.warn_once(
                "range",
                f"X has values from {smallest:g} to {largest:g}, far outside the range of fit, "
                f"{low:g} to {high:g}. Is it scaled as the training data are?",
            )
        elif 0 < largest - smallest < (high - low) / RANGE_RATIO:
            self.warn_once(
                "range",
                f"X has values from {smallest:g} to {largest:g}, a small part of the range of fit, "
                f"{low:g} to {high:g}. Is it scaled as the training data are?",
            )

    def __call__(
        self, X: Array, layers: Sequence[str] | None = None, *, check_finite: bool = True
    ) -> dict[str, torch.Tensor]:
        """Compute layers' features, all of them in one pass.

        Parameters
        ----------
        X : array of samples
        layers : sequence of str, default=None
            None takes the map's own.
        check_finite : bool, default=True
            Raise a ValueError where the network gives NaN or infinity.

        Returns
        -------
        dict of str to torch.Tensor of shape (n, n_layer_features)
        """
        found = self._run(X, layers or self.layers, check_finite=check_finite)
        for name in found.keys() & self._columns.keys():
            found[name] = found[name][:, self._columns[name].to(self.device)]
        return found

    def with_gradient(
        self, X: torch.Tensor, layers: Sequence[str] | None = None
    ) -> dict[str, torch.Tensor]:
        """Compute layers' features (as :meth:`__call__` does) for torch to differentiate.

        X is a tensor on the map's device and in its dtype.
        """
        with self._isolated_pass():
            x, layers = X.reshape(len(X), *self.input_shape), layers or self.layers
            layout, smallest = self._layouts.of_samples, self._layouts.smallest
            return run_samples(self._followed.network, x, layers, None, layout, smallest)

    def embed_cells(self, X: Array) -> torch.Tensor:
        """Return the start layer's output, or the samples where there is none, as cells."""
        start = self.start_layer
        return self.to_device(X) if start is None else self._run(X, (start,))[start]

    def features_of_cells(self, cells: torch.Tensor, layer: str) -> torch.Tensor:
        """Compute a layer's features of cells, of shape (n, n_layer_features)."""
        return self._run(cells, (layer,), self.start_layer)[layer]

    def outputs(self, X: Array, *, check_finite: bool = True) -> torch.Tensor:
        """Compute the network's own output, of shape (n, n_outputs).

        Raises an error where one is not finite, with ``check_finite``.
        """
        return self._run(X, (self.output,), check_finite=check_finite)[self.output]

    def predict(self, X: Array) -> torch.Tensor:
        """Compute the network's own labels, of shape (n,) and type int64.

        The highest output; a single output is the logit of the second of two classes.
        """
        return self.label(self.outputs(X))

    @staticmethod
    def label(outputs: torch.Tensor) -> torch.Tensor:
        """Return the labels for some outputs, as :meth:`predict` does."""
        return outputs.argmax(dim=1) if outputs.shape[1] > 1 else (outputs[:, 0] > 0).long()

    def check_outputs(self, X: Array, n_classes: int, parameter: str) -> None:
        """Check that the network's labels can be classes.

        Parameters
        ----------
        X : array of samples
        n_classes : int
            The network must have as many outputs (or one, for two classes).
        parameter : str
            The parameter that needs the labels, for the error.
        """
        n_outputs = self.outputs(X[:1]).shape[1]
        if n_outputs != n_classes and (n_outputs, n_classes) != (1, 2):
            raise ValueError(
                f"{parameter} needs a network with an output for each class, in the order of the "
                f"sorted classes, but it has {n_outputs} outputs and y has {n_classes} classes."
            )

    def affinities(
        self, cells: torch.Tensor, antigens: torch.Tensor, layer: str, affinity: PopulationAffinity
    ) -> torch.Tensor:
        """Run populations to a layer, and compute the affinity of each cell to its antigen.

        Parameters
        ----------
        cells : torch.Tensor of shape (n, n_cells, n_start_features)
        antigens : torch.Tensor of shape (n, n_layer_features)
            One for each population.
        layer : str
        affinity : PopulationAffinity

        Returns
        -------
        torch.Tensor of shape (n, n_cells)
        """
        layout = self._layouts.of_cells.get(layer) or self.choose_layout(layer, affinity)
        with torch.no_grad(), self._isolated_pass():
            computed, fitting = run_populations(
                self._followed.network,
                cells.reshape(*cells.shape[:2], *self.cell_shape),
                antigens,
                layer,
                affinity,
                self.start_layer,
                layout,
                self._layouts.smallest,
            )
        if fitting is not layout:
            self._layouts.of_cells[layer] = fitting
        return computed

    def choose_layout(self, layer: str, affinity: PopulationAffinity) -> BatchLayout:
        """Return the micro-batches of populations on their way to a layer, measured once."""
        with torch.no_grad(), self._isolated_pass():
            return self._layouts.choose(
                layer, affinity, self._followed, start=self.start_layer, cell_shape=self.cell_shape
            )

    def _isolated_pass(self) -> AbstractContextManager[object]:
        if self._draws_random or self.device.type not in AUTOCAST_DEVICES:
            return isolated_pass(self.device, draws_random=self._draws_random)
        # The usual case of isolated_pass, without a call.
        return torch.autocast(self.device.type, enabled=False)

    def _run(
        self,
        X: Array,
        layers: Sequence[str],
        start: str | None = None,
        *,
        check_finite: bool = True,
    ) -> dict[str, torch.Tensor]:
        shape = self.input_shape if start is None else self.cell_shape
        x = self.to_device(X).reshape(len(X), *shape)
        try:
            with torch.no_grad(), self._isolated_pass():
                layout, smallest = self._layouts.of_samples, self._layouts.smallest
                features = run_samples(self._followed.network, x, layers, start, layout, smallest)
        except LayerError:
            raise
        except Exception as error:  # such as token ids beyond an embedding
            reraise_out_of_memory(error)
            raise ValueError(
                f"The network given as {self._parameter} fails on some samples of X: "
                f"{type(error).__name__}: {error}"
            ) from error
        for name, values in features.items() if check_finite else ():
            if not torch.isfinite(values).all():
                raise ValueError(
                    f"layers={name!r}: the network gives NaN or infinity for some samples of X."
                )
        return features

    def __getstate__(self) -> dict[str, Any]:
        # Without what belongs to this machine and process.
        return {k: v for k, v in vars(self).items() if k not in ("device", "_warned")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._warned = set()
        try:
            device = resolve_device(self._device_name)
        except ValueError as error:
            warnings.warn(f"{error} The loaded estimator runs on the CPU.", stacklevel=2)
            device = torch.device("cpu")
        self._run_on(device)
