"""What a user would pick instead: ``python benchmarks/bench_alternatives.py --data-home DIR``.

On MNIST and its network, with equal work for both sides, in turn within one run: the authors' loop
over images as they describe it; nearest neighbours of every class by faiss, scikit-learn and
pynndescent; and threat scores by detectors of scikit-learn, PyOD, pytorch-ood and ART that learn
from the same clean images. Writes benchmarks/results/alternatives.csv. Needs the extras ``bench``
and ``reproduce``, and pynndescent; parts whose packages are missing are named and left out.
"""

import argparse
import csv
import functools
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from bench_limits import answer_alone, time_pairs
from bench_serving import processor
from reproduce.detectors import LIBRARIES
from reproduce.train import attack, load_data, load_network, split_rows
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

from sklearn_rails import RAILSClassifier, ThreatScorer, TorchFeatureExtractor, __version__
from sklearn_rails.neighbors import ClassNeighbors

RESULTS = Path(__file__).parent / "results" / "alternatives.csv"
N_CLASSES, N_NEIGHBORS = 10, 10
# The authors' settings of Algorithm 1, and the layer that fit chooses.
AUTHORS = {"layers": "conv1", "population_size": 1000, "generations": 10}


def compare_loop(problem, n_rows=3):
    """Compare with one image at a time, all of its 11,000 passes included."""
    rails = RAILSClassifier(problem.network, early_stopping=False, random_state=0, **AUTHORS)
    rails.fit(problem.X, problem.y)
    (layer,) = rails.layers_
    extractor = TorchFeatureExtractor(problem.network, layers=layer).fit(problem.X)
    features = torch.from_numpy(extractor.transform(problem.X))
    network = functools.partial(first_layer, problem.network)
    flat = problem.X.reshape(len(problem.X), -1)
    rows = problem.rows[:n_rows]

    def loop():
        return [
            answer_alone(rails, network, flat, features, problem.y, row)
            for row in rows.reshape(n_rows, -1)
        ]

    for settings, ours in (
        ("same passes, no early stopping", rails),
        (
            "our defaults",
            RAILSClassifier(problem.network, random_state=0).fit(problem.X, problem.y),
        ),
    ):
        fast, slow, ratio = time_pairs(lambda ours=ours: ours.predict(rows), loop, 3)
        yield {
            "task": f"RAILS, one image, {settings}",
            "alternative": "authors' loop",
            "ours_ms": 1e3 * fast / n_rows,
            "theirs_ms": 1e3 * slow / n_rows,
            "times_as_fast": 1 / ratio,
            "quality": "labels alike",
            "ours_quality": np.mean(ours.predict(rows) == loop()),
            "theirs_quality": "",
        }


def first_layer(network, cells):
    return network.conv1(cells.reshape(-1, 1, 28, 28)).flatten(1)


def faiss_indexes(groups):
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    indexes = []
    for group in groups:
        index = faiss.IndexFlatL2(group.shape[1])
        index.add(group)
        indexes.append(index)
    return lambda Q: [index.search(Q, N_NEIGHBORS)[1] for index in indexes]


def scikit_learn_indexes(groups, algorithm):
    indexes = [
        NearestNeighbors(n_neighbors=N_NEIGHBORS, algorithm=algorithm).fit(group)
        for group in groups
    ]
    return lambda Q: [index.kneighbors(Q, return_distance=False) for index in indexes]


def pynndescent_indexes(groups):
    from pynndescent import NNDescent

    indexes = [NNDescent(group, random_state=0, n_jobs=torch.get_num_threads()) for group in groups]
    for index in indexes:
        index.prepare()
    return lambda Q: [index.query(Q, k=N_NEIGHBORS)[0] for index in indexes]


SEARCHES = {
    "faiss IndexFlatL2": faiss_indexes,
    "scikit-learn brute": functools.partial(scikit_learn_indexes, algorithm="brute"),
    "scikit-learn kd_tree": functools.partial(scikit_learn_indexes, algorithm="kd_tree"),
    "pynndescent (approximate)": pynndescent_indexes,
}


def compare_neighbours(problem):
    """Compare with one index a class, each of which gets all queries."""
    for layer in ("input", "conv1", "output"):
        extractor = TorchFeatureExtractor(problem.network, layers=layer).fit(problem.X)
        F, new = extractor.transform(problem.X), extractor.transform(problem.rows)
        neighbors = ClassNeighbors().fit(torch.from_numpy(F), problem.y, N_CLASSES)
        groups = [np.ascontiguousarray(F[problem.y == c]) for c in range(N_CLASSES)]
        members = [np.flatnonzero(problem.y == c) for c in range(N_CLASSES)]
        for name, build in SEARCHES.items():
            if name == "scikit-learn kd_tree" and F.shape[1] > 1000:
                continue  # seconds for a query
            try:
                search = build(groups)
            except ImportError as error:
                print(f"{name} is left out: {error}", flush=True)
                continue
            for n_queries in (1, 64):
                Q = np.ascontiguousarray(new[:n_queries])
                queries = torch.from_numpy(Q)
                ours, theirs, ratio = time_pairs(
                    functools.partial(neighbors.kneighbors, queries, N_NEIGHBORS),
                    functools.partial(search, Q),
                    9 if n_queries == 1 else 5,
                )
                _, exact = neighbors.kneighbors(queries, N_NEIGHBORS)
                found = np.stack([m[f] for m, f in zip(members, search(Q), strict=True)], axis=1)
                recall = np.mean((found[..., None] == exact.numpy()[:, :, None]).any(axis=3))
                yield {
                    "task": f"{N_NEIGHBORS} neighbours in each of {N_CLASSES} classes, {layer} "
                    f"(d = {F.shape[1]:,}), {n_queries} queries",
                    "alternative": name,
                    "ours_ms": 1e3 * ours / n_queries,
                    "theirs_ms": 1e3 * theirs / n_queries,
                    "times_as_fast": 1 / ratio,
                    "quality": "neighbours found",
                    "ours_quality": 1.0,
                    "theirs_quality": recall,
                }


def learn_art(problem):
    from art.defences.detector.evasion import SubsetScanningDetector
    from art.estimators.classification import PyTorchClassifier

    wrapped = PyTorchClassifier(
        problem.network, torch.nn.CrossEntropyLoss(), (1, 28, 28), N_CLASSES, clip_values=(0, 1)
    )
    detector = SubsetScanningDetector(wrapped, problem.X[:1000], "conv4", verbose=False)
    return lambda X: detector.scan(X, X[:1])[0]


# Ours of the same kind.
METHODS = {
    "scikit-learn LocalOutlierFactor": "distance",
    "PyOD KNN": "distance",
    "pytorch-ood Mahalanobis": "mahalanobis",
    "ART SubsetScanningDetector": "auto",
}


def compare_detectors(problem, n_rows=300):
    """Compare detectors of one kind in the same layer: time of a score, and AUROC under attack."""
    layer = "input"  # which "auto" chooses for MNIST
    clean = problem.rows[:n_rows]
    attacked = attack("mnist", problem.network, clean, problem.y_rows[:n_rows])
    both = np.concatenate([clean, attacked]).astype(np.float32)
    is_attacked = np.repeat([0, 1], n_rows)
    flat = problem.X.reshape(len(problem.X), -1)
    for name, method in METHODS.items():
        start = time.perf_counter()
        try:
            if name in LIBRARIES:
                judge, rows = LIBRARIES[name](flat, problem.y, 50), both.reshape(len(both), -1)
            else:
                judge, rows = learn_art(problem), both
        except (ImportError, RuntimeError) as error:  # a torchvision that does not fit torch
            print(f"{name} is left out: {error}", flush=True)
            continue
        theirs_fit = time.perf_counter() - start
        start = time.perf_counter()
        ours = ThreatScorer(problem.network, layers=layer, method=method, random_state=0)
        ours.fit(problem.X, problem.y)
        ours_fit = time.perf_counter() - start
        fast, slow, ratio = time_pairs(
            functools.partial(ours.score_samples, both),
            functools.partial(judge, rows),
            3,
        )
        yield {
            "task": f"threat of {len(both)} images, ThreatScorer(method={method!r}), fit "
            f"{ours_fit:.1f} s, theirs {theirs_fit:.1f} s",
            "alternative": name,
            "ours_ms": 1e3 * fast / len(both),
            "theirs_ms": 1e3 * slow / len(both),
            "times_as_fast": 1 / ratio,
            "quality": "AUROC, PGD",
            "ours_quality": roc_auc_score(is_attacked, -ours.score_samples(both)),
            "theirs_quality": roc_auc_score(is_attacked, judge(rows)),
        }


class Problem:
    """MNIST, its network, and new images."""

    def __init__(self, data_home):
        data = load_data("mnist", data_home)
        self.network = load_network("mnist", data_home)
        self.X, self.y, self.rows, self.y_rows = split_rows("mnist", data, 300)


PARTS = {"loop": compare_loop, "neighbours": compare_neighbours, "detectors": compare_detectors}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-home", help="folder of mnist.npz")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    options = parser.parse_args()
    problem, lines = Problem(options.data_home), []
    for part in options.only:
        for line in PARTS[part](problem):
            numbers = {k: float(f"{v:.3g}") for k, v in line.items() if isinstance(v, float)}
            line |= numbers | {
                "threads": torch.get_num_threads(),
                "processor": processor(),
                "version": __version__,
                "torch": torch.__version__,
            }
            print(", ".join(f"{value}" for value in list(line.values())[:8]), flush=True)
            lines.append(line)
    print("median:", statistics.median(line["times_as_fast"] for line in lines), "times as fast")
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)


if __name__ == "__main__":
    main()
