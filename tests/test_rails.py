import copy
import pickle
import warnings

import joblib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import IsolationForest
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler
from torch import nn

from sklearn_rails import FrozenModule, RAILSClassifier, ThreatScorer, TorchFeatureExtractor
from sklearn_rails.features.layouts import Layouts
from sklearn_rails.neighbors import AFFINITIES, Affinity

IMAGE = (1, 8, 8)
CHEAP = {"population_size": 40, "generations": 2, "random_state": 0, "device": "cpu"}


@pytest.fixture
def split(digits):
    X, y = digits
    order = np.random.default_rng(0).permutation(len(y))
    return X[order[:400]], y[order[:400]], X[order[400:460]], y[order[400:460]]


@pytest.fixture
def fitted(conv_net, split):
    rails = RAILSClassifier(conv_net, layers=["conv1", "conv2"], input_shape=IMAGE, **CHEAP)
    return rails.fit(*split[:2])


def test_classifies_digits(digits):
    X, y = digits
    rails = RAILSClassifier(random_state=0).fit(X[:1000], y[:1000])
    nearest = KNeighborsClassifier(1).fit(X[:1000], y[:1000])
    assert (
        rails.score(X[1000:1300], y[1000:1300]) > nearest.score(X[1000:1300], y[1000:1300]) - 0.02
    )


def test_decision_function_predict_proba_and_predict_agree(fitted, split):
    new = split[2]
    scores, shares = fitted.decision_function(new), fitted.predict_proba(new)
    response = fitted.respond(new)
    assert_allclose(shares, scores / scores.sum(axis=1, keepdims=True))
    assert_array_equal(fitted.predict(new), fitted.classes_[scores.argmax(axis=1)])
    assert_array_equal(response.labels, fitted.predict(new))
    assert_array_equal(response.proba, shares)
    # Two plasma cells a layer vote; less than half a vote is left for affinity.
    votes = sum(
        (labels[..., None] == fitted.classes_).sum(axis=1)
        for labels in response.plasma_labels.values()
    )
    assert (votes.sum(axis=1) == 4).all()
    rest = scores - votes
    assert ((rest > 0) & (rest < 0.5)).all()
    assert len(np.unique(rest)) > 0.9 * rest.size


def test_decision_function_of_two_classes_is_one_dimensional(split):
    X, y, new, _ = split
    rails = RAILSClassifier(**CHEAP).fit(X, y > 4)
    scores = rails.decision_function(new)
    assert scores.shape == (len(new),)
    assert_array_equal(rails.predict(new), scores > 0)


def test_response_fields_have_the_documented_shapes_and_values(fitted, split):
    new = split[2]
    response = fitted.respond(new)
    n_forward = 0
    for layer in fitted.layers_:
        assert response.plasma[layer].shape == (len(new), 2, *IMAGE)
        assert response.memory[layer].shape == (len(new), 10, *IMAGE)
        assert_array_equal(response.memory[layer][:, :2], response.plasma[layer])
        assert (np.diff(response.memory_affinity[layer], axis=1) <= 0).all()
        assert set(response.memory_labels[layer].ravel()) <= set(fitted.classes_)
        # The affinities are those of the cells that are given.
        extractor = TorchFeatureExtractor(fitted.feature_extractor, layers=layer)
        cells = extractor.fit_transform(response.plasma[layer][:, 0])
        antigens = extractor.transform(new.reshape(-1, *IMAGE))
        assert_allclose(
            response.plasma_affinity[layer][:, 0],
            -np.linalg.norm(cells - antigens, axis=1),
            rtol=1e-3,
        )
        last = response.n_generations[layer]
        assert response.affinity_curve[layer].shape == (len(new), 3)
        assert response.class_curve[layer].shape == (len(new), 3, 10)
        assert set(last) <= {-1, 0, 1, 2}
        assert (last == -1).any()
        assert (last > 0).any()
        curve = response.affinity_curve[layer]
        assert np.isfinite(curve[np.arange(len(new)), last.clip(0)]).all()
        assert_allclose(response.class_curve[layer][:, 0], 0.1)
        n_forward += 40 * (last + 1).sum()
    assert response.n_forward == n_forward
    assert response.threat is None


def test_affinity_rises_from_generation_to_generation(split):
    X, y, new, _ = split
    rails = RAILSClassifier(early_stopping=False, generations=6, random_state=0).fit(X, y)
    curve = rails.respond(new).affinity_curve["input"]
    assert (curve[:, -1] > curve[:, 0]).all()


def test_kneighbors_returns_the_nearest_of_each_class(split):
    X, y, new, _ = split
    y = np.where(y == 7, 8, y)
    few = np.r_[np.flatnonzero(y != 3), np.flatnonzero(y == 3)[:4]]
    X, y = X[few], y[few]
    rails = RAILSClassifier(n_neighbors=6, **CHEAP).fit(X, y)
    distances, indices = rails.kneighbors(new)
    assert distances["input"].shape == indices["input"].shape == (len(new), 9, 6)
    for c, label in enumerate(rails.classes_):
        rows = np.flatnonzero(y == label)
        k = min(6, len(rows))
        assert rails.n_neighbors_[c] == k
        d = np.linalg.norm(new[:, None].astype(float) - X[rows], axis=2)
        best = np.argsort(d, axis=1, kind="stable")[:, :k]
        assert_array_equal(indices["input"][:, c, :k], rows[best])
        assert_allclose(distances["input"][:, c, :k], np.take_along_axis(d, best, 1), rtol=1e-5)
        assert (indices["input"][:, c, k:] == -1).all()
        assert np.isinf(distances["input"][:, c, k:]).all()


@pytest.fixture(scope="module")
def exact():
    """Float64, where a batch's shape moves no number enough to change a draw."""
    rng = np.random.default_rng(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    rails = RAILSClassifier(net, layers=["1", "2"], dtype="float64", **CHEAP)
    y = rng.integers(3, size=60)
    X = rng.normal(size=(60, 6)) + y[:, None]
    return rails.fit(X, y), rng.normal(size=(12, 6)) + 1


@settings(deadline=None, max_examples=40)
@given(
    order=st.permutations(range(12)),
    size=st.integers(1, 12),
    batch_size=st.sampled_from(["auto", 1, 7, 64, 1000]),
    n_jobs=st.sampled_from([None, 2, 3]),
)
def test_predictions_do_not_depend_on_order_subset_batch_or_n_jobs(
    exact, order, size, batch_size, n_jobs
):
    rails, new = exact
    expected = rails.decision_function(new)
    rows = order[:size]
    other = copy.copy(rails).set_params(n_jobs=n_jobs)
    other._features = copy.copy(rails._features)
    shape, device = other._features.input_shape, other._features.device
    other._features._layouts = Layouts(batch_size, shape, device)
    assert_allclose(other.decision_function(new[rows]), expected[rows], rtol=1e-9)


def test_working_memory_changes_no_prediction(fitted, split):
    from sklearn import config_context

    whole = fitted.respond(split[2])
    with config_context(working_memory=1):
        cut = fitted.respond(split[2])
    assert_array_equal(cut.proba, whole.proba)
    assert_array_equal(cut.memory["conv2"], whole.memory["conv2"])
    assert cut.n_forward == whole.n_forward


def test_fits_with_one_random_state_predict_alike(conv_net, split):
    X, y, new, _ = split
    rails = RAILSClassifier(conv_net, layers="conv1", input_shape=IMAGE, **CHEAP)
    first = rails.fit(X, y).predict_proba(new)
    assert_array_equal(clone(rails).fit(X, y).predict_proba(new), first)
    assert_array_equal(rails.predict_proba(new), first)
    assert (rails.set_params(random_state=1).fit(X, y).predict_proba(new) != first).any()


@pytest.mark.parametrize("save", ["pickle", "joblib", "memory map", "deepcopy"])
def test_saved_classifiers_predict_the_same(fitted, split, save, tmp_path):
    expected = fitted.decision_function(split[2])
    if save == "pickle":
        loaded = pickle.loads(pickle.dumps(fitted))
    elif save == "deepcopy":
        loaded = copy.deepcopy(fitted)
    else:
        joblib.dump(fitted, tmp_path / "rails.joblib")
        mode = "r" if save == "memory map" else None
        loaded = joblib.load(tmp_path / "rails.joblib", mmap_mode=mode)
    assert_array_equal(loaded.decision_function(split[2]), expected)
    assert_array_equal(pickle.loads(pickle.dumps(loaded)).decision_function(split[2]), expected)


@pytest.mark.parametrize("backend", [None, "threading", "loky"])
def test_a_backend_whose_workers_share_no_memory_is_not_used_and_warns_once(fitted, split, backend):
    rails, new = copy.copy(fitted).set_params(n_jobs=2), split[2]
    expected = fitted.predict(new)
    rails._features._warned.discard("backend")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if backend is None:
            found = rails.predict(new)
        else:
            with joblib.parallel_config(backend=backend, n_jobs=2):
                found = rails.predict(new)
                rails.predict(new)
    assert_array_equal(found, expected)
    texts = [str(one.message) for one in told if "backend" in str(one.message)]
    assert len(texts) == (backend == "loky")
    assert all("LokyBackend is not used" in text for text in texts)


def test_clone_shares_the_network_and_starts_unfitted(fitted, conv_net, split):
    twin = clone(fitted)
    assert twin.feature_extractor is conv_net
    with pytest.raises(NotFittedError):
        twin.predict(split[2])


@pytest.mark.parametrize("wrap", [lambda net: net, FrozenModule])
def test_grid_search_in_a_pipeline_with_two_jobs(conv_net, split, wrap):
    X, y, new, _ = split
    rails = RAILSClassifier(wrap(conv_net), layers="conv1", input_shape=IMAGE, **CHEAP)
    pipe = make_pipeline(MinMaxScaler(clip=True), rails)
    grid = {
        "railsclassifier__tau": ["scale", 1.0],
        "railsclassifier__rho": [0.05, 0.2],
        "railsclassifier__generations": [0, 2],
    }
    search = GridSearchCV(pipe, grid, cv=2, n_jobs=2, error_score="raise").fit(X[:150], y[:150])
    alone = GridSearchCV(pipe, grid, cv=2, error_score="raise").fit(X[:150], y[:150])
    assert_allclose(search.cv_results_["mean_test_score"], alone.cv_results_["mean_test_score"])
    assert search.best_estimator_[-1].feature_extractor is rails.feature_extractor
    assert search.score(new, split[3]) > 0.7


def test_cross_validation_and_calibration(split):
    X, y, new, _ = split
    rails = RAILSClassifier(**CHEAP)
    assert cross_val_score(rails, X, y, cv=3).mean() > 0.8
    calibrated = CalibratedClassifierCV(rails, cv=2).fit(X, y)
    assert_allclose(calibrated.predict_proba(new).sum(axis=1), 1)


def test_layers_and_shape_default_to_those_of_the_extractor(conv_net, split):
    X, y, new, _ = split
    extractor = TorchFeatureExtractor(conv_net, layers="conv2", input_shape=IMAGE)
    given = RAILSClassifier(extractor, **CHEAP).fit(X, y)
    spelled = RAILSClassifier(conv_net, layers="conv2", input_shape=IMAGE, **CHEAP).fit(X, y)
    assert given.layers_ == ("conv2",)
    assert_array_equal(given.predict_proba(new), spelled.predict_proba(new))


def test_images_may_be_flat_or_in_shape_arrays_or_tensors(fitted, split):
    new = split[2]
    expected = fitted.predict_proba(new)
    for images in (new.reshape(-1, *IMAGE), torch.tensor(new).reshape(-1, *IMAGE)):
        assert_array_equal(fitted.predict_proba(images), expected)


def test_populations_may_live_in_a_hidden_layer(conv_net, split):
    X, y, new, _ = split
    rails = RAILSClassifier(
        conv_net, layers="conv2", start_layer="conv1", input_shape=IMAGE, **CHEAP
    ).fit(X, y)
    cells = rails.respond(new).plasma["conv2"]
    assert cells.shape == (len(new), 2, 4, 8, 8)
    hidden = TorchFeatureExtractor(conv_net, layers="conv1", input_shape=IMAGE).fit_transform(X)
    flat = cells.reshape(-1, hidden.shape[1])
    assert (flat >= hidden.min(axis=0) - 1e-6).all()
    assert (flat <= hidden.max(axis=0) + 1e-6).all()
    assert rails.score(new, split[3]) > 0.7


def test_cells_stay_in_the_domain_of_the_data(split):
    X, y, new, _ = split
    params = {**CHEAP, "rho": 1.0, "delta_min": 0.5, "delta_max": 0.9, "early_stopping": False}

    def cells(rails, scale):
        return rails.fit(X * scale, y).respond(new * scale).memory["input"]

    unit = cells(RAILSClassifier(**params), 1)
    assert unit.min() == 0
    assert unit.max() == 1
    high = 16 * X.max(axis=0)
    ranged = cells(RAILSClassifier(**params), 16)
    assert (ranged >= 0).all()
    assert (ranged <= high).all()
    assert (ranged == high)[..., high > 0].any()
    assert cells(RAILSClassifier(**params, clip=(0.25, 0.75)), 1).max() == 0.75
    assert cells(RAILSClassifier(**params, clip=None), 1).max() > 1


def test_tau_scale_follows_the_units_of_the_features(split):
    X, y, _, _ = split
    small = RAILSClassifier(**CHEAP).fit(X, y).tau_["input"]
    large = RAILSClassifier(**CHEAP).fit(1000 * X, y).tau_["input"]
    assert_allclose(large, 1000 * small, rtol=1e-4)
    assert RAILSClassifier(tau=3, **CHEAP).fit(X, y).tau_ == {"input": 3.0}
    assert RAILSClassifier(**CHEAP).fit(np.ones((4, 2)), [0, 0, 1, 1]).tau_ == {"input": 1.0}


@pytest.mark.parametrize(
    "algorithm", ["brute", "kd_tree", "ball_tree", NearestNeighbors(leaf_size=5)]
)
@pytest.mark.parametrize("affinity", ["euclidean", "cosine"])
def test_every_algorithm_flocks_the_same_neighbours(split, algorithm, affinity):
    X, y, new, _ = split
    expected = RAILSClassifier(affinity=affinity, **CHEAP).fit(X, y)
    other = RAILSClassifier(affinity=affinity, algorithm=algorithm, n_jobs=2, **CHEAP).fit(X, y)
    assert_array_equal(other.kneighbors(new)[1]["input"], expected.kneighbors(new)[1]["input"])
    assert_array_equal(other.predict(new), expected.predict(new))


def test_threat_scores_are_reported_and_change_no_prediction(split):
    X, y, new, _ = split
    plain = RAILSClassifier(**CHEAP).fit(X, y).predict_proba(new)
    scorer = ThreatScorer(random_state=0)
    fitted_scorer = clone(scorer).fit(X, y)
    for detector in (scorer, FrozenEstimator(fitted_scorer)):
        rails = RAILSClassifier(threat_scorer=detector, **CHEAP).fit(X, y)
        response = rails.respond(new)
        assert_array_equal(response.threat, -fitted_scorer.score_samples(new))
        assert_array_equal(response.proba, plain)
    other = RAILSClassifier(threat_scorer=IsolationForest(random_state=0), **CHEAP).fit(X, y)
    assert other.respond(new).threat.shape == (len(new),)
    assert not hasattr(other.set_params(threat_scorer=None).fit(X, y), "threat_scorer_")


def test_verbose_shows_a_progress_bar(split, capsys):
    rails = RAILSClassifier(**CHEAP).fit(*split[:2])
    rails.predict(split[2])
    assert capsys.readouterr().err == ""
    rails.set_params(verbose=1).predict(split[2])
    shown = capsys.readouterr().err
    assert "60/60" in shown
    assert "100% of populations decided" in shown
    rails.fit(*split[:2])
    n_train = len(split[0])
    assert f"{n_train}/{n_train}" in capsys.readouterr().err


def test_repr_in_a_terminal_and_a_notebook_prints_no_network(fitted):
    for text in (repr(fitted), repr(fitted.respond), fitted._repr_html_()):
        assert "kernel_size" not in text
    assert "400 examples of 10 classes" in repr(fitted.neighbors_["conv1"])


def test_global_random_state_is_not_touched(fitted, split):
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    clone(fitted).fit(*split[:2]).predict(split[2])
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert_array_equal(np.random.get_state()[1], numpy_state)


class Tuple(nn.Module):
    def forward(self, x):
        return x, x


BAD = [
    ({"population_size": 9}, "population_size=9 is smaller than the number of classes, 10"),
    ({"delta_min": 0.2}, "delta_min=0.2 must not be larger than delta_max=0.15"),
    ({"tau": 0.0}, "'tau' parameter"),
    ({"tau": "auto"}, "'tau' parameter"),
    ({"rho": 1.5}, "'rho' parameter"),
    ({"generations": -1}, "'generations' parameter"),
    ({"plasma_fraction": 0.0}, "'plasma_fraction' parameter"),
    ({"affinity": "manhattan"}, "affinity='manhattan' must be one of"),
    ({"selection": "tournament"}, "'selection' parameter"),
    ({"crossover": "two_point"}, "'crossover' parameter"),
    ({"clip": (1, 0)}, r"clip=\(1, 0\) must be 'auto', None or a pair"),
    ({"clip": (0, 1, 2)}, "clip=.* must be"),
    ({"algorithm": "annoy"}, "'algorithm' parameter"),
    ({"algorithm": "brute", "affinity": "inner_product"}, "algorithm='brute'"),
    ({"affinity": lambda a, b: 1.0}, "affinity must give a tensor .* gave float"),
    ({"layers": "conv7"}, r"layers='conv7'.*\['conv7'\]"),
    ({"start_layer": "conv7"}, r"start_layer='conv7'.*\['conv7'\]"),
    ({"start_layer": "fc", "layers": "conv1"}, r"reached \['conv1'\] from start_layer='fc'"),
    ({"feature_extractor": Tuple(), "layers": None}, "layers='output': the network gives a tuple"),
    ({"input_shape": (3, 5)}, r"input_shape=\(3, 5\) holds 15 values"),
    ({"device": "cuda:77"}, "device='cuda:77' cannot be used"),
    ({"threat_scorer": MinMaxScaler()}, "'threat_scorer' parameter"),
    ({"batch_size": 0}, "'batch_size' parameter"),
    ({"dtype": "float16"}, "'dtype' parameter"),
]


@pytest.mark.parametrize(("params", "message"), BAD)
def test_invalid_parameters_raise_and_a_failed_fit_changes_nothing(fitted, split, params, message):
    X, y, new, _ = split
    expected = fitted.predict_proba(new)
    changing = {*params, "engine_"}
    before = {k: v for k, v in vars(fitted).items() if k not in changing}
    good = {k: getattr(fitted, k) for k in params}
    fitted.set_params(**params)
    with pytest.raises(ValueError, match=message):
        fitted.fit(X, y)
    assert {k: v for k, v in vars(fitted).items() if k not in changing} == before
    assert_array_equal(fitted.set_params(**good).predict_proba(new), expected)


def test_invalid_data_raises_and_changes_nothing(fitted, split):
    X, y, new, _ = split
    before = dict(vars(fitted))
    for bad_X, bad_y, message in (
        (np.where(np.eye(*X.shape), np.nan, X), y, "NaN"),
        (np.where(np.eye(*X.shape), np.inf, X), y, "infinity"),
        (X[:, :63], y, r"input_shape=\(1, 8, 8\) holds 64 values a sample, but X has 63"),
        (X.reshape(-1, 8, 8), y, r"samples of X have shape \(8, 8\)"),
        (X, y[:-1], "inconsistent numbers of samples"),
        (X, y + 0.5, "Unknown label type"),
    ):
        with pytest.raises(ValueError, match=message):
            fitted.fit(bad_X, bad_y)
        assert vars(fitted) == before
    unfitted = clone(fitted).set_params(layers="conv7")
    before = dict(vars(unfitted))
    with pytest.raises(ValueError, match="conv7"):
        unfitted.fit(X, y)
    assert vars(unfitted) == before
    with pytest.raises(ValueError, match=r"shape \(8, 8\).*fitted on samples of shape \(1, 8, 8\)"):
        fitted.predict(new.reshape(-1, 8, 8))
    with pytest.raises(TypeError, match="feature_extractor must be .* got str"):
        RAILSClassifier("resnet").fit(X, y)


def test_tau_as_a_number_applies_to_every_layer(conv_net, split):
    X, y, _, _ = split
    rails = RAILSClassifier(conv_net, layers=["conv1", "conv2"], input_shape=IMAGE, tau=2)
    assert repr(rails.fit(X, y).tau_) == "{'conv1': 2.0, 'conv2': 2.0}"


class Manhattan(Affinity):
    """Minus the sum of absolute differences."""

    def __call__(self, antigens, features, *, overwrite_features=False):
        return -(features - antigens[:, None]).abs().sum(dim=2)


def test_a_new_affinity_needs_one_class_and_one_line_in_the_table(split, monkeypatch):
    X, y, new, y_new = split
    monkeypatch.setitem(AFFINITIES, "manhattan", Manhattan)
    rails = RAILSClassifier(affinity="manhattan", random_state=0).fit(X, y)
    distances, indices = rails.kneighbors(new[:5])
    expected = np.abs(X - new[:5, None]).sum(axis=2)
    for row, (near, found) in enumerate(zip(distances["input"], indices["input"], strict=True)):
        assert_allclose(near, expected[row][found], rtol=1e-5)
    assert rails.score(new, y_new) > 0.9
