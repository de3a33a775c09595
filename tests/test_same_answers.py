"""Random settings give the same answers, however they are asked."""

import pickle
import random
import subprocess
import sys
import warnings
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from sklearn import config_context
from sklearn.base import clone
from torch import nn

from sklearn_rails import DkNNClassifier, RAILSClassifier, ThreatScorer
from sklearn_rails.distributed import predict as predict_distributed
from sklearn_rails.immune import Arbitration, Triage
from sklearn_rails.neighbors import ExactNeighbors
from sklearn_rails.persistence import load, save
from sklearn_rails.sensing import DETECTORS

METHODS = ("predict", "predict_proba", "decision_function", "p_values", "transform")
N_NEW = 12
HERE = Path(__file__).parent

# The last bits of products of matrices in double precision depend on a sample's place in its batch:
# those of networks with dtype="float64", of "mahalanobis" and of "kernel_density". Scores then
# differ by up to 5e-15; whatever else is compared is equal bit for bit.
DOUBLE_TOLERANCE = 1e-12

# A network's features depend on how many threads share its sums. Scores of classifiers differ by up
# to 2e-7, threat scores by up to 2e-5.
THREADS_TOLERANCE = 1e-3


def minus_manhattan(a, b):
    return -(a - b).abs().sum(dim=1)


def make_network(n_channels, n_classes):
    """Return a network whose layers are named by their numbers."""
    return nn.Sequential(
        nn.Conv2d(n_channels, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(36, 12),
        nn.Tanh(),
        nn.Linear(12, n_classes),
    )


def draw_problem(rnd):
    """Draw samples, labels, new samples and a network."""
    rng = np.random.default_rng(rnd.randrange(2**32))
    n_classes, n_samples, n_channels = rnd.choice([2, 3, 5]), rnd.choice([40, 75, 130]), 1
    shape = rnd.choice([(n_channels, 6, 6), (n_channels, 6, 6), (36,)])
    y = np.arange(n_samples) % n_classes
    centers = rng.random((n_classes, *shape))
    rows = 0.4 * centers[rng.integers(n_classes, size=n_samples + N_NEW)]
    rows[:n_samples] = 0.4 * centers[y]
    rows = rows + 0.6 * rng.random(rows.shape)
    rows = (rows * rnd.choice([1, 1, 10]) + rnd.choice([0, 0, -3])).astype(np.float32)
    with torch.random.fork_rng():
        torch.manual_seed(rnd.randrange(99))
        network = make_network(n_channels, n_classes) if len(shape) == 3 else None
    labels = y if rnd.random() < 0.7 else np.array(list("edcba"))[y]
    return rows[:n_samples], labels, rows[n_samples:], network


def draw_layers(rnd, network, start=-1):
    if network is None:
        return "input"
    names = [str(i) for i in range(start + 1, len(network))] + ["input"] * (start < 0)
    return rnd.choice([*names, rnd.sample(names, 2)])


def draw_scorer(rnd, network, **settings):
    usable = [m for m in DETECTORS if network is not None or m not in NEEDS_NETWORK]
    method = rnd.choice([*usable, "auto", rnd.sample(usable, 2), usable])
    if isinstance(method, list) and rnd.random() < 0.5:
        of_method = {m: draw_layers(rnd, network) for m in method if DETECTORS[m].uses_layers}
        settings |= {"layers": of_method} if of_method else {}
    return ThreatScorer(
        method=method,
        alpha=rnd.choice([0.1, 0.3]),
        n_neighbors=rnd.choice([3, 10, 50]),
        dtype=rnd.choice(["float32", "float32", "float64"]),
        **settings,
    )


NEEDS_NETWORK = ("disagreement", "feature_squeezing", "confidence")
ALGORITHMS = ["auto", "auto", ExactNeighbors("float16"), "brute", "kd_tree", "ball_tree"]


def draw_estimator(rnd, network):
    """Draw an estimator and its settings."""
    common = {
        "layers": draw_layers(rnd, network),
        "batch_size": rnd.choice(["auto", 33, 33, 64]),
        "random_state": rnd.randrange(99),
        "device": "cpu",
    }
    kind = rnd.choice(["RAILS", "RAILS", "RAILS", "DkNN", "ThreatScorer"])
    if kind == "ThreatScorer":
        return draw_scorer(rnd, network, feature_extractor=network, **common)
    common |= {
        "dtype": rnd.choice(["float32", "float32", "float32", "float64"]),
        "algorithm": rnd.choice(ALGORITHMS),
    }
    if kind == "DkNN":
        common["algorithm"] = rnd.choice(["auto", "auto", "brute", "kd_tree"])
        return DkNNClassifier(
            network,
            n_neighbors=rnd.choice([1, 5, 75]),
            calibration=rnd.choice([0.1, 0.3, "leave-one-out"]),
            p_value=rnd.choice(["conformal", "empirical"]),
            **common,
        )
    affinity = rnd.choice(["euclidean", "euclidean", "cosine", "inner_product", minus_manhattan])
    if affinity in ("inner_product", minus_manhattan):
        common["algorithm"] = "auto"
    start = rnd.choice([None, None, 0, 2]) if network is not None else None
    if start is not None:
        common |= {"layers": draw_layers(rnd, network, start), "start_layer": str(start)}
    gates = [None, None] + [Arbitration(alpha=0.3)] * (network is not None)
    scorer = rnd.choice([None, draw_scorer(rnd, network)])
    gates += [Triage()] * (scorer is not None)
    return RAILSClassifier(
        network,
        n_neighbors=rnd.choice([1, 4, 10]),
        population_size=rnd.choice([17, 30, 60, "auto"]),
        generations=rnd.choice([1, 3, 5]),
        tau=rnd.choice(["scale", "scale", 0.1, 1e-4, 30.0]),
        rho=rnd.choice([0.0, 0.15, 0.5]),
        plasma_fraction=rnd.choice([0.05, 0.3]),
        affinity=affinity,
        selection=rnd.choice(["global", "class_balanced"]),
        crossover=rnd.choice(["affinity", "uniform"]),
        clip=rnd.choice(["auto", None, (-1.0, 1.0)]),
        early_stopping=rnd.random() < 0.7,
        gate=rnd.choice(gates),
        threat_scorer=scorer,
        **common,
    )


def ask(estimator, X, rnd=None):
    """Return answers of an estimator by their names: of all methods, or of one that is drawn."""
    methods = [method for method in METHODS if hasattr(estimator, method)]
    if hasattr(estimator, "kneighbors"):
        methods.append("kneighbors")
    if getattr(estimator, "threat_scorer", None) is not None:
        methods.append("predict_with_alarm")
    answers = {}
    for method in methods if rnd is None else [rnd.choice(methods)]:
        answer = getattr(estimator, method)(X)
        if method == "kneighbors":
            answers["distances"], answers["indices"] = (by_layer(found) for found in answer)
        elif method == "predict_with_alarm":
            answers["alarm"] = answer[1]
        else:
            answers[method] = answer
    return answers


def by_layer(found):
    """Join the arrays of all layers, in each of which a sample has some neighbours."""
    return np.concatenate([values.reshape(len(values), -1) for values in found.values()], axis=1)


def joined(parts):
    parts = list(parts)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def ways(estimator, X, y, new, network, rnd, folder):
    """Yield the names of ways to ask, what is answered, and for which samples."""
    everything = np.arange(len(new))
    order = np.random.default_rng(rnd.randrange(99)).permutation(len(new))
    chosen = order[: rnd.choice([1, 2, 5, 9])]
    yield "again", ask(estimator, new, rnd), everything
    yield "another order", ask(estimator, new[order], rnd), order
    yield "a subset", ask(estimator, new[chosen], rnd), chosen
    size, method = rnd.choice([1, 4, 7]), rnd.randrange(99)
    parts = [new[i : i + size] for i in range(0, len(new), size)]
    found = joined(ask(estimator, part, random.Random(method)) for part in parts)
    yield f"batches of {size}", found, everything
    with config_context(working_memory=0.02):
        yield "little working memory", ask(estimator, new, rnd), everything
    with joblib.parallel_backend("threading", n_jobs=2):
        yield "a backend of threads", ask(estimator, new, rnd), everything
    if "n_jobs" in estimator.get_params():
        yield "n_jobs=2", ask(pickled(estimator).set_params(n_jobs=2), new, rnd), everything
    yield "a pickle", ask(pickled(estimator), new, rnd), everything
    joblib.dump(estimator, folder / "joblib")
    mapped = joblib.load(folder / "joblib", mmap_mode="r")
    yield "a mapped pickle", ask(mapped, new, rnd), everything
    if getattr(estimator, "affinity", None) is not minus_manhattan:  # which cannot be saved
        save(estimator, folder / "model")
        for mmap_mode in (None, "r"):
            loaded = load(folder / "model", network, mmap_mode=mmap_mode)
            yield f"load with mmap_mode={mmap_mode}", ask(loaded, new, rnd), everything
    yield "another run", ask(clone(estimator).fit(X, y), new, rnd), everything


def costly_ways(estimator, new, client):
    """Yield ways that start threads or processes; all answers of all samples."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(2 if n_threads == 1 else 1)
    try:
        yield "torch threads", ask(estimator, new)
    finally:
        torch.set_num_threads(n_threads)
    with joblib.parallel_backend("loky", n_jobs=2):
        parts = joblib.Parallel()(
            joblib.delayed(ask)(estimator, part) for part in (new[:5], new[5:])
        )
    yield "loky", joined(parts)
    methods = [method for method in METHODS if hasattr(estimator, method)]
    found = {m: predict_distributed(estimator, new, client, method=m) for m in methods}
    yield "dask", found


def check_saved(folder):
    """Ask and compare in another process; prints the number of comparisons."""
    n = 0
    for path in folder.glob("setting *"):
        estimator, new, expected = joblib.load(path)
        n += check(path.name, "another process", estimator, ask(estimator, new), expected)
    print(n)


def pickled(estimator):
    return pickle.loads(pickle.dumps(estimator))


def check(setting, way, estimator, found, expected):
    """Compare answers, and return their number."""
    in_double = isinstance(estimator, ThreatScorer) or estimator.dtype == "float64"
    tolerance = THREADS_TOLERANCE if way == "torch threads" else DOUBLE_TOLERANCE * in_double
    for name, values in found.items():
        message = f"setting {setting}, {way}, {name} of {estimator}"
        assert values.dtype == expected[name].dtype, message
        if values.dtype.kind == "f" and tolerance:
            assert_allclose(values, expected[name], tolerance, tolerance, err_msg=message)
        else:
            assert_array_equal(values, expected[name], err_msg=message)
    return len(found)


def compare(setting, folder, client=None):
    """Fit and ask an estimator in many ways, and return the number of comparisons."""
    rnd = random.Random(setting)
    X, y, new, network = draw_problem(rnd)
    estimator = draw_estimator(rnd, network)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as of few samples for alpha
        expected, n = ask(estimator.fit(X, y), new), 0
        for way, found, chosen in ways(estimator, X, y, new, network, rnd, folder):
            wanted = {name: values[chosen] for name, values in expected.items()}
            n += check(setting, way, estimator, found, wanted)
        if client:
            joblib.dump((estimator, new, expected), folder / f"setting {setting}")
            for way, found in costly_ways(estimator, new, client):
                n += check(setting, way, estimator, found, expected)
    return n


@pytest.mark.parametrize("setting", range(1000, 1020))
def test_answers_are_the_same_in_every_way(setting, tmp_path):
    assert compare(setting, tmp_path) > 10


@pytest.mark.slow
def test_answers_of_500_settings_are_the_same_in_every_way(tmp_path, report):
    distributed = pytest.importorskip("distributed", reason="dask[distributed] is not installed")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs="CRITICAL"
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        n = [compare(i, tmp_path, None if i % 25 else client) for i in range(500)]
    command = (
        "import sys, pathlib, test_same_answers as t; t.check_saved(pathlib.Path(sys.argv[1]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", command, tmp_path], cwd=HERE, check=True, stdout=subprocess.PIPE
    )
    report("same answers: settings", len(n))
    report("same answers: comparisons", sum(n) + int(run.stdout))
