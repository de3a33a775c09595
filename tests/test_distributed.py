"""Predictions on a cluster of two processes."""

import os
import signal
import sys
import threading
import time

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler
from torch import nn

from sklearn_rails import DkNNClassifier, RAILSClassifier, ThreatScorer
from sklearn_rails import distributed as module
from sklearn_rails.distributed import predict

distributed = pytest.importorskip("distributed", reason="dask[distributed] is not installed")
da = pytest.importorskip("dask.array")

N_CLASSES = 3
rng = np.random.default_rng(0)
X = rng.random((90, 2, 4, 4), dtype=np.float32)
Y = np.array(["a", "b", "c"])[np.arange(90) % N_CLASSES]
NEW = rng.random((70, 2, 4, 4), dtype=np.float32)


@pytest.fixture(scope="module")
def client():
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs="CRITICAL"
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def rails():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, N_CLASSES))
    scorer = ThreatScorer(method="distance", alpha=0.2)
    rails = RAILSClassifier(
        net, layers="1", population_size=30, threat_scorer=scorer, random_state=0
    )
    return rails.fit(X, Y)


@pytest.mark.parametrize("method", ["predict", "predict_proba", "decision_function"])
@pytest.mark.parametrize("flat", [False, True])
def test_answers_are_those_of_one_process(client, rails, method, flat, tmp_path):
    expected = getattr(rails, method)(NEW)
    rows = NEW.reshape(70, -1) if flat else NEW
    assert_array_equal(predict(rails, rows, client, method=method), expected)
    assert_array_equal(predict(rails, rows, method=method, block_size=9), expected)
    np.save(tmp_path / "rows.npy", rows)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    assert_array_equal(predict(rails, mapped, client, method=method), expected)
    chunks = (32, *((2,) * (rows.ndim - 1)))
    found = predict(rails, da.from_array(rows, chunks=chunks), client, method=method)
    assert found.chunks[0] == (32, 32, 6)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert_array_equal(found.compute(), expected)


def test_answers_of_several_arrays_are_joined(client, rails):
    distances, indices = predict(rails, NEW, client, method="kneighbors")
    expected = rails.kneighbors(NEW)
    assert_array_equal(distances["1"], expected[0]["1"])
    assert_array_equal(indices["1"], expected[1]["1"])
    for found, answer in zip(
        predict(rails, NEW, client, method="predict_with_alarm"),
        rails.predict_with_alarm(NEW),
        strict=True,
    ):
        assert_array_equal(found, answer)
    with pytest.raises(ValueError, match="method='kneighbors' must return an array for a dask"):
        predict(rails, da.from_array(NEW), client, method="kneighbors")


def test_other_estimators_and_pipelines(client):
    rows, new = X.reshape(90, -1), NEW.reshape(70, -1)
    for estimator in (
        make_pipeline(MinMaxScaler(), DkNNClassifier(random_state=0)),
        ThreatScorer(method="distance", random_state=0),
    ):
        estimator.fit(rows, Y)
        assert_array_equal(predict(estimator, new, client), estimator.predict(new))
    assert_array_equal(
        predict(estimator, new, client, method="transform"), estimator.transform(new)
    )


class Slow(DkNNClassifier):
    """Takes a while for each block."""

    def predict(self, X):
        time.sleep(0.05)
        return super().predict(X)


def test_blocks_of_a_killed_worker_are_computed_by_others(client):
    rows = X.reshape(90, -1)
    estimator = Slow(random_state=0).fit(rows, Y)
    pids = client.run(os.getpid)
    victim = next(iter(pids.values()))
    killer = threading.Timer(0.4, os.kill, (victim, signal.SIGKILL))
    killer.start()
    found = predict(estimator, rows, client, block_size=2)
    killer.join()
    assert_array_equal(found, DkNNClassifier(random_state=0).fit(rows, Y).predict(rows))
    assert victim not in client.run(os.getpid).values()
    client.wait_for_workers(2)


def test_an_estimator_that_no_worker_holds_any_more_is_sent_again():
    rows = X.reshape(90, -1)
    estimator = Slow(random_state=0).fit(rows, Y)
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=1, dashboard_address=None, silence_logs="CRITICAL"
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        (pid,) = client.run(os.getpid).values()
        killer = threading.Timer(0.4, os.kill, (pid, signal.SIGKILL))
        killer.start()
        found = predict(estimator, rows, client, block_size=2)
        killer.join()
        assert_array_equal(found, DkNNClassifier(random_state=0).fit(rows, Y).predict(rows))


class Reader:
    """Samples that say how many of their blocks are in use."""

    def __init__(self, rows):
        self.rows, self.n_read = rows, 0

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, block):
        self.n_read += 1
        return self.rows[block]


def test_few_blocks_are_read_at_a_time(client, rails, monkeypatch):
    reader, ahead = Reader(NEW), []

    def run(*args):
        for item in original(*args):
            ahead.append(reader.n_read - len(ahead))
            yield item

    original = module._run
    monkeypatch.setattr(module, "_run", run)
    predict(rails, reader, client, block_size=2, verbose=False)
    assert reader.n_read == 35
    assert max(ahead) <= 5  # two for each of two threads, and the one that is done


def test_what_is_wrong_is_said(client, rails):
    with pytest.raises(NotFittedError):
        predict(RAILSClassifier(), NEW, client)
    with pytest.raises(ValueError, match="method='prdict' is no method of RAILSClassifier"):
        predict(rails, NEW, client, method="prdict")
    with pytest.raises(ValueError, match="block_size=0 must be 1 or more"):
        predict(rails, NEW, client, block_size=0)
    with pytest.raises(ValueError, match="Found array with 0 sample"):
        predict(rails, NEW[:0], client)
    with pytest.raises(ValueError, match="X has 5 features"):
        predict(rails, np.zeros((9, 5), dtype=np.float32), client)


def test_there_must_be_a_client_and_a_worker(rails, monkeypatch):
    def nobody():
        raise ValueError("No clients found")

    monkeypatch.setattr(distributed, "default_client", nobody)
    with pytest.raises(ValueError, match="client=None takes the current client, but there is none"):
        predict(rails, NEW)

    with (
        distributed.LocalCluster(n_workers=0, processes=False, dashboard_address=None) as cluster,
        distributed.Client(cluster) as idle,
        pytest.raises(ValueError, match="client has no worker"),
    ):
        predict(rails, NEW, idle)


def test_progress_is_shown(client, rails, capsys):
    predict(rails, NEW, client)
    assert "70/70" in capsys.readouterr().err
    predict(rails, NEW, client, verbose=False)
    assert capsys.readouterr().err == ""


def test_without_dask_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    dknn = DkNNClassifier().fit(np.eye(4), [0, 1, 0, 1])
    with pytest.raises(ImportError, match=r"pip install sklearn-rails\[dask\]"):
        predict(dknn, np.eye(4))
