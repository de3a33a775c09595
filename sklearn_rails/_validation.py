"""Checks of samples and labels that the estimators share."""

import math
import sys
from collections.abc import Iterable, Iterator
from numbers import Integral
from types import FrameType
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import issparse
from sklearn.utils import check_array, get_tags
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    check_consistent_length,
    column_or_1d,
    validate_data,
)
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


# Samples of a data set that are read together.
READ_SAMPLES = 256


def find_user_level() -> int:
    """Return the stack level, counted from the caller, of the first line of the user's code.

    That is a line outside of this package, scikit-learn and joblib.

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
    return name.partition(".")[0] in ("sklearn_rails", "sklearn", "joblib")


def plain_scalar(value: Any) -> Any:
    """Convert a numpy scalar to a Python one, whose arithmetic does not overflow.

    Parameters
    ----------
    value : object

    Returns
    -------
    object
        Any other value itself.
    """
    return value.item() if isinstance(value, np.generic) else value


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


def validate_labels(y: Any) -> NDArray[Any]:
    """Check labels and convert them to an array.

    Parameters
    ----------
    y : array-like or torch.Tensor of shape (n,)

    Returns
    -------
    ndarray of shape (n,)

    Raises
    ------
    ValueError
        If they are not one-dimensional, or cannot be classes.
    """
    labels: NDArray[Any] = column_or_1d(plain_labels(y), warn=True)
    check_classification_targets(labels)
    return labels


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
        batches = [batch if isinstance(batch, list | tuple) else [batch] for batch in loader]
    except RuntimeError as error:
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
    if isinstance(X, DataLoader) and isinstance(X.sampler, RandomSampler):
        raise ValueError(
            "X is a DataLoader that shuffles its samples, so that nobody could tell which answer "
            "is for which of them: use one with shuffle=False."
        )
    return read_samples(X)[0]


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
        array = _nested_array(X)
        X = array if array.ndim > 2 else X
    if not isinstance(X, np.ndarray | torch.Tensor) or X.ndim < 3:
        return X, ()
    shape = tuple(X.shape[1:])
    return X.reshape(len(X), math.prod(shape)), shape


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
    X = X.detach().resolve_neg()
    if X.is_floating_point() and X.dtype not in (torch.float32, torch.float64):
        X = X.float()
    return X.numpy() if X.device.type == "cpu" else X


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
    if not isinstance(y, torch.Tensor):
        if str(getattr(y, "dtype", None)) == "object" and np.ndim(y) == 1:
            plain = np.asarray(list(y))
            return plain if plain.ndim == 1 and plain.dtype.kind in "biuf" else y
        return y
    if y.is_meta or y.is_nested or y.layout != torch.strided:
        raise ValueError("y must be a dense tensor that holds values, one label for each sample.")
    y = y.detach().cpu()
    return (y.float() if y.dtype == torch.bfloat16 else y).numpy()


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
    y = plain_labels(y)
    shape = tuple(getattr(y, "shape", ()))
    if len(shape) == 2 and shape[1] > 1:
        raise ValueError(
            f"y should be a 1d array, got an array of shape {shape} instead. Of one-hot labels, "
            "pass y.argmax(axis=1)."
        )
    y_required = reset and get_tags(estimator).target_tags.required
    if isinstance(X, torch.Tensor):
        _validate_tensor(estimator, X, reset=reset)
        if y is not None or y_required:
            y = column_or_1d(y, warn=True)
            check_consistent_length(X, y)
    else:
        float_type = DTYPE_OF[estimator.dtype]
        # Integers stay what they are, since float32 does not represent all of them.
        dtype = "numeric" if keep_integers else float_type
        if keep_integers:
            X = _plain_integers(X)
        if y is None and not y_required:
            X = validate_data(estimator, X, reset=reset, dtype=dtype)
        else:
            X, y = validate_data(estimator, X, y, reset=reset, dtype=dtype)
        if keep_integers and reset and X.dtype not in INTEGER_DTYPES:
            X = check_array(X, dtype=float_type, input_name="X", estimator=estimator)
    if y is not None:
        check_classification_targets(y)
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
