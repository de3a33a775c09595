import contextlib
import copy
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from numpy.testing import assert_array_equal
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from sklearn_rails import DkNNClassifier, RAILSClassifier, ThreatScorer, TorchFeatureExtractor
from sklearn_rails.metrics import make_robust_scorer, robust_accuracy_score


def test_a_sample_counts_if_it_is_correct_under_every_attack():
    y = np.array(["a", "b", "b", "c"])
    assert robust_accuracy_score(y, y) == 1
    assert robust_accuracy_score(y, ["a", "b", "a", "c"], ["b", "b", "b", "c"]) == 0.5
    weight = [3, 1, 0, 0]
    assert robust_accuracy_score(y, ["c", "b", "b", "c"], sample_weight=weight) == 0.25


@pytest.mark.parametrize(
    ("y_true", "y_attacked"),
    [
        ([0, 1, 2], [0.0, 2.0, 2.0]),
        (np.array([0, 1, 2], np.uint8), torch.tensor([0, 2, 2])),
        (torch.tensor([0.0, 1.0, 2.0], requires_grad=True), np.array([0, 2, 2], object)),
        (pd.Series([0, 1, 2]), np.array([[0], [2], [2]])),
        (np.array(["a", "b", "cc"], object), ["a", "c", "cc"]),
        (pd.Series(["a", "b", "cc"]), np.array(["a", "c", "cc"])),
        (pd.Series(["a", "b", "cc"]).astype("category"), ["a", "c", "cc"]),
    ],
)
def test_labels_of_every_type_are_compared(y_true, y_attacked):
    assert robust_accuracy_score(y_true, y_attacked) == pytest.approx(2 / 3)
    assert robust_accuracy_score(y_true, y_true, sample_weight=torch.ones(3)) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (([0, 1],), "one attack or more"),
        (([0, 1], [0, 1], [1]), "inconsistent numbers"),
        (([], []), "y_true has no samples"),
        (([0, 1], ["0", "1"]), r"y_attacked\[0\] has labels of dtype <U1, but y_true of int64"),
        ((["0", "1"], ["0", "1"], [0, 1]), r"y_attacked\[1\] has labels of dtype int64"),
        (([0, np.nan], [0, 1]), "y_true contains NaN"),
        (([0, 1], [0, np.inf]), r"y_attacked\[0\] contains infinity"),
        (([0, 1], [0, None]), r"y_attacked\[0\] must hold real numbers"),
        ((np.array(["a", 1], object), ["a", "b"]), "y_true must hold real numbers"),
        (([[0, 1], [1, 0]], [0, 1]), "y_true must be one-dimensional"),
    ],
)
def test_robust_accuracy_refuses_invalid_input(given, message):
    with pytest.raises(ValueError, match=message):
        robust_accuracy_score(*given)


@pytest.mark.parametrize("weight", [[np.nan, 1], [-1, 1], [np.inf, 1], [0, 0], ["a", "b"], [1]])
def test_invalid_weights_are_refused(weight):
    with pytest.raises(ValueError, match="sample_weight|inconsistent numbers"):
        robust_accuracy_score([0, 1], [0, 1], sample_weight=weight)


def log_and_darken(network, X, y, *, folder):
    """Attack, and write a file for each call."""
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


def test_a_search_attacks_the_network_once_for_each_split(digits, network, tmp_path):
    X, y = digits[0][:300], digits[1][:300]
    search = GridSearchCV(
        DkNNClassifier(network, layers="input", random_state=0),
        {"n_neighbors": [1, 5, 20]},
        scoring=make_robust_scorer(partial(log_and_darken, folder=tmp_path)),
        cv=3,
        refit=False,
    )
    # First in one process, since two that reach the same split at the same time both attack it.
    # Then in worker processes, which find the stored samples.
    for n_jobs in (1, 2):
        search.set_params(n_jobs=n_jobs).fit(X, y)
        assert [path.read_text() for path in tmp_path.iterdir()] == ["once"] * 3
        assert np.unique(search.cv_results_["mean_test_score"]).size > 1
    assert network.training
    assert all(p.grad is None for p in network.parameters())


def test_the_score_is_the_accuracy_on_the_attacked_samples(digits, network):
    X, y = digits
    names = np.array([f"digit {label}" for label in y])
    rails = RAILSClassifier(network, layers="input", population_size=20, generations=1)
    rails.set_params(random_state=0, input_shape=(1, 8, 8)).fit(X[:500], names[:500])

    def attack(network, X, y):
        assert X.shape[1:] == (1, 8, 8)
        assert_array_equal(y, digits[1][500:600])
        return np.clip(X - 0.3, 0, 1)

    expected = rails.score(np.clip(X[500:600] - 0.3, 0, 1), names[500:600])
    assert 0.2 < expected < 1
    assert make_robust_scorer(attack)(rails, X[500:600], names[500:600]) == expected


def test_in_a_pipeline_the_input_of_the_network_is_attacked(digits, network):
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


def test_a_scorer_loaded_after_its_process_has_ended_works(digits, network):
    X, y = digits[0][:100], digits[1][:100]
    fitted = DkNNClassifier(network, layers="input", random_state=0).fit(X, y)
    scorer = make_robust_scorer(leave_alone)
    expected = scorer(fitted, X, y)
    saved = pickle.dumps(scorer)
    shutil.rmtree(scorer._folder)
    assert pickle.loads(saved)(fitted, X, y) == expected


def test_estimators_without_a_network_are_refused(digits, network):
    X, y = digits[0][:100], digits[1][:100]
    fitted = DkNNClassifier(network, random_state=0).fit(X, y)
    with pytest.raises(ValueError, match="LogisticRegression has no network to attack"):
        make_robust_scorer(lambda *given: given[1])(LogisticRegression().fit(X, y), X, y)
    with pytest.raises(ValueError, match="DkNNClassifier has no network"):
        make_robust_scorer(lambda *given: given[1])(DkNNClassifier().fit(X, y), X, y)
    with pytest.raises(ValueError, match="attack must return samples of shape .100, 64.*.1, 64"):
        make_robust_scorer(lambda network, X, y: X[:1])(fitted, X, y)
    with pytest.raises(TypeError, match="attack must be callable, got str"):
        make_robust_scorer("pgd")


@pytest.fixture
def fitted(digits, network):
    X, y = digits[0][:100], digits[1][:100]
    return DkNNClassifier(network, layers="input", n_neighbors=5, random_state=0).fit(X, y), X, y


RETURNED = {
    "objects": lambda X: X.astype(object),
    "float64": lambda X: X.astype(np.float64),
    "float16": lambda X: X.astype(np.float16),
    "nested lists": lambda X: X.tolist(),
    "in Fortran order": np.asfortranarray,
    "a tensor with a graph": lambda X: torch.from_numpy(X).requires_grad_() * 1,
    "a list of tensors": lambda X: list(torch.from_numpy(X).requires_grad_() * 1),
    "a bfloat16 tensor": lambda X: torch.from_numpy(X).bfloat16(),
}


@pytest.mark.parametrize("kind", RETURNED)
def test_attacks_may_return_any_array_of_numbers(fitted, kind):
    dknn, X, y = fitted
    scorer = make_robust_scorer(lambda network, X, y: RETURNED[kind](X))
    expected = dknn.score(X, y)
    assert [scorer(dknn, X, y), scorer(dknn, X, y)] == [expected, expected]
    (kept,) = Path(scorer._folder).iterdir()
    assert np.load(kept).dtype == np.float32


REFUSED = {
    "NaN": (lambda X: X * np.nan, "finite"),
    "infinity": (lambda X: X + np.inf, "finite"),
    "numbers beyond float32": (lambda X: X.astype(np.float64) + 1e300, "finite samples, also as"),
    "strings": (lambda X: X.astype(str), "result of attack must hold real numbers"),
    "numbers and strings": (lambda X: np.where(X > 1, X, "0").astype(object), "real numbers"),
    "complex numbers": (lambda X: X * 1j, "real numbers"),
    "nothing": (lambda X: None, "real numbers"),
    "ragged lists": (lambda X: [[0.0], [0.0, 1.0]], "result of attack must be an array"),
    "another shape": (lambda X: X[:, :5], "shape .100, 64., as it got them, .* .100, 5."),
    "masked values": (lambda X: np.ma.array(X, mask=X > 0.5), "masked"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_invalid_attacked_samples_are_always_refused_and_never_stored(fitted, kind):
    spoil, message = REFUSED[kind]
    scorer = make_robust_scorer(lambda network, X, y: spoil(X))
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            scorer(*fitted)
        assert os.listdir(scorer._folder) == []


def test_an_attack_that_fails_leaves_no_file(fitted, monkeypatch):
    def attack(network, X, y):
        raise KeyboardInterrupt

    scorer = make_robust_scorer(attack)
    with pytest.raises(KeyboardInterrupt):
        scorer(*fitted)
    assert os.listdir(scorer._folder) == []

    def full_disk(file, array):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "save", full_disk)
    scorer = make_robust_scorer(leave_alone)
    with pytest.raises(OSError, match="No space"):
        scorer(*fitted)
    assert os.listdir(scorer._folder) == []


def test_an_attack_may_change_its_arguments(fitted, network):
    dknn, X, y = fitted
    X, y = X.copy(), y.copy()
    X_before, y_before = X.copy(), y.copy()
    weights = {name: value.clone() for name, value in network.state_dict().items()}

    def attack(network, X, y):
        X[:] = 0
        y[:] = 0
        network.requires_grad_(False)
        for parameter in network.parameters():
            parameter.zero_()
        return X

    make_robust_scorer(attack)(dknn, X, y)
    assert_array_equal(X, X_before)
    assert_array_equal(y, y_before)
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_attacks_receive_labels_for_torch_losses(digits, network):
    X, y = digits[0][:200], digits[1][:200]
    got = []

    def attack(network, X, y):
        torch.nn.functional.cross_entropy(network(torch.from_numpy(X)), torch.from_numpy(y))
        got.append(y)
        return X

    names = np.array([f"digit {label}" for label in y])
    for labels in (
        y.astype(np.uint8),
        y.astype(np.float64),
        torch.from_numpy(y),
        names,
        names.astype(object),
    ):
        dknn = DkNNClassifier(network, n_neighbors=5, random_state=0).fit(X, np.asarray(labels))
        assert make_robust_scorer(attack)(dknn, X, labels) == dknn.score(X, np.asarray(labels))
    assert len(got) == 5
    for labels in got:
        assert labels.dtype == np.int64
        assert_array_equal(labels, y)


def test_a_class_only_in_the_test_split_keeps_its_position(digits, network):
    X, y = digits[0][:200], digits[1][:200]
    names = np.array([f"digit {label}" for label in y])
    got = []
    dknn = DkNNClassifier(network, n_neighbors=5, random_state=0).fit(X[y != 3], names[y != 3])
    score = make_robust_scorer(lambda network, X, y: got.append(y) or X)(dknn, X, names)
    assert_array_equal(got[0], y)
    assert 0 < score <= (y != 3).mean()


def test_a_float64_estimator_is_attacked_in_float64(digits, network):
    X, y = digits[0][:100].astype(np.float64) + 1e-12, digits[1][:100]
    dknn = DkNNClassifier(network, dtype="float64", n_neighbors=5, random_state=0).fit(X, y)

    def attack(network, X_given, y):
        assert network(torch.from_numpy(X_given)).dtype == torch.float64
        assert_array_equal(X_given, X)
        return X_given

    assert make_robust_scorer(attack)(dknn, X, y) == dknn.score(X, y)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_attack_has_gradients_even_if_the_caller_disables_them(fitted, mode):
    def attack(network, X, y):
        X = torch.from_numpy(X).requires_grad_()
        (slope,) = torch.autograd.grad(network(X).sum(), X)
        return X + slope

    dknn, X, y = fitted
    expected = make_robust_scorer(attack)(dknn, X, y)
    with mode():
        assert make_robust_scorer(attack)(dknn, X, y) == expected


def test_a_scorer_needs_a_classifier_and_labels(fitted, network):
    dknn, X, y = fitted
    scorer = make_robust_scorer(leave_alone)
    with pytest.raises(TypeError, match="must be a classifier, got ThreatScorer"):
        scorer(ThreatScorer(network, random_state=0).fit(X), X, y)
    with pytest.raises(ValueError, match="y contains NaN"):
        scorer(dknn, X, np.where(y == 3, np.nan, y))
    with pytest.raises(ValueError, match="inconsistent numbers"):
        scorer(dknn, X, y[:5])
    with pytest.raises(ValueError, match="all must be strings, or all numbers"):
        scorer(dknn, X, y.astype(str))
    with pytest.raises(ValueError, match="NaN"):
        scorer(dknn, X * np.nan, y)


def test_copies_of_a_scorer_share_its_samples(fitted):
    calls = []
    scorer = make_robust_scorer(lambda network, X, y: calls.append(1) or X)
    again = copy.deepcopy(scorer)
    scorer(*fitted)
    again(*fitted)
    assert again._folder == scorer._folder
    assert len(calls) == 1


ENDS = """
import os, sys, time
import numpy as np
from joblib import Parallel, delayed
from torch import nn
from sklearn_rails import DkNNClassifier
from sklearn_rails.metrics import make_robust_scorer

X, y = np.random.default_rng(0).random((60, 12)), np.arange(60) % 3
dknn = DkNNClassifier(nn.Linear(12, 3), n_neighbors=5, random_state=0).fit(X, y)
scorer = make_robust_scorer(lambda network, X, y: X)
assert not [name for name in os.listdir(os.environ["TMPDIR"]) if "sklearn_rails" in name]
if sys.argv[1] == "workers":
    score = delayed(lambda scorer: [scorer(dknn, X, y), scorer._folder][1])
    folders = Parallel(n_jobs=2)(score(scorer) for _ in range(2))
    assert set(folders) == {scorer._folder}
scorer(dknn, X, y)
assert os.listdir(scorer._folder)
if hasattr(os, "fork") and os.fork() == 0:
    sys.exit()  # A forked process removes nothing when it ends.
os.wait()
assert os.listdir(scorer._folder)
print("ready", flush=True)
if sys.argv[1] != "exit":
    time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["exit", "SIGTERM", "workers"])
def test_no_folder_is_left_behind(tmp_path, end):
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", ENDS, end],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout.readline() == "ready\n"
        if end != "exit":
            process.terminate()
        process.wait(timeout=30)
        # The folder is removed at once, or a moment after a signal.
        deadline = time.monotonic() + 10
        while left := list(tmp_path.glob("sklearn_rails*")):
            assert time.monotonic() < deadline, left
            time.sleep(0.05)
    finally:
        # Idle workers outlive their parent by minutes.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
