import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import roc_auc_score

from sklearn_rails.metrics import detection_scores, fpr_at_tpr_score, tpr_at_fpr_score


def test_scores_agree_with_a_calculation_by_hand():
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
def test_only_the_order_of_scores_counts_and_sides_are_symmetric(y_true, threat):
    given_scores = detection_scores(y_true, threat)
    assert detection_scores(y_true.astype(int), np.exp(threat) * 3 + 1) == given_scores
    mirrored = detection_scores(~y_true, -threat)
    assert mirrored["aupr_in"] == given_scores["aupr_out"]
    assert mirrored["auroc"] == pytest.approx(given_scores["auroc"])
    assert given_scores["auroc"] == roc_auc_score(y_true, threat)


TYPES = {
    "bool": lambda y: np.array(y, bool),
    "int8": lambda y: np.array(y, np.int8),
    "uint8": lambda y: np.array(y, np.uint8),
    "uint64": lambda y: np.array(y, np.uint64),
    "float16": lambda y: np.array(y, np.float16),
    "longdouble": lambda y: np.array(y, np.longdouble),
    "object": lambda y: np.array(y, object),
    "list": list,
    "column": lambda y: np.array(y)[:, None],
    "masked array without a mask": np.ma.array,
    "series": pd.Series,
    "bfloat16 tensor": lambda y: torch.tensor(y, dtype=torch.bfloat16),
    "tensor with a graph": lambda y: torch.tensor(y, dtype=torch.float32, requires_grad=True),
    "list of tensors": lambda y: list(torch.tensor(y, dtype=torch.float32, requires_grad=True)),
}


@pytest.mark.parametrize("kind", TYPES)
def test_scores_are_the_same_for_every_number_type(kind):
    y_true, threat = [0, 0, 0, 1, 1, 1], [0, 1, 0, 1, 1, 0]
    as_type = TYPES[kind]
    assert detection_scores(as_type(y_true), as_type(threat)) == detection_scores(y_true, threat)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int64, np.uint64])
def test_scores_at_the_ends_of_an_integer_type_keep_their_order(dtype):
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    threat = np.array([low, low + 1, high - 1, high], dtype)
    y_true = [0, 1, 0, 1]
    assert detection_scores(y_true, threat) == detection_scores(y_true, [0, 1, 2, 3])
    assert fpr_at_tpr_score(y_true, threat, tpr=0.5) == 0
    assert tpr_at_fpr_score(y_true, threat, fpr=0) == 0.5


def test_infinite_scores_rank_first_and_last():
    y_true = [0, 1, 0, 1, 1]
    finite = detection_scores(y_true, [0, 1, 2, 3, 3])
    assert detection_scores(y_true, [-np.inf, 1, 2, np.inf, np.inf]) == finite


def test_arguments_are_not_changed():
    y_true, threat = np.array([0, 2, 0, 1]), np.array([1, 5, 2, 3], np.uint8)
    detection_scores(y_true, threat)
    np.testing.assert_array_equal(y_true, [0, 2, 0, 1])
    np.testing.assert_array_equal(threat, [1, 5, 2, 3])


BAD = {
    "NaN": ([0, np.nan, 1], "NaN"),
    "strings": (["0", "1", "1"], "real numbers"),
    "mixed": (np.array([0, "1", 1], object), "real numbers"),
    "missing": ([0, None, 1], "real numbers"),
    "complex": ([0, 1j, 1], "real numbers"),
    "dates": (np.array([0, 1, 2], "M8[s]"), "real numbers"),
    "two columns": (np.zeros((3, 2)), r"one-dimensional, got an array of shape \(3, 2\)"),
    "one number": (1, "one-dimensional"),
    "ragged": ([[0], [1, 2], [1]], "must be an array"),
    "masked": (np.ma.array([0, 1, 1], mask=[0, 1, 0]), "masked"),
}


@pytest.mark.parametrize("score", [detection_scores, fpr_at_tpr_score, tpr_at_fpr_score])
@pytest.mark.parametrize("parameter", ["y_true", "threat"])
@pytest.mark.parametrize("kind", BAD)
def test_invalid_scores_and_labels_are_refused(score, parameter, kind):
    values, message = BAD[kind]
    with pytest.raises(ValueError, match=f"{parameter} .*{message}"):
        score(**{"y_true": [0, 1, 1], "threat": [0, 1, 2], parameter: values})


@pytest.mark.parametrize(
    ("score", "parameter"), [(fpr_at_tpr_score, "tpr"), (tpr_at_fpr_score, "fpr")]
)
@pytest.mark.parametrize("value", ["a", None, np.nan, np.inf, -0.1, 1.1, 0.5j, [0.5]])
def test_invalid_shares_are_refused(score, parameter, value):
    with pytest.raises(ValueError, match=f"{parameter}=.* must be a share"):
        score([0, 1, 1], [0, 1, 2], **{parameter: value})


def test_shares_may_be_numpy_scalars():
    y_true, threat = [0, 0, 1, 1], [0, 2, 1, 3]
    assert fpr_at_tpr_score(y_true, threat, tpr=np.float32(0.5)) == 0
    assert tpr_at_fpr_score(y_true, threat, fpr=np.int64(1)) == 1


@pytest.mark.parametrize(
    ("score", "arguments", "message"),
    [
        (fpr_at_tpr_score, {"tpr": 0}, "tpr=0 must be a share"),
        (tpr_at_fpr_score, {"fpr": 1.5}, "fpr=1.5 must be a share"),
        (
            detection_scores,
            {"y_true": [1, 1, 1]},
            "attacked and clean samples, got 3 attacked",
        ),
        (detection_scores, {"threat": [0, np.nan, 1]}, "threat contains NaN"),
        (detection_scores, {"threat": [0, 1]}, "inconsistent numbers"),
    ],
)
def test_invalid_input_is_refused(score, arguments, message):
    with pytest.raises(ValueError, match=message):
        score(**{"y_true": [0, 1, 1], "threat": [0, 1, 2], **arguments})
