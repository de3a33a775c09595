"""Conformal statistics: calibration samples, p-values and thresholds."""

from __future__ import annotations

import math
import warnings
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._validation import find_user_level

# Finite scores are clipped to +-LARGEST, and a scale is at least 1 / LARGEST wide, so that the
# difference of two scores divided by the width is finite in float64.
LARGEST = 1e150

# Scores whose relative difference is below this are ties; also relative to the median score.
ROUNDING = 1e-7

# Evidence of a score that cannot be compared with the calibration scores. The evidence of any other
# score is below 1000: log(2 * LARGEST**2) is 692.
MAX_EVIDENCE = 1e6


def sample_rows(
    n: int, size: int, rng: int | np.random.Generator | np.random.RandomState
) -> NDArray[np.int64]:
    """Draw positions of samples at random, without replacement.

    Parameters
    ----------
    n : int
        Number of samples.
    size : int
        Number of positions to draw; all of them if ``size`` is ``n`` or more.
    rng : int, numpy.random.Generator or numpy.random.RandomState
        Seed or random generator.

    Returns
    -------
    ndarray of shape (min(n, size),), int64
        In ascending order.
    """
    if size >= n:
        return np.arange(n, dtype=np.int64)
    if isinstance(rng, np.random.RandomState):
        # RandomState.choice shuffles all n positions, however few are drawn.
        rng = rng.randint(np.iinfo(np.int32).max)
    return np.sort(np.random.default_rng(rng).choice(n, size, replace=False)).astype(np.int64)


def conformal_p_values(
    scores: NDArray[Any], calibration: NDArray[Any], *, count_own: bool = True
) -> NDArray[np.float64]:
    """Return the p-values of nonconformity scores among those of calibration samples.

    Parameters
    ----------
    scores : ndarray
        Higher conforms less; NaN counts as the highest.
    calibration : ndarray of shape (n_calibration,)
        Scores of the calibration samples, in ascending order.
    count_own : bool, default=True
        Count the sample itself: (count + 1) / (n_calibration + 1), which makes p-values valid.

    Returns
    -------
    ndarray of the shape of ``scores``, float64
        Share of the calibration samples whose score is at least as high.
    """
    at_least = len(calibration) - np.searchsorted(calibration, scores, side="left")
    p_values: NDArray[np.float64] = (at_least + count_own) / (len(calibration) + count_own)
    return p_values


def conformal_threshold(calibration: NDArray[Any], alpha: float | Fraction) -> float:
    """Return the score above which the conformal p-value is alpha or less.

    Parameters
    ----------
    calibration : ndarray of shape (n_calibration,)
        Scores of the calibration samples.
    alpha : float
        Between 0 and 1. Its decimal representation counts, not the nearest binary number.

    Returns
    -------
    float
        Infinite if there are too few calibration samples for a p-value of alpha.
    """
    n_above = math.floor(Fraction(str(alpha)) * (len(calibration) + 1)) - 1
    return np.inf if n_above < 0 else float(np.sort(calibration)[::-1][n_above])


def warn_of_few_rows(
    parameter: str, alpha: float | Fraction, n_calibration: int, message: str
) -> None:
    """Warn if no p-value can be alpha or less.

    Parameters
    ----------
    parameter : str
        Name under which the user passed alpha.
    alpha : float
    n_calibration : int
        Number of calibration samples.
    message : str
        Text after ``"<parameter>=<alpha> needs <n> "``.
    """
    n_needed = math.ceil(1 / Fraction(str(alpha))) - 1
    if n_calibration >= n_needed:
        return
    # Decimal, since 1 / alpha may be beyond the largest float.
    text = f"{parameter}={alpha} needs {Decimal(n_needed):.6g} {message}"
    warnings.warn(text, stacklevel=find_user_level())


class ConformalScale:
    """Convert scores to evidence: minus the log of their conformal p-value on clean samples.

    Between calibration scores the p-value is interpolated. Above the largest it keeps falling, so
    that evidence grows with the score beyond the range of the calibration scores too.

    Parameters
    ----------
    calibration : ndarray of shape (n_calibration,)
        Scores of clean samples; higher is more suspicious. NaN counts as +inf.
    rows : ndarray of int, default=slice(None)
        Positions of the scores that set the scale. The others only show which infinite scores
        occur on clean samples.
    """

    def __init__(
        self, calibration: NDArray[Any], rows: NDArray[np.int64] | slice = slice(None)
    ) -> None:
        self._known_infinities = np.unique(calibration[np.isinf(calibration)])
        ordered = np.sort(_clip(calibration[rows]))
        first = _first_of_ties(ordered)
        self._scores = ordered[first]
        self._p_values = (len(ordered) - first + 1) / (len(ordered) + 1)
        spread = self._scores[-1] - np.median(ordered)
        self._width = max(spread, 1 / LARGEST) if spread > 0 else 1.0

    def __call__(self, scores: NDArray[Any]) -> NDArray[np.float64]:
        """Compute the evidence of scores.

        Parameters
        ----------
        scores : ndarray of shape (n,)

        Returns
        -------
        ndarray of shape (n,), float64
            0 for the least suspicious. ``MAX_EVIDENCE`` for NaN, and for an infinite score that no
            calibration score equals.
        """
        infinite = np.isinf(scores) & ~np.isin(scores, self._known_infinities)
        incomparable = np.isnan(scores) | infinite
        scores = _clip(scores)
        last = len(self._scores) - 1
        above = np.minimum(np.searchsorted(self._scores, scores, side="left"), last)
        below = np.maximum(np.searchsorted(self._scores, scores, side="right") - 1, 0)
        # Rounding must not give a score more evidence than a higher calibration score.
        inside = np.interp(scores, self._scores, self._p_values)
        inside = np.fmax(np.fmin(inside, self._p_values[below]), self._p_values[above])
        beyond = np.maximum(scores - self._scores[-1], 0) / self._width
        evidence: NDArray[np.float64] = np.log1p(beyond) - np.log(inside)
        evidence[incomparable] = MAX_EVIDENCE
        return evidence


def _first_of_ties(ordered: NDArray[np.float64]) -> NDArray[np.intp]:
    """Find the positions at which ascending scores increase by more than rounding.

    Duplicates have the same score except for its last bits, which depend on the block they are in.
    """
    first, typical = [0], np.median(np.abs(ordered))
    for place in range(1, len(ordered)):
        score = ordered[first[-1]]
        if ordered[place] - score > ROUNDING * max(abs(score), typical):
            first.append(place)
    return np.array(first)


def _clip(scores: NDArray[Any]) -> NDArray[np.float64]:
    clipped: NDArray[np.float64] = np.where(np.isnan(scores), np.inf, scores).astype(np.float64)
    return np.clip(clipped, -LARGEST, LARGEST)
