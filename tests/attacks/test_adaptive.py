import contextlib

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from sklearn.base import clone
from sklearn.ensemble import IsolationForest
from sklearn.frozen import FrozenEstimator
from sklearn.neighbors import KNeighborsClassifier

from sklearn_rails import DkNNClassifier, RAILSClassifier, ThreatScorer
from sklearn_rails.attacks import AdaptiveKNNAttack, pgd
from sklearn_rails.attacks._surrogates import ThreatSurrogate, soft_class_scores
from sklearn_rails.datasets import load_digit_images
from sklearn_rails.demo import train_network
from sklearn_rails.immune import Arbitration, Triage
from sklearn_rails.metrics import robust_accuracy_score
from sklearn_rails.neighbors import resolve_affinity
from sklearn_rails.sensing import DETECTORS

# What a few steps suffice for; the defaults are for evaluations.
QUICK = {"max_iter": 30, "n_restarts": 3, "n_targets": 2, "random_state": 0}


@pytest.fixture(scope="module")
def task():
    data = load_digit_images()
    network = train_network(data.X_train[:600], data.y_train[:600], max_epochs=8, verbose=0)
    return network, data.X_train[:600], data.y_train[:600], data.X_test[:40], data.y_test[:40]


def defence(kind, network, X, y):
    fitted = {
        "k-NN": DkNNClassifier(n_neighbors=5, calibration="leave-one-out"),
        "DkNN": DkNNClassifier(network, layers=["conv1", "conv2"], n_neighbors=5, random_state=0),
        "RAILS": RAILSClassifier(network, layers="conv2", population_size=50, random_state=0),
    }
    return fitted[kind].fit(X, y)


@pytest.fixture(scope="module", params=["k-NN", "DkNN", "RAILS"])
def defended(request, task):
    network, X, y, X_test, y_test = task
    return defence(request.param, network, X, y), X, y, X_test, y_test


@pytest.mark.slow
def test_accuracy_falls_with_the_radius_to_nothing(defended):
    estimator, X, y, X_test, y_test = defended
    accuracy = []
    for eps in (0, 0.1, 0.2, 1):
        attacked = AdaptiveKNNAttack(estimator, X, y, eps=eps, **QUICK).generate(X_test, y_test)
        assert attacked.shape == X_test.shape
        assert attacked.dtype == np.float32
        assert np.abs(attacked - X_test).max() <= eps + 1e-6
        assert attacked.min() >= 0
        assert attacked.max() <= 1
        accuracy.append(estimator.score(attacked, y_test))
    assert accuracy[0] == estimator.score(X_test, y_test) > 0.9
    assert accuracy == sorted(accuracy, reverse=True)
    assert accuracy[-1] <= 0.05  # RAILS is judged by other seeds than its own


def test_it_beats_noise_of_its_size_and_the_attack_on_the_network(task, defended):
    estimator, X, y, X_test, y_test = defended
    eps = 0.15
    attack = AdaptiveKNNAttack(estimator, X, y, eps=eps, **QUICK)
    accuracy = estimator.score(attack.generate(X_test, y_test), y_test)
    signs = np.random.default_rng(0).choice([-eps, eps], size=X_test.shape)
    noisy = np.clip(X_test + signs, 0, 1).astype(np.float32)
    assert estimator.score(noisy, y_test) > 0.85
    transferred = pgd(task[0], X_test, y_test, eps=eps, step=eps / 5)
    assert accuracy < estimator.score(transferred, y_test) - 0.05


def test_a_gradient_free_attack_does_not_beat_it(task):
    from art.attacks.evasion import SquareAttack
    from art.estimators.classification import BlackBoxClassifierNeuralNetwork

    network, X, y, X_test, y_test = task
    estimator = defence("k-NN", network, X, y)
    black_box = BlackBoxClassifierNeuralNetwork(
        lambda rows: estimator.predict_proba(rows.astype(np.float32)),
        input_shape=X.shape[1:],
        nb_classes=10,
        clip_values=(0, 1),
    )
    square = SquareAttack(black_box, eps=0.2, max_iter=200, nb_restarts=1, verbose=False)
    attack = AdaptiveKNNAttack(estimator, X, y, eps=0.2, **QUICK)
    answers = [
        estimator.predict(rows.astype(np.float32))
        for rows in (square.generate(X_test, y_test), attack.generate(X_test, y_test))
    ]
    by_square, adaptive = (np.mean(labels == y_test) for labels in answers)
    assert adaptive <= by_square < 0.9
    assert robust_accuracy_score(y_test, *answers) <= adaptive


def test_on_one_layer_dknn_is_the_k_nearest_neighbours(task):
    network, X, y, X_test, y_test = task
    attacked = AdaptiveKNNAttack(defence("k-NN", network, X, y), X, y, eps=0.2, **QUICK).generate(
        X_test, y_test
    )
    plain = KNeighborsClassifier(5).fit(X.reshape(len(X), -1), y)
    assert plain.score(attacked.reshape(len(X_test), -1), y_test) < 0.6


def test_targets_of_other_classes_fool_more_than_a_restart_alone(task):
    _, X, y, X_test, y_test = task
    nearest = DkNNClassifier(n_neighbors=1, calibration="leave-one-out").fit(X, y)
    accuracy = []
    for n_targets in (0, 12):
        attack = AdaptiveKNNAttack(
            nearest, X, y, eps=0.2, **QUICK | {"n_targets": n_targets, "n_restarts": 1}
        )
        attacked = attack.generate(X_test, y_test)
        assert farthest(attacked, X_test) <= 0.2 + 1e-7
        accuracy.append(nearest.score(attacked, y_test))
    assert accuracy[1] <= accuracy[0] - 0.05


def test_a_budget_ends_the_attack_as_the_steps_it_took_say(task):
    network, X, y, X_test, y_test = task
    estimator = defence("k-NN", network, X, y)
    settings = {"eps": 0.1, "max_iter": 20, "n_restarts": 2, "n_targets": 2, "random_state": 0}
    whole = AdaptiveKNNAttack(estimator, X, y, **settings)
    fooled = estimator.predict(whole.generate(X_test, y_test)) != y_test
    wrong = estimator.predict(X_test) != y_test
    assert_array_equal(whole.n_steps_ == 0, wrong)
    assert set(whole.n_steps_[fooled & ~wrong]) > {20}
    assert (whole.n_steps_[~fooled] == (2 * 2 + 2) * 20).all()

    # What comes first does not depend on what follows.
    for max_steps in (20, 40):
        short = AdaptiveKNNAttack(estimator, X, y, max_steps=max_steps, **settings)
        attacked = short.generate(X_test, y_test)
        assert_array_equal(short.n_steps_, whole.n_steps_.clip(max=max_steps))
        assert_array_equal(
            estimator.predict(attacked) != y_test, fooled & (whole.n_steps_ <= max_steps)
        )
    cut = AdaptiveKNNAttack(estimator, X, y, max_steps=85, **settings)
    cut.generate(X_test, y_test)
    assert cut.n_steps_.max() == 85


def test_targets_are_the_nearest_samples_of_other_classes(digits):
    X, y = digits[0][:30], np.repeat([0, 1], [27, 3])
    dknn = DkNNClassifier(n_neighbors=1, calibration="leave-one-out").fit(X, y)
    attack = AdaptiveKNNAttack(dknn, X, y, eps=0.1, n_targets=5)
    samples, labels = torch.from_numpy(X[[0, 29]]), torch.tensor([0, 1])
    found = attack._targets(samples, labels).numpy()
    distance = np.linalg.norm(X[[0, 29], None] - X, axis=2)
    assert_array_equal(found[0], [*(27 + distance[0, 27:].argsort()), -1, -1])
    assert_array_equal(found[1], distance[1, :27].argsort()[:5])


def test_samples_that_are_not_fooled_or_misclassified_from_the_start_are_returned_unchanged(task):
    network, X, y, X_test, y_test = task
    estimator = defence("k-NN", network, X, y)
    wrong = np.where(estimator.predict(X_test) == 3, 4, 3)
    attack = AdaptiveKNNAttack(estimator, X, y, eps=0.1, **QUICK)
    assert_array_equal(attack.generate(X_test, wrong), X_test)
    attacked = attack.generate(X_test, y_test)
    stands = estimator.predict(attacked) == y_test
    assert 0 < stands.sum() < len(X_test)
    assert_array_equal(attacked[stands], X_test[stands])


def test_the_same_seed_gives_the_same_samples_and_the_estimator_is_left_unchanged(defended):
    estimator, X, y, X_test, y_test = defended
    before = estimator.predict_proba(X_test)
    first, again = (
        AdaptiveKNNAttack(
            estimator, X, y, eps=0.15, max_iter=10, n_restarts=3, random_state=1
        ).generate(X_test[:10], y_test[:10])
        for _ in range(2)
    )
    assert_array_equal(first, again)
    assert_array_equal(estimator.predict_proba(X_test), before)


def test_named_classes_flat_rows_other_ranges_and_cells_in_a_hidden_layer(task):
    network, X, y, X_test, y_test = task
    names = np.array([f"digit {label}" for label in range(10)])
    shape = {"input_shape": (1, 8, 8)}
    flat, flat_test = X.reshape(len(X), 64) * 16, X_test.reshape(len(X_test), 64) * 16
    scaled = torch.nn.Sequential(Scale(1 / 16), network.module_)
    rails = RAILSClassifier(
        scaled, layers="1.conv2", start_layer="1.conv1", population_size=50, random_state=0, **shape
    ).fit(flat, names[y])
    attack = AdaptiveKNNAttack(rails, flat, names[y], eps=4, clip=(0, 16), **QUICK)
    attacked = attack.generate(flat_test, names[y_test])
    assert attacked.shape == flat_test.shape
    assert 1 < attacked.max() <= 16
    clean, robust = (rails.score(rows, names[y_test]) for rows in (flat_test, attacked))
    assert robust < clean - 0.3


class Scale(torch.nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


def test_an_arbitrating_defence_is_attacked_as_a_whole(task):
    network, X, y, X_test, y_test = task
    rails = RAILSClassifier(population_size=50, gate=Arbitration(0.05), random_state=0)
    rails.set_params(feature_extractor=network, layers="input").fit(X, y)
    accuracy = []
    for eps in (0.15, 1):
        attack = AdaptiveKNNAttack(rails, X, y, eps=eps, **QUICK | {"n_restarts": 1})
        attacked = attack.generate(X_test, y_test)
        accuracy.append(rails.score(attacked, y_test))
    # To fool the neighbours alone is harder than to fool the network alone, and here not enough.
    transferred = pgd(network, X_test, y_test, eps=0.15, step=0.03)
    assert accuracy[0] < rails.score(transferred, y_test) - 0.05
    assert accuracy[1] <= 0.05


def test_the_attack_sees_which_labels_stand(task):
    network, X, y, X_test, y_test = task
    rails = RAILSClassifier(
        network, layers="input", population_size=50, gate=Arbitration(0.05), random_state=0
    ).fit(X, y)
    attacked = pgd(network, X_test, y_test, eps=0.3, step=0.05)
    stands = rails.respond(attacked).p_values > 0.05
    assert (rails.predict(attacked) != y_test)[stands].any()
    surrogate = AdaptiveKNNAttack(rails, X, y, eps=0.1, random_state=0)._defence
    _, answers = surrogate.respond(torch.from_numpy(attacked.reshape(len(attacked), -1)))
    assert_array_equal(answers.numpy()[stands], network.predict(attacked)[stands])


def test_the_references_of_labels_that_stand_are_neighbours(task):
    network, X, y, X_test, _ = task
    rails = RAILSClassifier(
        network, layers="input", population_size=50, gate=Arbitration(0.3), random_state=0
    ).fit(X, y)
    stands = rails.respond(X_test).p_values > 0.3
    surrogate = AdaptiveKNNAttack(rails, X, y, eps=0.1, random_state=0)._defence
    points = torch.from_numpy(X_test.reshape(len(X_test), -1))
    references, _ = surrogate.respond(points)
    # The gate compares neighbours; the vote on the others is about populations.
    ((_, index),) = rails.engine_.kneighbors(points)
    neighbors = torch.from_numpy(X.reshape(len(X), -1)[index])
    members, exists = references["input"]
    n_neighbors = index.shape[2]
    assert 0 < stands.sum() < len(stands)
    assert_array_equal(members[stands][:, :, :n_neighbors], neighbors[stands])
    assert not exists[stands][:, :, n_neighbors:].any()
    is_neighbor = (members[~stands][:, :, :n_neighbors] == neighbors[~stands]).all(dim=3)
    assert is_neighbor.float().mean() < 0.5
    assert exists[~stands].any(dim=2).all()


@pytest.mark.parametrize("method", ["credibility", "mahalanobis", ["distance", "credibility"]])
def test_an_attack_keeps_away_from_alarms(task, method):
    network, X, y, X_test, y_test = task
    scorer = ThreatScorer(network, layers="conv1", method=method, n_neighbors=10, random_state=0)
    rails = RAILSClassifier(
        network, layers="conv2", population_size=50, threat_scorer=scorer, random_state=0
    ).fit(X, y)
    caught, silent = {}, {}
    for weight in (0, 1e-9, 1, "selective"):
        attack = AdaptiveKNNAttack(
            rails, X, y, eps=0.3, threat_weight=weight, **QUICK | {"n_restarts": 1, "n_targets": 0}
        )
        attacked = attack.generate(X_test, y_test)
        wrong = rails.predict(attacked) != y_test
        alarm = rails.threat_scorer_.predict(attacked) == -1
        caught[weight] = (wrong & alarm).sum()
        silent[weight] = (wrong & ~alarm).sum()
    # Caught are then those that are wrong and alarming from the beginning.
    assert caught[0] > caught[1e-9] >= caught[1]
    assert silent[1] >= silent[1e-9]
    assert min(silent[1], silent["selective"]) > silent[0]
    assert silent["selective"] > silent[1e-9]


@pytest.mark.parametrize("method", DETECTORS)
def test_the_threat_falls_along_its_soft_version(task, method):
    network, X, y, X_test, y_test = task
    scorer = ThreatScorer(network, layers="conv1", method=method, n_neighbors=10, random_state=0)
    rails = RAILSClassifier(network, layers="conv2", threat_scorer=scorer, random_state=0).fit(X, y)
    scorer = rails.threat_scorer_
    points = torch.from_numpy(pgd(network.module_, X_test, y_test, eps=0.2, step=0.05, max_iter=10))
    points = points.flatten(1)
    surrogate = ThreatSurrogate(rails, torch.from_numpy(X).flatten(1), y, n_references=10)
    before = scorer.score_samples(points)
    for _ in range(10):
        points.requires_grad_()
        (slope,) = torch.autograd.grad(surrogate.soften(points.detach())(points).sum(), points)
        points = (points.detach() - 0.01 * slope.sign()).clamp(0, 1)
    assert scorer.score_samples(points).mean() > before.mean() + 0.2


def test_the_soft_threat_of_each_method_is_that_of_its_layers(task):
    network, X, y, X_test, _ = task
    train, points = (torch.from_numpy(A).flatten(1) for A in (X, X_test[:20]))
    of_method = {"mahalanobis": "conv2", "disagreement": "conv1", "distance": ["conv1", "conv2"]}

    def soft_threat(methods, layers):
        scorer = ThreatScorer(network, layers=layers, method=methods, random_state=0)
        rails = RAILSClassifier(network, layers="conv2", threat_scorer=scorer, random_state=0)
        surrogate = ThreatSurrogate(rails.fit(X, y), train, y, n_references=10)
        return surrogate.soften(points)(points)

    alone = [soft_threat(method, layers) for method, layers in of_method.items()]
    torch.testing.assert_close(soft_threat(list(of_method), of_method), sum(alone))


def test_triage_is_attacked_at_the_neighbours_that_vote(task):
    network, X, y, X_test, y_test = task
    scorer = ThreatScorer(network, layers="conv1", method="distance", random_state=0)
    rails = RAILSClassifier(
        network, layers="conv2", population_size=50, threat_scorer=scorer, random_state=0
    ).fit(X, y)
    triaging = clone(rails).set_params(gate=Triage()).fit(X, y)
    n_fooled = []
    for estimator in (triaging, rails):
        attack = AdaptiveKNNAttack(estimator, X, y, eps=0.12, threat_weight=1, **QUICK)
        attacked = attack.generate(X_test, y_test)
        silent = triaging.threat_scorer_.predict(attacked) == 1
        wrong = triaging.predict(attacked) != y_test
        n_fooled.append((silent & wrong).sum())
    # An attack at the cells that are bred finds less.
    assert n_fooled[0] > n_fooled[1]
    assert n_fooled[0] > 10


def test_a_threat_weight_needs_a_threat_scorer_that_it_knows(task):
    network, X, y, *_ = task
    knn = defence("k-NN", network, X, y)
    with pytest.raises(TypeError, match="threat_weight needs .* got the threat_scorer None"):
        AdaptiveKNNAttack(knn, X, y, eps=0.1, threat_weight=1)
    fitted = ThreatScorer(n_neighbors=10, random_state=0).fit(X)
    frozen = RAILSClassifier(threat_scorer=FrozenEstimator(fitted), random_state=0).fit(X, y)
    AdaptiveKNNAttack(frozen, X, y, eps=0.1, threat_weight=1)
    forest = RAILSClassifier(threat_scorer=IsolationForest(random_state=0), random_state=0)
    forest.fit(X.reshape(len(X), 64), y)
    with pytest.raises(TypeError, match="IsolationForest"):
        AdaptiveKNNAttack(forest, X.reshape(len(X), 64), y, eps=0.1, threat_weight=1)
    for weight in (-1, np.nan, np.inf, "all", [0.1], None, 1j):
        with pytest.raises(
            ValueError, match="'threat_weight' parameter .* a float .* or a str among {'selective'}"
        ):
            AdaptiveKNNAttack(knn, X, y, eps=0.1, threat_weight=weight)


def test_the_seed_of_rails_is_not_known_and_success_is_judged_by_unseen_ones(task, monkeypatch):
    network, X, y, X_test, y_test = task
    rails = defence("RAILS", network, X, y)
    attack = AdaptiveKNNAttack(rails, X, y, eps=0.15, n_checks=2, **QUICK)
    engines = (*attack._defence.known, *attack._defence.unseen, rails.engine_)
    seeds = {engine.layers[0].stream.seed for engine in engines}
    assert len(seeds) == 3 + 2 + 1
    # If the unseen seeds were never wrong, no row would be given.
    monkeypatch.setattr(
        attack._defence, "predict", lambda rows: torch.from_numpy(y_test[: len(rows)])
    )
    assert_array_equal(attack.generate(X_test[:1], y_test[:1]), X_test[:1])


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"eps": -0.1}, ValueError, "'eps' parameter .* Got -0.1"),
        ({"eps": np.nan}, ValueError, "'eps' parameter .* Got nan"),
        ({"max_iter": 0}, ValueError, "'max_iter' parameter .* Got 0"),
        ({"estimator": KNeighborsClassifier()}, TypeError, "got KNeighborsClassifier"),
        ({"y_train": np.arange(600)}, ValueError, "y_train has classes.*10"),
        *(
            ({name: value}, ValueError, f"'{name}' parameter .* must be an int")
            for name in ("max_iter", "n_restarts", "n_references", "refresh", "n_seeds", "n_checks")
            for value in (1.5, "a", None, 0, np.float64(2))
        ),
        *(
            ({name: value}, ValueError, f"'{name}' parameter .* must be a float")
            for name in ("eps", "step")
            for value in ("a", np.inf, np.nan, -1, 1j, [0.1])
        ),
        *(
            ({"clip": value}, ValueError, "clip=.* must be 'auto', None or a pair")
            for value in ("range", (1, 0), (0, np.inf), (np.nan, 1), (0, 0), 1, (0, 1, 2), ("a", 1))
        ),
        ({"eps": 1e300, "clip": None}, ValueError, r"eps=1e\+300 is too large for X_train"),
        ({"max_steps": 0}, ValueError, "'max_steps' parameter .* Got 0"),
        ({"n_targets": -1}, ValueError, "'n_targets' parameter .* Got -1"),
        ({"clip": (0, 0.5)}, ValueError, "clip=.0, 0.5. does not hold X_train, .* from 0 to 1"),
        ({"clip": (0.5, 2)}, ValueError, "clip=.0.5, 2. does not hold X_train"),
        ({"random_state": "a"}, ValueError, "'random_state' parameter"),
        ({"verbose": "a"}, ValueError, "'verbose' parameter"),
        ({"y_train": np.full(600, np.nan)}, ValueError, "y_train contains NaN"),
        ({"y_train": np.full(600, "3")}, ValueError, "y_train has classes"),
        ({"y_train": [0, 1]}, ValueError, "inconsistent numbers"),
        ({"X_train": np.zeros((600, 1, 4, 4))}, ValueError, "samples of shape"),
    ],
)
def test_bad_input_is_named(task, changed, error, message):
    network, X, y, _, _ = task
    given = {"estimator": defence("k-NN", network, X, y), "X_train": X, "y_train": y, "eps": 0.1}
    with pytest.raises(error, match=message):
        AdaptiveKNNAttack(**{**given, **changed})


def farthest(attacked, X):
    return np.abs(attacked.astype(np.float64) - np.asarray(X, np.float64)).max()


@pytest.mark.parametrize(
    ("scale", "offset", "dtype"),
    [
        (16, 0, "float32"),
        (255, 0, "float32"),
        (2, -1, "float32"),
        (1, 1e6, "float32"),
        (1, 0, "float64"),
        (1, 1e9, "float64"),
    ],
)
@pytest.mark.parametrize("clip", ["auto", None, "pair"])
def test_attacked_samples_stay_in_the_ball_and_in_the_domain(digits, scale, offset, dtype, clip):
    X, y = digits[0].astype(dtype) * scale + np.asarray(offset, dtype), digits[1]
    # Samples may be outside of the domain of the training samples.
    X[400, ::3] += 0.5 * scale
    X[401, ::3] -= 0.5 * scale
    dknn = DkNNClassifier(n_neighbors=5, calibration="leave-one-out", dtype=dtype)
    dknn.fit(X[:400], y[:400])
    low, high = X[:400].min(axis=0), X[:400].max(axis=0)
    if low.min() >= 0 and high.max() <= 1:
        low, high = 0, 1
    if clip == "pair":
        clip = low, high = X[:420].min(), X[:420].max()
    eps = 0.3 * scale
    attack = AdaptiveKNNAttack(
        dknn, X[:400], y[:400], eps=eps, clip=clip, **QUICK | {"max_iter": 10, "n_targets": 0}
    )
    attacked = attack.generate(X[400:420], y[400:420])
    moved = (attacked != X[400:420]).any(axis=1)
    assert moved.sum() > 5
    assert attacked.dtype == dtype
    assert farthest(attacked, X[400:420]) <= np.nextafter(np.asarray(eps, dtype), np.inf)
    if clip is None:
        assert ((attacked < low) | (attacked > high)).sum() > 100
    else:
        assert (attacked >= np.minimum(low, X[400:420])).all()
        assert (attacked <= np.maximum(high, X[400:420])).all()


def test_samples_outside_of_a_given_clip_are_an_error(task):
    network, X, y, X_test, y_test = task
    attack = AdaptiveKNNAttack(defence("k-NN", network, X, y), X, y, eps=0.1, clip=[0, 1])
    with pytest.raises(ValueError, match=r"clip=\[0, 1\] does not hold X, .* to 1.5"):
        attack.generate(X_test + 0.5, y_test)


def test_clip_holds_values_that_are_its_bounds_but_for_rounding(digits):
    X, y = digits[0][:100].astype(np.float64) / 10, digits[1][:100]
    dknn = DkNNClassifier(n_neighbors=5, random_state=0).fit(X, y)
    AdaptiveKNNAttack(dknn, X, y, eps=0.1, clip=(0, 0.1))


class InPlace(torch.nn.Module):
    """Overwrites its input, what its layers return and, in eval mode too, drops some of it."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(64, 32)
        self.second = torch.nn.Linear(32, 10)

    def forward(self, x):
        x -= 0.5
        x = torch.nn.functional.relu_(self.first(x))
        return self.second(torch.nn.functional.dropout(x, 0.01, training=True))


MODES = {"enabled": contextlib.nullcontext, "no_grad": torch.no_grad}
MODES["inference_mode"] = torch.inference_mode


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["DkNN", "RAILS"])
def test_an_attack_has_gradients_in_every_mode_and_changes_nothing(digits, mode, kind):
    X, y = digits[0][:420].copy(), digits[1][:420].copy()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = torch.nn.Sequential(Noise(), torch.nn.Linear(64, 32), torch.nn.ReLU())
    if kind == "DkNN":
        estimator = DkNNClassifier(network, layers="1", n_neighbors=5, random_state=0)
    else:
        estimator = RAILSClassifier(network, layers="1", population_size=20, random_state=0)
    estimator.fit(X[:400], y[:400])
    before = X.copy(), y.copy(), torch.get_rng_state(), np.random.get_state()[1].copy()
    with MODES[mode]():
        tensors = torch.from_numpy(X), torch.from_numpy(y)
        attack = AdaptiveKNNAttack(
            estimator,
            tensors[0][:400],
            tensors[1][:400],
            eps=0.2,
            max_iter=10,
            n_restarts=2,
            n_checks=1,
            random_state=0,
        )
        attacked = attack.generate(tensors[0][400:], tensors[1][400:])
    assert estimator.score(attacked, y[400:]) < estimator.score(X[400:], y[400:])
    after = X, y, torch.get_rng_state(), np.random.get_state()[1]
    for expected, found in zip(before, after, strict=True):
        assert_array_equal(found, expected)
    assert all(parameter.grad is None for parameter in network.parameters())


class Noise(torch.nn.Module):
    def forward(self, x):
        return x + 0 * torch.rand_like(x)


def test_a_network_that_works_in_place_is_attacked(digits):
    X, y = digits[0][:420], digits[1][:420]
    dknn = DkNNClassifier(InPlace(), layers="first", n_neighbors=5, random_state=0)
    dknn.fit(X[:400], y[:400])
    attack = AdaptiveKNNAttack(dknn, X[:400], y[:400], eps=0.3, **QUICK | {"max_iter": 10})
    attacked = attack.generate(X[400:], y[400:])
    assert dknn.score(attacked, y[400:]) < dknn.score(X[400:], y[400:]) - 0.3
    assert farthest(attacked, X[400:]) <= 0.3 + 1e-7


@pytest.mark.parametrize("form", ["flat", "one sample", "images", "lists", "tensor of images"])
def test_attacked_samples_have_the_shape_of_those_given(digits, form):
    X, y = digits[0].copy(), digits[1]
    dknn = DkNNClassifier(n_neighbors=5, random_state=0, input_shape=(1, 8, 8))
    dknn.fit(X[:400], y[:400])
    attack = AdaptiveKNNAttack(dknn, X[:400], y[:400], eps=0.3, max_iter=5, random_state=0)
    given, labels = {
        "flat": (X[400:410], y[400:410]),
        "one sample": (X[400:401], y[400:401]),
        "images": (X[400:410].reshape(-1, 1, 8, 8), y[400:410]),
        "lists": (X[400:410].tolist(), y[400:410].tolist()),
        "tensor of images": (
            torch.from_numpy(X[400:410].reshape(-1, 1, 8, 8)).requires_grad_(),
            torch.from_numpy(y[400:410]),
        ),
    }[form]
    attacked = attack.generate(given, labels)
    assert attacked.shape == np.shape(given)
    assert (attacked.reshape(len(given), 64) != X[400 : 400 + len(given)]).any()


def test_a_single_class_leaves_nothing_to_attack(digits):
    X = digits[0][:20]
    dknn = DkNNClassifier(n_neighbors=3, calibration="leave-one-out").fit(X, np.full(20, "one"))
    attack = AdaptiveKNNAttack(dknn, X, ["one"] * 20, eps=0.3, **QUICK | {"max_iter": 5})
    assert_array_equal(attack.generate(X, ["one"] * 20), X)


def test_parameters_may_be_numpy_scalars(digits):
    X, y = digits[0][:100], digits[1][:100]
    dknn = DkNNClassifier(n_neighbors=5, random_state=0).fit(X, y)
    sizes = ("max_iter", "n_restarts", "n_references", "refresh", "n_seeds", "n_checks")
    attack = AdaptiveKNNAttack(
        dknn,
        X,
        y,
        eps=np.float32(0.1),
        step=np.float64(0.05),
        clip=np.array([0, 1]),
        random_state=np.int64(0),
        verbose=np.int64(0),
        **dict.fromkeys(sizes, np.int64(2)),
    )
    assert attack.generate(X[:5], y[:5]).shape == (5, 64)


class Detached(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(64, 8)

    def forward(self, x):
        return self.linear(x.detach())


def test_a_network_without_gradients_is_refused(digits, monkeypatch):
    X, y = digits[0][:100], digits[1][:100]
    dknn = DkNNClassifier(Detached(), layers="output", n_neighbors=5, random_state=0).fit(X, y)
    attack = AdaptiveKNNAttack(dknn, X, y, eps=0.1, max_iter=2)
    with pytest.raises(ValueError, match="as far as the layers .* detached from its input"):
        attack.generate(X, y)
    monkeypatch.setattr(dknn._features, "integer_input", True, raising=False)
    with pytest.raises(TypeError, match="needs gradients, and with them a continuous input"):
        AdaptiveKNNAttack(dknn, X, y, eps=0.1)


def test_unknown_classes_are_named(task):
    network, X, y, X_test, _ = task
    attack = AdaptiveKNNAttack(defence("k-NN", network, X, y), X, y, eps=0.1)
    with pytest.raises(ValueError, match="y has classes that the estimator does not know: .11"):
        attack.generate(X_test, np.full(len(X_test), 11))


@pytest.mark.parametrize("affinity", ["euclidean", "cosine", "inner_product"])
def test_quick_nearness_is_the_affinity_and_so_is_its_slope(affinity):
    rng = torch.Generator().manual_seed(0)
    members = 100 + torch.randn(2, 3, 50, generator=rng)
    features = (members[:, 0] + 0.01 * torch.randn(2, 50, generator=rng)).requires_grad_()
    origin = features.detach() + 0.1 * torch.randn(2, 50, generator=rng)
    exact = resolve_affinity(affinity)(features.double(), members.double())
    # The soft maximum of a single reference is its affinity.
    given = members[:, :, None], torch.ones(2, 3, 1, dtype=torch.bool), origin, 1.0
    quick = soft_class_scores(resolve_affinity(affinity), *given)(features)
    torch.testing.assert_close(quick.double(), exact, rtol=1e-3, atol=1e-4)
    slopes = [torch.autograd.grad(values.sum(), features)[0] for values in (exact, quick)]
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-2, atol=1e-3)
