"""Outlier detectors of scikit-learn and PyOD as methods of a ThreatScorer."""

import pickle

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.base import BaseEstimator, OutlierMixin, clone
from sklearn.ensemble import IsolationForest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import LocalOutlierFactor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import OneClassSVM
from torch import nn

from sklearn_rails import ThreatScorer
from sklearn_rails.sensing import SoftQuery

LOF = LocalOutlierFactor(novelty=True)


@pytest.fixture
def samples():
    rng = np.random.default_rng(0)
    X, new = rng.normal(size=(2, 400, 4)).astype(np.float32)
    return X, new


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


class FromZero(OutlierMixin, BaseEstimator):
    """Has only the decision_function that scikit-learn asks of an outlier detector."""

    def __init__(self, shape=(-1,)):
        self.shape = shape

    def fit(self, X, y=None):
        self.n_samples_ = len(X)
        return self

    def decision_function(self, X):
        return -np.linalg.norm(X, axis=1).reshape(self.shape)


@pytest.mark.parametrize(
    "detector",
    [
        LOF,
        IsolationForest(random_state=0),
        OneClassSVM(),
        make_pipeline(StandardScaler(), LOF),
        FromZero(),
    ],
    ids=lambda detector: type(detector).__name__,
)
def test_scores_of_scikit_learn_are_calibrated_on_held_out_samples(samples, detector):
    X, new = samples
    scorer = ThreatScorer(method=detector, alpha=0.1, random_state=0).fit(X)
    assert scorer.methods_ == (type(detector).__name__.lower(),)
    assert scorer.n_calibration_ == 200
    (fitted,) = scorer.detectors_.values()
    inner = fitted.estimators_["input"]
    score = getattr(inner, "score_samples", inner.decision_function)
    order = np.argsort(score(new))
    flagged = scorer.predict(new) == -1
    assert 0.02 < flagged.mean() < 0.2
    # Flagged are those of the lowest scores.
    assert_array_equal(np.sort(order[: flagged.sum()]), np.flatnonzero(flagged))
    assert (scorer.predict(new + 9) == -1).all()


def test_outlier_detectors_see_the_features_of_each_layer(samples, net):
    X, new = samples
    scorer = ThreatScorer(net, layers=["0", "1"], method=LOF, random_state=0).fit(X)
    (detector,) = scorer.detectors_.values()
    features = {name: f.numpy() for name, f in scorer.feature_map_(new).items()}
    for name, estimator in detector.estimators_.items():
        assert estimator.n_samples_fit_ == 200
        assert estimator.n_features_in_ == features[name].shape[1]
        assert set(map(bytes, estimator._fit_X)) < set(
            map(bytes, scorer.feature_map_(X)[name].numpy())
        )


def test_samples_that_fit_an_outlier_detector_do_not_calibrate(samples):
    X, _ = samples
    drawn = []

    class Records(FromZero):
        def fit(self, X, y=None):
            drawn.append(X.copy())
            return self

        def decision_function(self, X):
            drawn.append(X.copy())
            return super().decision_function(X)

    ThreatScorer(method=[Records(), "distance"], random_state=0).fit(X)
    fitted, *_, calibrating = [set(map(bytes, part)) for part in drawn]
    assert len(fitted) == len(calibrating) == 200
    assert not fitted & calibrating


def test_detectors_of_pyod_are_turned_round(samples):
    knn = pytest.importorskip("pyod.models.knn").KNN
    X, new = samples
    scorer = ThreatScorer(method=["distance", knn()], random_state=0).fit(X)
    assert scorer.methods_ == ("distance", "knn")
    assert (scorer.predict(new + 9) == -1).all()
    assert (scorer.predict(new) == -1).mean() < 0.12
    loaded = pickle.loads(pickle.dumps(scorer))
    assert_array_equal(loaded.score_samples(new), scorer.score_samples(new))


def test_scores_that_depend_on_the_batch_raise(samples):
    ecod = pytest.importorskip("pyod.models.ecod").ECOD
    with pytest.raises(ValueError, match=r"ECOD\(.* another score in another batch"):
        ThreatScorer(method=ecod()).fit(samples[0])


def test_names_of_outlier_detectors(samples):
    X, new = samples
    wide = LocalOutlierFactor(n_neighbors=30, novelty=True)
    scorer = ThreatScorer(method=["distance", LOF, IsolationForest(), wide], random_state=0).fit(X)
    names = ["distance", "localoutlierfactor-1", "isolationforest", "localoutlierfactor-2"]
    assert list(scorer.methods_) == list(scorer.detectors_) == names
    assert list(scorer.get_feature_names_out()) == [f"threat_{name}" for name in names]
    assert scorer.transform(new).shape == (400, 4)
    assert repr(scorer.detectors_["localoutlierfactor-2"]) == f"OutlierDetector({wide!r})"


def test_parameters_are_never_changed(samples):
    X, new = samples
    forest = IsolationForest(n_estimators=5)
    methods = [forest, "distance"]
    scorer = ThreatScorer(method=methods, random_state=0).fit(X)
    assert scorer.method is methods
    assert methods == [forest, "distance"]
    assert forest.random_state is None
    assert not hasattr(forest, "estimators_")
    # The scorer's random_state is that of the forest, which has none.
    again = clone(scorer)
    assert again.method[0] is not forest
    assert_array_equal(again.fit(X).score_samples(new), scorer.score_samples(new))
    other = clone(scorer).set_params(random_state=1).fit(X).score_samples(new)
    assert (other != scorer.score_samples(new)).any()
    # Nor does a change of the parameter change what is fitted.
    before = scorer.score_samples(new)
    forest.set_params(n_estimators=9)
    assert_array_equal(scorer.score_samples(new), before)


def test_a_search_over_the_parameters_of_an_outlier_detector(samples):
    X, _ = samples

    def caught(scorer, X, y=None):
        return (scorer.predict(X + 3) == -1).mean()

    grid = {"method__n_neighbors": [3, 10], "alpha": [0.1]}
    search = GridSearchCV(ThreatScorer(method=LOF, random_state=0), grid, scoring=caught, cv=2)
    search.fit(X)
    assert search.best_estimator_.method.n_neighbors in (3, 10)
    assert LOF.n_neighbors == 20


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        (LocalOutlierFactor(), TypeError, r"LocalOutlierFactor\(\) cannot .* novelty=True"),
        (LocalOutlierFactor, TypeError, r"the class LocalOutlierFactor; pass LocalOutlierFactor"),
        (StandardScaler(), TypeError, r"StandardScaler\(\) is not an outlier detector"),
        (["distance", LogisticRegression()], TypeError, "is not an outlier detector"),
        (["distance", 3], TypeError, "3 is not an outlier detector"),
        ("mahalanobi", ValueError, r"such as IsolationForest\(\).* Did you mean 'mahalanobis'\?"),
        ("LID", ValueError, r"Did you mean 'lid'\?"),
        (["auto", LOF], ValueError, "'auto' cannot be in a list"),
        (FromZero(shape=(-1, 1)), ValueError, r"decision_function of .* got shape \(1, 1\)"),
    ],
)
def test_what_is_not_a_method_raises(samples, method, error, message):
    with pytest.raises(error, match=message):
        ThreatScorer(method=method).fit(samples[0])


def test_outlier_detectors_need_four_samples(samples):
    X, _ = samples
    with pytest.raises(ValueError, match="needs 4 samples or more, got n_samples=3"):
        ThreatScorer(method=FromZero()).fit(X[:3])
    with pytest.warns(UserWarning, match="alpha=0.05 needs 19 calibration samples"):
        ThreatScorer(method=[FromZero(), "distance"]).fit(X[:4])


def test_new_samples_may_come_one_by_one(samples):
    X, new = samples
    scorer = ThreatScorer(method=[LOF, "mahalanobis"], random_state=0).fit(X)
    alone = np.concatenate([scorer.score_samples(x[None]) for x in new[:9]])
    assert_allclose(alone, scorer.score_samples(new)[:9], rtol=1e-5)


def test_an_attack_cannot_differentiate_an_outlier_detector(samples):
    X, _ = samples
    scorer = ThreatScorer(method=LOF, random_state=0).fit(X)
    (detector,) = scorer.detectors_.values()
    with pytest.raises(NotImplementedError, match="OutlierDetector has no differentiable threat"):
        detector.soft_threat(SoftQuery(torch.zeros(2, 4), scorer.feature_map_))
