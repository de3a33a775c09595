"""The choice of layers by attacked training samples."""

import warnings

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from sklearn_rails import DkNNClassifier, RAILSClassifier, ThreatScorer, TorchFeatureExtractor
from sklearn_rails.datasets import load_digit_images
from sklearn_rails.demo import train_network
from sklearn_rails.features import FeatureMap, choose_layers
from sklearn_rails.features.layer_choice import (
    MAX_KEPT,
    MAX_LAYERS,
    MIN_SAMPLES,
    HeldOutAttack,
    LayerScores,
    draw_by_class,
    input_range,
    score_layers,
)

LAYERS = ["input", "conv1", "conv2", "conv3", "conv4", "output"]


@pytest.fixture(scope="module")
def digits():
    return load_digit_images()


@pytest.fixture(scope="module")
def network(digits):
    return train_network(digits.X_train, digits.y_train, max_epochs=8, verbose=0)


def map_of(module, shape, X, **kwargs):
    settings = {"device": "cpu", "dtype": "float32", "batch_size": "auto"} | kwargs
    features = FeatureMap(module, None, input_shape=shape, **settings)
    features.probe(X, with_output=True)
    return features


@pytest.fixture(scope="module")
def digit_map(network, digits):
    X = digits.X_train.reshape(len(digits.X_train), -1)
    return map_of(network.module_, (1, 8, 8), X), X


class Tabular(nn.Sequential):
    """Classify by the sign of the first of four features, through two hidden layers."""

    def __init__(self, n_outputs=2):
        super().__init__(
            nn.Linear(4, 4, bias=False),
            nn.ReLU(),
            nn.Linear(4, 4, bias=False),
            nn.ReLU(),
            nn.Linear(4, n_outputs, bias=False),
        )
        with torch.no_grad():
            self[0].weight.zero_()
            self[0].weight[0, 0], self[0].weight[1, 0] = 1, -1
            self[0].weight[2, 1], self[0].weight[3, 2] = 1, 1
            self[2].weight.copy_(torch.eye(4))
            self[4].weight.zero_()
            if n_outputs == 1:
                self[4].weight[0, :2] = torch.tensor([-1.0, 1.0])
            else:
                self[4].weight[0, 0] = self[4].weight[1, 1] = 1


def tabular_data(n=200):
    X = np.random.default_rng(0).normal(size=(n, 4)).astype(np.float32)
    return X, np.where(X[:, 0] > 0, "above", "below")


@pytest.mark.parametrize("cls", [RAILSClassifier, DkNNClassifier, ThreatScorer])
def test_a_hidden_layer_is_chosen_by_default(cls, network, digits):
    estimator = cls(network).fit(digits.X_train[:400], digits.y_train[:400])
    scores = estimator.layer_scores_
    assert isinstance(scores, LayerScores)
    assert list(scores) == LAYERS
    assert estimator.layers_ == (scores.best,)
    assert scores.best != "output"
    for values in scores.values():
        assert values.shape == scores.radii.shape
        assert ((values >= 0) & (values <= 1)).all()
    assert "conv2" in repr(scores)


def test_the_choice_protects_where_the_network_does_not(network, digits):
    from sklearn_rails.attacks import pgd

    X, y = digits.X_train, digits.y_train
    attacked = pgd(network, digits.X_test[:100], digits.y_test[:100], eps=60 / 255)
    assert network.score(attacked, digits.y_test[:100]) < 0.1
    dknn = DkNNClassifier(network, n_neighbors=5, random_state=0).fit(X, y)
    assert dknn.score(attacked, digits.y_test[:100]) > 0.4
    with pytest.warns(UserWarning, match="layers=None compares inputs by the network's output"):
        unprotected = DkNNClassifier(network, layers=None, n_neighbors=5).fit(X, y)
    assert unprotected.layers_ == ("output",)
    assert unprotected.score(attacked, digits.y_test[:100]) < 0.2


def test_the_choice_is_a_function_of_network_and_data(digit_map, digits):
    features, X = digit_map
    y = digits.y_train
    first = score_layers(features, X[:300], y[:300])
    again = score_layers(features, X[:300], np.array([f"class {c}" for c in y[:300]]))
    seeds = [score_layers(features, X, y, n_held_out=50, seed=seed) for seed in (0, 1)]
    for layer in LAYERS:
        assert_array_equal(first[layer], again[layer])
    assert any((seeds[0][layer] != seeds[1][layer]).any() for layer in LAYERS)


def test_accuracies_are_those_of_a_literal_loop(digit_map, digits):
    features, X = digit_map
    X, y = X[:120], digits.y_train[:120]
    found = score_layers(features, X, y)
    rng = np.random.default_rng(0)
    attack = HeldOutAttack(features, X, y, eps=None, n_held_out=400, rng=rng)
    assert len(attack.index) == 120
    for radius, attacked in enumerate(attack):
        for layer in LAYERS:
            queries = features(attacked, (layer,))[layer].double().numpy()
            stored = features(X, (layer,))[layer].double().numpy()
            correct = 0
            for query, own in zip(queries, attack.index, strict=True):
                cosine = stored @ query / np.linalg.norm(stored, axis=1) / np.linalg.norm(query)
                cosine[own] = -np.inf
                means = []
                for c in range(10):
                    nearest = np.sort(cosine[(y == c) & np.isfinite(cosine)])[-5:]
                    means.append(nearest.mean() if len(nearest) else -np.inf)
                correct += np.argmax(means) == y[own]
            assert found[layer][radius] == pytest.approx(correct / 120, abs=0.009), layer


def test_the_last_layer_within_half_a_standard_error_is_chosen():
    scores = {
        name: np.array([value]) for name, value in zip("abc", (0.80, 0.79, 0.70), strict=True)
    }
    assert LayerScores(scores, np.zeros(1), 0.03).best == "b"
    assert LayerScores(scores, np.zeros(1), 0.01).best == "a"


def test_attacks_stay_in_their_ball_and_break_the_network(digit_map, digits):
    features, X = digit_map
    rng = np.random.default_rng(0)
    attack = HeldOutAttack(features, X, digits.y_train, eps=None, n_held_out=200, rng=rng)
    clean = torch.from_numpy(X[attack.index])
    labels = features.predict(clean)
    assert_allclose(attack.radii / attack.radii[2], [0, 0.5, 1, 2, 3])
    for radius, attacked in zip(attack.radii, attack, strict=True):
        assert (attacked - clean).abs().max() <= radius + 1e-6
        assert attacked.min() >= 0
        assert attacked.max() <= 1
        assert_array_equal(attack.changed, features.predict(attacked) != labels)
        if radius == attack.radii[2]:
            assert attack.changed.mean() >= 1 - MAX_KEPT - 0.1
    given = HeldOutAttack(features, X, digits.y_train, eps=0.1, n_held_out=20, rng=rng)
    assert_allclose(given.radii, [0, 0.05, 0.1, 0.2, 0.3])


def test_a_radius_is_in_units_of_features_or_channels():
    X = np.array([[0.0, 10, 5], [1, 30, 5]], dtype=np.float32)
    low, high, unit = input_range(map_of(nn.Linear(3, 2), (3,), X), X)
    assert_array_equal(low, [0, 10, 5])
    assert_array_equal(high, [1, 30, 5])
    assert_array_equal(unit, [1, 20, 0])
    images = np.arange(16, dtype=np.float32).reshape(2, 8)  # two channels of two by two
    features = map_of(nn.Sequential(nn.Flatten(), nn.Linear(8, 2)), (2, 2, 2), images)
    assert_array_equal(input_range(features, images)[2], [11] * 8)
    assert_array_equal(input_range(features, images / 15)[2], [1] * 8)


def test_samples_are_drawn_as_evenly_from_classes_as_they_allow():
    y = np.repeat([0, 1, 2], [100, 3, 50])
    drawn = draw_by_class(y, 21, np.random.default_rng(0))
    assert np.bincount(y[drawn]).tolist() == [9, 3, 9]
    assert len(set(drawn)) == 21
    assert sorted(draw_by_class(y, 999, np.random.default_rng(0))) == list(range(153))


@pytest.mark.parametrize("n_outputs", [1, 2])
def test_tabular_networks(n_outputs):
    X, y = tabular_data()
    rails = RAILSClassifier(Tabular(n_outputs), generations=1, random_state=0).fit(X, y)
    assert set(rails.layer_scores_) <= {"input", "0", "1", "2", "3", "output"}
    assert rails.layer_scores_["output"][0] > 0.9
    assert rails.layer_scores_["output"][2] <= 0.5
    assert rails.layers_ == (rails.layer_scores_.best,)


def test_a_batch_size_beyond_all_samples_costs_no_more():
    X, y = tabular_data()
    passes = []

    class Counting(Tabular):
        def forward(self, x):
            passes.append(len(x))
            return super().forward(x)

    dknn = DkNNClassifier(Counting(), n_neighbors=5, batch_size=10**9).fit(X, y)
    assert dknn.feature_map_.batch_size == 4096
    assert max(passes) == 4096
    assert dknn.score(X, y) > 0.8


def test_a_start_layer_leaves_what_comes_after_it(network, digits):
    rails = RAILSClassifier(network, start_layer="conv2", generations=1, random_state=0)
    rails.fit(digits.X_train[:200], digits.y_train[:200])
    assert list(rails.layer_scores_) == ["conv3", "conv4", "output"]
    assert rails.layers_[0] in ("conv3", "conv4")


def test_a_pipeline_and_a_search_take_it_unchanged():
    X, y = tabular_data()
    pipeline = make_pipeline(StandardScaler(), RAILSClassifier(Tabular(), generations=1))
    assert pipeline.fit(X, y).score(X, y) > 0.8


def fit_with_warning(estimator, X, y, match):
    with pytest.warns(UserWarning, match=match):
        estimator.fit(X, y)
    assert estimator.layer_scores_ is None
    return estimator.layers_


@pytest.mark.parametrize("cls", [DkNNClassifier, ThreatScorer])
def test_few_samples_take_a_layer_in_the_middle(cls, network, digits):
    n = MIN_SAMPLES - 1
    X, y = digits.X_train[:n], digits.y_train[:n]
    layers = fit_with_warning(cls(network), X, y, f"only {n} training samples, and it takes 50")
    assert layers == ("conv2",)


class Embedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.hidden = nn.Embedding(20, 3), nn.Linear(3, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.hidden(self.embed(x).mean(1)).relu())


class WithoutGradient(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        with torch.no_grad():
            return self.head(self.hidden(x).relu())


class OverwritesItsGradient(WithoutGradient):
    def forward(self, x):
        return self.head(self.hidden(x).tanh().mul_(2))


def test_networks_that_cannot_be_attacked_take_a_layer_in_the_middle():
    tokens = np.random.default_rng(0).integers(0, 20, size=(60, 5))
    y = tokens[:, 0] % 2
    layers = fit_with_warning(DkNNClassifier(Embedding()), tokens, y, "takes integers")
    assert layers == ("embed",) or layers == ("hidden",)
    X, y = tabular_data()
    for network in (WithoutGradient(), OverwritesItsGradient()):
        assert fit_with_warning(DkNNClassifier(network), X, y, "no gradient") == ("hidden",)


class Steps(nn.Module):
    """A network whose gradient is zero nearly everywhere."""

    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.hidden(x).sign())


def test_an_attack_without_effect_is_reported():
    X, y = tabular_data()
    with pytest.warns(UserWarning, match="No attack by which layers are compared changes"):
        DkNNClassifier(Steps()).fit(X, y)


def test_without_a_network_the_input_is_the_layer():
    X, y = tabular_data()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for layers in ("auto", None):
            dknn = DkNNClassifier(layers=layers).fit(X, y)
            assert dknn.layers_ == ("input",)
            assert dknn.layer_scores_ is None


def test_an_extractor_keeps_layers_that_it_names(network, digits):
    X, y = digits.X_train[:100], digits.y_train[:100]
    named = TorchFeatureExtractor(network, layers=["conv3"])
    assert DkNNClassifier(named).fit(X, y).layers_ == ("conv3",)
    unnamed = DkNNClassifier(TorchFeatureExtractor(network)).fit(X, y)
    assert unnamed.layers_ == (unnamed.layer_scores_.best,)
    scorer = ThreatScorer()
    rails = RAILSClassifier(network, threat_scorer=scorer, generations=0, random_state=0).fit(X, y)
    assert rails.threat_scorer_.layers_ == rails.layers_
    assert scorer.layers == "auto"


class Awkward(nn.Module):
    """Layers that cannot be used beside some that can."""

    def __init__(self):
        super().__init__()
        self.twice = nn.ReLU()
        self.block = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True))
        self.pair = nn.LSTM(5, 3, batch_first=True)
        self.unused = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(5, track_running_stats=False)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        h = self.block(self.twice(self.twice(x)))
        self.pair(h[:, None])
        self.norm(h)
        return self.head(h)


def test_only_usable_layers_are_compared():
    X, _ = tabular_data()
    features = map_of(Awkward(), (4,), X)
    assert features.find_layers() == ("input", "block.0", "block", "output")


def test_of_many_layers_outer_ones_are_compared():
    def block():
        return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

    torch.manual_seed(0)
    X, _ = tabular_data()
    network = nn.Sequential(*(block() for _ in range(8)), nn.Linear(4, 2))
    features = map_of(network, (4,), X)
    assert len(features.find_layers()) == 1 + 3 * 8 + 1
    assert features.find_layers(MAX_LAYERS) == ("input", *"01234567", "output")
    # Two modules alone would be few, so that some of those within them are taken.
    halves = nn.Sequential(nn.Sequential(*network[:4]), nn.Sequential(*network[4:]))
    found = map_of(halves, (4,), X).find_layers(7)
    assert len(found) == 7
    assert (found[0], found[-1]) == ("input", "output")
    assert "0" in found
    assert len(features.find_layers(5)) == 5
    assert features.find_layers(5)[-1] == "output"


def test_scores_of_detection_are_areas_under_the_curve(digit_map, digits):
    from sklearn_rails.sensing.layer_choice import _placements

    rng = np.random.default_rng(0)
    attacked, clean = rng.integers(0, 9, size=(40, 3)) + 1.0, rng.integers(0, 9, size=(60, 3)) * 1.0
    found = _placements(attacked, clean).mean(axis=0)
    for column in range(3):
        truth = np.repeat([1, 0], [40, 60])
        values = np.concatenate([attacked[:, column], clean[:, column]])
        assert found[column] == pytest.approx(roc_auc_score(truth, values))


@pytest.mark.parametrize("method", ["credibility", "feature_squeezing"])
def test_methods_without_a_score_for_each_layer_take_accuracies(method, network, digits):
    scorer = ThreatScorer(network, method=method)
    scorer.fit(digits.X_train[:200], digits.y_train[:200])
    assert scorer.layer_scores_.radii[0] == 0


def test_the_cost_does_not_grow_with_the_number_of_samples():
    passes = []

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.head = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            passes.append(len(x))
            return self.head(self.hidden(x).relu())

    counts = []
    for n in (6_000, 12_000):
        X, y = tabular_data(n)
        torch.manual_seed(0)
        features = map_of(Counting(), (4,), X)
        passes.clear()
        score_layers(features, X, y)
        counts.append(sum(passes))
    # References, queries and attacks; batches of vectors are filled up to 256.
    assert max(counts) < 26_000


asked = []


def counting(features, X, y):
    asked.append(len(X))
    return score_layers(features, X, y)


def test_the_choice_is_made_once_for_each_network_and_data(monkeypatch):
    asked.clear()
    monkeypatch.setattr("sklearn_rails._rails.score_layers", counting)
    network, (X, y) = Tabular(), tabular_data()
    search = GridSearchCV(RAILSClassifier(network, generations=1), {"tau": [0.5, 1.0, 2.0]}, cv=2)
    search.fit(X, y)
    assert len(asked) == 3  # two folds and all samples
    with torch.no_grad():
        network[4].weight.mul_(2)
    RAILSClassifier(network).fit(X, y)
    assert len(asked) == 4
    RAILSClassifier(network).fit(X, y[::-1])
    assert len(asked) == 5

    class Tabular2(Tabular):
        def forward(self, x):
            return super().forward(x) / 2

    twin = Tabular2()
    twin.load_state_dict(network.state_dict())
    twin.__class__.__qualname__ = Tabular.__qualname__
    RAILSClassifier(twin).fit(X, y)
    assert len(asked) == 6


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"eps": 0}, ValueError, "eps=0 must be a positive number"),
        ({"n_held_out": 1}, ValueError, "n_held_out=1 must be an integer, 2 or more"),
        ({"network": "net"}, TypeError, "network"),
        ({"network": WithoutGradient()}, ValueError, "network has no gradient"),
        ({"X": np.ones((20, 4), np.float32), "y": np.arange(20)}, ValueError, "50 samples or more"),
        ({"y": np.arange(3)}, ValueError, "inconsistent numbers of samples"),
    ],
)
def test_choose_layers_names_what_is_wrong(change, error, match):
    X, y = tabular_data()
    arguments = {"network": Tabular(), "X": X, "y": y, "eps": None, "n_held_out": 50} | change
    with pytest.raises(error, match=match):
        choose_layers(arguments.pop("network"), arguments.pop("X"), arguments.pop("y"), **arguments)


@pytest.mark.slow
def test_choose_layers_takes_a_radius_and_a_seed(network, digits):
    X, y = digits.X_train[:300], digits.y_train[:300]
    scores = choose_layers(network, X, y, eps=0.2, random_state=0)
    assert_allclose(scores.radii, [0, 0.1, 0.2, 0.4, 0.6])
    flat = choose_layers(
        network.module_, X.reshape(300, -1), y, eps=0.2, input_shape=(1, 8, 8), random_state=0
    )
    assert all((scores[layer] == flat[layer]).all() for layer in LAYERS)
