"""How close to the limits the engine runs: ``python benchmarks/bench_limits.py``.

Every line is a ratio measured in one run, or a CPU time, with the limit it is held to; the exit
status is not zero if one falls short. Timings take the median of pairs. ``--only overhead
neighbours`` picks parts, ``--repeat`` sets the number of pairs. ``memory_large`` takes 5 GiB, and
runs only if it is picked, as does ``device``, which compares a GPU with the CPU. ``--device cuda``
runs ``overhead`` and ``device`` on a GPU; see run_on_gpu.sh.
"""

import argparse
import functools
import pickle
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import sklearn
import torch
from bench_serving import measure_serving, processor
from reproduce.train import attack, load_data, load_network, split_rows
from sklearn.base import clone
from torch import nn

from sklearn_rails import (
    DkNNClassifier,
    RAILSClassifier,
    ThreatScorer,
    TorchFeatureExtractor,
)
from sklearn_rails.demo import SmallCNN
from sklearn_rails.features.batching import BatchLayout
from sklearn_rails.features.truncation import TruncatedNetwork
from sklearn_rails.immune.random import generation_uniforms
from sklearn_rails.neighbors import ClassNeighbors, ExactNeighbors

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import literal  # the slow loop that the tests hold the engine to

SEED = 0


def time_pairs(first, second, repeat):
    """Run two functions in turn and give the median times and the median of the ratios."""
    first(), second()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        first()
        middle = time.perf_counter()
        second()
        times.append((middle - start, time.perf_counter() - middle))
    ratios = [a / b for a, b in times]
    a, b = (statistics.median(column) for column in zip(*times, strict=True))
    return a, b, statistics.median(ratios)


def make_images(n, shape):
    rng = np.random.default_rng(SEED)
    return rng.random((n, *shape), dtype=np.float32), rng.integers(10, size=n)


def bench_overhead(repeat, device="cpu"):
    """Predict, against the bare truncated forward passes of as many images."""
    more = 1 if device == "cpu" else 16  # a GPU needs many images to be busy
    cases = []
    for width in (16, 64):
        for layer in ("conv2", "conv3"):
            n_rows = more * (16 if width == 16 else 4)
            cases.append((SmallCNN((1, 28, 28), width=width), layer, (1, 28, 28), n_rows, 1.10))
    mlp = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    cases.append((mlp, "2", (64,), 200, 2.0))
    for network, layer, shape, n_rows, limit in cases:
        X, y = make_images(2_000, shape)
        rails = RAILSClassifier(
            network.eval(),
            layers=layer,
            generations=10,
            early_stopping=False,
            device=device,
            random_state=SEED,
        ).fit(X, y)
        n_cells = rails.engine_.layers[0].schedule.population_size
        n_images = n_rows * n_cells * (rails.generations + 1)
        truncated = TruncatedNetwork(
            network, device=torch.device(device), dtype=torch.float32, input_shape=shape
        )
        bare, batch_size = best_forward(truncated, layer, shape, n_images)
        predict = functools.partial(rails.predict, X[:n_rows])
        seconds, least, ratio = time_pairs(predict, bare, repeat)
        name = f"{type(network).__name__} {getattr(network, 'width', '')}".strip()
        yield (
            f"predict / bare forward, {name} {layer}, {n_rows} rows, {n_images:,} images",
            ratio,
            "<=",
            limit,
            f"{1e6 * seconds / n_images:.2f} / {1e6 * least / n_images:.2f} us an image, bare in "
            f"batches of {batch_size}",
        )
        if layer in ("conv2", "2") and n_rows >= 16:
            compiled = RAILSClassifier(**rails.get_params() | {"compile": True}).fit(X, y)
            compiled.predict(X[:n_rows])
            ours, theirs, ratio = time_pairs(
                functools.partial(compiled.predict, X[:n_rows]), predict, repeat
            )
            yield (
                f"compile=True / False, {name} {layer}",
                ratio,
                "",
                None,
                f"{1e6 * ours / n_images:.2f} / {1e6 * theirs / n_images:.2f} us an image",
            )


@torch.no_grad()
def best_forward(network, layer, shape, n_images):
    """Find the batch size and memory format at which the bare network is fastest."""
    candidates = []
    device = network.device
    images = (32, 64, 128, 256) if device.type == "cpu" else (256, 1024, 4096)
    for size in images if len(shape) == 3 else (256, 1024, 4096, 16384):
        for channels_last in (False, True)[: 1 + (len(shape) == 3)]:
            batch = BatchLayout(size, channels_last).store(torch.rand(size, *shape, device=device))

            def run(batch=batch, n=n_images):
                with torch.no_grad():
                    for _ in range(-(-n // len(batch))):
                        network(batch, (layer,))
                if batch.is_cuda:
                    torch.cuda.synchronize()

            run(n=1)
            start = time.perf_counter()
            run(n=min(n_images, 4 * size))
            n_run = -(-min(n_images, 4 * size) // size) * size
            candidates.append(((time.perf_counter() - start) / n_run, size, run))
    _, size, run = min(candidates, key=lambda candidate: candidate[0])
    return run, size


def bench_neighbours(repeat):
    """Exact neighbours of every class, against one faiss IndexFlatL2 a class."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    rng = np.random.default_rng(SEED)
    n, n_classes, k = 20_000, 10, 10
    y = rng.integers(n_classes, size=n)
    for d in (64, 512, 6272):
        X = rng.normal(size=(n, d)).astype(np.float32)
        neighbors = ClassNeighbors().fit(torch.from_numpy(X), y, n_classes)
        indexes = []
        for c in range(n_classes):
            index = faiss.IndexFlatL2(d)
            index.add(X[y == c])
            indexes.append(index)
        for n_queries in (1, 100):
            Q = rng.normal(size=(n_queries, d)).astype(np.float32)
            queries = torch.from_numpy(Q)
            ours, theirs, ratio = time_pairs(
                lambda queries=queries, neighbors=neighbors: neighbors.kneighbors(queries, k),
                lambda Q=Q, indexes=indexes: [index.search(Q, k) for index in indexes],
                5 * repeat,
            )
            yield (
                f"neighbours / faiss, d = {d}, {n_queries} queries, {n:,} rows",
                ratio,
                "<=",
                1.2,
                f"{1e3 * ours / n_queries:.3f} / {1e3 * theirs / n_queries:.3f} ms a query",
            )
        rows, query = torch.from_numpy(X), torch.from_numpy(Q[:1])
        half = ClassNeighbors(algorithm=ExactNeighbors("float16")).fit(rows, y, n_classes)
        ours, theirs, ratio = time_pairs(
            lambda half=half, query=query, rows=rows: half.kneighbors(query, k, rows.__getitem__),
            lambda neighbors=neighbors, query=query: neighbors.kneighbors(query, k),
            5 * repeat,
        )
        yield (
            f"half / full precision, d = {d}, 1 query, {n:,} rows",
            ratio,
            "<=",
            2,
            f"{1e3 * ours:.3f} / {1e3 * theirs:.3f} ms",
        )


def bench_loops(repeat):
    """A literal loop over rows, cells and elements, and a loop over rows in torch."""
    X, y = make_images(500, (64,))
    network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).double()
    X = X.astype(np.float64)
    settings = {"population_size": 100, "generations": 3}
    rails = RAILSClassifier(
        network,
        layers="output",
        early_stopping=False,
        dtype="float64",
        random_state=SEED,
        **settings,
    ).fit(X, y)
    start = time.perf_counter()
    run_literally(rails, network, X, y, X[0] / 2)
    literally = time.perf_counter() - start
    rows = X[:100] / 2
    rails.predict(rows)
    start = time.perf_counter()
    rails.predict(rows)
    engine = (time.perf_counter() - start) / len(rows)
    yield (
        "literal loop / engine, 64-128-64 network, T = 100, G = 3, float64",
        literally / engine,
        ">=",
        50,
        f"{1e3 * literally:.0f} / {1e3 * engine:.2f} ms a row",
    )
    features = network(torch.from_numpy(X)).detach()
    engine, loop, ratio = time_pairs(
        lambda: rails.predict(rows),
        lambda: [answer_alone(rails, network, X, features, y, row) for row in rows],
        repeat,
    )
    yield (
        "loop over rows in torch / engine, the same",
        1 / ratio,
        "",
        None,
        f"{1e3 * loop / len(rows):.2f} / {1e3 * engine / len(rows):.2f} ms a row",
    )
    engine, loop, ratio = time_pairs(
        lambda: rails.predict(rows), lambda: [rails.predict(row[None]) for row in rows], repeat
    )
    yield (
        "one row at a time / all at once, the same",
        1 / ratio,
        "",
        None,
        f"{1e3 * loop / len(rows):.2f} / {1e3 * engine / len(rows):.2f} ms a row",
    )


@torch.no_grad()
def answer_alone(rails, network, X, features, y, x):
    """Answer one row with torch's own operators, as one would write it first.

    The first layer of ``rails`` counts; ``network`` gives its features.
    """
    X, y, x = torch.from_numpy(X), torch.from_numpy(y), torch.from_numpy(x)
    antigen = network(x[None])
    n_cells, tau, classes = rails.population_size, next(iter(rails.tau_.values())), y.unique()

    def mutate(cells):
        size = torch.empty_like(cells).uniform_(rails.delta_min, rails.delta_max)
        sign = torch.randint_like(cells, 2) * 2 - 1
        return (cells + size * sign * (torch.rand_like(cells) < rails.rho)).clamp(0, 1)

    cells, labels = [], []
    for c in classes:
        members = (y == c).nonzero()[:, 0]
        distance = (features[members] - antigen).norm(dim=1)
        nearest = members[distance.topk(min(rails.n_neighbors, len(members)), largest=False)[1]]
        clones = nearest.repeat(n_cells)[: n_cells // len(classes)]
        cells.append(X[clones])
        labels.append(y[clones])
    cells, labels = mutate(torch.cat(cells)), torch.cat(labels)
    for _ in range(rails.generations):
        affinity = -(network(cells) - antigen).norm(dim=1)
        p = torch.softmax(affinity / tau, dim=0)
        first = torch.multinomial(p, n_cells, replacement=True)
        second = torch.empty_like(first)
        for c in classes:
            children = (labels[first] == c).nonzero()[:, 0]
            if len(children):
                members = (labels == c).nonzero()[:, 0]
                drawn = torch.multinomial(p[members], len(children), replacement=True)
                second[children] = members[drawn]
        q = torch.sigmoid((affinity[first] - affinity[second]) / tau)[:, None]
        cells = mutate(torch.where(torch.rand_like(cells) < q, cells[first], cells[second]))
        labels = labels[first]
    affinity = -(network(cells) - antigen).norm(dim=1)
    return labels[affinity.topk(n_cells // 20).indices].mode().values.item()


def run_literally(rails, network, X, y, x):
    @torch.no_grad()
    def features(rows):
        return network(torch.from_numpy(rows)).numpy()

    def draws(generation):
        drawn = generation_uniforms(rails.seed_, 0, generation, rails.population_size, X.shape[1])
        return {name: numbers.double().numpy() for name, numbers in drawn.items()}

    return literal.respond_in_layer(
        X,
        features(X),
        y,
        10,
        features(x[None])[0],
        lambda cell: features(cell[None])[0],
        k=rails.n_neighbors,
        T=rails.population_size,
        G=rails.generations,
        tau=rails.tau_["output"],
        rho=rails.rho,
        delta_min=rails.delta_min,
        delta_max=rails.delta_max,
        draws=draws,
    )


def bench_passes(repeat, data_home, n_rows=300):
    """Forward passes of the default settings, and labels against the full schedule."""
    from bench_passes import LAYERS

    limits = {"mnist": 100}
    for name, layer in LAYERS.items():
        network, X, y, X_val, y_val = load_problem(name, data_home, n_rows)
        rails = RAILSClassifier(network, layers=layer, random_state=SEED).fit(X, y)
        full = RAILSClassifier(network, layers=layer, early_stopping=False, random_state=SEED)
        full.fit(X, y)
        kinds = (
            ("clean", X_val, limits.get(name), 0.995),
            ("attacked", attack(name, network, X_val, y_val), None, 0.98),
        )
        for kind, rows, limit, share in kinds:
            response, expected = rails.respond(rows), full.predict(rows)
            yield (
                f"forward passes a row, {name} {layer}, {kind}, {len(rows)} validation rows",
                response.n_forward / len(rows),
                "" if limit is None else "<=",
                limit,
                f"accuracy {np.mean(response.labels == y_val):.1%}",
            )
            yield (
                f"labels as without early stopping, {name} {layer}, {kind}",
                np.mean(expected == response.labels),
                ">=",
                share,
                f"accuracy without {np.mean(expected == y_val):.1%}",
            )


def load_problem(name, data_home, n_rows):
    data = load_data(name, data_home)
    return load_network(name, data_home), *split_rows(name, data, n_rows)


def bench_half(repeat, data_home, n_rows=500):
    """bfloat16 against float32: time, and accuracy on the same rows, clean and attacked."""
    from bench_passes import LAYERS

    for name in ("mnist", "svhn"):
        network, X, y, X_val, y_val = load_problem(name, data_home, n_rows)
        rows = np.concatenate([X_val, attack(name, network, X_val, y_val)])
        half, single = (
            RAILSClassifier(
                network, layers=LAYERS[name], early_stopping=False, dtype=dtype, random_state=SEED
            ).fit(X, y)
            for dtype in ("bfloat16", "float32")
        )
        few = rows[:: len(rows) // 20]
        ours, theirs, ratio = time_pairs(
            functools.partial(half.predict, few), functools.partial(single.predict, few), repeat
        )
        yield (
            f"bfloat16 / float32, {name} {LAYERS[name]}",
            ratio,
            "<=",
            0.5,
            f"{1e3 * ours / len(few):.0f} / {1e3 * theirs / len(few):.0f} ms a row",
        )
        truth = np.concatenate([y_val, y_val])
        right = [np.asarray(model.predict(rows) == truth, dtype=float) for model in (half, single)]
        lost = right[1] - right[0]
        yield (
            f"accuracy lost by bfloat16, {name}, {len(rows)} rows, half of them attacked",
            lost.mean(),
            "<=",
            1.96 * lost.std() / len(lost) ** 0.5,
            f"{right[0].mean():.2%} / {right[1].mean():.2%}; the limit is the 95 % half-width",
        )


def bench_serving(repeat, data_home, n_rows=200):
    """CPU time of requests of one image, in ms; see bench_serving.py."""
    for row in measure_serving(data_home, n_rows):
        limit = row["limit_ms"]
        yield (
            f"CPU ms for a request, {row['estimator']}",
            row["cpu_ms"],
            "" if limit is None else "<=",
            limit,
            f"p50 {row['p50_ms']} ms, p99 {row['p99_ms']} ms",
        )


def bench_files(repeat, data_home):
    """Size of pickles over the features, samples and network that they need."""
    from bench_passes import LAYERS

    network, X, y, rows, _ = load_problem("mnist", data_home, 20)
    shared = {"layers": LAYERS["mnist"], "random_state": SEED}
    scorer = ThreatScorer(random_state=SEED)
    cases = {
        "RAILS": RAILSClassifier(network, **shared),
        "RAILS, ThreatScorer": RAILSClassifier(network, threat_scorer=scorer, **shared),
        "RAILS, pixels": RAILSClassifier(layers="input", random_state=SEED),
        "DkNN": DkNNClassifier(network, **shared),
        "ThreatScorer, conv1": ThreatScorer(network, **shared),
        "ThreatScorer, pixels": ThreatScorer(network, layers="input", random_state=SEED),
    }
    n_bytes = sum(p.nbytes for p in network.parameters())
    for name, estimator in cases.items():
        estimator.fit(X, y)
        saved = pickle.dumps(estimator)
        extractor = TorchFeatureExtractor(network, layers=estimator.layers_).fit(X[:20])
        width = extractor.transform(X[:1]).shape[1]
        if isinstance(estimator, RAILSClassifier) and "input" not in estimator.layers_:
            width += X[0].size
        needed = 4 * len(X) * width + n_bytes
        loaded = pickle.loads(saved)
        start = time.perf_counter()
        loaded.predict(rows[:1])
        yield (
            f"saved / needed bytes, mnist, {name}",
            len(saved) / needed,
            "<=",
            1.1,
            f"{len(saved) / 2**20:.0f} / {needed / 2**20:.0f} MiB, first prediction after loading "
            f"{time.perf_counter() - start:.2f} s",
        )


def bench_sketches(repeat, data_home, n_queries=50):
    """Time of a query with short vectors first, against one product with all features."""
    from bench_passes import LAYERS

    for name in ("mnist", "svhn", "cifar10"):
        network, X, y, rows, _ = load_problem(name, data_home, n_queries)
        extractor = TorchFeatureExtractor(network, layers=LAYERS[name]).fit(X[:20])
        features, queries = (torch.from_numpy(extractor.transform(A)) for A in (X, rows))
        neighbors = ClassNeighbors().fit(features, y, n_classes=10)
        search = neighbors._search
        sketch, what = search.sketch, f"{name} {LAYERS[name]}, {features.shape[1]} features"
        if sketch is None:
            yield f"examples left by short vectors, {what}", 1, "", None, "no short vectors"
            continue
        n_left, rank_some = [], search._rank_some

        def count_left(query, places, *others, n_left=n_left, rank_some=rank_some):
            n_left.append(len(places))
            return rank_some(query, places, *others)

        def find(with_sketch, neighbors=neighbors, sketch=sketch, queries=queries):
            neighbors._search.sketch = sketch if with_sketch else None
            for query in queries:
                neighbors.kneighbors(query[None], 10)

        search._rank_some = count_left
        find(True)
        del search._rank_some
        short, full, ratio = time_pairs(
            functools.partial(find, True), functools.partial(find, False), repeat
        )
        yield (
            f"time of one query with short vectors / without, {what}",
            ratio,
            "<=",
            0.5,
            f"{sketch.examples.shape[1]} values, {np.mean(n_left) / len(X):.1%} of the examples "
            f"left, {1e3 * short / n_queries:.2f} / {1e3 * full / n_queries:.2f} ms",
        )


def bench_device(repeat, device="cpu"):
    """Labels on another device, with its fast products, and memory, against the CPU."""
    network = SmallCNN((1, 28, 28)).eval()
    X, y = make_images(2_500, (1, 28, 28))
    X, rows, y = X[:2_000], X[2_000:], y[:2_000]
    rails = RAILSClassifier(network, layers="conv2", random_state=SEED)
    expected = clone(rails).set_params(device="cpu").fit(X, y).predict(rows)
    for name, precision, dtype, share in (
        ("float32", "highest", "float32", 0.995),
        ("TF32", "high", "float32", 0.98),
        ("bfloat16", "highest", "bfloat16", 0.9),
    ):
        torch.set_float32_matmul_precision(precision)
        there = clone(rails).set_params(device=device, dtype=dtype).fit(X, y)
        labels = there.predict(rows)
        torch.set_float32_matmul_precision("highest")
        yield (
            f"labels on {device} as on the CPU, {name}, {len(rows)} images of noise",
            np.mean(labels == expected),
            ">=",
            share,
            "noise has no clear class, so that these labels are the least stable",
        )
    if device != "cpu":
        peaks = []
        for n_rows in (500, 5_000):
            torch.cuda.reset_peak_memory_stats()
            there.predict(np.resize(rows, (n_rows, *rows.shape[1:])))
            peaks.append(torch.cuda.max_memory_allocated() / 2**20)
        yield (
            "peak memory of 5,000 rows / 500 rows",
            peaks[1] / peaks[0],
            "<=",
            1.05,
            f"{peaks[1]:.0f} / {peaks[0]:.0f} MiB",
        )


class SlowNetwork(nn.Module):
    """Takes 10 ms for every row, and counts rows."""

    counts = []  # of all instances, since estimators run a copy

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 9)

    def forward(self, x):
        time.sleep(0.01 * len(x))
        self.counts.append(len(x))
        return self.layer(x)


def bench_fit(repeat):
    """Rows that go through a slow network in ``fit``."""
    X, y = make_images(20, (64,))
    for estimator in (RAILSClassifier, DkNNClassifier, ThreatScorer):
        SlowNetwork.counts.clear()
        settings = {"layers": "layer", "n_neighbors": 2, "random_state": SEED}
        estimator(SlowNetwork(), **settings).fit(X, np.arange(len(y)) % 9)
        yield (
            f"rows through a slow network / rows of fit, {estimator.__name__}, {len(X)} rows",
            sum(SlowNetwork.counts) / len(X),
            "<=",
            5,
            f"{len(SlowNetwork.counts)} passes",
        )


def bench_memory(repeat):
    """Peak memory of predicting 10 times as many rows, but for inputs and outputs."""
    peaks = {n_rows: run_measurement("memory", n_rows) for n_rows in (400, 4_000)}
    yield (
        "peak memory of 4,000 rows / 400 rows, digits, T = 200, working_memory 64 MiB",
        peaks[4_000] / peaks[400],
        "<=",
        1.05,
        f"{peaks[4_000]:.0f} / {peaks[400]:.0f} MiB",
    )


def bench_memory_large(repeat):
    """Peak memory of indexing and searching 1,000,000 rows of 512 features, which are 1.9 GiB."""
    n_rows, d = 1_000_000, 512
    yield (
        f"peak memory in GiB of fit and 100 queries, {n_rows:,} rows, d = {d}",
        run_measurement("memory_large", n_rows) / 1024,
        "<=",
        8,
        f"the features alone {4 * n_rows * d / 2**30:.1f} GiB",
    )


def run_measurement(part, n_rows):
    """Run a measurement in a process of its own, and return the peak of its memory in MiB."""
    run = subprocess.run(
        [sys.executable, __file__, "--only", part, "--measure-memory", str(n_rows)],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(run.stdout)


def measure_memory(part, n_rows):
    if part == "memory_large":
        rng = np.random.default_rng(SEED)
        X, y = rng.standard_normal((n_rows, 512), dtype=np.float32), rng.integers(10, size=n_rows)
        features = torch.from_numpy(X)
        neighbors = ClassNeighbors().fit(features, y, 10)
        neighbors.kneighbors(features[:1] + 0.1, 10)
        neighbors.kneighbors(features[:100] + 0.1, 10)
    else:
        X, y = make_images(2_000, (64,))
        rails = RAILSClassifier(early_stopping=False, generations=2, random_state=SEED).fit(X, y)
        with sklearn.config_context(working_memory=64):
            rails.predict(np.resize(X, (n_rows, 64)))
    # The peak of this process alone; getrusage has that of the parent too.
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    print(int(peak) / 1024)


PARTS = {
    "overhead": bench_overhead,
    "neighbours": bench_neighbours,
    "loops": bench_loops,
    "passes": bench_passes,
    "half": bench_half,
    "serving": bench_serving,
    "files": bench_files,
    "sketches": bench_sketches,
    "fit": bench_fit,
    "device": bench_device,
    "memory": bench_memory,
    "memory_large": bench_memory_large,
}


ON_REQUEST = ("memory_large", "device")
ON_DEVICE = ("overhead", "device")
ON_IMAGES = ("passes", "half", "serving", "files", "sketches")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    usual = [part for part in PARTS if part not in ON_REQUEST]
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=usual)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--data-home", help="folder of mnist.npz and the like")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1")
    parser.add_argument("--measure-memory", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure_memory:
        return measure_memory(options.only[0], options.measure_memory)
    print(
        f"torch {torch.__version__}, scikit-learn {sklearn.__version__}, numpy {np.__version__}, "
        f"{torch.get_num_threads()} thread(s), {processor()}, Python {platform.python_version()}\n"
    )
    short = 0
    for part in options.only:
        more = {"data_home": options.data_home} if part in ON_IMAGES else {}
        more |= {"device": options.device} if part in ON_DEVICE else {}
        for what, value, sign, limit, details in PARTS[part](options.repeat, **more):
            met = {"<=": lambda v, m: v <= m, ">=": lambda v, m: v >= m, "": lambda v, m: True}
            verdict = "" if not sign else "ok" if met[sign](value, limit) else "SHORT"
            short += verdict == "SHORT"
            bound = f"{sign} {limit:g}" if sign else ""
            print(f"{verdict:<5} {value:8.3f} {bound:<8} {what} ({details})", flush=True)
    return short > 0


if __name__ == "__main__":
    sys.exit(main())
