import pickle

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from sklearn import config_context
from sklearn.base import clone
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from torch import nn

from sklearn_rails import DkNNClassifier
from sklearn_rails._conformal import sample_rows
from sklearn_rails.features.mapping import FeatureMap

# On a line: three a, then b, then three c.
X_LINE = np.array([[0.0], [1.0], [2.0], [4.0], [8.0], [9.0], [10.0]])
Y_LINE = np.array(["a", "a", "a", "b", "c", "c", "c"])
X_CAL = np.array([[0.5], [2.6], [5.0], [9.4]])
Y_CAL = np.array(["a", "a", "b", "c"])


def on_a_line(**params):
    dknn = DkNNClassifier(n_neighbors=3, calibration=(X_CAL, Y_CAL), **params)
    return dknn.fit(X_LINE, Y_LINE)


def test_p_values_worked_out_by_hand():
    # Neighbours of the calibration rows and how many are of another class than the row's:
    #   0.5 (a): 0, 1, 2 -> a a a: 0        2.6 (a): 2, 4, 1 -> a b a: 1
    #   5.0 (b): 4, 2, 8 -> b a c: 2        9.4 (c): 9, 10, 8 -> c c c: 0
    # So the calibration nonconformities are 0, 0, 1, 2.
    # 3.2: 4, 2, 1 -> b a a: nonconformity a 1, b 2, c 3.
    # 7.0: 8, 9, 10 or 4 (both at 3: the lower index, 4) -> c c b: a 3, b 2, c 1.
    X = np.array([[3.2], [7.0]])
    empirical = on_a_line(p_value="empirical")
    assert_allclose(empirical.p_values(X), [[2 / 4, 1 / 4, 0], [0, 1 / 4, 2 / 4]])
    assert_allclose(empirical.credibility(X), [0.5, 0.5])
    assert_allclose(empirical.confidence(X), [0.75, 0.75])
    conformal = on_a_line()
    assert_allclose(conformal.p_values(X), [[3 / 5, 2 / 5, 1 / 5], [1 / 5, 2 / 5, 3 / 5]])
    assert_allclose(conformal.credibility(X), [0.6, 0.6])
    assert_allclose(conformal.confidence(X), [0.6, 0.6])
    assert_array_equal(conformal.predict(X), ["a", "c"])
    assert conformal.n_calibration_ == 4


def test_full_agreement_has_the_highest_credibility():
    # Nonconformity 0 counts: every calibration row conforms no better.
    assert_allclose(on_a_line(p_value="empirical").credibility([[0.9]]), [1.0])


def test_two_layers_add_up_their_votes():
    class Folded(nn.Module):
        """The second layer folds the line at 5."""

        def __init__(self):
            super().__init__()
            self.straight, self.folded = nn.Identity(), nn.Identity()

        def forward(self, x):
            return self.folded((self.straight(x) - 5).abs())

    dknn = on_a_line(feature_extractor=Folded(), layers=["straight", "folded"])
    # 9.2: straight 9, 10, 8 -> c c c; folded |x - 5| = 4.2 among 5, 4, 3, 1, 3, 4, 5:
    # 4 (index 1, a), 4 (index 5, c), 5 (index 0, a) -> a c a. Votes: a 2, c 4.
    # Calibration: 0.5 (a): a a a + folded 4.5 among the same: 5 (0), 4 (1), 4 (5) -> a a c: 1.
    # 2.6 (a): a b a + 2.4: 3 (2), 3 (4), 1 (3) -> a c b: 1 + 2 = 3.
    # 5.0 (b): b a c + 0: 1 (3), 3 (2), 3 (4) -> b a c: 4.  9.4 (c): c c c + 4.4: 4 4 5 -> a c a: 2.
    # Nonconformity of 9.2: a 4, b 6, c 2; of 1, 2, 3, 4 at least as much: 1, 0 and 3 rows.
    assert_allclose(dknn.p_values([[9.2]]), [[2 / 5, 1 / 5, 4 / 5]])
    assert dknn.predict([[9.2]]) == ["c"]


def test_ties_go_by_votes_and_then_by_distance():
    X = np.array([[0.0], [1.0], [3.0], [4.0]])
    y = np.array([0, 0, 1, 1])
    dknn = DkNNClassifier(n_neighbors=4, calibration=(X, y)).fit(X, y)
    # All four are neighbours: two votes each, one p-value. The nearest decides.
    p = dknn.p_values([[1.9], [2.1]])
    assert_array_equal(p[:, 0], p[:, 1])
    assert_array_equal(dknn.predict([[1.9], [2.1]]), [0, 1])


def test_leave_one_out_calibration_by_hand():
    dknn = DkNNClassifier(n_neighbors=2, calibration="leave-one-out", p_value="empirical")
    dknn.fit(X_LINE, Y_LINE)
    # Two nearest others: 0: 1 2 (0). 1: 0 2 (0). 2: 1 and, of 0 and 4 at 2, the first (0).
    # 4 (b): 2 1 (2). 8: 9 10 (0). 9: 8 10 (0). 10: 9 8 (0). So: 0 six times, and 2.
    # 2.9: 2 (a), 4 (b) -> a 1, b 1, c 2: one row in seven has at least that.
    assert_allclose(dknn.p_values([[2.9]]), [[1 / 7, 1 / 7, 1 / 7]])
    assert dknn.predict([[2.9]]) == ["a"]


def test_calibration_rows_are_never_neighbours(digits):
    X, y = digits
    dknn = DkNNClassifier(n_neighbors=5, calibration=0.3, random_state=0).fit(X[:300], y[:300])
    held_out = sample_rows(300, 90, np.random.RandomState(0))
    kept = np.setdiff1d(np.arange(300), held_out)
    assert dknn.n_calibration_ == 90
    vote = KNeighborsClassifier(5).fit(X[kept], y[:300][kept])
    shares = vote.predict_proba(X[300:400])
    # The tie-breaking half vote aside, the shares are those of plain neighbours.
    assert_array_equal(
        np.round(dknn.predict_proba(X[300:400]) * 5 - shares * 5), np.zeros_like(shares)
    )


@pytest.mark.parametrize(
    ("share", "n_held_out"),
    [(0.01, 1), (0.1, 3), (np.float32(0.1), 3), (np.float16(0.5), 16), (0.999, 32)],
)
def test_a_share_holds_out_a_plain_random_sample_but_never_all(share, n_held_out):
    X, y = np.arange(33.0)[:, None], np.array([0] * 30 + [1] * 2 + [2])
    held_out = []
    for seed in range(200):
        dknn = DkNNClassifier(n_neighbors=1, calibration=share, random_state=seed).fit(X, y)
        assert dknn.n_calibration_ == n_held_out
        # A sample that is its own nearest neighbour was not held out.
        held_out.append(dknn._neighbors["input"].kneighbors(torch.from_numpy(X).float(), 1)[0])
    rate = (torch.stack(held_out)[:, :, 0, 0] < 0).double().mean(dim=0).numpy()
    # Every sample as likely as any other, whatever its class: five standard deviations.
    expected = n_held_out / 33
    assert (abs(rate - expected) < 5 * np.sqrt(expected * (1 - expected) / 200) + 1e-12).all()


def test_a_class_without_neighbours_is_known_but_never_predicted():
    X, y = np.arange(12.0)[:, None], np.array(["a"] * 6 + ["b"] * 5 + ["c"])
    lost = 0
    for seed in range(20):
        dknn = DkNNClassifier(n_neighbors=2, calibration=0.5, random_state=seed).fit(X, y)
        assert_array_equal(dknn.classes_, ["a", "b", "c"])
        p_values, proba = dknn.p_values(X), dknn.predict_proba(X)
        assert p_values.shape == proba.shape == (12, 3)
        assert_allclose(proba.sum(axis=1), 1)
        if 2 not in dknn._labels:
            lost += 1
            assert_array_equal(proba[:, 2], 0)
            assert "c" not in dknn.predict(X)
            # The sample of class c calibrates with the largest nonconformity, 2 neighbours.
            assert dknn._calibration[-1] == 2
            assert (p_values[:, 2] >= 2 / 7).all()
    assert 1 < lost < 19


def test_one_sample_cannot_be_neighbour_and_calibration():
    for calibration in (0.1, "leave-one-out"):
        with pytest.raises(ValueError, match=f"calibration={calibration!r} needs 2 .*n_samples=1"):
            DkNNClassifier(calibration=calibration).fit([[0.0]], [0])
    dknn = DkNNClassifier(calibration=([[0.0]], [0])).fit([[0.0]], [0])
    assert_allclose(dknn.p_values([[1.0]]), [[1.0]])


@pytest.mark.parametrize(
    "labels",
    [
        Y_CAL.tolist(),
        Y_CAL.astype(object),
        np.array([0, 0, 1, 2]),
        torch.tensor([0, 0, 1, 2]),
        torch.tensor([0.0, 0.0, 1.0, 2.0]),
    ],
    ids=["list", "object", "int", "tensor", "float tensor"],
)
@pytest.mark.parametrize("pair", [list, tuple])
def test_calibration_samples_of_your_own_may_be_of_any_kind(labels, pair):
    y = (
        Y_LINE
        if isinstance(np.asarray(labels).flat[0], str)
        else np.searchsorted(["a", "b", "c"], Y_LINE)
    )
    X_cal = torch.from_numpy(X_CAL) if isinstance(labels, torch.Tensor) else X_CAL.tolist()
    dknn = DkNNClassifier(n_neighbors=3, calibration=pair((X_cal, labels))).fit(X_LINE, y)
    assert_array_equal(dknn.p_values(X_LINE), on_a_line().p_values(X_LINE))


def test_calibration_labels_of_another_type_raise():
    dknn = DkNNClassifier(calibration=([[0.0], [1.0]], ["0", "1"]))
    with pytest.raises(ValueError, match=r"y_cal has classes that y has not: \['0', '1'\]"):
        dknn.fit([[0.0], [1.0]], [0, 1])


def test_parameters_set_after_fit_act_at_the_next_fit():
    dknn = on_a_line()
    expected = dknn.p_values(X_LINE)
    dknn.set_params(p_value="empirical", n_neighbors=1, calibration=0.5)
    assert_array_equal(dknn.p_values(X_LINE), expected)


def test_features_of_many_samples_are_never_held_at_once(digits, monkeypatch):
    X, y = digits
    expected = DkNNClassifier(n_neighbors=5, calibration="leave-one-out").fit(X[:300], y[:300])
    n_rows, features_of = [], FeatureMap.__call__

    def counting(self, X, **kwargs):
        n_rows.append(len(X))
        return features_of(self, X, **kwargs)

    monkeypatch.setattr(FeatureMap, "__call__", counting)
    with config_context(working_memory=0.03):  # 30 rows of 64 float32, four times
        for calibration in (0.1, "leave-one-out", (X[300:], y[300:])):
            dknn = clone(expected).set_params(calibration=calibration).fit(X[:300], y[:300])
            assert max(n_rows) <= 31, calibration
        dknn = clone(expected).fit(X[:300], y[:300])
        answers = dknn.p_values(X), dknn.predict_proba(X)
    assert max(n_rows) <= 31
    assert_array_equal(answers[0], expected.p_values(X))
    assert_allclose(answers[1], expected.predict_proba(X), rtol=1e-6)


def test_conformal_p_values_hold_on_clean_data(digits):
    X, y = digits
    order = np.random.default_rng(0).permutation(len(y))
    fit, new = order[:1000], order[1000:]
    dknn = DkNNClassifier(n_neighbors=10, calibration=0.3, random_state=0).fit(X[fit], y[fit])
    p_true = dknn.p_values(X[new])[np.arange(len(new)), y[new]]
    for level in (0.05, 0.1, 0.3):
        spread = np.sqrt(level * (1 - level) * (1 / len(new) + 1 / dknn.n_calibration_))
        assert (p_true <= level).mean() <= level + 3 * spread


@pytest.mark.parametrize("algorithm", ["brute", "kd_tree", "ball_tree", NearestNeighbors()])
def test_every_algorithm_gives_the_same_votes(digits, algorithm):
    X, y = digits
    dknn = DkNNClassifier(n_neighbors=7, random_state=0).fit(X[:200], y[:200])
    other = clone(dknn).set_params(algorithm=algorithm, n_jobs=2).fit(X[:200], y[:200])
    assert_allclose(dknn.predict_proba(X[200:300]), other.predict_proba(X[200:300]), rtol=1e-5)


def test_pickling_and_cloning(conv_net, digits):
    X, y = digits
    dknn = DkNNClassifier(conv_net, layers=["conv1", "conv2"], input_shape=(1, 8, 8))
    dknn.fit(X[:200], y[:200])
    loaded = pickle.loads(pickle.dumps(dknn))
    assert_array_equal(loaded.p_values(X[200:250]), dknn.p_values(X[200:250]))
    assert clone(dknn).feature_extractor is conv_net
    tensor = torch.tensor(X[200:250]).reshape(-1, 1, 8, 8)
    assert_array_equal(dknn.p_values(tensor), dknn.p_values(X[200:250]))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"calibration": 1.5}, "'calibration' parameter"),
        ({"calibration": (X_CAL,)}, r"calibration must be a pair \(X_cal, y_cal\), got 1 items"),
        ({"calibration": [X_CAL] * 3}, r"calibration must be a pair \(X_cal, y_cal\), got 3 items"),
        ({"calibration": np.array([X_CAL, X_CAL])}, "'calibration' parameter"),
        ({"calibration": ("ab", "cd")}, r"calibration=\(X_cal, y_cal\)"),
        ({"calibration": (X_CAL, ["a", "a", "b", "z"])}, r"classes that y has not: \['z'\]"),
        (
            {"calibration": (X_CAL, ["a"])},
            r"y_cal must have a label .* found 1 labels, but 4 samples",
        ),
        ({"calibration": (np.ones((2, 3)), ["a", "b"])}, "X_cal, y_cal.*3 features"),
        ({"p_value": "exact"}, "'p_value' parameter"),
        ({"n_neighbors": 0}, "'n_neighbors' parameter"),
    ],
)
def test_invalid_parameters_raise_and_change_nothing(params, message):
    dknn = on_a_line()
    expected = dknn.p_values(X_CAL)
    fitted = dict(vars(dknn))
    dknn.set_params(**params)
    with pytest.raises(ValueError, match=message):
        dknn.fit(X_LINE, Y_LINE)
    dknn.set_params(calibration=fitted["calibration"], p_value="conformal", n_neighbors=3)
    assert vars(dknn) == fitted
    assert_array_equal(dknn.p_values(X_CAL), expected)


class FindsFewer(NearestNeighbors):
    """An index that finds fewer neighbours than it is asked for, and fills up with -1."""

    n_found = 1

    def kneighbors(self, X, n_neighbors, return_distance):
        index = super().kneighbors(X, n_neighbors, return_distance=return_distance)
        index[:, self.n_found :] = -1
        return index


def test_neighbours_that_an_index_does_not_find_have_no_vote():
    dknn = on_a_line(algorithm=FindsFewer())
    proba = dknn.predict_proba(X_LINE)
    assert_array_equal(dknn.predict(X_LINE), Y_LINE)
    assert_array_equal(proba.max(axis=1), 1)  # of the one that was found
    with pytest.raises(ValueError, match="algorithm: kneighbors gave no neighbour"):
        on_a_line(algorithm=type("FindsNone", (FindsFewer,), {"n_found": 0})())
