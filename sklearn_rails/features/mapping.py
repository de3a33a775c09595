"""The maps f_l from rows to layers' features, as a fitted estimator keeps them."""

import warnings

import numpy as np
import torch

from .batching import iterate_batches, resolve_batch_size
from .device import DTYPES, kept_random_state, resolve_device
from .frozen import freeze
from .truncation import TruncatedNetwork


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
        The layer that :meth:`start` runs to and :meth:`iterate_cells` sets out from.

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
        except RuntimeError as error:
            raise ValueError(
                f"The network does not take rows of shape {self.input_shape} (input_shape sets "
                f"it): {error}"
            ) from error
        return {name: outputs[name].reshape(len(x), -1) for name in self.layers}

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

    def __call__(self, X):
        """Give every layer's features of some rows.

        Parameters
        ----------
        X : ndarray or torch.Tensor of shape (n, n_features)

        Returns
        -------
        dict of str to torch.Tensor of shape (n, n_layer_features)
        """
        return self._collect(X, self.layers)

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

    def outputs(self, X):
        """Give the network's own output.

        Parameters
        ----------
        X : ndarray or torch.Tensor of shape (n, n_features)

        Returns
        -------
        torch.Tensor of shape (n, n_outputs)
        """
        output = self._network.output
        return self._collect(X, (output,))[output]

    def iterate_cells(self, cells, layer):
        """Run cells from the start layer to another, a micro-batch at a time.

        Parameters
        ----------
        cells : torch.Tensor of shape (n, n_start_features)
        layer : str

        Yields
        ------
        rows : slice
        features : torch.Tensor of shape (rows.stop - rows.start, n_layer_features)
        """
        for rows, outputs in self._iterate(cells, (layer,), self.start_layer, self.start_shape):
            yield rows, outputs[layer]

    def _collect(self, X, layers):
        parts = {name: [] for name in layers}
        for _, outputs in self._iterate(X, layers, None, self.input_shape):
            for name, output in outputs.items():
                parts[name].append(output)
        features = {name: torch.cat(batches) for name, batches in parts.items()}
        for name, values in features.items():
            if not torch.isfinite(values).all():
                raise ValueError(
                    f"layers={name!r}: the network gives NaN or infinity for some rows of X."
                )
        return features

    def _iterate(self, X, layers, start, shape):
        x = self.to_device(X).reshape(len(X), *shape)
        batch_size = resolve_batch_size(self._batch_size, shape, self.device)
        with torch.no_grad(), kept_random_state(self.device):
            for rows, batch in iterate_batches(x, batch_size):
                outputs = self._network(batch, layers, start)
                n_rows = rows.stop - rows.start
                yield rows, {k: v[:n_rows].reshape(n_rows, -1) for k, v in outputs.items()}

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
