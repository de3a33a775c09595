"""Checks that the estimators share: rows of images, and fits that fail without a trace."""

import functools
import math

import numpy as np
import torch
from sklearn.utils import get_tags
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_consistent_length, column_or_1d, validate_data

DTYPE_OF = {"float32": np.float32, "float64": np.float64}


def all_or_nothing(fit):
    """Make a method that fails leave its estimator as it was."""

    @functools.wraps(fit)
    def wrapped(self, *args, **kwargs):
        before = dict(vars(self))
        try:
            return fit(self, *args, **kwargs)
        except BaseException:
            vars(self).clear()
            vars(self).update(before)
            raise

    return wrapped


def validate_fit_rows(estimator, X, y=None, *, input_shape):
    """Check training rows and remember their shape on the estimator.

    Sets ``n_features_in_``, ``feature_names_in_`` where there are names, and ``input_shape_``.

    Parameters
    ----------
    estimator : estimator with the parameter ``dtype``
    X : array-like of shape (n, n_features) or (n, *input_shape), or torch.Tensor
    y : array-like of shape (n,), default=None
        Class labels.
    input_shape : tuple of int or None
        The parameter; None takes the shape of X.

    Returns
    -------
    X : ndarray, or torch.Tensor if it came on a GPU, of shape (n, n_features)
    y : ndarray of shape (n,), or None

    Raises
    ------
    ValueError
        If X, y or ``input_shape`` does not fit.
    """
    flat, shape = _flatten(X)
    wanted = None if input_shape is None else tuple(int(size) for size in input_shape)
    if wanted is not None and len(shape) > 1 and shape != wanted:
        raise ValueError(f"input_shape={wanted} was given, but the rows of X have shape {shape}.")
    flat, y = _validate_flat(estimator, flat, y, reset=True)
    if wanted is not None and math.prod(wanted) != flat.shape[1]:
        raise ValueError(
            f"input_shape={wanted} holds {math.prod(wanted)} values a row, but X has "
            f"{flat.shape[1]} features."
        )
    estimator.input_shape_ = wanted or (shape if len(shape) > 1 else (flat.shape[1],))
    return flat, y


def validate_rows(estimator, X):
    """Check rows for a fitted estimator.

    Parameters
    ----------
    estimator : fitted estimator
    X : array-like of shape (n, n_features) or (n, *input_shape_), or torch.Tensor

    Returns
    -------
    ndarray, or torch.Tensor if it came on a GPU, of shape (n, n_features)

    Raises
    ------
    ValueError
        If X has another shape than the training rows, or holds NaN or infinity.
    """
    flat, shape = _flatten(X)
    if len(shape) > 1 and shape != estimator.input_shape_:
        raise ValueError(
            f"X has rows of shape {shape}, but {type(estimator).__name__} was fitted on rows of "
            f"shape {estimator.input_shape_}."
        )
    return _validate_flat(estimator, flat, None, reset=False)[0]


def _flatten(X):
    """Lay n-dimensional arrays and tensors out as rows; leave all else to scikit-learn."""
    if isinstance(X, torch.Tensor):
        X = X.detach()
        if X.device.type == "cpu":
            X = X.numpy()
    if not isinstance(X, np.ndarray | torch.Tensor) or X.ndim < 3:
        return X, ()
    shape = tuple(X.shape[1:])
    return X.reshape(len(X), math.prod(shape)), shape


def _validate_flat(estimator, X, y, *, reset):
    y_required = reset and get_tags(estimator).target_tags.required
    if isinstance(y, torch.Tensor):
        y = y.detach().cpu().numpy()
    if isinstance(X, torch.Tensor):
        _validate_tensor(estimator, X, reset=reset)
        if y is not None or y_required:
            y = column_or_1d(y, warn=True)
            check_consistent_length(X, y)
    else:
        dtype = DTYPE_OF[estimator.dtype]
        if y is None and not y_required:
            X = validate_data(estimator, X, reset=reset, dtype=dtype)
        else:
            X, y = validate_data(estimator, X, y, reset=reset, dtype=dtype)
    if y is not None:
        check_classification_targets(y)
    return X, y


def _validate_tensor(estimator, X, *, reset):
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
