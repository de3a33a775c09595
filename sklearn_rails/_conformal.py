"""Conformal statistics: calibration samples, p-values and thresholds."""

import math
import warnings
from decimal import Decimal
from fractions import Fraction

import numpy as np

from ._validation import find_user_level

# Finite scores are clipped to +-LARGEST, and differences of scores below 1 / LARGEST count as that,
# so that a quotient of two differences is finite in float64.
LARGEST = 1e150

# Scores that differ by less than this share of themselves, or of a typical score, are ties.
ROUNDING = 1e-7

# Evidence of a score that cannot be compared with those of the calibration samples. That of any
# other score is below 1000: log(2 * LARGEST**2) is 692.
MAX_EVIDENCE = 1e6


def sample_rows(n, size, rng):
    """Draw positions of rows at random, without replacement.

    Parameters
    ----------
    n : int
        Number of rows.
    size : int
        Number of positions; all of them if there are not more.
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
        # RandomState shuffles all n positions to choose a few.
        rng = rng.randint(np.iinfo(np.int32).max)
    return np.sort(np.random.default_rng(rng).choice(n, size, replace=False)).astype(np.int64)


def conformal_p_values(scores, calibration, *, count_own=True):
    """Compare nonconformity scores with those of calibration samples.

    Parameters
    ----------
    scores : ndarray
        Higher conforms less; NaN conforms least of all.
    calibration : ndarray of shape (n_calibration,)
        Scores of the calibration samples, in ascending order.
    count_own : bool, default=True
        Count the sample itself, (count + 1) / (n_calibration + 1), as a valid p-value does.

    Returns
    -------
    ndarray, float64
        Of the shape of ``scores``: share of the calibration samples that conform no better.
    """
    at_least = len(calibration) - np.searchsorted(calibration, scores, side="left")
    return (at_least + count_own) / (len(calibration) + count_own)


def conformal_threshold(calibration, alpha):
    """Return the score above which the conformal p-value is alpha or less.

    Parameters
    ----------
    calibration : ndarray of shape (n_calibration,)
        Scores of the calibration samples.
    alpha : float
        Between 0 and 1. Its decimal text counts, not the binary number next to it.

    Returns
    -------
    float
        Infinite if there are too few calibration samples for a p-value of alpha.
    """
    n_above = math.floor(Fraction(str(alpha)) * (len(calibration) + 1)) - 1
    return np.inf if n_above < 0 else float(np.sort(calibration)[::-1][n_above])


def warn_of_few_rows(parameter, alpha, n_calibration, message):
    """Warn if no p-value can be alpha or less.

    Parameters
    ----------
    parameter : str
        Name of the parameter that alpha was given as.
    alpha : float
    n_calibration : int
        Number of calibration samples.
    message : str
        What is to follow ``"<parameter>=<alpha> needs <n> "``.
    """
    n_needed = math.ceil(1 / Fraction(str(alpha))) - 1
    if n_calibration >= n_needed:
        return
    # Decimal, since 1 / alpha may be beyond the largest float.
    text = f"{parameter}={alpha} needs {Decimal(n_needed):.6g} {message}"
    warnings.warn(text, stacklevel=find_user_level())


class ConformalScale:
    """Turn scores into evidence, minus the log of their conformal p-value on clean samples.

    Between the calibration scores the p-value is interpolated, and beyond the largest it goes on
    falling, so that the evidence grows with the score and orders samples that lie outside of all
    that has been seen.

    Parameters
    ----------
    calibration : ndarray of shape (n_calibration,)
        Scores of clean samples; higher is more suspect. NaN counts as +inf.
    rows : ndarray of int, default=slice(None)
        Positions of the scores that set the scale. The others only tell which infinite scores
        clean samples have.
    """

    def __init__(self, calibration, rows=slice(None)):
        self._known_infinities = np.unique(calibration[np.isinf(calibration)])
        ordered = np.sort(_clip(calibration[rows]))
        first = _first_of_ties(ordered)
        self._scores = ordered[first]
        self._p_values = (len(ordered) - first + 1) / (len(ordered) + 1)
        spread = self._scores[-1] - np.median(ordered)
        self._width = max(spread, 1 / LARGEST) if spread > 0 else 1.0

    def __call__(self, scores):
        """Return the evidence of some scores.

        Parameters
        ----------
        scores : ndarray of shape (n,)

        Returns
        -------
        ndarray of shape (n,), float64
            0 for the least suspect. ``MAX_EVIDENCE`` for NaN, and for an infinite score if no
            calibration score was the same.
        """
        infinite = np.isinf(scores) & ~np.isin(scores, self._known_infinities)
        incomparable = np.isnan(scores) | infinite
        scores = _clip(scores)
        last = len(self._scores) - 1
        above = np.minimum(np.searchsorted(self._scores, scores, side="left"), last)
        below = np.maximum(np.searchsorted(self._scores, scores, side="right") - 1, 0)
        # Rounding must not lift a score over a calibration score that is higher.
        inside = np.interp(scores, self._scores, self._p_values)
        inside = np.fmax(np.fmin(inside, self._p_values[below]), self._p_values[above])
        beyond = np.maximum(scores - self._scores[-1], 0) / self._width
        return np.where(incomparable, MAX_EVIDENCE, np.log1p(beyond) - np.log(inside))


def _first_of_ties(ordered):
    """Find the places where scores in ascending order grow by more than rounding.

    Duplicates are scored alike but for the last bits, which depend on the block they stand in.
    """
    first, typical = [0], np.median(np.abs(ordered))
    for place in range(1, len(ordered)):
        score = ordered[first[-1]]
        if ordered[place] - score > ROUNDING * max(abs(score), typical):
            first.append(place)
    return np.array(first)


def _clip(scores):
    scores = np.where(np.isnan(scores), np.inf, scores).astype(np.float64)
    return np.clip(scores, -LARGEST, LARGEST)
