import pickle
import warnings

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from sklearn import config_context
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import LocalOutlierFactor, NearestNeighbors
from sklearn.pipeline import make_pipeline, make_union
from sklearn.preprocessing import normalize
from torch import nn

from sklearn_rails import RAILSClassifier, ThreatScorer, TorchFeatureExtractor
from sklearn_rails.demo import train_network
from sklearn_rails.features.mapping import FeatureMap
from sklearn_rails.sensing import DETECTORS, Detector, score_new

ANYWHERE = ["credibility", "distance", "kernel_density", "mahalanobis", "lid"]
METHODS = [*ANYWHERE, ["credibility", "distance"], ANYWHERE]
WITH_NETWORK = [*DETECTORS, list(DETECTORS)]


@pytest.fixture
def split(digits):
    X, y = digits
    order = np.random.default_rng(0).permutation(len(y))
    return X[order[:900]], y[order[:900]], X[order[900:]]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("with_labels", [True, False])
def test_false_alarm_rate_is_alpha(split, method, with_labels):
    X, y, new = split
    scorer = ThreatScorer(method=method, random_state=0)
    for alpha in (0.05, 0.2):
        scorer.set_params(alpha=alpha).fit(X, y if with_labels else None)
        rate = (scorer.predict(new) == -1).mean()
        spread = np.sqrt(alpha * (1 - alpha) * (1 / len(new) + 1 / scorer.n_calibration_))
        assert abs(rate - alpha) < 3 * spread


@pytest.mark.slow
@pytest.mark.parametrize("method", WITH_NETWORK, ids=str)
def test_false_alarm_rate_with_a_network_is_alpha(split, method):
    X, y, new = split
    network = train_network(X[:300].reshape(-1, 1, 8, 8), y[:300], max_epochs=5, verbose=0)
    # Not the samples that the network was trained on.
    X, y = X[300:], y[300:]
    scorer = ThreatScorer(
        network, layers=["conv2", "fc"], method=method, input_shape=(1, 8, 8), random_state=0
    )
    for alpha in (0.05, 0.2):
        scorer.set_params(alpha=alpha).fit(X, y)
        rate = (scorer.predict(new) == -1).mean()
        spread = np.sqrt(alpha * (1 - alpha) * (1 / len(new) + 1 / scorer.n_calibration_))
        assert abs(rate - alpha) < 3 * spread


# Noise lies far from all classes, but what few neighbours it has may be of one: credibility alone
# is not made for it.
@pytest.mark.parametrize(
    ("method", "auroc"),
    [
        ("credibility", 0.85),
        ("distance", 0.99),
        ("kernel_density", 0.99),
        ("mahalanobis", 0.99),
        ("lid", 0.9),
    ],
)
def test_noise_is_more_suspect_than_clean_samples(split, method, auroc):
    X, y, new = split
    scorer = ThreatScorer(method=method, random_state=0).fit(X, y)
    noise = np.random.default_rng(0).uniform(size=(200, 64))
    threat = scorer.transform(np.concatenate([new, noise]))
    is_noise = np.repeat([0, 1], [len(new), len(noise)])
    assert threat.shape == (len(is_noise), 1)
    assert roc_auc_score(is_noise, threat[:, 0]) > auroc
    assert (scorer.predict(noise) == -1).mean() > 4 * (scorer.predict(new) == -1).mean()


def test_the_distance_is_that_of_the_kth_neighbour_among_the_others(split):
    X, y, new = split
    scorer = ThreatScorer(method="distance", n_neighbors=4, random_state=0).fit(X, y)
    index = NearestNeighbors(n_neighbors=4).fit(normalize(X))
    clean = np.sort(index.kneighbors()[0][:, -1])  # scikit-learn leaves a sample itself out
    radius = index.kneighbors(normalize(new))[0][:, -1]
    p_values = (1 + (clean >= radius[:, None]).sum(axis=1)) / (1 + len(clean))
    assert_array_equal(scorer.predict(new) == -1, p_values <= 0.05)


def test_each_method_has_the_layers_that_a_dict_gives_it(conv_net, split):
    X, y, new = split
    of_method = {"credibility": ["conv1", "fc"], "mahalanobis": "fc", "kernel_density": ["conv2"]}
    of_method |= {"distance": "conv1", "disagreement": ["fc", "conv1"], "lid": "output"}
    methods = [*of_method, "feature_squeezing", "confidence", LocalOutlierFactor(novelty=True)]
    of_method |= {"localoutlierfactor": "conv2"}
    given = {"input_shape": (1, 8, 8), "random_state": 0}
    scorer = ThreatScorer(conv_net, layers=of_method, method=methods, **given).fit(X, y)
    assert set(scorer.layers_) == {"conv1", "conv2", "fc", "output"}
    for method, name in zip(methods, scorer.methods_, strict=True):
        layers = of_method.get(name, "conv1")
        alone = ThreatScorer(conv_net, layers=layers, method=method, **given).fit(X, y)
        scores = [
            score_new({name: s.detectors_[name]}, new, s.feature_map_, 10, alone._evidence.n_scores)
            for s in (scorer, alone)
        ]
        assert_array_equal(*scores)


def test_layers_of_each_method_are_searched_like_others(conv_net, split):
    X, y, new = split
    scorer = ThreatScorer(
        conv_net, method=["distance", "confidence"], input_shape=(1, 8, 8), random_state=0
    )
    by_method = clone(scorer).set_params(layers={"distance": "conv1"}).fit(X, y)
    for_all = clone(scorer).set_params(layers="conv1").fit(X, y)
    assert_array_equal(by_method.transform(new), for_all.transform(new))
    names = [{"distance": "conv1"}, {"distance": "fc"}]
    search = GridSearchCV(scorer, {"layers": names}, scoring=lambda s, X: -len(s.layers_[0]), cv=2)
    assert search.fit(X).best_estimator_.layers_ == ("fc",)


def test_scores_transform_and_predict_agree(split):
    X, y, new = split
    scorer = ThreatScorer(method=["credibility", "distance"], random_state=0).fit(X, y)
    assert_array_equal(scorer.score_samples(new), -scorer.transform(new).sum(axis=1))
    assert_array_equal(scorer.decision_function(new), scorer.score_samples(new) - scorer.offset_)
    assert_array_equal(scorer.predict(new), np.where(scorer.decision_function(new) < 0, -1, 1))


def test_without_labels_the_classes_are_those_the_network_predicts(conv_net, split):
    X, _, new = split
    with torch.no_grad():
        images = torch.tensor(X).reshape(-1, 1, 8, 8)
        conv_net.fc.bias -= conv_net.eval()(images).mean(dim=0)  # so that it predicts all classes
        predicted = conv_net(images).argmax(dim=1).numpy()
    scorer = ThreatScorer(conv_net, layers="conv1", input_shape=(1, 8, 8), random_state=0)
    given = clone(scorer).fit(X, predicted).transform(new)
    assert_array_equal(scorer.fit(X).transform(new), given)
    shuffled = np.random.default_rng(0).permutation(predicted)
    assert (scorer.fit(X, shuffled).transform(new) != given).any()


def test_before_a_classifier_in_a_pipeline_and_beside_features_in_a_union(split):
    X, y, new = split
    rails = RAILSClassifier(population_size=50, random_state=0)
    alone = rails.fit(X, y).predict(new[:50])
    pipe = make_pipeline(ThreatScorer(output="passthrough"), clone(rails)).fit(X, y)
    assert_array_equal(pipe.predict(new[:50]), alone)
    scorer = ThreatScorer(output="passthrough").fit(X, y)
    assert scorer.transform(new) is new
    assert list(scorer.get_feature_names_out()[:2]) == ["x0", "x1"]
    union = make_union("passthrough", ThreatScorer(method=["credibility", "distance"])).fit(X, y)
    assert union.transform(new).shape == (len(new), 66)
    frame = union.set_output(transform="pandas").transform(new)
    assert list(frame.columns[-2:]) == [
        "threatscorer__threat_credibility",
        "threatscorer__threat_distance",
    ]


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_frames_have_the_methods_names(split, library):
    pytest.importorskip(library)
    X, y, new = split
    scorer = ThreatScorer(method=["lid", "distance"]).set_output(transform=library)
    frame = scorer.fit(X, y).transform(new)
    assert type(frame).__module__.split(".")[0] == library
    assert list(frame.columns) == ["threat_lid", "threat_distance"]


def test_a_search_over_methods_and_alpha(split):
    X, y, _ = split
    search = GridSearchCV(
        make_pipeline(ThreatScorer(random_state=0), LogisticRegression()),
        {"threatscorer__method": ["distance", "credibility"], "threatscorer__alpha": [0.05, 0.1]},
        cv=2,
    ).fit(X, y)
    assert len(search.cv_results_["params"]) == 4

    def caught(scorer, X, y):
        noise = np.random.default_rng(0).uniform(size=X.shape)
        return (scorer.predict(noise) == -1).mean() - (scorer.predict(X) == -1).mean()

    grid = {"method": ["credibility", "distance"], "alpha": [0.01, 0.1]}
    search = GridSearchCV(ThreatScorer(random_state=0), grid, scoring=caught, cv=2).fit(X, y)
    assert search.best_params_["method"] == "distance"


def test_pickled_scorers_score_alike(conv_net, split):
    X, y, new = split
    scorer = ThreatScorer(
        conv_net, layers=["conv1", "conv2"], method=list(DETECTORS), input_shape=(1, 8, 8)
    ).fit(X, y)
    loaded = pickle.loads(pickle.dumps(scorer))
    assert_array_equal(loaded.score_samples(new), scorer.score_samples(new))


def test_too_few_samples_for_alpha_warn():
    X = np.random.default_rng(0).random((15, 2))
    y = np.arange(15) % 2
    scorer = ThreatScorer()
    for fit in (
        ThreatScorer().fit_predict,
        ThreatScorer().fit_transform,
        make_pipeline(ThreatScorer()).fit,
        RAILSClassifier(threat_scorer=ThreatScorer()).fit,
        scorer.fit,
    ):
        message = r"alpha=0.05 needs 19 calibration samples, but there are 15"
        with pytest.warns(UserWarning, match=message) as told:
            fit(X, y)
        assert [warning.filename for warning in told] == [__file__]
    assert (scorer.predict(X + 100) == 1).all()
    assert np.isfinite(scorer.decision_function(X + 100)).all()


@pytest.mark.parametrize("alpha", [5e-324, np.float32(1e-6)])
def test_nothing_is_flagged_at_a_tiny_alpha(alpha):
    X = np.random.default_rng(0).random((40, 2))
    with pytest.warns(UserWarning, match="needs .* calibration samples, but there are 40"):
        scorer = ThreatScorer(alpha=alpha).fit(X)
    assert (scorer.predict(X + 100) == 1).all()


@pytest.mark.parametrize(
    ("alpha", "n_samples", "n_alarms"),
    # 0.29 * 100 is 28.999999999999996, and so is the floor of 0.07 * 100 only by luck.
    [(0.29, 99, 28), (0.07, 99, 6), (np.nextafter(1, 0), 9, 8), (np.float32(0.1), 9, 0)],
)
def test_flagged_samples_are_counted_in_exact_fractions(alpha, n_samples, n_alarms):
    X = np.sort(np.random.default_rng(0).random((n_samples, 1)), axis=0) ** 3
    scorer = ThreatScorer(alpha=alpha, n_neighbors=2, random_state=0).fit(X)
    index = NearestNeighbors(n_neighbors=2).fit(np.float32(X))
    clean = np.sort(index.kneighbors()[0][:, -1])
    asked = np.linspace(1.5, 3, 50)[:, None] ** 3
    radius = index.kneighbors(np.float32(asked))[0][:, -1]
    expected = radius > clean[::-1][n_alarms]
    assert_array_equal(scorer.predict(asked) == -1, expected)


@pytest.mark.parametrize(("n_samples", "k"), [(2, 1), (3, 2), (10, 2), (41, 10), (300, 50)])
def test_neighbours_are_a_quarter_of_few_samples(n_samples, k):
    X = np.random.default_rng(0).random((n_samples, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert ThreatScorer().fit(X).n_neighbors_ == k


def test_fit_predict_takes_the_labels(split):
    X, y, _ = split
    scorer = ThreatScorer(random_state=0)
    at_once = scorer.fit_predict(X, y)
    assert_array_equal(at_once, ThreatScorer(random_state=0).fit(X, y).predict(X))
    assert (at_once != ThreatScorer(random_state=0).fit_predict(X)).any()


def test_ties_are_not_flagged():
    # Two places, one of them rare: its samples are the most suspect, but not more than one another.
    X = np.repeat([[0.0], [1.0]], [950, 50], axis=0)
    for method in ("distance", "mahalanobis", "kernel_density", ["mahalanobis", "kernel_density"]):
        scorer = ThreatScorer(method=method, alpha=0.02, random_state=0).fit(X + 1)
        assert (scorer.predict([[1.0], [2.0]]) == 1).all(), method


class Breaks(nn.Module):
    """Gives a number that is not finite where the first value of a sample is above 2."""

    def __init__(self, broken=np.nan, where="features"):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.hidden, self.fc = nn.Identity(), nn.Linear(4, 3)
        self.broken, self.where = broken, where

    def forward(self, x):
        breaks = x[:, :1] > 2
        features = self.hidden(
            x.masked_fill(breaks, self.broken) if self.where == "features" else x
        )
        outputs = self.fc(features.nan_to_num(0.0, 0.0, 0.0))
        return outputs.masked_fill(breaks, self.broken) if self.where == "outputs" else outputs


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("method", [*DETECTORS, ["credibility", "distance"]], ids=str)
@pytest.mark.parametrize("n_samples", [10, 80])
@pytest.mark.filterwarnings("ignore:alpha=0.05 needs")
def test_samples_without_finite_features_are_always_flagged(broken, method, n_samples):
    # Of 10 samples, no other can be flagged.
    X = np.random.default_rng(0).random((n_samples, 4))
    scorer = ThreatScorer(Breaks(broken), layers="hidden", method=method, random_state=0).fit(X)
    new = np.random.default_rng(1).random((6, 4))
    strange = new.copy()
    strange[[1, 4], 0] = 3
    threat = scorer.transform(strange)
    assert np.isfinite(threat).all()
    assert_array_equal(scorer.score_samples(strange), -threat.sum(axis=1))
    assert_array_equal(scorer.predict(strange)[[1, 4]], -1)
    assert threat[[1, 4]].min() > 1000 > np.delete(threat, [1, 4], axis=0).max()
    # The others' scores are as without them, and it is so alone.
    kept = [0, 2, 3, 5]
    assert_allclose(scorer.transform(strange)[kept], scorer.transform(new[kept]), rtol=1e-6)
    assert_array_equal(scorer.predict(strange[[1, 4]]), -1)


@pytest.mark.parametrize("method", ["disagreement", "kernel_density", "feature_squeezing"])
def test_outputs_that_are_not_finite_are_flagged_where_a_method_needs_them(method):
    X = np.random.default_rng(0).random((40, 4))
    network = Breaks(where="outputs")
    scorer = ThreatScorer(network, layers="hidden", method=method, random_state=0).fit(X)
    strange = X[:3] + np.array([3, 0, 0, 0])
    assert_array_equal(scorer.predict(strange), -1)
    assert np.isfinite(scorer.score_samples(strange)).all()
    X[7, 0] = 3
    with pytest.raises(ValueError, match="gives NaN or infinity for some samples of X"):
        ThreatScorer(network, layers="hidden", method=method).fit(X)


def test_training_features_that_are_not_finite_raise():
    X = np.random.default_rng(0).random((40, 4))
    X[7, 0] = 3
    with pytest.raises(ValueError, match="layers='hidden': the network gives NaN or infinity"):
        ThreatScorer(Breaks(), layers="hidden").fit(X)


@pytest.mark.parametrize("method", ["credibility", "kernel_density", "lid"])
def test_one_huge_training_sample_does_not_change_other_scores(method):
    X = np.random.default_rng(0).random((300, 12))
    X[7, 0] = 1e20
    scorer = ThreatScorer(method=method, random_state=0).fit(X)
    assert np.isfinite(scorer.transform(X)).all()
    assert scorer.predict(X[7:8] * 2) == -1


class Scripted(Detector):
    """Score a sample by its first value, in two columns."""

    def fit(self, clean):
        return self

    def score(self, query):
        return np.float64(query.X[:, :1]) * [1, 0] + [0, 7]


class Coded(Scripted):
    def __call__(self, query):
        special = {-1: np.nan, -2: np.inf, -3: -np.inf}
        return np.array([[special.get(int(value), value)] for value in query.X[:, 0]])


def test_infinite_scores_are_in_order_and_nan_is_flagged(monkeypatch):
    monkeypatch.setitem(DETECTORS, "lid", Coded)
    nan, above, below = [-1.0], [-2.0], [-3.0]
    clean = np.arange(1.0, 60)[:, None]
    scorer = ThreatScorer(method="lid", random_state=0).fit(clean)
    asked = [[1.0], [57.0], [58.0], [100.0], above, below, nan]
    # What no clean sample has cannot be compared.
    assert_array_equal(scorer.predict(asked), [1, 1, -1, -1, -1, -1, -1])
    # A tenth of the clean samples have it: a score like any other, the highest or the lowest.
    scorer.fit(np.concatenate([clean, [above] * 6, [below] * 6]))
    assert_array_equal(scorer.predict(asked), [1, 1, 1, 1, 1, 1, -1])
    evidence = scorer.transform([below, *asked[:4], above, nan])[:, 0]
    assert (np.diff(evidence) > 0).sum() >= 4
    assert (np.diff(evidence) >= 0).all()
    assert np.isfinite(evidence).all()
    # NaN among clean samples counts as the highest.
    scorer.set_params(alpha=0.2).fit(np.concatenate([clean, [nan] * 6]))
    assert_array_equal(scorer.predict([[1.0], [59.0], nan]), [1, -1, -1])
    with pytest.raises(ValueError, match="method='lid': all scores of 'lid' are NaN"):
        scorer.fit(np.full((30, 1), -1.0))


def test_halves_that_set_scales_and_threshold_are_drawn_at_random(monkeypatch):
    # Sorted samples, in two columns of scores: the first half would be no measure for the second.
    monkeypatch.setitem(DETECTORS, "lid", Scripted)
    X = np.arange(4000.0)[:, None]
    scorer = ThreatScorer(method="lid", alpha=0.1, random_state=0).fit(X)
    assert scorer.n_calibration_ == 2000
    flagged = (scorer.predict(np.arange(0, 4000, 0.5)[:, None]) == -1).mean()
    assert abs(flagged - 0.1) < 4 * np.sqrt(0.1 * 0.9 / 2000)


@pytest.mark.parametrize("method", [m for m in DETECTORS if m != "mahalanobis"])
def test_scores_do_not_depend_on_batches_or_blocks(conv_net, split, method):
    X, y, new = split
    scorer = ThreatScorer(
        conv_net, layers=["conv2", "fc"], method=method, input_shape=(1, 8, 8), random_state=0
    ).fit(X[:200], y[:200])
    scores = scorer.score_samples(new[:60])
    alone = np.concatenate([scorer.score_samples(new[i : i + 1]) for i in range(20)])
    assert_allclose(alone, scores[:20], rtol=1e-6, atol=1e-6)
    with config_context(working_memory=0.05):
        assert_allclose(scorer.score_samples(new[:60]), scores, rtol=1e-6, atol=1e-6)


def test_features_of_many_new_samples_are_never_held_at_once(split, monkeypatch):
    X, y, new = split
    scorer = ThreatScorer(random_state=0).fit(X, y)
    n_samples, features_of = [], FeatureMap.__call__

    def counting(self, X, *args, **kwargs):
        n_samples.append(len(X))
        return features_of(self, X, *args, **kwargs)

    monkeypatch.setattr(FeatureMap, "__call__", counting)
    with config_context(working_memory=0.03):  # 30 samples of 64 float32, four times
        scorer.predict(new)
    assert max(n_samples) <= 31
    assert sum(n_samples) == len(new)


def test_fitted_attributes_have_pyods_names_too():
    data = pytest.importorskip("pyod.utils.data")
    rng = np.random.default_rng(0)
    X, far = rng.normal(size=(100, 4)), rng.normal(5, 1, size=(10, 4))
    scorer = ThreatScorer(method="distance", alpha=0.1, random_state=0).fit(X)
    assert len(scorer.decision_scores_) == scorer.n_calibration_
    assert scorer.threshold_ == -scorer.offset_
    assert 0 < scorer.labels_.mean() <= 0.1
    assert_array_equal(scorer.labels_, scorer.decision_scores_ > scorer.threshold_)
    new = np.concatenate([X[:10] + 0.1, far])
    threat, truth = -scorer.score_samples(new), np.repeat([0, 1], 10)
    assert_array_equal(threat > scorer.threshold_, scorer.predict(new) == -1)
    data.evaluate_print("ThreatScorer", truth, threat)


AUTO = ("disagreement", "mahalanobis", "feature_squeezing")
WITHOUT_OUTPUTS = ("credibility", "mahalanobis")


def test_methods_are_chosen_for_what_there_is(split):
    X, y, new = split
    assert ThreatScorer().fit(X, y).methods_ == ("credibility",)
    assert ThreatScorer(TorchFeatureExtractor()).fit(X).methods_ == ("credibility",)
    network = nn.Linear(64, 10)
    scorer = ThreatScorer(network, random_state=0)
    for targets in (y, None):
        assert scorer.fit(X, targets).methods_ == AUTO
        named = ThreatScorer(network, method=list(AUTO), random_state=0).fit(X, targets)
        assert_array_equal(scorer.score_samples(new), named.score_samples(new))
    assert scorer.transform(new).shape == (len(new), 3)
    assert ThreatScorer(nn.Linear(64, 1)).fit(X, y > 4).methods_ == AUTO


@pytest.mark.parametrize(
    ("n_outputs", "n_classes", "reason"),
    [
        (16, 10, "16 outputs and y has 10 classes"),  # an embedding
        (1, 10, "1 outputs and y has 10 classes"),  # a number
        (10, 1, "10 outputs and y has 1 classes"),
    ],
)
def test_outputs_that_are_not_the_classes_are_left_out_with_a_warning(
    split, n_outputs, n_classes, reason
):
    X, y, new = split
    scorer = ThreatScorer(nn.Linear(64, n_outputs), random_state=0)
    with pytest.warns(UserWarning, match=f"method='auto' uses .* {reason}") as told:
        scorer.fit(X, y % n_classes)
    assert [warning.filename for warning in told] == [__file__]
    assert scorer.methods_ == WITHOUT_OUTPUTS
    assert (scorer.predict(new + 9) == -1).all()


class Pair(nn.Module):
    """Returns two tensors, of which none is the output."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 8), nn.Linear(8, 10)

    def forward(self, x):
        hidden = self.first(x)
        return {"hidden": hidden, "scores": self.second(hidden)}


def test_a_network_with_outputs_that_cannot_be_used(split):
    X, y, _ = split
    with pytest.warns(UserWarning, match="method='auto' uses .* the network gives a dict there"):
        scorer = ThreatScorer(Pair(), layers="first").fit(X, y)
    assert scorer.methods_ == WITHOUT_OUTPUTS
    # There are then no classes but those of y.
    with pytest.raises(ValueError, match="the network gives a dict there"):
        ThreatScorer(Pair(), layers="first").fit(X)
    with pytest.raises(ValueError, match="the network gives a dict there"):
        ThreatScorer(Pair()).fit(X, y)


def test_integers_are_not_squeezed():
    tokens = np.random.default_rng(0).integers(9, size=(80, 4))
    embedding = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(16, 3))
    scorer = ThreatScorer(embedding, layers="1", random_state=0).fit(tokens)
    assert scorer.methods_ == ("disagreement", "mahalanobis")


@pytest.mark.parametrize("method", ["auto", "disagreement", "kernel_density", "feature_squeezing"])
def test_one_class_and_a_network_of_one_output(method):
    X = np.random.default_rng(0).normal(size=(60, 4))
    scorer = ThreatScorer(nn.Linear(4, 1), method=method, n_neighbors=2, alpha=0.1)
    scorer.fit(X, np.zeros(60))
    assert np.isfinite(scorer.transform(X)).all()
    assert (scorer.predict(X) == -1).mean() < 0.25


def test_output_set_after_fit_takes_effect_at_the_next_fit(split):
    X, y, new = split
    scorer = ThreatScorer().fit(X, y).set_params(output="passthrough")
    assert scorer.transform(new).shape == (len(new), 1)
    assert list(scorer.get_feature_names_out()) == ["threat_credibility"]
    assert scorer.fit(X, y).transform(new) is new


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"method": "entropy"}, r"method='entropy' must be one of"),
        ({"method": 3}, "'method' parameter"),
        ({"method": ["distance", "entropy"]}, r"method=\['distance', 'entropy'\] must be one of"),
        ({"method": ["distance", "distance"]}, "once"),
        ({"method": []}, "one or more"),
        ({"alpha": 0.0}, "'alpha' parameter"),
        ({"output": "frame"}, "'output' parameter"),
        (
            {"method": "disagreement"},
            r"'disagreement' depends on a network's outputs",
        ),
        ({"method": ["distance", "feature_squeezing"]}, "'feature_squeezing' depends on a network"),
        ({"method": "lid", "n_neighbors": 1}, "'lid' needs 2 neighbours or more.* n_neighbors=1"),
        ({"layers": "conv1"}, r"does not have: \['conv1'\]"),
        ({"method": "distance", "layers": {"distance": "conv1"}}, r"does not have: \['conv1'\]"),
        ({"method": "distance", "layers": {"distance": []}}, r"layers\['distance'\]=\[\] must"),
        ({"method": "distance", "layers": {"distance": ["input"] * 2}}, "and each only once"),
        ({"method": "distance", "layers": {"lid": "input"}}, r"\['distance'\].* got .*\['lid'\]"),
        ({"method": "distance", "layers": {}}, r"those of \['distance'\].* got those of \[\]"),
        (
            {
                "method": ["distance", "confidence"],
                "layers": {"distance": "input", "confidence": "input"},
            },
            r"those of \['distance'\], the methods that score layers",
        ),
    ],
)
def test_invalid_parameters_raise(split, params, message):
    with pytest.raises(ValueError, match=message):
        ThreatScorer(**params).fit(split[0])


@pytest.mark.parametrize("layers", [None, 1, ["input", 1]])
def test_layers_of_a_method_are_named_by_strings(split, layers):
    with pytest.raises(TypeError, match=r"layers\['distance'\] must be the name of a layer"):
        ThreatScorer(method="distance", layers={"distance": layers}).fit(split[0])


def test_labels_need_an_output_for_each_class(conv_net, split):
    X, y, _ = split
    scorer = ThreatScorer(conv_net, method="disagreement", input_shape=(1, 8, 8))
    with pytest.raises(ValueError, match=r"method='disagreement' needs .* 10 outputs .* 2 classes"):
        scorer.fit(X, y % 2)
