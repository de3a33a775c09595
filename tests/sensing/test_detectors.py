import pickle

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from scipy.ndimage import median_filter
from scipy.special import softmax
from sklearn import config_context
from sklearn.covariance import LedoitWolf
from torch import nn
from torch.nn.functional import normalize

from sklearn_rails import sensing
from sklearn_rails._conformal import sample_rows
from sklearn_rails.features.mapping import FeatureMap
from sklearn_rails.sensing import DETECTORS, CleanSamples, Query
from sklearn_rails.sensing.mahalanobis import ShrunkWhitening

N_CLASSES, K = 3, 4


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, N_CLASSES))


@pytest.fixture
def samples():
    rng = np.random.default_rng(0)
    y = rng.permutation(np.arange(40) % N_CLASSES)
    X = (rng.normal(size=(40, 5)) + 0.5 * y[:, None]).astype(np.float32)
    return X, y, rng.normal(size=(12, 5)).astype(np.float32)


def map_of(net, layers="1", shape=(5,)):
    return FeatureMap(
        net, layers, input_shape=shape, device="cpu", dtype="float32", batch_size="auto"
    )


def fit(method, X, y, network):
    network.probe(X)
    return DETECTORS[method]().fit(CleanSamples(X, y, N_CLASSES, K, network))


def score(detector, X, network, self_index=None):
    return detector(Query(X, network(X), network, self_index))


def literal(method, X, y, new, network):
    """Score one sample against all of X, in the plainest way."""
    features, f = (network(Z)["1"].double().numpy() for Z in (X, new[None]))
    distance = np.linalg.norm(features - f, axis=1)
    order = np.argsort(distance)[:K]
    predicted = int(network.predict(new[None])[0])
    if method == "credibility":
        # Plus the distance of the k-th neighbour, over itself plus a typical one.
        return K - np.bincount(y[order]).max(), distance[order[-1]]
    if method == "disagreement":
        return distance[y == predicted].min() - distance[y != predicted].min()
    if method == "lid":
        return -1 / np.mean(np.log(distance[order] / distance[order[-1]]))
    if method == "distance":
        a, b = (normalize(torch.tensor(z), dim=1).numpy() for z in (features, f))
        return np.sort(np.linalg.norm(a - b, axis=1))[K - 1]
    assert method == "kernel_density"
    of_class = distance[y == predicted]
    return of_class, predicted


def test_credibility_counts_neighbours_of_other_classes_and_breaks_ties(net, samples):
    X, y, new = samples
    network = map_of(net)
    detector = fit("credibility", X, y, network)
    typical = detector.radii_["1"]
    every = [
        literal("credibility", *(np.delete(a, i, 0) for a in (X, y)), X[i], network)[1]
        for i in range(len(X))
    ]
    assert typical == pytest.approx(np.median(every), rel=0.05)

    def expect(X, y, x):
        against, distance = literal("credibility", X, y, x, network)
        return against + distance / (typical + distance)

    expected = [expect(X, y, x) for x in new]
    assert_allclose(score(detector, new, network)[:, 0], expected, rtol=1e-4)
    self_index = np.arange(20)
    expected = []
    for i in self_index:
        without = expect(np.delete(X, i, 0), np.delete(y, i), X[i])
        # Among its own neighbours a sample is the nearest, at no distance.
        within = literal("credibility", X, y, X[i], network)[0]
        expected.append(max(without // 1, within) + without % 1)
    assert_allclose(score(detector, X[self_index], network, self_index)[:, 0], expected, rtol=1e-4)


@pytest.mark.parametrize("method", ["disagreement", "lid", "distance"])
def test_scores_agree_with_a_literal_computation(net, samples, method):
    X, y, new = samples
    network = map_of(net)
    detector = fit(method, X, y, network)
    expected = [literal(method, X, y, x, network) for x in new]
    assert_allclose(score(detector, new, network)[:, 0], expected, rtol=1e-4)
    self_index = np.arange(20)
    expected = [
        literal(method, np.delete(X, i, 0), np.delete(y, i), X[i], network) for i in self_index
    ]
    assert_allclose(score(detector, X[self_index], network, self_index)[:, 0], expected, rtol=1e-4)


def test_density_is_the_mean_kernel_of_the_predicted_class(net, samples, monkeypatch):
    monkeypatch.setattr(sensing.density, "BLOCK_BYTES", 40 * 4 * 5)  # five samples at a time
    X, y, new = samples
    network = map_of(net)
    detector = fit("kernel_density", X, y, network)
    every = np.arange(len(X))
    radius = [
        np.sort(np.linalg.norm((network(X)["1"] - f).numpy(), axis=1))[K] for f in network(X)["1"]
    ]
    bandwidth = np.median(radius)
    assert bandwidth == pytest.approx(detector.bandwidth_["1"], rel=0.02)

    def density(X, y, x):
        distance, _ = literal("kernel_density", X, y, x, network)
        return -np.log(np.mean(np.exp(-((distance / detector.bandwidth_["1"]) ** 2))))

    expected = [density(X, y, x) for x in new]
    assert_allclose(score(detector, new, network)[:, 0], expected, rtol=1e-4)
    expected = [density(np.delete(X, i, 0), np.delete(y, i), X[i]) for i in every]
    assert_allclose(score(detector, X, network, every)[:, 0], expected, rtol=1e-4)


def test_a_class_without_samples_has_no_density(net, samples):
    X, y, new = samples
    network = map_of(net)
    predicted = network.predict(new).numpy()
    missing = predicted[0]
    kept = y != missing
    detector = fit("kernel_density", X[kept], y[kept], network)
    assert_allclose(np.isinf(score(detector, new, network)[:, 0]), predicted == missing)


@pytest.mark.parametrize(("n", "d"), [(60, 5), (12, 30)])
def test_whitening_agrees_with_ledoit_wolf_of_scikit_learn(n, d):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(n, d)) * np.linspace(0.2, 3, d)
    expected = LedoitWolf(assume_centered=True).fit(rows)
    whiten = ShrunkWhitening(torch.tensor(rows))
    assert whiten.shrinkage == pytest.approx(expected.shrinkage_)
    new = torch.tensor(rng.normal(size=(7, d)))
    assert_allclose(whiten(new).square().sum(dim=1), expected.mahalanobis(new.numpy()))


@pytest.mark.parametrize("few", [False, True])
def test_mahalanobis_is_to_the_nearest_mean_and_leaves_one_out(net, samples, few, monkeypatch):
    if few:  # so that only some samples estimate the covariance
        monkeypatch.setattr(sensing.mahalanobis, "COVARIANCE_SAMPLES", 4)
    X, y, new = samples
    y = np.where(np.arange(len(y)) == 7, N_CLASSES, y)  # a class of one sample
    network = map_of(net)
    network.probe(X)
    detector = DETECTORS["mahalanobis"]().fit(CleanSamples(X, y, N_CLASSES + 1, K, network))
    features = network(X)["1"].double().numpy()
    used = sample_rows(len(X), 4, 0) if few else np.arange(len(X))
    means = np.stack([features[y == c].mean(axis=0) for c in range(N_CLASSES + 1)])
    residuals = (features - means[y])[used]
    scatter = residuals.T @ residuals / len(used)
    s = detector.estimates_["1"].whitening.shrinkage
    target = s * np.trace(scatter) / 6 * np.eye(6)

    def nearest(f, means, scatter):
        precision = np.linalg.inv((1 - s) * scatter + target)
        return min((f - m) @ precision @ (f - m) for m in means if np.isfinite(m).all())

    expected = [nearest(f, means, scatter) for f in network(new)["1"].double().numpy()]
    assert_allclose(score(detector, new, network)[:, 0], expected, rtol=1e-3)

    self_index = np.arange(20)
    expected = []
    for i in self_index:
        n = (y == y[i]).sum()
        r = features[i] - means[y[i]]
        without = means.copy()
        without[y[i]] = means[y[i]] - r / (n - 1) if n > 1 else np.nan
        part = (i in used and n > 1) * n / max(n - 1, 1) / len(used)
        expected.append(nearest(features[i], without, scatter - part * np.outer(r, r)))
    assert_allclose(score(detector, X[self_index], network, self_index)[:, 0], expected, rtol=1e-3)


@pytest.mark.parametrize(("shape", "n_steps"), [((1, 4, 4), 1), ((3, 4, 4), 31), ((5,), 31)])
def test_squeezing_agrees_with_a_literal_computation(shape, n_steps):
    torch.manual_seed(0)
    n_features = int(np.prod(shape))
    net = nn.Sequential(nn.Flatten(), nn.Linear(n_features, 8), nn.ReLU(), nn.Linear(8, N_CLASSES))
    rng = np.random.default_rng(0)
    X = rng.uniform(2, 6, size=(30, n_features)).astype(np.float32)
    X[0, 0], X[1, 0] = 2, 6
    network = map_of(net, "output", shape)
    network.probe(X)
    clean = CleanSamples(X, np.zeros(30, dtype=int), N_CLASSES, K, network)
    squeezed = [np.round((X - 2) / 4 * n_steps) / n_steps * 4 + 2]
    if len(shape) == 3:
        filtered = [
            [median_filter(channel, size=2) for channel in x] for x in X.reshape(-1, *shape)
        ]
        squeezed.append(np.array(filtered).reshape(X.shape))

    def probabilities(X):
        return network.outputs(X.astype(np.float32)).softmax(dim=1).numpy()

    expected = np.max(
        [np.abs(probabilities(Z) - probabilities(X)).sum(axis=1) for Z in squeezed], axis=0
    )
    found = DETECTORS["feature_squeezing"]().fit(clean)(Query(X, network(X), network))
    assert_allclose(found[:, 0], expected, atol=1e-5)


@pytest.mark.parametrize("n_outputs", [1, 2, 5])
def test_confidence_is_the_log_odds_of_the_predicted_label(n_outputs):
    X = 30 * np.random.default_rng(0).standard_normal((20, n_outputs), dtype=np.float32)
    X[0] = 0
    network = map_of(nn.Identity(), "output", (n_outputs,))
    network.probe(X)
    scores = DETECTORS["confidence"]().fit(None)(Query(X, network(X), network))
    logits = np.pad(X, ((0, 0), (1, 0))) if n_outputs == 1 else X
    probabilities = softmax(logits.astype(np.longdouble), axis=1)
    largest = probabilities.max(axis=1)
    others = np.sort(probabilities, axis=1)[:, :-1].sum(axis=1)
    assert_allclose(scores[:, 0], (np.log(others) - np.log(largest)).astype(float), rtol=1e-6)
    assert scores[0, 0] == pytest.approx(np.log(max(n_outputs, 2) - 1), abs=1e-12)
    assert len(np.unique(scores)) == 20  # also where the largest probability is rounded to 1


def plain_map(X):
    """Return a map that has the input as its only layer."""
    plain = map_of(None, None, X.shape[1:])
    plain.probe(X)
    return plain


def fit_plain(method, X, y=None, k=5):
    X = np.asarray(X, dtype=np.float32)
    y = np.zeros(len(X), dtype=int) if y is None else y
    return DETECTORS[method]().fit(CleanSamples(X, y, int(y.max()) + 1, k, plain_map(X)))


def score_plain(detector, X, self_index=None):
    X = torch.as_tensor(X, dtype=torch.float32)
    return detector(Query(X, {"input": X}, plain_map(X), self_index))[:, 0]


NEIGHBOUR_METHODS = ["credibility", "lid", "distance", "kernel_density", "mahalanobis"]


def test_dimension_of_equally_far_and_of_coinciding_neighbours():
    corners = np.eye(12)
    detector = fit_plain("lid", corners)
    assert score_plain(detector, np.full((1, 12), 0.5)).tolist() == [np.inf]
    # A training sample coincides with itself; without itself all others are equally far.
    assert score_plain(detector, corners[:2]).tolist() == [0, 0]
    assert score_plain(detector, corners[:2], np.arange(2)).tolist() == [np.inf] * 2
    duplicates = fit_plain("lid", np.r_[np.zeros((8, 3)), np.random.default_rng(0).random((8, 3))])
    assert score_plain(duplicates, np.zeros((1, 3))).tolist() == [0]
    assert score_plain(duplicates, np.full((1, 3), -9.0)).tolist() == [np.inf]


@pytest.mark.parametrize("method", [*NEIGHBOUR_METHODS, "disagreement"])
@pytest.mark.parametrize("apart", [1e3, 1e6])
def test_scores_do_not_depend_on_batch_composition(method, apart):
    rng = np.random.default_rng(0)
    means, y = rng.normal(size=(6, 8)) * apart, rng.integers(6, size=300)
    X = (means[y] + rng.normal(size=(300, 8))).astype(np.float32)
    detector = fit_plain(method, X, y)
    together = score_plain(detector, X + 0.25)
    alone = np.concatenate([score_plain(detector, x[None] + 0.25) for x in X])
    assert_allclose(alone, together, rtol=1e-6)
    if method == "mahalanobis":
        centers = np.stack([X[y == c].astype(np.float64).mean(axis=0) for c in range(6)])
        residuals = X - centers[y]
        scatter, s = (
            residuals.T @ residuals / len(X),
            detector.estimates_["input"].whitening.shrinkage,
        )
        precision = np.linalg.inv((1 - s) * scatter + s * np.trace(scatter) / 8 * np.eye(8))
        differences = (X + np.float32(0.25)).astype(np.float64)[:, None] - centers
        expected = np.einsum("nci,ij,ncj->nc", differences, precision, differences).min(axis=1)
        assert_allclose(together, expected, rtol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e6])
def test_scores_do_not_depend_on_an_offset(offset):
    # Eighths, which float32 holds at any of the offsets.
    rng = np.random.default_rng(0)
    X, new = (np.round(rng.normal(size=(80, 3)) * 8) / 8 for _ in range(2))
    expected = score_plain(fit_plain("kernel_density", X), new)
    assert_allclose(score_plain(fit_plain("kernel_density", X + offset), new + offset), expected)
    for method in ("lid", "credibility", "mahalanobis"):
        moved = score_plain(fit_plain(method, X + offset), new + offset)
        assert_allclose(moved, score_plain(fit_plain(method, X), new), rtol=1e-6, err_msg=method)


@pytest.mark.parametrize("method", NEIGHBOUR_METHODS)
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e25])
def test_scores_do_not_depend_on_the_scale(method, scale):
    rng = np.random.default_rng(0)
    X, new = rng.normal(size=(2, 60, 3))
    plain = score_plain(fit_plain(method, X), new)
    scaled = score_plain(fit_plain(method, X * scale), new * scale)
    assert_allclose(scaled, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", NEIGHBOUR_METHODS)
@pytest.mark.parametrize("value", [1e20, 1e30, 3e38, np.inf, np.nan])
def test_an_extreme_sample_is_the_most_suspect_and_changes_no_other_score(method, value):
    rng = np.random.default_rng(0)
    X, new = (rng.normal(size=(n, 3)) + np.array([0, 5, 0]) for n in (60, 20))
    detector = fit_plain(method, X)
    expected = score_plain(detector, new)
    new[3, 0] = value
    found = score_plain(detector, new)
    others = np.arange(20) != 3
    assert_allclose(found[others], expected[others], rtol=1e-6)
    if method != "lid" or value > 1e29:
        assert found[3] == found.max()
    assert not np.isnan(found).any()


@pytest.mark.parametrize("method", NEIGHBOUR_METHODS)
@pytest.mark.parametrize("value", [1e20, 1e30])
def test_an_extreme_training_sample_changes_no_other_score(method, value):
    rng = np.random.default_rng(0)
    X, new = rng.normal(size=(60, 3)), rng.normal(size=(20, 3))
    clean = score_plain(fit_plain(method, np.delete(X, 7, axis=0)), new)
    X[7, 0] = value
    detector = fit_plain(method, X)
    found = score_plain(detector, new)
    assert np.isfinite(found).all()
    if method != "distance":  # by direction, the sample is not extreme
        # A density is divided by the number of samples; medians move by a rank.
        assert_allclose(found, clean, rtol=0.05, atol=0.02)
    left_out = score_plain(detector, X, np.arange(60))
    assert not np.isnan(left_out).any()
    if method not in ("distance", "lid"):
        assert left_out[7] == left_out.max()


def test_detectors_share_one_copy_of_the_features():
    X = np.random.default_rng(0).random((400, 500)).astype(np.float32)
    clean = CleanSamples(X, np.arange(400) % 2, 2, 5, plain_map(X))
    methods = ["credibility", "disagreement", "distance", "kernel_density", "lid"]
    detectors = [DETECTORS[method]().fit(clean) for method in methods]
    saved = pickle.dumps(detectors)
    assert len(saved) < 1.1 * X.nbytes
    new = torch.from_numpy(X[:9] + 0.1)
    query = Query(new, {"input": new}, plain_map(X))
    for detector, loaded in zip(detectors, pickle.loads(saved), strict=True):
        assert_allclose(loaded(query), detector(query))


@pytest.mark.parametrize("offset", [0, 1000])  # stored as they are, and as differences
def test_clean_features_are_read_from_the_index_bit_for_bit(offset):
    rng = np.random.default_rng(0)
    X = (np.round(rng.normal(size=(50, 3)) * 8) / 8 + offset).astype(np.float32)
    with config_context(working_memory=0.001):
        clean = CleanSamples(X, rng.integers(3, size=50), 4, 5, plain_map(X))
    drawn = rng.permutation(50)[:20]
    assert_array_equal(clean.features_of("input", drawn), X[drawn])
    features, index = clean.examples("input")
    assert_array_equal(features, X[index])
    assert clean.labels[index].tolist() == sorted(clean.labels)


def test_whitening_does_not_depend_on_the_scale():
    rng = np.random.default_rng(0)
    rows, new = rng.normal(size=(30, 4)), torch.tensor(rng.normal(size=(5, 4)))
    expected = ShrunkWhitening(torch.tensor(rows))(new)
    for scale in (1e-90, 1e90):
        found = ShrunkWhitening(torch.tensor(rows * scale))(new * scale)
        assert_allclose(found.abs(), expected.abs(), rtol=1e-6)
