"""What changes after fit: the network, and the parameters."""

import gc
import itertools
import pickle
import warnings
import weakref

import joblib
import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from sklearn.exceptions import NotFittedError
from torch import nn

from sklearn_rails import (
    DkNNClassifier,
    FrozenModule,
    RAILSClassifier,
    ThreatScorer,
    TorchFeatureExtractor,
)
from sklearn_rails.immune import Arbitration, build

CHEAP = {"population_size": 20, "generations": 1, "n_neighbors": 3}


@pytest.fixture
def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))


@pytest.fixture
def task():
    rng = np.random.default_rng(0)
    y = np.arange(90) % 3
    return (rng.random((90, 8)) + y[:, None] / 2).astype(np.float32), y


def train_further(network):
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    network(torch.ones(4, 8)).square().sum().backward()
    optimizer.step()


def write_through_data(network):
    network[0].weight.data.mul_(0.5).add_(1.0)


def write_one_value_through_numpy(network):
    network[2].bias.detach().numpy()[1] += 3


def replace_tensor(network):
    network[0].weight.data = network[0].weight.data + 1


def replace_submodule(network):
    network[1] = nn.Tanh()


def change_a_setting(network):
    network[1] = nn.LeakyReLU(0.5)


def load_other_weights(network):
    network.load_state_dict({k: v + 1 for k, v in network.state_dict().items()})


CHANGES = [
    train_further,
    write_through_data,
    write_one_value_through_numpy,
    replace_tensor,
    replace_submodule,
    change_a_setting,
    nn.Module.half,
    load_other_weights,
]


def estimators(network):
    return [
        (RAILSClassifier(network, layers="0", random_state=0, **CHEAP), "predict_proba"),
        (DkNNClassifier(network, layers="0", n_neighbors=3, random_state=0), "predict_proba"),
        (ThreatScorer(network, layers="0", n_neighbors=3, alpha=0.2, random_state=0), "transform"),
    ]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_network_that_changes_after_fit_is_noticed(network, task, change, which):
    X, y = task
    estimator, ask = estimators(network)[which]
    estimator.fit(X, y)
    getattr(estimator, ask)(X)
    change(network)
    with pytest.warns(
        UserWarning, match=r"network given as feature_extractor has changed since"
    ) as told:
        live = getattr(estimator, ask)(X)
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_array_equal(getattr(estimator, ask)(X), live)
    # What is loaded answers as the live one, and says so too.
    loaded = pickle.loads(pickle.dumps(estimator))
    with pytest.warns(UserWarning, match="changed since fit"):
        assert_array_equal(getattr(loaded, ask)(X), live)
    estimator.fit(X, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        getattr(estimator, ask)(X)


def test_an_extractor_follows_its_network_without_a_warning(network, task):
    X, _ = task
    extractor = TorchFeatureExtractor(network, layers="0").fit(X)
    write_through_data(network)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = extractor.transform(X)
    with torch.no_grad():
        assert_array_equal(found.round(4), network[0](torch.from_numpy(X)).numpy().round(4))


def test_a_network_that_lost_a_layer_raises(network, task):
    X, y = task
    dknn = DkNNClassifier(network, layers="2", random_state=0).fit(X, y)
    del network[2]
    with pytest.raises(ValueError, match=r"layers=\('2',\) names layers .* does not have"):
        dknn.predict(X)


@pytest.mark.parametrize("change", CHANGES)
def test_pickles_and_hashes_hold_the_network_as_it_is(network, change):
    frozen = FrozenModule(network)
    key = joblib.hash(frozen)
    pickle.dumps(frozen)
    change(network)
    assert joblib.hash(frozen) != key
    loaded = pickle.loads(pickle.dumps(frozen)).module
    x = torch.ones(2, 8, dtype=network[0].weight.dtype)
    assert type(loaded[1]) is type(network[1])
    assert torch.equal(loaded(x), network(x))


def test_using_the_network_is_no_change(network, task):
    X, y = task
    network.append(nn.BatchNorm1d(3)).eval()
    dknn = DkNNClassifier(network, layers="0", random_state=0).fit(X, y)
    network(torch.from_numpy(X)).sum().backward()
    network.register_forward_hook(lambda *_: None)
    network.train()
    network.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dknn.predict(X)


SETTINGS = {
    "n_neighbors": 1,
    "population_size": 2,
    "generations": 0,
    "tau": 100.0,
    "rho": 1.0,
    "delta_min": 5.0,
    "delta_max": 9.0,
    "plasma_fraction": 1.0,
    "memory_fraction": 1.0,
    "memory_capacity": 1,
    "affinity": "cosine",
    "selection": "class_balanced",
    "crossover": "uniform",
    "early_stopping": False,
    "clip": None,
    "gate": Arbitration(0.5),
    "p_value": "empirical",
    "calibration": "leave-one-out",
    "alpha": 0.9,
    "method": "distance",
    "output": "passthrough",
    "layers": "2",
    "start_layer": "0",
    "dtype": "float64",
    "batch_size": 1,
    "device": "meta",
    "input_shape": (2, 4),
    "random_state": 7,
    "feature_extractor": None,
}


@pytest.mark.parametrize(
    ("which", "name"),
    [
        (which, name)
        for which, (estimator, _) in enumerate(estimators(None))
        for name in SETTINGS
        if name in estimator.get_params(deep=False)
    ],
)
def test_set_params_takes_effect_at_the_next_fit(network, task, which, name):
    X, y = task
    estimator, ask = estimators(network)[which]
    if which == 0:
        estimator.set_params(threat_scorer=ThreatScorer(random_state=0), early_stopping=True)
    estimator.fit(X, y)
    asks = [ask, "predict", *(["decision_function"] if which == 2 else ["predict_proba"])]
    asks += ["kneighbors"] if which == 0 else ["p_values", "credibility"] if which == 1 else []
    expected = [getattr(estimator, a)(X) for a in asks]
    estimator.set_params(**{name: SETTINGS[name]})
    for a, before in zip(asks, expected, strict=True):
        found = getattr(estimator, a)(X)
        if a == "kneighbors":
            found, before = found[1]["0"], before[1]["0"]
        assert_array_equal(found, before)
    if which == 0:
        response = estimator.respond(X[:5])
        assert_array_equal(response.labels, expected[1][:5])
        estimator.remember(response, confidence=0).forget()
        assert_array_equal(estimator.predict(X), expected[1])


def test_a_wrong_parameter_set_after_fit_is_refused_by_the_next_fit_only(task):
    X, y = task
    rails = RAILSClassifier(random_state=0, **CHEAP).fit(X, y)
    expected = rails.predict(X)
    rails.set_params(population_size=2)
    assert_array_equal(rails.predict(X), expected)
    with pytest.raises(ValueError, match="population_size=2 is smaller than the number of classes"):
        rails.fit(X, y)
    assert_array_equal(rails.predict(X), expected)
    assert rails.population_size == 2


def test_a_failed_fit_leaves_the_random_state_unchanged(task):
    X, y = task
    seed = RAILSClassifier(random_state=np.random.RandomState(0), **CHEAP).fit(X, y).seed_
    rails = RAILSClassifier(random_state=np.random.RandomState(0), **CHEAP).set_params(layers="no")
    with pytest.raises(ValueError, match="layers='no'"):
        rails.fit(X, y)
    with pytest.raises(NotFittedError):
        rails.predict(X)
    assert rails.set_params(layers=None).fit(X, y).seed_ == seed


def test_a_pickle_of_another_version_warns(task, monkeypatch):
    X, y = task
    dknn = DkNNClassifier(random_state=0).fit(X, y)
    saved = pickle.dumps(dknn)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pickle.loads(saved)
    monkeypatch.setattr("sklearn_rails._base.__version__", "9.9")
    with pytest.warns(UserWarning, match=r"pickled by sklearn_rails .* loaded by 9\.9"):
        pickle.loads(saved)


@pytest.mark.parametrize("again", ["fit", "partial_fit"])
def test_a_refit_does_not_hold_two_indexes_and_a_failed_one_keeps_the_old(task, again, monkeypatch):
    X, y = task
    rails = RAILSClassifier(random_state=0, **CHEAP).fit(X, y)
    expected = rails.predict_proba(X)
    old = weakref.ref(rails.neighbors_["input"])
    alive = []

    def fail(layer, tau):
        gc.collect()
        alive.append(old() is not None)
        # Threads that predict meanwhile still have an index.
        assert_array_equal(rails.predict_proba(X[:5]), expected[:5])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build, "_scale", fail)
        with pytest.raises(KeyboardInterrupt):
            getattr(rails, again)(X, y)
    assert alive == [False]
    assert_array_equal(rails.predict_proba(X), expected)
    assert_array_equal(pickle.loads(pickle.dumps(rails)).predict_proba(X), expected)


def test_a_failure_in_any_pass_of_the_network_leaves_the_old_fit(network, task):
    X, y = task

    class Fails(nn.Module):
        budget = np.inf

        def __init__(self):
            super().__init__()
            self.inner = network

        def forward(self, x):
            Fails.budget -= 1
            if Fails.budget < 0:
                raise KeyboardInterrupt
            return self.inner(x)

    net = Fails()
    for estimator, ask in estimators(net):
        estimator.set_params(layers="inner.0").fit(X, y)
        expected = getattr(estimator, ask)(X)
        before = vars(estimator).copy()
        for n_passes in itertools.count():
            Fails.budget = n_passes
            try:
                estimator.fit(X[:40], y[:40])
            except KeyboardInterrupt:
                Fails.budget = np.inf
                assert vars(estimator).keys() == before.keys()
                assert_array_equal(getattr(estimator, ask)(X), expected)
            else:
                break
        Fails.budget = np.inf
        assert n_passes > 5


class Holds(nn.Module):
    """Holds what decides on its output in every kind of attribute."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 3)
        self.mean = torch.zeros(8)
        self.shift = np.zeros(3, np.float32)
        self.activation = torch.relu
        self.settings = {"slope": 1.0}
        self.power = 1
        self.more = [nn.Linear(3, 3)]
        self.dropout = nn.Dropout(0.5)
        self.last_mean, self.is_ready, self.n_passes, self.seen = 0.0, False, 0, []

    def forward(self, x):
        self.last_mean, self.is_ready, self.n_passes = float(x.mean()), True, self.n_passes + 1
        self.seen.append(len(x))
        h = self.activation(self.a(self.dropout(x - self.mean))) * self.settings["slope"]
        return self.more[0](h**self.power + torch.from_numpy(self.shift))


EDITS = {
    "tensor replaced": lambda n: setattr(n, "mean", torch.arange(8.0)),
    "tensor in place": lambda n: n.mean.add_(1),
    "array in place": lambda n: n.shift.__iadd__(1),
    "function": lambda n: setattr(n, "activation", torch.tanh),
    "entry of a dictionary": lambda n: n.settings.update(slope=-3.0),
    "integer": lambda n: setattr(n, "power", 2),
    "layer in a plain list": lambda n: n.more[0].weight.data.mul_(-3),
    "hook": lambda n: n.a.register_forward_hook(lambda m, i, o: -3 * o),
    "hook before": lambda n: n.a.register_forward_pre_hook(lambda m, i: (-3 * i[0],)),
    "activation of a layer of torch": lambda n: n.more.append(nn.ReLU()),
}

USES = {
    "run": lambda n: n(torch.rand(4, 8)),
    "dropout": lambda n: setattr(n.dropout, "p", 0.1),
    "hook that watches": lambda n: n.a.register_forward_hook(lambda m, i, o: None),
    "modes": lambda n: n.eval().requires_grad_(False).train(),
}


def make_holds():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Holds()


@pytest.mark.parametrize("edit", EDITS)
def test_edits_of_every_kind_of_attribute_are_noticed(task, edit):
    X, y = task
    network = make_holds()
    frozen = FrozenModule(network)
    key, dknn = joblib.hash(frozen), DkNNClassifier(network, random_state=0).fit(X, y)
    EDITS[edit](network)
    with pytest.warns(UserWarning, match="has changed since fit"):
        live = dknn.p_values(X)
    loaded = pickle.loads(pickle.dumps(dknn))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_array_equal(loaded.p_values(X), live)
    assert (joblib.hash(frozen) != key) or "hook" in edit


@pytest.mark.parametrize("use", USES)
def test_uses_that_change_no_feature_are_not_reported(task, use):
    X, y = task
    network = make_holds()
    dknn = DkNNClassifier(network, random_state=0).fit(X, y)
    expected = dknn.p_values(X)
    USES[use](network)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_array_equal(dknn.p_values(X), expected)
        assert_array_equal(dknn.p_values(X), expected)
    assert len(network.seen) == (use == "run")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda n: n.__setitem__(2, nn.Linear(6, 5)), "layers='2' has 5 features, but had 3"),
        (lambda n: n.__setitem__(0, nn.Linear(9, 6)), "cannot be used any more"),
        (lambda n: n.to("meta"), "meta device"),
        (
            lambda n: n.__setitem__(
                2, nn.Sequential(n[2], nn.BatchNorm1d(3, track_running_stats=False))
            ),
            "other features in another batch",
        ),
    ],
)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_network_edited_beyond_use_is_refused_each_time(network, task, which, edit, message):
    X, y = task
    estimator, ask = estimators(network)[which]
    estimator.set_params(layers="2").fit(X, y)
    edit(network)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"has changed since fit.*{message}"):
            getattr(estimator, ask)(X)
