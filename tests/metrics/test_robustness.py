import pickle
import shutil
from functools import partial

import joblib
import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from sklearn_rails import DkNNClassifier, RAILSClassifier, TorchFeatureExtractor
from sklearn_rails.metrics import make_robust_scorer, robust_accuracy_score


def test_a_row_counts_if_it_is_right_under_every_attack():
    y = np.array(["a", "b", "b", "c"])
    assert robust_accuracy_score(y, y) == 1
    assert robust_accuracy_score(y, ["a", "b", "a", "c"], ["b", "b", "b", "c"]) == 0.5
    weight = [3, 1, 0, 0]
    assert robust_accuracy_score(y, ["c", "b", "b", "c"], sample_weight=weight) == 0.25


@pytest.mark.parametrize(
    ("given", "message"),
    [(([0, 1],), "one attack or more"), (([0, 1], [0, 1], [1]), "inconsistent numbers")],
)
def test_robust_accuracy_names_bad_input(given, message):
    with pytest.raises(ValueError, match=message):
        robust_accuracy_score(*given)


def log_and_darken(network, X, y, *, folder):
    """Leaves a file for each call."""
    assert not network.training
    path = folder / joblib.hash((X, y))
    path.write_text(path.read_text() + "again" if path.exists() else "once")
    network(torch.from_numpy(X)).sum().backward()
    return np.clip(X - 0.4, 0, 1)


def leave_alone(network, X, y):
    return X


@pytest.fixture
def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))


def test_a_search_attacks_the_network_once_a_split(digits, network, tmp_path):
    X, y = digits[0][:300], digits[1][:300]
    search = GridSearchCV(
        DkNNClassifier(network, layers="input", random_state=0),
        {"n_neighbors": [1, 5, 20]},
        scoring=make_robust_scorer(partial(log_and_darken, folder=tmp_path)),
        cv=3,
        refit=False,
    )
    # First in one process: two that come to the same split at the same moment both attack it.
    # Then worker processes find what is there.
    for n_jobs in (1, 2):
        search.set_params(n_jobs=n_jobs).fit(X, y)
        assert [path.read_text() for path in tmp_path.iterdir()] == ["once"] * 3
        assert np.unique(search.cv_results_["mean_test_score"]).size > 1
    assert network.training
    assert all(p.grad is None for p in network.parameters())


def test_the_score_is_the_accuracy_on_the_attacked_rows(digits, network):
    X, y = digits
    names = np.array([f"digit {label}" for label in y])
    rails = RAILSClassifier(network, layers="input", population_size=20, generations=1)
    rails.set_params(random_state=0, input_shape=(1, 8, 8)).fit(X[:500], names[:500])

    def attack(network, X, y):
        assert X.shape[1:] == (1, 8, 8)
        assert y[0].startswith("digit")
        return np.clip(X - 0.3, 0, 1)

    expected = rails.score(np.clip(X[500:600] - 0.3, 0, 1), names[500:600])
    assert 0.2 < expected < 1
    assert make_robust_scorer(attack)(rails, X[500:600], names[500:600]) == expected


def test_in_a_pipeline_rows_are_attacked_where_the_network_sees_them(digits, network):
    X, y = digits
    seen = []

    def attack(network, X, y):
        seen.append(X)
        return X

    pipeline = make_pipeline(
        FunctionTransformer(lambda X: X / 2),
        DkNNClassifier(TorchFeatureExtractor(network, layers="1"), random_state=0),
    ).fit(X[:200], y[:200])
    score = make_robust_scorer(attack)(pipeline, X[200:260], y[200:260])
    assert_array_equal(seen[0], X[200:260] / 2)
    assert score == pipeline.score(X[200:260], y[200:260])
    alone = make_pipeline(pipeline[-1])
    assert make_robust_scorer(attack)(alone, X[200:260], y[200:260]) == alone.score(
        X[200:260], y[200:260]
    )


def test_a_scorer_that_is_loaded_after_its_process_has_ended_finds_a_place(digits, network):
    X, y = digits[0][:100], digits[1][:100]
    fitted = DkNNClassifier(network, layers="input", random_state=0).fit(X, y)
    scorer = make_robust_scorer(leave_alone)
    expected = scorer(fitted, X, y)
    saved = pickle.dumps(scorer)
    shutil.rmtree(scorer._folder)
    assert pickle.loads(saved)(fitted, X, y) == expected


def test_what_cannot_be_attacked_is_named(digits, network):
    X, y = digits[0][:100], digits[1][:100]
    fitted = DkNNClassifier(network, random_state=0).fit(X, y)
    with pytest.raises(ValueError, match="LogisticRegression has no network to attack"):
        make_robust_scorer(lambda *given: given[1])(LogisticRegression().fit(X, y), X, y)
    with pytest.raises(ValueError, match="DkNNClassifier has no network"):
        make_robust_scorer(lambda *given: given[1])(DkNNClassifier().fit(X, y), X, y)
    with pytest.raises(ValueError, match="attack must give rows of shape .100, 64.*.1, 64"):
        make_robust_scorer(lambda network, X, y: X[:1])(fitted, X, y)
    with pytest.raises(TypeError, match="attack must be callable, got str"):
        make_robust_scorer("pgd")
