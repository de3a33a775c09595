"""Named layers of a fitted network as features."""

import warnings
from numbers import Integral

import numpy as np
import torch
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin

from .._compat import Interval, StrOptions, fit_context
from .._validation import all_or_nothing, validate_fit_rows, validate_rows
from .batching import iterate_batches, resolve_batch_size
from .device import DTYPES, kept_random_state, resolve_device
from .frozen import SharesNetwork, as_module, freeze
from .truncation import TruncatedNetwork

# What every estimator of the package accepts for a network's place, precision and cuts.
NETWORK_CONSTRAINTS = {
    "layers": [None, str, "array-like"],
    "input_shape": [None, "array-like"],
    "device": [str],
    "dtype": [StrOptions(set(DTYPES))],
    "batch_size": [StrOptions({"auto"}), Interval(Integral, 1, None, closed="left")],
}


class TorchFeatureExtractor(ClassNamePrefixFeaturesOutMixin, TransformerMixin, SharesNetwork):
    """Layers of a fitted network as a transformer.

    ``transform`` runs the network as far as the last of the layers, in eval mode and without
    gradients, and gives their outputs flattened and side by side. The network is never changed,
    and :meth:`fit` learns nothing but the number of features.

    Parameters
    ----------
    module : torch.nn.Module, fitted skorch net or FrozenModule, default=None
        The network. None passes X through.
    layers : str or sequence of str, default=None
        Names of layers, as in ``module.named_modules()``. ``"input"`` and ``"output"`` stand for
        the network's own, and None for its output.
    input_shape : tuple of int, default=None
        Shape of one input, such as ``(1, 28, 28)``, when X has two dimensions. None takes X's own
        shape.
    device : str, default="auto"
        ``"cpu"``, ``"cuda"``, ``"cuda:<index>"`` or ``"mps"``. ``"auto"`` is CUDA where there is a
        GPU, else the CPU.
    dtype : {"float32", "float64"}, default="float32"
        Precision of inputs, parameters and features.
    batch_size : int or "auto", default="auto"
        Rows that go through the network together.

    Attributes
    ----------
    n_features_in_ : int
        Number of values in one input.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of the inputs, when X has them.
    input_shape_ : tuple of int
        Shape of one input.
    layers_ : tuple of str
        The layers, in the order of their columns.
    device_ : torch.device
        Where the network runs.

    See Also
    --------
    FrozenModule : A network as a parameter that hashes by its content.

    Notes
    -----
    The estimators of this package take the extractor, or the network itself, as their
    ``feature_extractor``. A torch tensor handed to ``transform`` gives a tensor on the device.

    Examples
    --------
    >>> import numpy as np
    >>> from torch import nn
    >>> from sklearn_rails import TorchFeatureExtractor
    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> X = np.ones((5, 4), dtype=np.float32)
    >>> TorchFeatureExtractor(net, layers=["0", "2"]).fit_transform(X).shape
    (5, 5)
    """

    _parameter_constraints = {"module": "no_validation", **NETWORK_CONSTRAINTS}

    def __init__(
        self,
        module=None,
        *,
        layers=None,
        input_shape=None,
        device="auto",
        dtype="float32",
        batch_size="auto",
    ):
        self.module = module
        self.layers = layers
        self.input_shape = input_shape
        self.device = device
        self.dtype = dtype
        self.batch_size = batch_size

    @all_or_nothing
    @fit_context(prefer_skip_nested_validation=True)
    def fit(self, X, y=None):
        """Check the network and its layers against the shape of X.

        Parameters
        ----------
        X : array-like of shape (n, n_features) or (n, *input_shape)
            Inputs of the network.
        y : None
            Not used, present by convention.

        Returns
        -------
        TorchFeatureExtractor
            The estimator itself.

        Raises
        ------
        ValueError
            If a parameter is invalid, a layer is unknown, or X does not fit the network.
        """
        X, _ = validate_fit_rows(self, X, input_shape=self.input_shape)
        features = feature_map(self, self.module)
        self._n_features_out = sum(f.shape[1] for f in features.probe(X).values())
        self.layers_ = features.layers
        self.device_ = features.device
        self._features = features
        return self

    def transform(self, X):
        """Give the layers' features.

        Parameters
        ----------
        X : array-like of shape (n, n_features) or (n, *input_shape), or torch.Tensor
            Inputs of the network.

        Returns
        -------
        ndarray of shape (n, n_features_out), or torch.Tensor if X is one
            The features, in the dtype of the estimator.

        Raises
        ------
        ValueError
            If X does not fit the network.
        """
        if not hasattr(self, "_features"):
            return type(self)(**self.get_params(deep=False)).fit(X).transform(X)
        rows = validate_rows(self, X)
        features = torch.cat(list(self._features(rows).values()), dim=1)
        return features if isinstance(X, torch.Tensor) else features.cpu().numpy()

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        tags.transformer_tags.preserves_dtype = []  # `dtype` decides
        return tags


def feature_map(estimator, network, start_layer=None):
    """Build the map that an estimator's parameters describe.

    Parameters
    ----------
    estimator : estimator
        With ``layers``, ``device``, ``dtype``, ``batch_size`` and ``input_shape_``.
    network : None, torch.nn.Module, fitted skorch net, FrozenModule or TorchFeatureExtractor
        What it was given. An extractor's own layers, device and batch size stand in where the
        estimator leaves its own open.
    start_layer : str, default=None
        The layer that populations live in; None for the input.

    Returns
    -------
    FeatureMap

    Raises
    ------
    TypeError, ValueError
        If the network, a layer or the device cannot be used.
    """
    parameter = "module" if isinstance(estimator, TorchFeatureExtractor) else "feature_extractor"
    if isinstance(network, TorchFeatureExtractor):
        network = network.module
    return FeatureMap(
        None if network is None else as_module(network, parameter),
        open_parameter(estimator, "layers"),
        input_shape=estimator.input_shape_,
        device=open_parameter(estimator, "device"),
        dtype=estimator.dtype,
        batch_size=open_parameter(estimator, "batch_size"),
        start_layer=start_layer,
    )


def open_parameter(estimator, name):
    """Give an estimator's parameter, or its extractor's where it is left open.

    Parameters
    ----------
    estimator : estimator
    name : {"layers", "input_shape", "device", "batch_size"}

    Returns
    -------
    object
    """
    value = getattr(estimator, name)
    extractor = getattr(estimator, "feature_extractor", None)
    left_open = value is None or (isinstance(value, str) and value == "auto")
    if left_open and isinstance(extractor, TorchFeatureExtractor):
        return getattr(extractor, name)
    return value


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
