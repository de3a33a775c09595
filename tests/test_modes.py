"""Every fast path gives the labels of the plain one."""

import shutil
import sys
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from conftest import ConvNet
from numpy.testing import assert_array_equal
from sklearn import config_context

from sklearn_rails import RAILSClassifier, ThreatScorer
from sklearn_rails.immune import Arbitration, Triage, compiled
from sklearn_rails.neighbors import ExactNeighbors

PLAIN = {"layers": ["conv1", "conv2"], "population_size": 60, "generations": 4, "random_state": 0}
PLAIN |= {"early_stopping": False, "batch_size": 16, "input_shape": (1, 8, 8)}

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="needs a C++ compiler"
)

GATES = {
    "no gate": {},
    "arbitration": {"gate": Arbitration(alpha=0.3)},
    "triage": {
        "gate": Triage(),
        "threat_scorer": ThreatScorer(method="mahalanobis", alpha=0.5, random_state=0),
    },
}


@pytest.fixture(scope="module")
def task(digits):
    X, y = digits
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ConvNet()
    plain = {
        gate: RAILSClassifier(network, **PLAIN, **settings).fit(X[:800], y[:800])
        for gate, settings in GATES.items()
    }
    expected = {gate: rails.predict(X[800:950]) for gate, rails in plain.items()}
    # The gates decide something.
    assert not np.array_equal(expected["no gate"], expected["arbitration"])
    assert not np.array_equal(expected["no gate"], expected["triage"])
    return network, X[:800], y[:800], X[800:950], expected


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    "mode",
    [
        {"batch_size": 1},
        {"batch_size": 1000},
        {"batch_size": "auto"},
        {"n_jobs": 2},
        {"dtype": "float64"},
        {"algorithm": "brute"},
        {"algorithm": ExactNeighbors("float16")},
        {"algorithm": ExactNeighbors("float16"), "start_layer": "norm1", "layers": "conv2"},
        {"algorithm": ExactNeighbors("a folder")},
        pytest.param({"compile": True}, marks=needs_compiler),
        pytest.param({"compile": True, "n_jobs": 2}, marks=needs_compiler),
        pytest.param({"compile": True, "start_layer": "norm1", "clip": None}, marks=needs_compiler),
        pytest.param({"device": "cuda"}, marks=needs_gpu),
        pytest.param({"device": "cuda", "algorithm": ExactNeighbors("float16")}, marks=needs_gpu),
        pytest.param({"device": "cuda", "algorithm": ExactNeighbors("a folder")}, marks=needs_gpu),
    ],
    ids=str,
)
def test_every_mode_predicts_like_the_plain_path(task, mode, gate, tmp_path):
    network, X, y, new, expected = task
    n_samples = 10 if mode.get("batch_size") == 1 else 60
    new, expected = new[:n_samples], expected[gate][:n_samples]
    if getattr(mode.get("algorithm"), "storage", None) == "a folder":
        mode = {**mode, "algorithm": ExactNeighbors(tmp_path)}
    if "start_layer" in mode:
        mode = {**mode, "layers": "conv2"}
        plain = {**PLAIN, **mode, **GATES[gate], "algorithm": "auto", "compile": False}
        expected = RAILSClassifier(network, **plain).fit(X, y).predict(new)
    rails = RAILSClassifier(network, **{**PLAIN, **mode}, **GATES[gate]).fit(X, y)
    assert_array_equal(rails.predict(new), expected)


def test_little_memory_one_row_at_a_time_and_a_bank_on_disk_give_the_same_labels(task, tmp_path):
    network, X, y, new, expected = task
    expected = expected["no gate"]
    rails = RAILSClassifier(network, **PLAIN).fit(X, y)
    with config_context(working_memory=0.5):
        assert_array_equal(rails.predict(new), expected)
    assert_array_equal(
        np.concatenate([rails.predict(row[None]) for row in new[:20]]), expected[:20]
    )
    joblib.dump(rails, tmp_path / "rails.joblib")
    mapped = joblib.load(tmp_path / "rails.joblib", mmap_mode="r")
    assert_array_equal(mapped.predict(new), expected)


def test_early_stopping_changes_almost_no_label(task):
    network, X, y, new, expected = task
    rails = RAILSClassifier(network, **{**PLAIN, "early_stopping": True}).fit(X, y)
    assert np.mean(rails.predict(new) == expected["no gate"]) >= 0.995


def test_without_a_compiler_fit_says_so(task, monkeypatch):
    def no_compiler():
        raise RuntimeError("No working C++ compiler found.")

    network, X, y, _, _ = task
    monkeypatch.setattr(compiled, "_compiled", no_compiler)
    with pytest.raises(ValueError, match=r"compile=True needs a C\+\+ compiler .* No working"):
        RAILSClassifier(network, **PLAIN, compile=True).fit(X, y)


@pytest.mark.parametrize("batch_size", [16, "auto"])
@pytest.mark.parametrize("start_layer", [None, "norm1"])
def test_bfloat16_changes_few_labels(task, batch_size, start_layer):
    network, X, y, new, _ = task
    settings = {**PLAIN, "layers": "conv2", "batch_size": batch_size, "start_layer": start_layer}
    expected = RAILSClassifier(network, **settings).fit(X, y).predict(new)
    half = RAILSClassifier(network, **settings, dtype="bfloat16").fit(X, y)
    features = half.feature_map_(X[:50], half.layers_)["conv2"]
    assert features.dtype == torch.float32
    assert half.dtype_ == "bfloat16"
    assert np.mean(half.predict(new) == expected) >= 0.97


def is_mapped(tensor, folder):
    """Check whether a tensor's memory is a file's in a folder."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, stop = (int(place, 16) for place in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < stop:
            return str(folder) in line
    return False


@on_linux
def test_a_saved_bank_is_not_read_into_memory(task, tmp_path):
    network, X, y, _, _ = task
    rails = RAILSClassifier(network, **PLAIN).fit(X, y)
    joblib.dump(rails, tmp_path / "rails.joblib")
    mapped = joblib.load(tmp_path / "rails.joblib", mmap_mode="r")
    assert is_mapped(mapped.neighbors_["conv2"].store.examples, tmp_path)
    assert not is_mapped(rails.neighbors_["conv2"].store.examples, tmp_path)


@on_linux
def test_features_in_a_folder_take_a_file_that_leaves_nothing_behind(task, tmp_path):
    network, X, y, _, _ = task
    rails = RAILSClassifier(network, **{**PLAIN, "algorithm": ExactNeighbors(str(tmp_path))}).fit(
        X, y
    )
    assert is_mapped(rails.neighbors_["conv2"].store.examples, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"algorithm": ExactNeighbors("flaot16")},
            "storage='flaot16' must be 'memory', 'float16' or a folder",
        ),
        ({"algorithm": ExactNeighbors(3)}, "'storage' parameter of ExactNeighbors"),
        (
            {
                "algorithm": ExactNeighbors("float16"),
                "affinity": lambda a, b: (a * b).sum(dim=1),
            },
            "affinity of your",
        ),
    ],
)
def test_unsupported_storage_raises(task, settings, message):
    network, X, y, _, _ = task
    with pytest.raises(ValueError, match=message):
        RAILSClassifier(network, **{**PLAIN, **settings}).fit(X, y)


@pytest.mark.parametrize(("max_share", "dtype"), [(np.inf, "bfloat16"), (0.0, "float32")])
def test_auto_takes_bfloat16_where_it_is_faster(task, monkeypatch, max_share, dtype):
    network, X, y, new, expected = task
    monkeypatch.setattr("sklearn_rails.features.precision.MAX_SHARE", max_share)
    rails = RAILSClassifier(network, **PLAIN, dtype="auto").fit(X, y)
    assert rails.dtype_ == dtype
    assert np.mean(rails.predict(new) == expected["no gate"]) >= (0.97 if max_share else 1)


def test_auto_stays_in_float32_where_bfloat16_does_not_run(task):
    class OnlyFloat32(torch.nn.Linear):
        def forward(self, x):
            hidden = super().forward(x)
            if hidden.dtype != torch.float32:
                raise TypeError("no such kernel")
            return hidden

    _, X, y, _, _ = task
    with torch.random.fork_rng():
        network = OnlyFloat32(64, 8)
    rails = RAILSClassifier(network, layers="output", dtype="auto", random_state=0).fit(X, y)
    assert rails.dtype_ == "float32"
