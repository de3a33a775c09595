"""Checks of numbers and labels given as lists, arrays, frames or tensors."""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from .._validation import as_array, naming


def as_numbers(values: ArrayLike | torch.Tensor, name: str) -> NDArray[Any]:
    """Convert values to an array of real numbers or booleans.

    Parameters
    ----------
    values : array-like, torch.Tensor or list of torch.Tensor
    name : str
        The parameter, for the error.

    Returns
    -------
    ndarray of a boolean, integer or floating dtype

    Raises
    ------
    ValueError
        If the values are ragged, masked, or not real numbers.
    """
    array = as_array(values, name)
    if array.dtype == object and all(isinstance(v, Real | np.bool_) for v in array.flat):
        with naming(name):
            array = array.astype(np.float64)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} must hold real numbers, got values of dtype {array.dtype}.")
    return array


def check_scores(scores: ArrayLike | torch.Tensor, name: str) -> NDArray[Any]:
    """Check one number per sample; infinite numbers are allowed, NaN is not.

    Parameters
    ----------
    scores : array-like of shape (n,) or (n, 1), or torch.Tensor
    name : str
        The parameter, for the error.

    Returns
    -------
    ndarray of shape (n,)

    Raises
    ------
    ValueError
        If the scores are not real numbers, not one-dimensional, or NaN.
    """
    array = _one_dimensional(as_numbers(scores, name), name)
    if np.isnan(array).any():
        raise ValueError(f"{name} contains NaN.")
    return array


def check_labels(labels: ArrayLike | torch.Tensor, name: str) -> NDArray[Any]:
    """Check one class label per sample: all of them strings, or all of them finite numbers.

    Parameters
    ----------
    labels : array-like of shape (n,) or (n, 1), or torch.Tensor
    name : str
        The parameter, for the error.

    Returns
    -------
    ndarray of shape (n,)
        Strings, finite numbers or booleans.

    Raises
    ------
    ValueError
        If the labels are anything else, or not one-dimensional.
    """
    array = as_array(labels, name)
    if array.dtype.kind in "UT" or (
        array.dtype == object and all(isinstance(v, str) for v in array.flat)
    ):
        # By way of objects: numpy does not know how long the strings of its variable type are.
        return _one_dimensional(array.astype(object).astype(str), name)
    array = check_scores(array, name)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} contains infinity.")
    return array


def _one_dimensional(array: NDArray[Any], name: str) -> NDArray[Any]:
    if array.ndim == 2 and array.shape[1] == 1:
        return array[:, 0]
    if array.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, got an array of shape {array.shape}.")
    return array
