"""How fast one image is answered, and many: ``python benchmarks/bench_serving.py``.

Each estimator is fitted on 10,000 MNIST images, saved, and loaded by an HTTP server of its own
(standard library, one thread) that takes an image as bytes and returns what ``predict`` says. A
client sends one image after the other over the loopback. Reported are the median and the 99th
percentile of the time of a request, the server's CPU time for one, and the images a second that
``predict`` itself answers in batches of 1, 8 and 64, by wall and by CPU time. The exit status is
not zero if a CPU time is above its limit. Writes benchmarks/results/serving.csv.
"""

import argparse
import csv
import http.client
import http.server
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import joblib
import numpy as np
import torch
from reproduce.train import load_data, load_network, split_rows

from sklearn_rails import DkNNClassifier, RAILSClassifier, ThreatScorer, __version__
from sklearn_rails.immune import Arbitration

RESULTS = Path(__file__).parent / "results" / "serving.csv"
SHAPE = (1, 28, 28)
# Milliseconds of CPU time for a request.
LIMITS = {"network": None, "RAILS": 20, "RAILS, Arbitration": 8, "DkNN": 6, "ThreatScorer": 8}
BATCHES = (1, 8, 64)
N_WARM = 20


class NetworkAlone:
    """The network without a defence, to compare with."""

    def __init__(self, network):
        self.network = network

    @torch.no_grad()
    def predict(self, X):
        return self.network(torch.from_numpy(X)).argmax(dim=1).numpy()


def serve(path):
    """Serve the estimator in a file, and print the port."""
    estimator = joblib.load(path)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else the client waits 40 ms for small answers

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            X = np.frombuffer(body, dtype=np.float32).reshape(-1, *SHAPE)
            self._answer(estimator.predict(X.copy()).tolist())

        def do_GET(self):
            self._answer(time.process_time())

        def _answer(self, content):
            content = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()


def ask(connection, image=None):
    """Return what the server answers: to an image, or its CPU time."""
    if image is None:
        connection.request("GET", "/")
    else:
        connection.request("POST", "/", image.tobytes())
    return json.loads(connection.getresponse().read())


def measure_requests(path, X):
    """Measure requests of one image each: wall times, and the server's CPU time for each."""
    command = [sys.executable, __file__, "--serve", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", int(server.stdout.readline()))
            for image in X[:N_WARM]:
                ask(connection, image)
            seconds, started = [], ask(connection)
            for image in X[N_WARM:]:
                start = time.perf_counter()
                ask(connection, image)
                seconds.append(time.perf_counter() - start)
            return np.array(seconds), (ask(connection) - started) / len(seconds)
        finally:
            server.kill()


def measure_throughput(estimator, X, batch_size, n_images):
    """Measure images a second, by wall and by CPU time."""
    batches = [
        X[start : start + batch_size]
        for start in range(0, min(n_images, len(X) - batch_size + 1), batch_size)
    ]
    estimator.predict(batches[0])
    wall, cpu = time.perf_counter(), time.process_time()
    for batch in batches:
        estimator.predict(batch)
    n_done = batch_size * len(batches)
    return n_done / (time.perf_counter() - wall), n_done / (time.process_time() - cpu)


def make_estimators(network, dtype):
    """Return the estimators with their default settings, and the network alone."""
    settings = {"dtype": dtype, "random_state": 0}
    yield "network", NetworkAlone(network)
    yield "RAILS", RAILSClassifier(network, **settings)
    yield "RAILS, Arbitration", RAILSClassifier(network, gate=Arbitration(), **settings)
    yield "DkNN", DkNNClassifier(network, **settings)
    yield "ThreatScorer", ThreatScorer(network, **settings)


def measure_serving(data_home, n_requests, dtype="float32"):
    """Return the measurements of each estimator."""
    data, network = load_data("mnist", data_home), load_network("mnist", data_home)
    X, y, rows, _ = split_rows("mnist", data, n_requests + N_WARM)
    for name, estimator in make_estimators(network, dtype):
        if name != "network":
            estimator.fit(X, y)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "estimator.joblib"
            joblib.dump(estimator, path)
            seconds, cpu = measure_requests(path, rows)
        row = {
            "estimator": name,
            "p50_ms": round(1e3 * np.median(seconds), 2),
            "p99_ms": round(1e3 * np.quantile(seconds, 0.99), 2),
            "cpu_ms": round(1e3 * cpu, 2),
            "limit_ms": LIMITS[name],
        }
        for size in BATCHES:
            wall, cpu = measure_throughput(estimator, rows, size, n_requests)
            row |= {f"images_per_s_{size}": round(wall), f"images_per_cpu_s_{size}": round(cpu)}
        yield row | {
            "dtype": dtype,
            "threads": torch.get_num_threads(),
            "processor": processor(),
            "version": __version__,
            "torch": torch.__version__,
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-home", help="folder of mnist.npz")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve)
    results, n_short = [], 0
    for row in measure_serving(options.data_home, options.requests, options.dtype):
        limit = row["limit_ms"]
        is_short = limit is not None and row["cpu_ms"] > limit
        n_short += is_short
        verdict = "" if limit is None else "SHORT" if is_short else "ok"
        print(f"{verdict:<5}", ", ".join(f"{k}={v}" for k, v in row.items()), flush=True)
        results.append(row)
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, results[0])
        writer.writeheader()
        writer.writerows(results)
    return n_short > 0


def processor():
    """Name the processor, and its units for bfloat16."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.machine()
    found = dict(line.split(":", 1) for line in text.replace("\t", "").splitlines() if ":" in line)
    flags = found.get("flags", "").split()
    units = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags]
    return " ".join([found.get("model name", platform.machine()).strip(), *units])


if __name__ == "__main__":
    sys.exit(main())
