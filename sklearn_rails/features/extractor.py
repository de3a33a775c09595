"""Named layers of a fitted network as features."""

from numbers import Integral
from typing import Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin

from .._compat import Interval, StrOptions, fit_context
from .._validation import as_fitted, restore_on_error, validate_fit_rows, validate_rows
from .device import DTYPES
from .frozen import SharesNetwork, as_module
from .mapping import FeatureMap

# Sizes of tensors beyond this overflow inside of torch, before memory runs out.
LARGEST_SIZE = 2**31 - 1

# What every estimator of the package accepts for a network's place, precision and cuts.
NETWORK_CONSTRAINTS = {
    "layers": [None, str, "array-like"],
    "input_shape": [None, "array-like"],
    "device": [str, torch.device],
    "dtype": [StrOptions(set(DTYPES))],
    "batch_size": [StrOptions({"auto"}), Interval(Integral, 1, LARGEST_SIZE, closed="both")],
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

    @restore_on_error
    @fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: ArrayLike | torch.Tensor, y: None = None) -> Self:
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
        prepare_fit(self, X, network=self.module)
        self._n_features_out = self._features.n_features_out
        return self

    def transform(self, X: ArrayLike | torch.Tensor) -> np.ndarray | torch.Tensor:
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
        fitted = as_fitted(self)
        rows = validate_rows(fitted, X)
        features = torch.cat(list(fitted._features(rows).values()), dim=1)
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
        parameter=parameter,
    )


def prepare_fit(estimator, X, y=None, *, network, start_layer=None, with_output=False):
    """Check the data and the network of a fit, and make the map from one to the other.

    Sets ``_features``, ``layers_`` and what :func:`validate_fit_rows` sets.

    Parameters
    ----------
    estimator : estimator
    X, y
        As ``fit`` takes them.
    network, start_layer
        As :func:`feature_map` takes them.
    with_output : bool, default=False
        Whether the network's output will be needed as well as the layers.

    Returns
    -------
    X : ndarray or torch.Tensor of shape (n, n_features)
    y : ndarray of shape (n,), or None

    Raises
    ------
    TypeError, ValueError
        If the data, a parameter or the network cannot be used.
    """
    X, y = validate_fit_rows(
        estimator,
        X,
        y,
        input_shape=open_parameter(estimator, "input_shape"),
        keep_integers=network is not None,
    )
    features = feature_map(estimator, network, start_layer)
    features.probe(X, with_output=with_output)
    estimator._features = features
    estimator.layers_ = features.layers
    return features.cast(X), y


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
