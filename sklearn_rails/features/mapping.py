"""The maps f_l from rows to layers' features, as a fitted estimator keeps them."""

import functools
import warnings
import weakref

import numpy as np
import torch
from sklearn.utils import gen_batches

from .batching import (
    Layout,
    fastest_layout,
    halve_until_it_fits,
    iterate_batches,
    iterate_tiles,
    no_room_for_a_row,
    rows_layout,
)
from .device import (
    DTYPES,
    keep_freed_memory,
    kept_random_state,
    memory_budget,
    resolve_device,
)
from .frozen import freeze
from .truncation import TruncatedNetwork

# Arrays of a block's features that are held at a time: the batches, the features, a copy.
BLOCKS_HELD = 4

# network -> {way through it: layout}: a search over other parameters measures a network once.
_LAYOUTS = weakref.WeakKeyDictionary()


class FeatureMap:
    """The maps f_l from rows to layers' features, on one device and in one dtype.

    Parameters
    ----------
    module : torch.nn.Module or None
        None passes rows through as the layer ``"input"``.
    layers : None, str or sequence of str
        Names of the layers; None for the network's output.
    input_shape : tuple of int
        Shape of one row.
    device, dtype, batch_size
        As the estimators take them.
    start_layer : str, default=None
        The layer that :meth:`start` runs to and populations live in.

    Attributes
    ----------
    layers : tuple of str
    device : torch.device

    Raises
    ------
    TypeError, ValueError
        If the network, a layer or the device cannot be used.
    """

    def __init__(self, module, layers, *, input_shape, device, dtype, batch_size, start_layer=None):
        self._module = module
        self._device_name = device
        self.dtype = DTYPES[dtype]
        self.input_shape = tuple(int(size) for size in input_shape)
        self._run_on(resolve_device(device))
        if self.device.type == "mps" and dtype == "float64":
            raise ValueError("dtype='float64' cannot be had on device='mps'; use 'float32'.")
        self._batch_size = batch_size
        self._layouts = {}
        self.layers = self._network.resolve_layers(layers, "layers")
        self.start_layer = start_layer
        if start_layer is not None:
            self._network.resolve_layers(start_layer, "start_layer")
        self.start_shape = self.input_shape

    @property
    def has_network(self):
        """Whether there is a network, and not the input alone."""
        return self._module is not None

    def _run_on(self, device):
        self.device = device
        if device.type == "cpu":
            keep_freed_memory()
        self._network = TruncatedNetwork(
            self._module, device=device, dtype=self.dtype, input_shape=self.input_shape
        )

    def probe(self, X):
        """Look at a few rows: complain of layers that cannot be used, and learn the shapes.

        Parameters
        ----------
        X : ndarray or torch.Tensor of shape (n, n_features)

        Returns
        -------
        dict of str to torch.Tensor of shape (n_probes, n_layer_features)

        Raises
        ------
        ValueError
            If the network cannot take the rows or give the layers.
        """
        # Rows far apart in X, since neighbouring ones may be alike.
        x = self.to_device(X[:: max(1, len(X) - 1)][:2]).reshape(-1, *self.input_shape)
        try:
            with torch.no_grad(), kept_random_state(self.device):
                self._network.check(x, self.layers, self.start_layer)
                outputs = self._network(x, self.layers)
                if self.start_layer is not None:
                    start = self._network(x, (self.start_layer,))[self.start_layer]
                    self.start_shape = tuple(start.shape[1:])
        except torch.OutOfMemoryError as error:
            raise no_room_for_a_row(error) from error
        except RuntimeError as error:
            raise ValueError(
                f"The network does not take rows of shape {self.input_shape} (input_shape sets "
                f"it): {error}"
            ) from error
        features = {name: outputs[name].reshape(len(x), -1) for name in self.layers}
        self._row_bytes = sum(f[0].nbytes for f in features.values())
        return features

    def to_device(self, X):
        """Bring rows to the map's device and dtype.

        Parameters
        ----------
        X : ndarray or torch.Tensor of shape (n, n_features)

        Returns
        -------
        torch.Tensor of shape (n, n_features)
        """
        if isinstance(X, np.ndarray):
            # torch warns of read-only arrays, which memory-mapped ones are, and refuses strides
            # below zero.
            X = torch.from_numpy(X if X.flags.writeable and X.flags.c_contiguous else X.copy())
        return X.to(device=self.device, dtype=self.dtype)

    def __call__(self, X, *, check_finite=True):
        """Compute every layer's features.

        Parameters
        ----------
        X : ndarray or torch.Tensor of shape (n, n_features)
        check_finite : bool, default=True
            Raise an error where the network gives NaN or infinity.

        Returns
        -------
        dict of str to torch.Tensor of shape (n, n_layer_features)

        Raises
        ------
        ValueError
            If a feature is not finite, with ``check_finite``.
        """
        return self._collect(X, self.layers, check_finite=check_finite)

    def row_blocks(self, n_samples):
        """Split samples into blocks whose features fit into scikit-learn's ``working_memory``.

        Parameters
        ----------
        n_samples : int

        Returns
        -------
        list of slice
        """
        size = max(1, memory_budget(self.device) // (BLOCKS_HELD * self._row_bytes))
        return list(gen_batches(n_samples, min(size, n_samples)))

    @property
    def output(self):
        """The name of the network's own output."""
        return self._network.output

    def with_gradient(self, X, layers=None):
        """Give layers' features of some rows, for torch to differentiate.

        Parameters
        ----------
        X : torch.Tensor of shape (n, n_features)
            On the map's device and in its dtype.
        layers : sequence of str, default=None
            None takes the map's own.

        Returns
        -------
        dict of str to torch.Tensor of shape (n, n_layer_features)
        """
        outputs = self._network(X.reshape(len(X), *self.input_shape), layers or self.layers)
        return {name: output.reshape(len(X), -1) for name, output in outputs.items()}

    def start(self, X):
        """Give the output of the start layer, or the rows themselves where there is none.

        Parameters
        ----------
        X : ndarray or torch.Tensor of shape (n, n_features)

        Returns
        -------
        torch.Tensor of shape (n, n_start_features)
        """
        if self.start_layer is None:
            return self.to_device(X)
        return self._collect(X, (self.start_layer,))[self.start_layer]

    def from_start(self, cells, layer):
        """Run cells from the start layer to another, as :meth:`__call__` runs rows.

        Parameters
        ----------
        cells : torch.Tensor of shape (n, n_start_features)
        layer : str

        Returns
        -------
        torch.Tensor of shape (n, n_layer_features)
        """
        return self._collect(cells, (layer,), self.start_layer)[layer]

    def outputs(self, X, *, check_finite=True):
        """Compute the network's own output.

        Parameters
        ----------
        X : ndarray or torch.Tensor of shape (n, n_features)
        check_finite : bool, default=True
            Raise an error where the network gives NaN or infinity.

        Returns
        -------
        torch.Tensor of shape (n, n_outputs)

        Raises
        ------
        ValueError
            If an output is not finite, with ``check_finite``.
        """
        return self._collect(X, (self.output,), check_finite=check_finite)[self.output]

    def predict(self, X):
        """Give the network's own labels.

        Parameters
        ----------
        X : ndarray or torch.Tensor of shape (n, n_features)

        Returns
        -------
        torch.Tensor of shape (n,), int64
            The output that is highest. A single output is the logit of the second of two classes.
        """
        return self.label(self.outputs(X))

    @staticmethod
    def label(outputs):
        """Give the labels that :meth:`predict` takes from the network's outputs."""
        return outputs.argmax(dim=1) if outputs.shape[1] > 1 else (outputs[:, 0] > 0).long()

    def check_outputs(self, X, n_classes, parameter):
        """Complain where the network's labels cannot be classes.

        Parameters
        ----------
        X : ndarray or torch.Tensor of shape (n, n_features)
        n_classes : int
        parameter : str
            What asks for the labels.

        Raises
        ------
        ValueError
            If the network has not an output for each class (or one, for two classes).
        """
        n_outputs = self.outputs(X[:1]).shape[1]
        if n_outputs != n_classes and (n_outputs, n_classes) != (1, 2):
            raise ValueError(
                f"{parameter} needs a network with an output for each class, in the order of the "
                f"sorted classes, but it has {n_outputs} outputs and y has {n_classes} classes."
            )

    def compare_cells(self, cells, layer, antigens, compare, *, any_order):
        """Run populations from the start layer to another, and compare what comes out.

        Parameters
        ----------
        cells : torch.Tensor of shape (n, n_cells, n_start_features)
        layer : str
        antigens : torch.Tensor of shape (n, n_layer_features)
            What each row's cells are compared with.
        compare : callable
            ``compare(antigens, features, overwrite_features=...)`` gives (r, c) numbers for the
            antigens (r, n_layer_features) of some rows and the features (r, c, n_layer_features)
            of their cells, which it may overwrite if it is told so.
        any_order : bool
            Whether features may come in another order than their own (in all rows, and in both
            arguments, the same): the one in which they are stored, which saves a copy.

        Returns
        -------
        torch.Tensor of shape (n, n_cells)
        """
        layout = self.choose_layout(layer, compare, any_order=any_order)
        with torch.no_grad(), kept_random_state(self.device):
            compared, fitting = halve_until_it_fits(
                lambda layout: self._compare(cells, layer, antigens, compare, any_order, layout),
                layout,
            )
        if fitting is not layout:
            self._layouts[self._way(layer)] = fitting
        return compared

    def _compare(self, cells, layer, antigens, compare, any_order, layout):
        @functools.cache
        def antigens_with_channels_last(shape):
            return antigens.unflatten(1, shape).movedim(1, 3).flatten(1)

        def compare_tile(tile, rows, n_columns):
            batch = layout.store(tile.reshape(-1, *self.start_shape))
            outputs = self._network(batch, (layer,), self.start_layer)[layer]
            own = self._network.owns(outputs, batch)
            present = antigens
            if any_order and outputs.is_contiguous(memory_format=torch.channels_last):
                present = antigens_with_channels_last(outputs.shape[1:])
                outputs = outputs.movedim(1, 3)
            present = present[rows]
            features = outputs.reshape(*tile.shape[:2], -1)[: len(present), :n_columns]
            return compare(present, features, overwrite_features=own)

        compared = cells.new_empty(cells.shape[:2])
        for rows, columns, tile in iterate_tiles(cells, layout.batch_size):
            n_columns = compared[rows, columns].shape[1]
            # In a function, whose large tensors are gone before the next one needs memory.
            compared[rows, columns] = compare_tile(tile, rows, n_columns)
        return compared

    def choose_layout(self, layer, compare, *, any_order):
        """Choose the micro-batches of cells on their way to a layer, by a short measurement.

        Parameters
        ----------
        layer : str
        compare, any_order
            As :meth:`compare_cells` takes them.

        Returns
        -------
        Layout
        """
        way = self._way(layer)
        if way not in self._layouts:
            if self._batch_size != "auto":
                self._layouts[way] = Layout(int(self._batch_size))
            else:
                known = {} if self._module is None else _LAYOUTS.setdefault(self._module, {})
                if way not in known:
                    known[way] = self._measure_layout(layer, compare, any_order)
                self._layouts[way] = known[way]
        return self._layouts[way]

    def _way(self, layer):
        return layer, self.start_layer, self.start_shape, str(self.device), self.dtype

    @torch.no_grad()
    def _measure_layout(self, layer, compare, any_order):
        with kept_random_state(self.device):
            row = torch.zeros(1, *self.start_shape, device=self.device, dtype=self.dtype)
            antigen = self._network(row, (layer,), self.start_layer)[layer].reshape(1, -1)
            return fastest_layout(
                lambda rows, layout: self._compare(
                    rows.flatten(1)[None], layer, antigen, compare, any_order, layout
                ),
                self.start_shape,
                device=self.device,
                dtype=self.dtype,
            )

    def _collect(self, X, layers, start=None, *, check_finite=True):
        shape = self.input_shape if start is None else self.start_shape
        x = self.to_device(X).reshape(len(X), *shape)
        if self._batch_size == "auto":
            layout = rows_layout(self.input_shape, self.device)
        else:
            layout = Layout(int(self._batch_size))

        def run(layout):
            parts = {name: [] for name in layers}
            for rows, batch in iterate_batches(x, layout):
                n_rows = rows.stop - rows.start
                for name, output in self._network(batch, layers, start).items():
                    parts[name].append(output[:n_rows].reshape(n_rows, -1))
            return {name: torch.cat(batches) for name, batches in parts.items()}

        with torch.no_grad(), kept_random_state(self.device):
            features, _ = halve_until_it_fits(run, layout)
        for name, values in features.items() if check_finite else ():
            if not torch.isfinite(values).all():
                raise ValueError(
                    f"layers={name!r}: the network gives NaN or infinity for some rows of X."
                )
        return features

    def __getstate__(self):
        state = {k: v for k, v in vars(self).items() if k != "_network"}
        return state | {"_module": None if self._module is None else freeze(self._module)}

    def __setstate__(self, state):
        vars(self).update(state)
        self._module = None if self._module is None else self._module.module
        try:
            device = resolve_device(self._device_name)
        except ValueError as error:
            warnings.warn(f"{error} The loaded estimator runs on the CPU.", stacklevel=2)
            device = torch.device("cpu")
        self._run_on(device)
