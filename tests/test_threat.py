import pickle

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline, make_union
from sklearn.preprocessing import normalize

from sklearn_rails import RAILSClassifier, ThreatScorer
from sklearn_rails.demo import train_network
from sklearn_rails.immune.sensing import SENSORS

ANYWHERE = ["credibility", "distance", "kernel_density", "mahalanobis", "lid"]
METHODS = [*ANYWHERE, ["credibility", "distance"], ANYWHERE]
WITH_NETWORK = [*SENSORS, list(SENSORS)]


@pytest.fixture
def split(digits):
    X, y = digits
    order = np.random.default_rng(0).permutation(len(y))
    return X[order[:900]], y[order[:900]], X[order[900:]]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("with_labels", [True, False])
def test_alarms_on_clean_rows_are_as_rare_as_asked_for(split, method, with_labels):
    X, y, new = split
    scorer = ThreatScorer(method=method, random_state=0)
    for alpha in (0.05, 0.2):
        scorer.set_params(alpha=alpha).fit(X, y if with_labels else None)
        rate = (scorer.predict(new) == -1).mean()
        spread = np.sqrt(alpha * (1 - alpha) * (1 / len(new) + 1 / scorer.n_calibration_))
        assert abs(rate - alpha) < 3 * spread


@pytest.mark.slow
@pytest.mark.parametrize("method", WITH_NETWORK, ids=str)
def test_alarms_with_a_network_are_as_rare_as_asked_for(split, method):
    X, y, new = split
    network = train_network(X[:300].reshape(-1, 1, 8, 8), y[:300], max_epochs=5, verbose=0)
    # Not the rows that the network was trained on.
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
def test_noise_is_more_suspect_than_clean_rows(split, method, auroc):
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
    clean = np.sort(index.kneighbors()[0][:, -1])  # scikit-learn leaves a row itself out
    radius = index.kneighbors(normalize(new))[0][:, -1]
    p_values = (1 + (clean >= radius[:, None]).sum(axis=1)) / (1 + len(clean))
    assert_array_equal(scorer.predict(new) == -1, p_values <= 0.05)


def test_scores_fit_together(split):
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


def test_saved_scorers_answer_as_before(conv_net, split):
    X, y, new = split
    scorer = ThreatScorer(
        conv_net, layers=["conv1", "conv2"], method=list(SENSORS), input_shape=(1, 8, 8)
    ).fit(X, y)
    loaded = pickle.loads(pickle.dumps(scorer))
    assert_array_equal(loaded.score_samples(new), scorer.score_samples(new))


def test_too_few_rows_for_alpha_are_told():
    X = np.random.default_rng(0).random((15, 2))
    with pytest.warns(UserWarning, match=r"alpha=0.05 needs 19 calibration rows, but there are 15"):
        scorer = ThreatScorer().fit(X)
    assert (scorer.predict(X + 100) == 1).all()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"method": "entropy"}, "'method' parameter"),
        ({"method": ["distance", "entropy"]}, r"method=\['distance', 'entropy'\] must be one of"),
        ({"method": ["distance", "distance"]}, "once"),
        ({"method": []}, "one or more"),
        ({"alpha": 0.0}, "'alpha' parameter"),
        ({"output": "frame"}, "'output' parameter"),
        (
            {"method": "disagreement"},
            r"'disagreement' is about a network's answers",
        ),
        ({"method": ["distance", "feature_squeezing"]}, "'feature_squeezing' is about a network"),
        ({"method": "lid", "n_neighbors": 1}, "'lid' compares distances .* n_neighbors=1"),
        ({"layers": "conv1"}, r"does not have: \['conv1'\]"),
    ],
)
def test_bad_parameters_are_named(split, params, message):
    with pytest.raises(ValueError, match=message):
        ThreatScorer(**params).fit(split[0])


def test_labels_need_an_output_for_each_class(conv_net, split):
    X, y, _ = split
    scorer = ThreatScorer(conv_net, method="disagreement", input_shape=(1, 8, 8))
    with pytest.raises(ValueError, match=r"method='disagreement' needs .* 10 outputs .* 2 classes"):
        scorer.fit(X, y % 2)
