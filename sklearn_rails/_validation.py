"""Checks of samples and labels that the estimators share."""

import math
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from numbers import Integral, Rational
from types import FrameType
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import issparse
from sklearn.utils import check_array, get_tags
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import assert_all_finite, column_or_1d, validate_data
from torch.utils.data import DataLoader, Dataset, RandomSampler

Samples = NDArray[Any] | torch.Tensor

DTYPE_OF: dict[str, type[np.floating[Any]]] = {
    "float32": np.float32,
    "float64": np.float64,
    "bfloat16": np.float32,
    "auto": np.float32,
}

# Kept as they are for a network that may take them: token ids must not pass through float32.
INTEGER_DTYPES = [np.dtype(code) for code in "bhilqBHILQ"]

WIDE_FLOATS = (torch.float32, torch.float64)
NUMPY_FLOATS = (torch.float16, *WIDE_FLOATS)

# Samples of a data set that are read together.
READ_SAMPLES = 256


def find_user_level() -> int:
    """Return the stack level, counted from the caller, of the first line of the user's code.

    That is a line outside of this package, scikit-learn, joblib and their context managers.

    Returns
    -------
    int
        For ``stacklevel`` of :func:`warnings.warn`.
    """
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and _is_of_a_library(frame):
        level, frame = level + 1, frame.f_back
    return level


def _is_of_a_library(frame: FrameType) -> bool:
    name: str = frame.f_globals.get("__name__", "")
    # contextlib: of functions that a context manager decorates, as naming does.
    return name.partition(".")[0] in ("sklearn_rails", "sklearn", "joblib", "contextlib")


def plain_scalar(value: Any) -> Any:
    """Convert a numpy scalar or a fraction to a Python number, whose arithmetic does not overflow.

    Parameters
    ----------
    value : object

    Returns
    -------
    object
        Any other value itself.
    """
    if isinstance(value, Rational) and not isinstance(value, Integral):
        return float(value)  # which scikit-learn's constraints take
    return value.item() if isinstance(value, np.generic) else value


@contextmanager
def naming(parameter: str) -> Iterator[None]:
    """Name a parameter in the errors that reading its value raises.

    Parameters
    ----------
    parameter : str

    Raises
    ------
    TypeError, ValueError
        In place of one whose message does not name the parameter.
    """
    try:
        yield
    except (TypeError, ValueError, OverflowError) as error:
        if re.search(rf"(?<!\w){re.escape(parameter)}(?!\w)", str(error)):
            raise
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{parameter}: {error}") from error


def validate_fit_rows(
    estimator: Any,
    X: Any,
    y: Any = None,
    *,
    input_shape: Iterable[int] | None,
    keep_integers: bool = False,
) -> tuple[Samples, NDArray[Any] | None]:
    """Check training samples and store their shape on the estimator.

    Sets ``n_features_in_``, ``feature_names_in_`` where there are names, and ``input_shape_``.

    Parameters
    ----------
    estimator : estimator with the parameter ``dtype``
    X : array-like of shape (n, n_features) or (n, *input_shape), or torch.Tensor
    y : array-like of shape (n,), default=None
        Class labels.
    input_shape : tuple of int or None
        The parameter; None takes the shape of X.
    keep_integers : bool, default=False
        Keep integers as they are, for a network that may take them.

    Returns
    -------
    X : ndarray, or torch.Tensor if it came on a GPU, of shape (n, n_features)
    y : ndarray of shape (n,), or None

    Raises
    ------
    TypeError, ValueError
        If X, y or ``input_shape`` does not fit.
    """
    expected = check_shape(input_shape)
    flat, shape = flatten(X)
    if getattr(flat, "ndim", 2) == 1:
        raise ValueError(
            f"X must have samples along its first axis, got shape {tuple(flat.shape)}. A single "
            "sample is X[None]; labels come second, as in fit(X, y)."
        )
    if expected is not None and len(shape) > 1 and shape != expected:
        raise ValueError(
            f"input_shape={expected} was given, but the samples of X have shape {shape}."
            + (
                f" It is the shape of one sample, without their number: pass input_shape={shape}."
                if len(expected) > 3 and expected[1:] == shape
                else shape_hint(flat, shape, expected)
            )
        )
    flat, y = validate_flat(estimator, flat, y, reset=True, keep_integers=keep_integers)
    if expected is not None and math.prod(expected) != flat.shape[1]:
        raise ValueError(
            f"input_shape={expected} holds {math.prod(expected)} values a sample, but X has "
            f"{flat.shape[1]} features."
        )
    estimator.input_shape_ = expected or (shape if len(shape) > 1 else (flat.shape[1],))
    return flat, y


def validate_labels(y: Any, n_samples: int | None = None, name: str = "y") -> NDArray[Any]:
    """Check class labels and convert them to an array.

    Parameters
    ----------
    y : array-like or torch.Tensor of shape (n,)
    n_samples : int, default=None
        How many labels there must be.
    name : str, default="y"
        The parameter, for errors.

    Returns
    -------
    ndarray of shape (n,)

    Raises
    ------
    TypeError, ValueError
        If they are not one-dimensional, of another number, missing, or cannot be classes.
    """
    with naming(name):
        y = plain_labels(y)
        shape = tuple(getattr(y, "shape", ()))
        if len(shape) == 2 and shape[1] > 1:
            raise ValueError(
                f"{name} should be a 1d array, got an array of shape {shape} instead. Of one-hot "
                f"labels, pass {name}.argmax(axis=1)."
            )
        labels: NDArray[Any] = column_or_1d(y, warn=True)
        if labels.dtype.kind == "c":
            raise ValueError(f"Complex data not supported: {name} is of {labels.dtype}.")
        if labels.dtype.kind == "V":
            raise ValueError(f"{name} must hold strings or numbers, got {labels.dtype}.")
        if labels.dtype.kind == "T":  # which scikit-learn does not know
            labels = labels.astype(object)
        assert_all_finite(labels, input_name=name)
        check_classification_targets(labels)
        np.unique(labels)
    if n_samples is not None and len(labels) != n_samples:
        raise ValueError(
            f"{name} must have a label for each sample of X: found {len(labels)} labels, but "
            f"{n_samples} samples, which are inconsistent numbers of samples."
        )
    return labels


def validate_weights(sample_weight: Any, n_samples: int) -> NDArray[np.float64]:
    """Check the weights of samples.

    Parameters
    ----------
    sample_weight : array-like or torch.Tensor of shape (n,)
    n_samples : int
        How many there must be.

    Returns
    -------
    ndarray of shape (n,), float64

    Raises
    ------
    ValueError
        If they are not real numbers, finite and 0 or more, one above 0, of that number.
    """
    array = as_array(sample_weight, "sample_weight")
    if array.dtype.kind not in "biufO" or array.ndim - (array.shape[-1:] == (1,)) != 1:
        raise ValueError(
            "sample_weight must be a one-dimensional array of numbers, got shape "
            f"{array.shape} of {array.dtype}."
        )
    with naming("sample_weight"):
        weights: NDArray[np.float64] = array.astype(np.float64).ravel()
    if len(weights) != n_samples:
        raise ValueError(
            f"sample_weight has {len(weights)} weights for {n_samples} samples: inconsistent "
            "numbers of samples."
        )
    if not (weights >= 0).all() or not 0 < weights.sum() < np.inf:
        raise ValueError(
            "sample_weight must be finite and 0 or more, with a weight above 0 and a finite sum."
        )
    return weights


def check_same_length(**arrays: Any) -> None:
    """Check that arrays have as many entries as one another.

    Parameters
    ----------
    **arrays : ndarray or torch.Tensor
        By their parameters' names.

    Raises
    ------
    ValueError
        If their numbers differ.
    """
    sizes = [len(array) for array in arrays.values()]
    if len(set(sizes)) > 1:
        raise ValueError(
            f"{', '.join(arrays)} must be of the same length, got inconsistent numbers of samples: "
            f"{sizes}."
        )


def check_label_kind(y: NDArray[Any], classes: NDArray[Any]) -> None:
    """Check that labels are strings if the classes are, and nothing else if they are not.

    Parameters
    ----------
    y : ndarray of shape (n,)
    classes : ndarray of shape (n_classes,)
        Of fit.

    Raises
    ------
    ValueError
        If they are of another kind.
    """
    if _hold_strings(y) != _hold_strings(classes):
        raise ValueError(f"y has labels of {y.dtype}, but those of fit are of {classes.dtype}.")


def _hold_strings(labels: NDArray[Any]) -> bool:
    return all(isinstance(label, str) for label in labels.tolist())


def check_known_labels(y: ArrayLike, classes: ArrayLike, source: str) -> None:
    """Check that all labels are among some classes.

    Parameters
    ----------
    y : ndarray of shape (n,)
    classes : array-like of shape (n_classes,)
    source : str
        What the classes are, for the error.

    Raises
    ------
    ValueError
        If there are other labels.
    """
    unknown = sorted(set(np.unique(y).tolist()) - set(np.unique(classes).tolist()), key=str)
    if unknown:
        raise ValueError(f"y has labels that are not among {source}: {unknown}.")


def check_shape(input_shape: Iterable[int] | None) -> tuple[int, ...] | None:
    """Check the ``input_shape`` parameter.

    Parameters
    ----------
    input_shape : iterable of int, or None

    Returns
    -------
    tuple of int, or None

    Raises
    ------
    ValueError
        If it does not hold positive integers.
    """
    if input_shape is None:
        return None
    with naming("input_shape"):
        sizes = tuple(plain_scalar(size) for size in input_shape)
    are_sizes = [isinstance(s, Integral) and not isinstance(s, bool) and int(s) > 0 for s in sizes]
    if not sizes or not all(are_sizes) or isinstance(input_shape, set | frozenset):
        raise ValueError(
            f"input_shape={input_shape!r} must hold positive integers, such as (1, 28, 28)."
        )
    return tuple(int(size) for size in sizes)


def shape_hint(X: Any, shape: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """Return a hint on what may be wrong with samples of another shape, or "".

    Parameters
    ----------
    X : array-like
        The samples as :func:`flatten` returns them.
    shape, expected : tuple of int
        The shape of one sample, and what it should be.

    Returns
    -------
    str
    """
    given = (*X.shape[:1], *(shape or X.shape[1:])) if hasattr(X, "shape") else ()
    if given == (math.prod(expected),):
        return " That is a single sample: pass X[None]."
    if len(expected) < 2 or shape == expected:
        return ""
    if given == expected:
        return " That is the shape of a single sample: pass X[None]."
    if len(expected) == 3:
        if given[1:] == (*expected[1:], expected[0]):
            return " The channels stand last: pass X.transpose(0, 3, 1, 2)."
        if given == (*expected[1:], expected[0]):
            return (
                " That is a single image with the channels last: pass X.transpose(2, 0, 1)[None]."
            )
        if expected[0] == 1 and given[1:] == expected[1:]:
            return " The axis of the channels is missing: pass X[:, None]."
        if expected[0] == 1 and given == expected[1:]:
            return " That is a single image without channels: pass X[None, None]."
    return ""


def read_samples(X: Any, y: Any = None) -> tuple[Any, Any]:
    """Read a data set or a loader of torch into memory, and leave all else as it is.

    Parameters
    ----------
    X : torch.utils.data.Dataset or DataLoader, or any other object
        Of samples, or of pairs of a sample and its label.
    y : array-like, default=None
        Labels. None takes those of the pairs, if there are any.

    Returns
    -------
    X, y : object
        Samples and labels.

    Raises
    ------
    TypeError
        If X gives something else.
    ValueError
        If X is empty, or its samples are of several shapes.
    """
    if not isinstance(X, DataLoader | Dataset):
        return X, y
    name = type(X).__name__
    loader = X if isinstance(X, DataLoader) else DataLoader(X, batch_size=READ_SAMPLES)
    try:
        # torch draws a seed for the workers of a loader, even if it has none.
        with torch.random.fork_rng(devices=[]):
            batches = [batch if isinstance(batch, list | tuple) else [batch] for batch in loader]
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise ValueError(f"X is a {name} of samples that make no batch: {error}") from error
    if not batches:
        raise ValueError(f"X is a {name} without any sample.")
    samples, *others = (list(parts) for parts in zip(*batches, strict=True))
    if len(others) > 1 or not all(isinstance(part, torch.Tensor) for part in samples):
        raise TypeError(
            f"X is a {name}, which must give samples as tensors, or pairs of a sample and its "
            f"label; it gives {[type(part).__name__ for part in batches[0]]}."
        )
    if y is None and others:
        y = np.concatenate([np.asarray(part) for part in others[0]])
    return torch.cat(samples), y


def read_in_order(X: Any) -> Any:
    """Read samples as :func:`read_samples` does, in an order that is known.

    Parameters
    ----------
    X : torch.utils.data.Dataset or DataLoader, or any other object

    Returns
    -------
    object
        The samples, or any other object itself.

    Raises
    ------
    TypeError, ValueError
        As :func:`read_samples`, and if X is a loader that shuffles.
    """
    check_in_order(X)
    return read_samples(X)[0]


def check_in_order(X: Any) -> None:
    """Check that samples come in an order that is known.

    Parameters
    ----------
    X : torch.utils.data.Dataset or DataLoader, or any other object

    Raises
    ------
    ValueError
        If X is a loader that shuffles.
    """
    if isinstance(X, DataLoader) and isinstance(X.sampler, RandomSampler):
        raise ValueError(
            "X is a DataLoader that shuffles its samples, so that nobody could tell which answer "
            "is for which of them: use one with shuffle=False."
        )


@naming("X")
def flatten(X: Any) -> tuple[Any, tuple[int, ...]]:
    """Flatten the samples of n-dimensional arrays and tensors, and leave all else as it is.

    Parameters
    ----------
    X : array-like or torch.Tensor

    Returns
    -------
    X : array-like, or torch.Tensor if it is on a GPU
        Of shape (n, n_features) if it had more than two dimensions, else for scikit-learn to check.
    shape : tuple of int
        Shape of one sample before; () with less than three dimensions.

    Raises
    ------
    TypeError
        If X is an iterator, or a data set of something else than samples.
    ValueError
        If it is not an array of samples of one shape, or a loader that shuffles.
    """
    X = read_in_order(X)
    if isinstance(X, Iterator):
        raise TypeError(f"X must be an array or a tensor, got a {type(X).__name__}.")
    if isinstance(X, list | tuple) and any(isinstance(sample, torch.Tensor) for sample in X):
        try:
            X = torch.stack([torch.as_tensor(sample) for sample in X])
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"X is not an array of samples of one shape: {error}") from error
    if isinstance(X, torch.Tensor):
        X = _plain_tensor(X)
    elif isinstance(X, np.ma.MaskedArray) and np.ma.is_masked(X):
        raise ValueError("X has masked values; fill them, or drop their samples.")
    elif not isinstance(X, np.ndarray) and _may_be_nested(X):
        X = _nested_array(X)
    if not isinstance(X, np.ndarray | torch.Tensor) or X.ndim < 3:
        return X, ()
    shape = tuple(X.shape[1:])
    return X.reshape(len(X), math.prod(shape)), shape


@naming("X")
def check_samples(
    X: Any, input_shape: Iterable[int] | None
) -> tuple[NDArray[Any] | torch.Tensor, tuple[int, ...]]:
    """Check samples for a function that has no estimator.

    Parameters
    ----------
    X : array-like of shape (n, n_features) or (n, *input_shape), or torch.Tensor
    input_shape : tuple of int or None

    Returns
    -------
    X : ndarray, or torch.Tensor if it is on a GPU, of shape (n, n_features)
    shape : tuple of int
        Shape of each sample in X.

    Raises
    ------
    TypeError, ValueError
        If X is not finite, empty, or not an array of samples of that shape.
    """
    expected = check_shape(input_shape)
    rows, shape = flatten(X)
    if isinstance(rows, torch.Tensor):
        if rows.ndim != 2 or len(rows) == 0 or not rows.isfinite().all():
            raise ValueError("X must be a finite tensor with samples along its first axis.")
    else:
        rows = check_array(rows, input_name="X")
        # torch reads neither other byte orders nor longdouble.
        if rows.dtype not in INTEGER_DTYPES:
            rows = check_array(rows, input_name="X", dtype=[np.float32, np.float64])
    shape = shape or (rows.shape[1],)
    if expected is not None and shape not in (expected, (math.prod(expected),)):
        raise ValueError(
            f"input_shape={expected} was given, but the samples of X have shape {shape}."
            + shape_hint(rows, shape, expected)
        )
    return rows, shape


def _may_be_nested(X: Any) -> bool:
    """Check for lists and array-likes of three dimensions or more, but not for frames."""
    if isinstance(X, list | tuple):
        return True
    is_frame = hasattr(X, "__dataframe__") or hasattr(X, "iloc")
    return hasattr(X, "__array__") and not is_frame and not issparse(X)


def _nested_array(X: Any) -> NDArray[Any]:
    try:
        array = np.asarray(X)
    except ValueError as error:
        raise ValueError(f"X is not an array of samples of one shape: {error}") from error
    if array.dtype == object and array.ndim > 2:
        try:
            array = array.astype(np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"X must hold numbers: {error}") from error
    return array


def _plain_tensor(X: torch.Tensor) -> Samples:
    """Convert a tensor to an array, or one on a GPU to a plain tensor."""
    if X.is_nested or X.layout != torch.strided or X.is_quantized:
        raise ValueError(
            f"X must be a dense tensor, got one of layout {X.layout} and type {X.dtype}."
        )
    if X.is_meta:
        raise ValueError("X is a tensor on the meta device, which holds no values.")
    if X.is_complex():
        raise ValueError(f"Complex data not supported: X is a tensor of type {X.dtype}.")
    if X.device.type == "cpu":
        return as_array(X, "X")
    X = X.detach().resolve_neg()
    return X.float() if X.is_floating_point() and X.dtype not in WIDE_FLOATS else X


def as_array(values: Any, name: str) -> NDArray[Any]:
    """Convert values to an array; tensors may have a graph and be on any device.

    Parameters
    ----------
    values : array-like, torch.Tensor or list of torch.Tensor
    name : str
        The parameter, for errors.

    Returns
    -------
    ndarray

    Raises
    ------
    TypeError, ValueError
        If they are ragged, masked, or in a tensor that holds no values.
    """
    if np.ma.is_masked(values):
        raise ValueError(f"{name} must not have masked values.")
    if isinstance(values, list | tuple) and any(isinstance(v, torch.Tensor) for v in values):
        values = [as_array(value, name) for value in values]
    if isinstance(values, torch.Tensor):
        values = _to_numpy_dtype(values, name)
    try:
        return np.asarray(values)
    # RuntimeError: by tensors inside of lists, and by subclasses of tensors that hold no values.
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{name} must be an array: {error}") from error


def is_dense(values: object) -> bool:
    """Check for a tensor that holds a value for each element.

    Parameters
    ----------
    values : object

    Returns
    -------
    bool
    """
    return (
        isinstance(values, torch.Tensor)
        and not (values.is_nested or values.is_quantized or values.is_meta)
        and values.layout == torch.strided
    )


def _to_numpy_dtype(values: torch.Tensor, name: str) -> torch.Tensor:
    if not is_dense(values):
        raise ValueError(
            f"{name} must be a dense tensor that holds values, got one of layout {values.layout} "
            f"and type {values.dtype} on {values.device}."
        )
    values = values.detach().cpu().resolve_conj().resolve_neg()
    # numpy has no bfloat16, nor floats of 8 bits.
    is_other = values.is_floating_point() and values.dtype not in NUMPY_FLOATS
    return values.float() if is_other else values


def plain_labels(y: Any) -> Any:
    """Convert labels in a tensor, or integers in an array of objects, for scikit-learn.

    Parameters
    ----------
    y : array-like or torch.Tensor

    Returns
    -------
    array-like

    Raises
    ------
    ValueError
        If a tensor holds no values.
    """
    if np.ma.is_masked(y):
        raise ValueError("y must not have masked values.")
    if not isinstance(y, torch.Tensor):
        if str(getattr(y, "dtype", None)) == "object" and np.ndim(y) == 1:
            plain = np.asarray(list(y))
            return plain if plain.ndim == 1 and plain.dtype.kind in "biuf" else y
        return y
    return as_array(y, "y")


@naming("X")
def validate_flat(
    estimator: Any, X: Any, y: Any, *, reset: bool, keep_integers: bool
) -> tuple[Samples, NDArray[Any] | None]:
    """Check flat samples and labels, as scikit-learn does, tensors on their own device.

    Parameters
    ----------
    estimator : estimator with the parameter ``dtype``
    X : array-like of shape (n, n_features), or torch.Tensor
    y : array-like of shape (n,), or None
    reset : bool
        Whether to set ``n_features_in_`` and ``feature_names_in_``, or to check against them.
    keep_integers : bool
        Keep integers as they are, for a network that may take them.

    Returns
    -------
    X : ndarray or torch.Tensor of shape (n, n_features)
    y : ndarray of shape (n,), or None

    Raises
    ------
    ValueError
        If X or y does not fit.
    """
    if isinstance(X, torch.Tensor):
        _validate_tensor(estimator, X, reset=reset)
    else:
        float_type = DTYPE_OF[estimator.dtype]
        # Integers stay what they are, since float32 does not represent all of them.
        dtype = "numeric" if keep_integers else float_type
        if keep_integers:
            X = _plain_integers(X)
        if isinstance(X, str):
            raise TypeError(f"X must be an array or a tensor, got the string {X!r}.")
        X = validate_data(estimator, X, reset=reset, dtype=dtype)
        if keep_integers and reset and X.dtype not in INTEGER_DTYPES:
            X = check_array(X, dtype=float_type, input_name="X", estimator=estimator)
    if y is not None:
        y = validate_labels(y, len(X))
    elif reset and get_tags(estimator).target_tags.required:
        name = type(estimator).__name__
        raise ValueError(
            f"This {name} estimator requires y to be passed, but the target y is None."
        )
    return X, y


def _plain_integers(X: Any) -> Any:
    """Convert integers in arrays of objects and in nullable frames to int64."""
    if hasattr(X, "iloc"):
        dtypes = [getattr(dtype, "numpy_dtype", None) for dtype in X.dtypes]
        are_integers = all(dtype in INTEGER_DTYPES for dtype in dtypes)
        return X.astype(np.int64) if are_integers and not X.isna().any(axis=None) else X
    if not isinstance(X, np.ndarray) or X.dtype != np.dtype(object) or X.size == 0:
        return X
    return X.astype(np.int64) if all(isinstance(value, Integral) for value in X.flat) else X


def _validate_tensor(estimator: Any, X: torch.Tensor, *, reset: bool) -> None:
    """Do what ``validate_data`` does, on the tensor's own device."""
    name = type(estimator).__name__
    if X.ndim != 2:
        raise ValueError(f"X must have two dimensions or more, got a tensor with {X.ndim}.")
    if len(X) == 0:
        raise ValueError("X has 0 sample(s) while a minimum of 1 is required.")
    if not torch.isfinite(X).all():
        raise ValueError(f"Input X of {name} contains NaN or infinity.")
    if reset:
        estimator.n_features_in_ = X.shape[1]
        vars(estimator).pop("feature_names_in_", None)
    elif X.shape[1] != estimator.n_features_in_:
        raise ValueError(
            f"X has {X.shape[1]} features, but {name} is expecting {estimator.n_features_in_} "
            "features as input."
        )
