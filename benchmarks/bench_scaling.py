"""How cost grows: ``python benchmarks/bench_scaling.py``.

Times ``fit``, ``kneighbors`` and ``predict`` of RAILS while one of the number of training samples,
features, classes, cells, generations and layers varies, on random data and a small network, without
early stopping. Writes benchmarks/results/scaling.csv, and draws log-log plots with the slopes of
straight lines into docs/images/scaling.png: 1 is proportional, 0 independent.
"""

import argparse
import csv
import statistics
import time
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from bench_serving import processor
from torch import nn

from sklearn_rails import RAILSClassifier, __version__

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "scaling.csv"
N_INPUTS, N_ROWS, N_REPEATS = 64, 16, 5
BASE = {
    "training samples": 5_000,
    "features": 256,
    "classes": 10,
    "cells": 150,
    "generations": 3,
    "layers": 1,
}
VARIED = {
    "training samples": (1_000, 3_000, 10_000, 30_000, 100_000),
    "features": (64, 256, 1_024, 4_096, 16_384),
    "classes": (2, 10, 50, 250, 1_000),
    "cells": (50, 150, 500, 1_500, 5_000),
    "generations": (1, 3, 10, 30, 100),
    "layers": (1, 2, 4, 8, 16),
}
STEPS = ("fit", "kneighbors", "predict")


def make_problem(setting):
    """Draw data, and a network whose layers are of one width."""
    rng = np.random.default_rng(0)
    n, n_classes = setting["training samples"], setting["classes"]
    X = rng.random((n + N_ROWS, N_INPUTS), dtype=np.float32)
    y = rng.permutation(np.arange(n) % n_classes)
    torch.manual_seed(0)
    width = setting["features"]
    # Narrow between the layers, so that the layers and not the network cost most.
    modules = [
        nn.Sequential(nn.Linear(N_INPUTS, 8), nn.Linear(8, width)),
        *(
            nn.Sequential(nn.Linear(width, 8), nn.Linear(8, width))
            for _ in range(setting["layers"] - 1)
        ),
    ]
    layers = [str(i) for i in range(setting["layers"])]
    return nn.Sequential(*modules), layers, X[:n], y, X[n:]


def measure(setting):
    """Measure seconds of fit, and milliseconds a row of the others."""
    network, layers, X, y, rows = make_problem(setting)
    rails = RAILSClassifier(
        network,
        layers=layers,
        population_size=max(setting["cells"], setting["classes"]),
        generations=setting["generations"],
        early_stopping=False,
        random_state=0,
    )
    times = {step: [] for step in STEPS}
    for _ in range(2):
        start = time.perf_counter()
        rails.fit(X, y)
        times["fit"].append(time.perf_counter() - start)
    for _ in range(N_REPEATS):
        for step in STEPS[1:]:
            start = time.perf_counter()
            getattr(rails, step)(rows)
            times[step].append(1e3 * (time.perf_counter() - start) / len(rows))
    # The first fit chooses batches, which later ones reuse.
    return {"fit": min(times["fit"])} | {s: statistics.median(times[s]) for s in STEPS[1:]}


def run():
    for name, values in VARIED.items():
        for value in values:
            taken = measure(BASE | {name: value})
            row = {"varied": name, "value": value}
            row |= {step: float(f"{seconds:.3g}") for step, seconds in taken.items()}
            row |= {
                "threads": torch.get_num_threads(),
                "processor": processor(),
                "version": __version__,
                "torch": torch.__version__,
            }
            print(", ".join(f"{k}={v}" for k, v in list(row.items())[:5]), flush=True)
            yield row


def plot():
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    with RESULTS.open() as file:
        rows = list(csv.DictReader(file))
    fig, axes = plt.subplots(2, 3, figsize=(9, 5.5), layout="constrained")
    units = {"fit": "fit, s", "kneighbors": "kneighbors, ms a row", "predict": "predict, ms a row"}
    for ax, name in zip(axes.flat, VARIED, strict=True):
        chosen = [row for row in rows if row["varied"] == name]
        values = np.array([float(row["value"]) for row in chosen])
        for step in STEPS:
            taken = np.array([float(row[step]) for row in chosen])
            # Of the larger half, where what does not grow counts little.
            slope = np.polyfit(np.log(values[-3:]), np.log(taken[-3:]), 1)[0]
            ax.plot(values, taken, "o-", label=f"{units[step]}: slope {slope:.2f}")
        ax.set(xscale="log", yscale="log", xlabel=name)
        ax.legend(fontsize="x-small")
    fig.savefig(ROOT / "docs" / "images" / "scaling.png", dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot-only", action="store_true")
    if not parser.parse_args().plot_only:
        rows = list(run())
        with RESULTS.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    plot()


if __name__ == "__main__":
    main()
