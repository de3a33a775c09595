import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from sklearn_rails.immune.conformity import ConformalScale, conformal_p_values

scores = st.lists(st.integers(0, 8), min_size=1, max_size=30)


@settings(deadline=None)
@given(calibration=scores, asked=scores)
def test_p_values_count_the_rows_that_conform_no_better(calibration, asked):
    calibration, asked = np.sort(calibration), np.array(asked)
    at_least = np.array([(calibration >= s).sum() for s in asked])
    n = len(calibration)
    assert_allclose(conformal_p_values(asked, calibration), (at_least + 1) / (n + 1))
    assert_allclose(conformal_p_values(asked, calibration, count_own=False), at_least / n)


@settings(deadline=None)
@given(values=scores)
def test_p_values_of_exchangeable_rows_are_uniform_or_larger(values):
    # Any of the rows is equally likely to be the new one, so counting them all is the probability.
    values = np.array(values)
    p = np.array(
        [conformal_p_values(v, np.sort(np.delete(values, i))) for i, v in enumerate(values)]
    )
    for level in np.unique(p):
        assert (p <= level).mean() <= level + 1e-12


@settings(deadline=None)
@given(calibration=scores, asked=st.lists(st.floats(-5, 50), min_size=2, max_size=20))
def test_evidence_grows_with_the_score_and_is_that_of_the_p_value(calibration, asked):
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
