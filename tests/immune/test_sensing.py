import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from scipy.ndimage import median_filter
from sklearn.covariance import LedoitWolf
from torch import nn
from torch.nn.functional import normalize

from sklearn_rails.features.mapping import FeatureMap
from sklearn_rails.immune import sensing
from sklearn_rails.immune.sensing import SENSORS, CleanRows, NewRows, ShrunkWhitening

N_CLASSES, K = 3, 4


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, N_CLASSES))


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    y = rng.permutation(np.arange(40) % N_CLASSES)
    X = (rng.normal(size=(40, 5)) + 0.5 * y[:, None]).astype(np.float32)
    return X, y, rng.normal(size=(12, 5)).astype(np.float32)


def map_of(net, layers="1", shape=(5,)):
    return FeatureMap(
        net, layers, input_shape=shape, device="cpu", dtype="float32", batch_size="auto"
    )


def fit(method, X, y, network):
    return SENSORS[method](CleanRows(X, network(X), y, N_CLASSES, K, network))


def score(sensor, X, network, own=None):
    return sensor(NewRows(X, network(X), network, own))


def literal(method, X, y, new, network):
    """Score one row against all of X, in the plainest way."""
    features, f = (network(Z)["1"].double().numpy() for Z in (X, new[None]))
    distance = np.linalg.norm(features - f, axis=1)
    order = np.argsort(distance)[:K]
    predicted = int(network.predict(new[None])[0])
    tie = distance[order[-1]] / (1 + distance[order[-1]])
    if method == "credibility":
        return K - np.bincount(y[order]).max() + tie
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


@pytest.mark.parametrize("method", ["credibility", "disagreement", "lid", "distance"])
def test_scores_are_those_of_a_literal_computation(net, rows, method):
    X, y, new = rows
    network = map_of(net)
    sensor = fit(method, X, y, network)
    expected = [literal(method, X, y, x, network) for x in new]
    assert_allclose(score(sensor, new, network)[:, 0], expected, rtol=1e-4)
    own = np.arange(20)
    expected = [literal(method, np.delete(X, i, 0), np.delete(y, i), X[i], network) for i in own]
    assert_allclose(score(sensor, X[own], network, own)[:, 0], expected, rtol=1e-4)


def test_density_is_the_mean_kernel_of_the_predicted_class(net, rows, monkeypatch):
    monkeypatch.setattr(sensing, "BLOCK_BYTES", 40 * 4 * 5)  # five rows at a time
    X, y, new = rows
    network = map_of(net)
    sensor = fit("kernel_density", X, y, network)
    every = np.arange(len(X))
    radius = [
        np.sort(np.linalg.norm((network(X)["1"] - f).numpy(), axis=1))[K] for f in network(X)["1"]
    ]
    bandwidth = np.median(radius)
    assert bandwidth == pytest.approx(sensor._bandwidth["1"], rel=0.02)

    def density(X, y, x):
        distance, _ = literal("kernel_density", X, y, x, network)
        return -np.log(np.mean(np.exp(-((distance / sensor._bandwidth["1"]) ** 2))))

    expected = [density(X, y, x) for x in new]
    assert_allclose(score(sensor, new, network)[:, 0], expected, rtol=1e-4)
    expected = [density(np.delete(X, i, 0), np.delete(y, i), X[i]) for i in every]
    assert_allclose(score(sensor, X, network, every)[:, 0], expected, rtol=1e-4)


def test_a_class_without_rows_has_no_density(net, rows):
    X, y, new = rows
    network = map_of(net)
    predicted = network.predict(new).numpy()
    missing = predicted[0]
    kept = y != missing
    sensor = fit("kernel_density", X[kept], y[kept], network)
    assert_allclose(np.isinf(score(sensor, new, network)[:, 0]), predicted == missing)


@pytest.mark.parametrize(("n", "d"), [(60, 5), (12, 30)])
def test_whitening_is_by_the_covariance_that_scikit_learn_shrinks(n, d):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(n, d)) * np.linspace(0.2, 3, d)
    expected = LedoitWolf(assume_centered=True).fit(rows)
    whiten = ShrunkWhitening(torch.tensor(rows))
    assert whiten.shrinkage == pytest.approx(expected.shrinkage_)
    new = torch.tensor(rng.normal(size=(7, d)))
    assert_allclose(whiten(new).square().sum(dim=1), expected.mahalanobis(new.numpy()))


@pytest.mark.parametrize("few", [False, True])
def test_mahalanobis_is_to_the_nearest_mean_and_without_a_row_itself(net, rows, few, monkeypatch):
    if few:  # so that only some rows tell the covariance
        monkeypatch.setattr(sensing, "COVARIANCE_ROWS", 4)
    X, y, new = rows
    y = np.where(np.arange(len(y)) == 7, N_CLASSES, y)  # a class of one row
    network = map_of(net)
    sensor = SENSORS["mahalanobis"](CleanRows(X, network(X), y, N_CLASSES + 1, K, network))
    features = network(X)["1"].double().numpy()
    used = sensing.sample_rows(len(X), 4) if few else np.arange(len(X))
    means = np.stack([features[y == c].mean(axis=0) for c in range(N_CLASSES + 1)])
    residuals = (features - means[y])[used]
    scatter = residuals.T @ residuals / len(used)
    s = sensor._whiten["1"].shrinkage
    target = s * np.trace(scatter) / 6 * np.eye(6)

    def nearest(f, means, scatter):
        precision = np.linalg.inv((1 - s) * scatter + target)
        return min((f - m) @ precision @ (f - m) for m in means if np.isfinite(m).all())

    expected = [nearest(f, means, scatter) for f in network(new)["1"].double().numpy()]
    assert_allclose(score(sensor, new, network)[:, 0], expected, rtol=1e-3)

    own = np.arange(20)
    expected = []
    for i in own:
        n = (y == y[i]).sum()
        r = features[i] - means[y[i]]
        without = means.copy()
        without[y[i]] = means[y[i]] - r / (n - 1) if n > 1 else np.nan
        part = (i in used and n > 1) * n / max(n - 1, 1) / len(used)
        expected.append(nearest(features[i], without, scatter - part * np.outer(r, r)))
    assert_allclose(score(sensor, X[own], network, own)[:, 0], expected, rtol=1e-3)


@pytest.mark.parametrize(("shape", "n_steps"), [((1, 4, 4), 1), ((3, 4, 4), 31), ((5,), 31)])
def test_squeezing_moves_probabilities(shape, n_steps):
    torch.manual_seed(0)
    n_features = int(np.prod(shape))
    net = nn.Sequential(nn.Flatten(), nn.Linear(n_features, 8), nn.ReLU(), nn.Linear(8, N_CLASSES))
    rng = np.random.default_rng(0)
    X = rng.uniform(2, 6, size=(30, n_features)).astype(np.float32)
    X[0, 0], X[1, 0] = 2, 6
    network = map_of(net, "output", shape)
    clean = CleanRows(X, network(X), np.zeros(30, dtype=int), N_CLASSES, K, network)
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
    found = SENSORS["feature_squeezing"](clean)(NewRows(X, network(X), network))
    assert_allclose(found[:, 0], expected, atol=1e-5)
