import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import roc_auc_score

from sklearn_rails.metrics import detection_scores, fpr_at_tpr_score, tpr_at_fpr_score


def test_scores_of_a_case_worked_out_by_hand():
    y_true = [0, 0, 0, 0, 0, 1, 1, 1, 1]
    threat = [1, 2, 3, 4, 7, 2.5, 5, 6, 8]
    assert fpr_at_tpr_score(y_true, threat, tpr=1) == 3 / 5
    assert fpr_at_tpr_score(y_true, threat, tpr=0.75) == 1 / 5
    assert fpr_at_tpr_score(y_true, threat, tpr=0.25) == 0
    assert tpr_at_fpr_score(y_true, threat, fpr=0) == 1 / 4
    assert tpr_at_fpr_score(y_true, threat, fpr=0.2) == 3 / 4
    assert tpr_at_fpr_score(y_true, threat, fpr=0.59) == 3 / 4
    assert detection_scores(y_true, threat) == {
        "auroc": (2 + 4 + 4 + 5) / 20,
        # Ranked from the top: attacked, clean, attacked, attacked, clean, clean, attacked.
        "aupr_out": pytest.approx((1 + 2 / 3 + 3 / 4 + 4 / 7) / 4),
        # Ranked from the bottom: clean, clean, attacked, clean, clean, 2 attacked, clean.
        "aupr_in": pytest.approx((1 + 1 + 3 / 4 + 4 / 5 + 5 / 8) / 5),
        "fpr_at_95_tpr": 3 / 5,
        "tpr_at_5_fpr": 1 / 4,
    }


labels = arrays(bool, 30).filter(lambda y: 0 < y.sum() < 30)
scores = arrays(np.float64, 30, elements=st.integers(-5, 5).map(float))


@given(labels, scores, st.floats(0.01, 1))
def test_rates_are_those_of_the_best_threshold(y_true, threat, share):
    flagged = [threat >= t for t in [*np.unique(threat), np.inf]]
    rates = [(f[~y_true].mean(), f[y_true].mean()) for f in flagged]
    assert fpr_at_tpr_score(y_true, threat, tpr=share) == min(f for f, t in rates if t >= share)
    assert tpr_at_fpr_score(y_true, threat, fpr=share) == max(t for f, t in rates if f <= share)


@given(labels, scores)
def test_only_the_order_of_scores_counts_and_the_sides_mirror(y_true, threat):
    given_scores = detection_scores(y_true, threat)
    assert detection_scores(y_true.astype(int), np.exp(threat) * 3 + 1) == given_scores
    mirrored = detection_scores(~y_true, -threat)
    assert mirrored["aupr_in"] == given_scores["aupr_out"]
    assert mirrored["auroc"] == pytest.approx(given_scores["auroc"])
    assert given_scores["auroc"] == roc_auc_score(y_true, threat)


@pytest.mark.parametrize(
    ("score", "arguments", "message"),
    [
        (fpr_at_tpr_score, {"tpr": 0}, "tpr=0 must be a share"),
        (tpr_at_fpr_score, {"fpr": 1.5}, "fpr=1.5 must be a share"),
        (detection_scores, {"y_true": [1, 1, 1]}, "attacked and clean rows, got 3 attacked of 3"),
        (detection_scores, {"threat": [0, np.nan, 1]}, "threat contains NaN"),
        (detection_scores, {"threat": [0, 1]}, "inconsistent numbers"),
    ],
)
def test_bad_input_is_named(score, arguments, message):
    with pytest.raises(ValueError, match=message):
        score(**{"y_true": [0, 1, 1], "threat": [0, 1, 2], **arguments})
