"""A network as a parameter: shared checks, and fits that fail without a trace."""

import functools
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, MutableMapping
from numbers import Integral
from typing import Any, ParamSpec, Self, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import nn

from ._compat import Interval, StrOptions, VisualBlock
from ._validation import (
    check_label_kind,
    find_user_level,
    flatten,
    naming,
    plain_scalar,
    shape_hint,
    validate_fit_rows,
    validate_flat,
    validate_labels,
    validate_weights,
)
from ._version import __version__
from .features.device import DTYPES, explain_out_of_memory
from .features.frozen import as_module, freeze, is_network
from .features.layer_choice import ScoreLayers, choose_layer
from .features.mapping import FeatureMap
from .neighbors.index import LARGEST_SIZE

P = ParamSpec("P")
T = TypeVar("T")

# What every estimator of the package accepts for a network's place, precision and cuts.
NETWORK_CONSTRAINTS = {
    "layers": "no_validation",  # by TruncatedNetwork.resolve_layers
    "input_shape": [None, "array-like"],
    "device": [str, torch.device],
    "dtype": [StrOptions(set(DTYPES))],
    "batch_size": [StrOptions({"auto"}), Interval(Integral, 1, LARGEST_SIZE, closed="both")],
}

# Parameters that decide how predictions are computed, and not what they are. These alone act at
# once when they are set after fit.
EXECUTION_PARAMETERS = ("n_jobs", "verbose")

# Parameters that only fit reads.
FIT_PARAMETERS = (
    "algorithm",
    "calibration",
    "feature_extractor",
    "method",
    "module",
    "random_state",
    "threat_scorer",
    "train_network",
)

# Methods that change one estimator take turns: of two threads that remember, neither's is lost.
_TURNS: MutableMapping[Any, Any] = weakref.WeakKeyDictionary()

# What a network that has changed since fit does to estimators that compare with training samples.
NEIGHBORS_ARE_STALE = "the features of the training samples are those of the network as it was."


class NetworkEstimator(BaseEstimator):
    """Clone, pickle and print an estimator without copying or printing a bare network.

    Holds little else: what estimators have in common beyond this stands in functions.
    """

    # Name of the parameter that holds the network.
    network_parameter = "feature_extractor"

    _features: FeatureMap

    @property
    def device_(self) -> torch.device:
        """Where the computation runs; an estimator loaded elsewhere may run elsewhere."""
        return self._features.device

    @property
    def dtype_(self) -> str:
        """In which type the network computes; ``dtype``, or what ``"auto"`` has chosen."""
        return self._features.network_dtype

    @property
    def network_(self) -> nn.Module | None:
        """The network that is used."""
        return self._features.module

    @property
    def feature_map_(self) -> FeatureMap:
        """The map from inputs to the layers' features."""
        return self._features

    def _as_fitted(self) -> Self:
        return as_fitted(self, consequence=NEIGHBORS_ARE_STALE)

    def _validate(self, X: Any) -> tuple[Self, Any]:
        """Return the estimator as it was fitted, and checked samples."""
        fitted = self._as_fitted()
        return fitted, validate_rows(fitted, X)

    def __sklearn_clone__(self) -> Self:
        networks = self._bare_networks()
        twin = self._with(dict.fromkeys(networks))
        return super(NetworkEstimator, twin).__sklearn_clone__()._with(networks)

    def _bare_networks(self) -> dict[str, Any]:
        """Return the parameters that are fitted networks, not nets that ``fit`` trains."""
        params = self.get_params(deep=False)
        if params.get("train_network"):
            params.pop(self.network_parameter)
        return {name: value for name, value in params.items() if is_network(value)}

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        if state is vars(self):
            state = dict(state)
        bare = list(self._bare_networks())
        # A skorch net comes back frozen: its optimizer and callbacks are not needed to predict.
        state["_bare_networks"] = [k for k in bare if isinstance(state[k], nn.Module)]
        state["_sklearn_rails_version"] = __version__
        return {**state, **{k: freeze(state[k]) for k in bare}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        version = state.pop("_sklearn_rails_version", "of an unknown version")
        if version != __version__:
            warnings.warn(
                f"This {type(self).__name__} was pickled by sklearn_rails {version} and is loaded "
                f"by {__version__}, which may compute something else or fail: fit it again.",
                stacklevel=2,
            )
        bare = state.pop("_bare_networks", ())
        super().__setstate__({**state, **{k: state[k].module for k in bare}})

    def __repr__(self, N_CHAR_MAX: int = 700) -> str:
        return super(NetworkEstimator, self._shown()).__repr__(N_CHAR_MAX)

    def _get_params_html(self, *args: Any, **kwargs: Any) -> Any:
        return super(NetworkEstimator, self._shown())._get_params_html(*args, **kwargs)

    def _sk_visual_block_(self) -> VisualBlock:
        """Show the network as one leaf, beside the estimators among the parameters."""
        params = self.get_params(deep=False)
        network = params.pop(self.network_parameter)
        network = network.module if _is_extractor(network) else network
        if params.get("train_network"):
            network = getattr(self, "network_", None)  # none before fit
        parts: dict[str, Any] = {}
        if network is not None:
            parts[self.network_parameter] = _Leaf(network, self._caption())
        for name, value in params.items():
            if isinstance(value, BaseEstimator):
                parts[f"{name}: {type(value).__name__}"] = value
        if not parts:
            name = type(self).__name__
            return VisualBlock("single", self, names=name, name_details=str(self))
        return VisualBlock(
            "parallel",
            list(parts.values()),
            names=list(parts),
            name_details=[str(part) for part in parts.values()],
        )

    def _caption(self) -> str:
        is_fitted = hasattr(self, "layers_")
        layers = self.layers_ if is_fitted else resolve_from_extractor(self, "layers")
        layers = "output" if layers is None else layers
        if isinstance(layers, Mapping):
            layers = [f"{name} of {method}" for method, name in layers.items()]
        names = layers if isinstance(layers, str) else ", ".join(map(str, layers))
        is_chosen = is_fitted and getattr(self, "layer_scores_", None) is not None
        return f"layers: {names}" + (" (chosen in fit)" if is_chosen else "")

    def _shown(self) -> Self:
        """Return a shallow copy that prints networks, its own and nested ones, by their class."""
        params = self.get_params(deep=False)
        nested = {k: v._shown() for k, v in params.items() if isinstance(v, NetworkEstimator)}
        return self._with({k: _Shown(v) for k, v in params.items() if is_network(v)} | nested)

    def _with(self, params: dict[str, Any]) -> Self:
        """Return a shallow copy with other values for some parameters."""
        copy = object.__new__(type(self))
        copy.__dict__.update(vars(self), **params)
        return copy


class NetworkClassifier(ClassifierMixin, NetworkEstimator):
    """A classifier whose score is checked as its other methods are."""

    classes_: NDArray[Any]

    def score(
        self,
        X: ArrayLike | torch.Tensor,
        y: ArrayLike | torch.Tensor,
        sample_weight: ArrayLike | torch.Tensor | None = None,
    ) -> float:
        """Return the accuracy of the predicted classes.

        Parameters
        ----------
        X : array-like of shape (n, n_features) or (n, *input_shape), or torch.Tensor
            Inputs.
        y : array-like of shape (n,)
            Their classes.
        sample_weight : array-like of shape (n,), default=None
            Weights of the samples, 0 or more.

        Returns
        -------
        float
            Between 0 and 1.
        """
        predicted = self.predict(X)
        labels = validate_labels(y, len(predicted))
        check_label_kind(labels, self.classes_)
        weights = None
        if sample_weight is not None:
            weights = validate_weights(sample_weight, len(predicted))
        return float(np.average(predicted == labels, weights=weights))


class _Leaf:
    """A network in the HTML representation of an estimator."""

    def __init__(self, network: Any, caption: str) -> None:
        self._module = as_module(network)
        self._caption = caption

    def __str__(self) -> str:
        # Not its modules, which may be hundreds.
        n_parameters = sum(p.numel() for p in self._module.parameters())
        return f"{type(self._module).__name__}, {n_parameters:,} parameters"

    def _sk_visual_block_(self) -> VisualBlock:
        return VisualBlock(
            "single",
            self,
            names=type(self._module).__name__,
            name_details=str(self),
            name_caption=self._caption,
        )


class _Shown:
    """Print a network by its class alone."""

    def __init__(self, network: object) -> None:
        self.network = network

    def __repr__(self) -> str:
        return f"<{type(self.network).__name__}>"


def restore_on_error(method: Callable[P, T]) -> Callable[P, T]:
    """Restore the estimator's attributes and random state if the decorated method raises.

    The method works on a shallow copy, whose new attributes the estimator takes over when it is
    done, all at once, so that threads which predict meanwhile use the old state or the new one;
    until then the estimator is its ``_original``. ``fit`` keeps the parameters that it ran with for
    :func:`as_fitted`.

    Parameters
    ----------
    method : callable
        A method that returns the estimator.

    Returns
    -------
    callable
    """

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _TURNS.setdefault(self, threading.RLock()):
            return run(self, *args, **kwargs)

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        names = self.get_params(deep=False)
        params = {name: plain_scalar(value) for name, value in names.items()}
        if method.__name__ != "fit":
            params |= getattr(self, "_fitted_params", {})
        work = self._with(params)
        work._original = self
        given = params.get("random_state")
        # Only these are drawn from: a seed makes a generator of its own.
        draws = given is None or isinstance(given, np.random.RandomState)
        rng = check_random_state(given) if draws else None
        state = None if rng is None else rng.get_state(legacy=False)
        try:
            with explain_out_of_memory(fit_advice(self)):
                method(work, *args, **kwargs)
            if method.__name__ == "fit":
                used = set(names) - set(FIT_PARAMETERS) - set(EXECUTION_PARAMETERS)
                work._fitted_params = {name: params[name] for name in used}
            vars(work).pop("_original", None)
            learned = {name: value for name, value in vars(work).items() if name not in names}
            kept = {name: value for name, value in vars(self).items() if name in names}
            # One assignment, which no thread and no exception finds half done.
            self.__dict__ = kept | learned
        except BaseException:
            if rng is not None:
                rng.set_state(state)
            raise
        return self

    return wrapped  # type: ignore[return-value]


def fit_advice(estimator: Any) -> str:
    """Return what the error says if an estimator's training samples do not fit into memory."""
    advice = f"Memory is too small to fit this {type(estimator).__name__}. Give fewer samples"
    if hasattr(estimator, "algorithm"):
        advice += (
            ", or keep their features in algorithm=ExactNeighbors(storage='float16') or in a folder"
        )
    return f"{advice}."


def as_fitted(estimator: Any, *, consequence: str | None = None) -> Any:
    """Return an estimator as its last fit made it, whatever has been set since.

    Parameters
    ----------
    estimator : estimator
    consequence : str, default=None
        What it means for the estimator if its network has changed since fit, for a warning.

    Returns
    -------
    estimator
        A view that shares the fitted attributes, and keeps them if the estimator is fitted again.

    Raises
    ------
    sklearn.exceptions.NotFittedError
        If the estimator is not fitted.
    """
    fitted = estimator._with({})  # read once: another thread may fit the estimator meanwhile
    check_is_fitted(fitted)
    with explain_out_of_memory("Memory is too small to check whether the network has changed."):
        fitted._features.follow_network(consequence=consequence)
    execution = {
        name: plain_scalar(getattr(fitted, name))
        for name in EXECUTION_PARAMETERS
        if hasattr(fitted, name)
    }
    vars(fitted).update(fitted._fitted_params | execution)
    return fitted


def validate_rows(estimator: Any, X: Any) -> Any:
    """Check samples for a fitted estimator.

    Parameters
    ----------
    estimator : fitted estimator
    X : array-like of shape (n, n_features) or (n, *input_shape_), or torch.Tensor

    Returns
    -------
    ndarray, or torch.Tensor if it came on a GPU, of shape (n, n_features)

    Raises
    ------
    TypeError, ValueError
        If X has another shape than the training samples, or holds NaN or infinity.
    """
    advice = "Memory is too small for X: pass fewer samples at a time."
    with naming("X"), explain_out_of_memory(advice):
        return _validate_rows(estimator, X)


def _validate_rows(estimator: Any, X: Any) -> Any:
    flat, shape = flatten(X)
    expected = estimator.input_shape_
    hint = shape_hint(flat, shape, expected)
    if len(shape) > 1 and shape != expected:
        raise ValueError(
            f"X has samples of shape {shape}, but {type(estimator).__name__} was fitted on samples "
            f"of shape {expected}.{hint}"
        )
    features = getattr(estimator, "_features", None)
    takes_integers = features is not None and features.integer_input
    try:
        rows: Any
        rows, _ = validate_flat(estimator, flat, None, reset=False, keep_integers=takes_integers)
    except ValueError as error:
        raise (ValueError(f"{error}{hint}") if hint else error) from None
    if takes_integers and not (rows == rows.round()).all():
        raise ValueError(
            f"X must hold integers, as the network of {type(estimator).__name__} takes them and "
            "had them in fit; got other numbers."
        )
    if features is not None:
        rows = features.cast(rows)
        features.check_range(rows)
    return rows


def feature_map(
    estimator: Any, network: Any, layers: Any, start_layer: str | None = None
) -> FeatureMap:
    """Build the map that an estimator's parameters describe.

    Parameters
    ----------
    estimator : estimator
        With ``device``, ``dtype``, ``batch_size`` and ``input_shape_``.
    network : None, torch.nn.Module, fitted skorch net, FrozenModule or TorchFeatureExtractor
        What it was given. An extractor's own device and batch size stand in where the estimator
        leaves its own open.
    layers : None, str or sequence of str
        As :class:`~.features.mapping.FeatureMap` takes them.
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
    parameter = estimator.network_parameter
    if _is_extractor(network):
        network = network.module
    return FeatureMap(
        None if network is None else as_module(network, parameter),
        layers,
        input_shape=estimator.input_shape_,
        device=resolve_from_extractor(estimator, "device"),
        dtype=estimator.dtype,
        batch_size=resolve_from_extractor(estimator, "batch_size"),
        start_layer=start_layer,
        parameter=parameter,
    )


def prepare_fit(
    estimator: Any,
    X: Any,
    y: Any = None,
    *,
    network: Any,
    start_layer: str | None = None,
    with_output: bool = False,
    score: ScoreLayers | None = None,
    layers: Any = None,
) -> tuple[Any, Any]:
    """Check the data and the network of a fit, and make the map from one to the other.

    Sets ``_features``, ``layers_`` and what :func:`validate_fit_rows` sets, and with ``score`` also
    ``layer_scores_``.

    Parameters
    ----------
    estimator : estimator
    X, y
        As ``fit`` takes them.
    network, start_layer
        As :func:`feature_map` takes them.
    with_output : bool, default=False
        Whether the network's output will be needed as well as the layers.
    score : callable, default=None
        Scores layers where ``layers`` is ``"auto"``, as :func:`~.layer_choice.score_layers` does.
        None for an estimator that has no such choice.
    layers : str or sequence of str, default=None
        None for the estimator's own.

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
        input_shape=resolve_from_extractor(estimator, "input_shape"),
        keep_integers=network is not None,
    )
    if getattr(estimator, "train_network", False):
        network = train_clone(estimator, X, y)
    if layers is None:
        layers = resolve_from_extractor(estimator, "layers")
    is_auto = score is not None and isinstance(layers, str) and layers == "auto"
    features = feature_map(estimator, network, None if is_auto else layers, start_layer)
    features.probe(X, with_output=with_output or is_auto)
    X = features.cast(X)
    if score is not None:
        estimator.layer_scores_ = None
        if features.has_network and is_auto:
            chosen, estimator.layer_scores_ = choose_layer(features, X, y, score)
            features.use_layers([chosen], X, with_output=with_output)
        elif features.has_network and layers is None:
            warnings.warn(
                "layers=None compares inputs by the network's output, which an attack on the "
                "network changes most. Name hidden layers, or use layers='auto'.",
                stacklevel=find_user_level(),
            )
    estimator._features = features
    estimator.layers_ = features.layers
    return X, y


def train_clone(estimator: Any, X: Any, y: Any) -> nn.Module:
    """Train a clone of an estimator's skorch net.

    Parameters
    ----------
    estimator : estimator
        With ``feature_extractor`` and ``input_shape_``.
    X : ndarray or torch.Tensor of shape (n, n_features)
    y : ndarray of shape (n,)

    Returns
    -------
    torch.nn.Module
        The net's ``module_``.

    Raises
    ------
    TypeError
        If ``feature_extractor`` is not a skorch net.
    """
    net = estimator.feature_extractor
    if not is_network(net) or isinstance(net, nn.Module):
        raise TypeError(
            "train_network=True trains a clone of feature_extractor in fit, which must be a skorch "
            f"net, such as NeuralNetClassifier(MyModule), got {type(net).__name__}."
        )
    rows = X.cpu().numpy() if isinstance(X, torch.Tensor) else X
    rows = rows if rows.dtype.kind in "iu" else rows.astype(np.float32)
    _, labels = np.unique(y, return_inverse=True)
    trained: Any = clone(net)
    trained.fit(rows.reshape(len(rows), *estimator.input_shape_), labels.astype(np.int64))
    module: nn.Module = trained.module_
    return module


def resolve_from_extractor(estimator: Any, name: str) -> Any:
    """Return an estimator's parameter, or its extractor's where it is left open.

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
    is_open = _is_open(value) and _is_extractor(extractor)
    own = getattr(extractor, name) if is_open else None
    return value if own is None else own


def fill_open_parameters(nested: Any, outer: Any) -> None:
    """Set what a nested estimator leaves open to the parameters of the one that holds it.

    Nothing is set in an estimator that has another network of its own.

    Parameters
    ----------
    nested : estimator
        With ``feature_extractor``, ``layers``, ``input_shape``, ``device`` and ``batch_size``.
    outer : estimator
        With the same parameters, and ``layers_``, which may be chosen in its ``fit``.
    """
    if nested.feature_extractor is not None and _module_of(nested) is not outer.network_:
        return
    if _is_open(resolve_from_extractor(nested, "layers")):
        nested.layers = list(outer.layers_)
    for name in ("input_shape", "device", "batch_size"):
        if _is_open(resolve_from_extractor(nested, name)):
            setattr(nested, name, resolve_from_extractor(outer, name))
    if nested.feature_extractor is None:
        trained = getattr(outer, "train_network", False)
        nested.feature_extractor = outer.network_ if trained else outer.feature_extractor


def _module_of(estimator: Any) -> nn.Module | None:
    network = estimator.feature_extractor
    network = network.module if _is_extractor(network) else network
    return None if network is None else as_module(network, estimator.network_parameter)


def _is_open(value: object) -> bool:
    return value is None or (isinstance(value, str) and value == "auto")


def _is_extractor(value: object) -> bool:
    return isinstance(value, NetworkEstimator) and value.network_parameter == "module"
