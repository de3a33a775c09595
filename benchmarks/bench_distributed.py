"""Predict on Dask workers: ``python benchmarks/bench_distributed.py --data-home DIR``.

Times RAILS on MNIST images in this process and on one and two worker processes of this machine,
with one torch thread each; what sending the estimator takes; and what a block costs beside its
prediction. From these a cost model gives the time on more machines: seconds to send the estimator
to all of them, one after the other over a network of ``--bandwidth`` bytes a second, plus samples
times seconds a sample over the number of workers, plus blocks times seconds a block, which the
client spends on its own. The model is compared with the time on two workers. Writes
benchmarks/results/distributed.csv.
"""

import argparse
import csv
import pickle
import time
from pathlib import Path

import numpy as np
import torch
from bench_serving import processor
from distributed import Client, LocalCluster
from reproduce.train import load_data, load_network, split_rows

from sklearn_rails import RAILSClassifier, TorchFeatureExtractor, __version__
from sklearn_rails.distributed import LARGEST_BLOCK, predict

RESULTS = Path(__file__).parent / "results" / "distributed.csv"
N_MILLION = 1_000_000


def measure(function):
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def measure_workers(n_workers, rails, rows):
    """Measure seconds to send the estimator, to predict, and for a block that does nothing."""
    with (
        LocalCluster(
            n_workers=n_workers, threads_per_worker=1, dashboard_address=None, silence_logs=50
        ) as cluster,
        Client(cluster) as client,
    ):
        sending, sent = measure(lambda: client.scatter(rails, broadcast=True, hash=False))
        client.run(torch.set_num_threads, 1)
        # The first block starts torch in each worker.
        predict(rails, rows[: 4 * n_workers], client, verbose=False)
        seconds, labels = measure(lambda: predict(rails, rows, client, verbose=False))
        idle = TorchFeatureExtractor(layers="input").fit(rows[:2])
        n_blocks = 200
        few = np.resize(rows, (n_blocks, *rows.shape[1:]))
        blocks, _ = measure(
            lambda: predict(idle, few, client, method="transform", block_size=1, verbose=False)
        )
        del sent
    return sending, seconds, blocks / n_blocks, labels


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-home", help="folder of mnist.npz")
    parser.add_argument("--rows", type=int, default=4_000)
    parser.add_argument("--bandwidth", type=float, default=1.25e9, help="bytes a second, 10 Gbit/s")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data, network = load_data("mnist", options.data_home), load_network("mnist", options.data_home)
    X, y, rows, _ = split_rows("mnist", data, 1_000)
    rows = np.resize(rows, (options.rows, *rows.shape[1:]))
    rails = RAILSClassifier(network, random_state=0).fit(X, y)
    n_bytes = len(pickle.dumps(rails))
    rails.predict(rows[:50])
    alone, expected = measure(lambda: rails.predict(rows))
    lines = [{"workers": 0, "samples": len(rows), "seconds": alone, "model_seconds": ""}]
    per_block = 0.0
    for n_workers in (1, 2):
        sending, seconds, per_block, labels = measure_workers(n_workers, rails, rows)
        assert np.array_equal(labels, expected)
        n_blocks = -(-len(rows) // min(LARGEST_BLOCK, -(-len(rows) // (2 * n_workers))))
        model = sending + len(rows) * alone / len(rows) / n_workers + n_blocks * per_block
        lines.append(
            {
                "workers": n_workers,
                "samples": len(rows),
                "seconds": seconds,
                "model_seconds": model,
                "sending_seconds": sending,
                "block_seconds": per_block,
            }
        )
    for n_workers in (10, 100):
        sending = n_workers * n_bytes / options.bandwidth
        work = N_MILLION * alone / len(rows) / n_workers
        n_blocks = -(-N_MILLION // LARGEST_BLOCK)
        lines.append(
            {
                "workers": n_workers,
                "samples": N_MILLION,
                "seconds": "",
                "model_seconds": sending + max(work, n_blocks * per_block),
                "sending_seconds": sending,
                "block_seconds": per_block,
            }
        )
    fields = [*lines[-1], "estimator_mib", "processor", "version", "torch"]
    for line in lines:
        numbers = {k: float(f"{v:.3g}") for k, v in line.items() if isinstance(v, float)}
        line |= numbers | {
            "estimator_mib": round(n_bytes / 2**20),
            "processor": processor(),
            "version": __version__,
            "torch": torch.__version__,
        }
        print(line, flush=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(lines)


if __name__ == "__main__":
    main()
