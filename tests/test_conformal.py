import warnings
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from sklearn_rails._conformal import (
    MAX_EVIDENCE,
    ConformalScale,
    conformal_p_values,
    conformal_threshold,
    sample_rows,
    warn_of_few_rows,
)

scores = st.lists(st.integers(0, 8), min_size=1, max_size=30)


@settings(deadline=None)
@given(calibration=scores, asked=scores)
def test_p_values_count_the_samples_that_conform_no_better(calibration, asked):
    calibration, asked = np.sort(calibration), np.array(asked)
    at_least = np.array([(calibration >= s).sum() for s in asked])
    n = len(calibration)
    assert_allclose(conformal_p_values(asked, calibration), (at_least + 1) / (n + 1))
    assert_allclose(conformal_p_values(asked, calibration, count_own=False), at_least / n)


@settings(deadline=None)
@given(values=scores)
def test_p_values_of_exchangeable_samples_are_uniform_or_larger(values):
    # Each of the samples is equally likely to be the new one, so their share is the probability.
    values = np.array(values)
    p = np.array(
        [conformal_p_values(v, np.sort(np.delete(values, i))) for i, v in enumerate(values)]
    )
    for level in np.unique(p):
        assert (p <= level).mean() <= level + 1e-12


@settings(deadline=None)
@given(calibration=scores, asked=st.lists(st.floats(-5, 50), min_size=2, max_size=20))
def test_evidence_increases_with_the_score_and_is_minus_the_log_p_value(calibration, asked):
    scale = ConformalScale(np.array(calibration, dtype=float))
    asked = np.sort(asked)
    evidence = scale(asked)
    assert (np.diff(evidence) >= -1e-12).all()
    assert evidence.min() >= -1e-12
    ordered = np.unique(calibration).astype(float)
    p = conformal_p_values(ordered, np.sort(calibration))
    assert_allclose(scale(ordered), -np.log(p))
    beyond = ordered[-1] + np.array([1.0, 2.0, 1000.0])
    assert (np.diff(scale(beyond)) > 0).all()


@pytest.mark.parametrize(
    "rng", [3, np.random.RandomState(3), np.random.default_rng(3)], ids=["int", "state", "gen"]
)
def test_sampled_positions_are_sorted_distinct_and_spread(rng):
    n = 2**24 + 5
    rows = sample_rows(n, 1000, rng)
    assert rows.dtype == np.int64
    assert len(rows) == 1000
    assert (np.diff(rows) > 0).all()
    assert rows[0] >= 0
    assert n - 2**18 < rows[-1] < n
    # Half of them are odd, within 5 standard deviations; positions at equal steps would fail.
    assert abs((rows % 2).mean() - 0.5) < 5 * 0.5 / 1000**0.5


@pytest.mark.parametrize("size", [7, 8, 10**12])
def test_a_sample_of_all_positions_is_all_positions(size):
    assert_array_equal(sample_rows(7, size, 0), np.arange(7))


def test_the_seed_determines_the_sample():
    assert_array_equal(sample_rows(1000, 10, 5), sample_rows(1000, 10, 5))
    assert (sample_rows(1000, 10, 5) != sample_rows(1000, 10, 6)).any()
    counts = np.bincount(
        np.concatenate([sample_rows(10, 3, seed) for seed in range(2000)]), minlength=10
    )
    assert (abs(counts - 600) < 5 * (2000 * 0.3 * 0.7) ** 0.5).all()


@settings(deadline=None)
@given(calibration=scores, percent=st.integers(1, 99))
def test_scores_above_the_threshold_have_p_values_up_to_alpha(calibration, percent):
    calibration = np.sort(calibration).astype(float)
    asked = np.arange(-1.0, 10)
    n_needed = Fraction(percent, 100) * (len(calibration) + 1)
    at_least = np.array([(calibration >= score).sum() for score in asked])
    for alpha in (percent / 100, np.float32(percent / 100), Fraction(percent, 100)):
        flagged = asked > conformal_threshold(calibration, alpha)
        assert_array_equal(flagged, [count + 1 <= n_needed for count in at_least.tolist()])


@pytest.mark.parametrize(
    ("alpha", "n_above"),
    # 0.29 * 100 is 28.999999999999996 in floating point, and the largest alpha times 100 is 100.
    [(0.07, 6), (0.29, 28), (np.float32(0.29), 28), (np.nextafter(1, 0), 98)],
)
def test_thresholds_are_computed_with_exact_fractions(alpha, n_above):
    assert conformal_threshold(np.arange(99.0), alpha) == 98 - n_above


@pytest.mark.parametrize("alpha", [5e-324, 1e-300, np.float64(5e-324)])
def test_a_tiny_alpha_has_an_infinite_threshold_and_warns(alpha):
    assert conformal_threshold(np.arange(99.0), alpha) == np.inf
    with pytest.warns(UserWarning, match=r"level=.*e-3\d\d needs .*e\+3\d\d of them") as caught:
        warn_of_few_rows("level", alpha, 99, "of them")
    assert caught[0].filename == __file__


def test_enough_calibration_samples_cause_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_few_rows("alpha", 0.05, 19, "rows")
    with pytest.warns(UserWarning, match="alpha=0.05 needs 19 rows"):
        warn_of_few_rows("alpha", 0.05, 18, "rows")


floats = st.floats(allow_nan=False) | st.sampled_from([0.0, 5e-324, 1e-308, 1e308, 1.0])


@settings(deadline=None)
@given(calibration=st.lists(floats, min_size=1, max_size=12), asked=st.lists(floats, max_size=12))
def test_evidence_is_finite_and_ordered_as_the_scores(calibration, asked):
    calibration = np.array(calibration)
    scale = ConformalScale(calibration)
    near = np.concatenate([np.nextafter(calibration, sign * np.inf) for sign in (-1, 1)])
    asked = np.unique(np.concatenate([calibration, near, asked]))
    evidence = scale(asked)
    assert np.isfinite(evidence).all()
    known = np.isfinite(asked) | np.isin(asked, calibration)
    assert (np.diff(evidence[known]) >= 0).all()
    assert (evidence[known] < 1000).all()
    assert (evidence[~known] == MAX_EVIDENCE).all()


def test_scores_that_cannot_be_compared_have_the_highest_evidence():
    scale = ConformalScale(np.array([1.0, 2.0, np.nan, np.inf]))
    evidence = scale(np.array([np.nan, -np.inf, np.inf, 1e300, 1.0]))
    assert_array_equal(evidence[:2], MAX_EVIDENCE)
    # Two of four calibration scores are at least inf: NaN counts as such.
    assert_allclose(evidence[2], -np.log(3 / 5))
    assert_allclose(evidence[4], 0)


def test_beyond_equal_scores_evidence_grows_by_their_unit():
    scale = ConformalScale(np.full(4, 7.0))
    assert_allclose(scale(np.array([6.0, 7.0, 8.0, 10.0])), [0, 0, np.log(2), np.log(4)])


def test_nan_has_the_lowest_p_value():
    calibration = np.array([0.0, 1.0, np.nan])
    assert_allclose(conformal_p_values(np.array([0.0, 2.0, np.nan]), calibration), [1, 0.5, 0.5])


def test_infinite_calibration_scores_outside_the_scale_are_comparable():
    scale = ConformalScale(np.array([1.0, 2.0, np.inf], dtype=np.float32), np.array([0, 1]))
    evidence = scale(np.array([2.0, 3.0, np.inf, -np.inf]))
    assert_allclose(evidence[0], -np.log(2 / 3))
    assert evidence[0] < evidence[1] < evidence[2] < 1000
    assert evidence[3] == MAX_EVIDENCE


def test_scores_that_differ_only_by_rounding_are_ties():
    calibration = np.repeat([1.0, 2.0, 3.0], 20) * (1 + 1e-12 * np.arange(60))
    scale = ConformalScale(calibration)
    for value, p_value in ((1.0, 1.0), (2.0, 41 / 61), (3.0, 21 / 61)):
        near = value * (1 + np.linspace(-1e-11, 1e-11, 9))
        assert_allclose(scale(near), -np.log(p_value), atol=1e-4)
        assert np.ptp(scale(near)) < 1e-3


@pytest.mark.parametrize("factor", [1e-140, 1e-3, 7.0, 1e140])
def test_evidence_does_not_depend_on_the_unit_of_scores(factor):
    calibration, asked = np.array([-1.0, 2.0, 2.0, 5.0, 11.0]), np.array([-2.0, 1, 2, 9, 20, 1e3])
    expected = ConformalScale(calibration)(asked)
    assert_allclose(ConformalScale(factor * calibration)(factor * asked), expected, rtol=1e-9)
    # log(6) of the largest, and more by the distance from it in units of that to the median.
    assert_allclose(expected[-2:], np.log(6 / 2) + np.log1p((asked[-2:] - 11) / 9))
