"""Checks of what a threat scorer returns, which may be any outlier detector."""

import reprlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._validation import as_array


def check_alarms(predictions: object, n_samples: int) -> NDArray[np.bool_]:
    """Check what a threat scorer's ``predict`` returned.

    Parameters
    ----------
    predictions : array-like of shape (n_samples,)
        -1 for a flagged sample, else 1.
    n_samples : int

    Returns
    -------
    ndarray of shape (n_samples,), bool
        True for a flagged sample.

    Raises
    ------
    ValueError
        If the predictions are anything else.
    """
    numbers = _as_numbers(predictions)
    if numbers.shape != (n_samples,) or not np.isin(numbers, (-1, 1)).all():
        raise ValueError(
            f"threat_scorer: predict must return -1 (an alarm) or 1 for each of the {n_samples} "
            f"samples, got {_describe(predictions, numbers)}."
        )
    return np.asarray(numbers == -1)


def check_threat_scores(scores: object, n_samples: int) -> NDArray[np.float64]:
    """Check what a threat scorer's ``score_samples`` returned.

    Parameters
    ----------
    scores : array-like of shape (n_samples,)
    n_samples : int

    Returns
    -------
    ndarray of shape (n_samples,), float64

    Raises
    ------
    ValueError
        If the scores are anything else, or NaN.
    """
    numbers = _as_numbers(scores)
    if numbers.shape != (n_samples,) or np.isnan(numbers).any():
        raise ValueError(
            f"threat_scorer: score_samples must return a number, not NaN, for each of the "
            f"{n_samples} samples, got {_describe(scores, numbers)}."
        )
    return numbers


def _as_numbers(values: Any) -> NDArray[np.float64]:
    """Return float64, without dimensions where the values are not an array of numbers."""
    try:
        array = as_array(values, "threat_scorer")
    except (TypeError, ValueError):  # lists of unequal lengths, tensors without values
        return np.array(np.nan)
    return array.astype(np.float64) if array.dtype.kind in "iuf" else np.array(np.nan)


def _describe(values: object, numbers: NDArray[np.float64]) -> str:
    if numbers.ndim == 0:
        return reprlib.repr(values)
    return f"shape {numbers.shape} with values {np.unique(numbers)[:4].tolist()}"
