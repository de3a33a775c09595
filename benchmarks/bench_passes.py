"""What accuracy costs: ``python benchmarks/bench_passes.py mnist svhn --rows 300``.

Compares settings of RAILS on the same validation rows, clean and attacked, with the fixed schedule
of the authors' settings (T = 1000, G = 10). Writes one CSV a data set into benchmarks/results/ and
draws the Pareto curve, robust accuracy against forward passes, into docs/images/.
"""

import argparse
import csv
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from reproduce.train import attack, load_data, load_network, split_rows

from sklearn_rails import RAILSClassifier, __version__

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# The layers that fit chooses, but for the digits, where that is the input.
LAYERS = {"digits": "conv2", "mnist": "conv1", "svhn": "block2", "cifar10": "block2"}
SIZES = (25, 50, 100, 150, 200, 400)
DEFAULT_SIZE, DEFAULT_GENERATIONS = 150, 3
GENERATIONS = (0, 1, 2, 3, 5, 10)
FIELDS = (
    "data",
    "layer",
    "population_size",
    "generations",
    "early_stopping",
    "n_rows",
    "clean_accuracy",
    "robust_accuracy",
    "forward_passes",
    "labels_as_authors",
    "labels_as_not_stopped",
    "version",
    "torch",
)


def settings():
    """Return the authors' schedule, and then ours without and with early stopping."""
    yield {"population_size": 1000, "generations": 10, "early_stopping": False}
    for generations in GENERATIONS:
        yield {
            "population_size": DEFAULT_SIZE,
            "generations": generations,
            "early_stopping": False,
        }
    for size in SIZES:
        yield {"population_size": size, "generations": 10, "early_stopping": True}
    for generations in (DEFAULT_GENERATIONS, 5):
        yield {"population_size": DEFAULT_SIZE, "generations": generations, "early_stopping": True}


def compare(name, n_rows, data_home):
    """Measure every setting on the same rows."""
    data = load_data(name, data_home)
    network = load_network(name, data_home)
    X, y, X_val, y_val = split_rows(name, data, n_rows)
    rows = np.concatenate([X_val, attack(name, network, X_val, y_val)])
    authors, runs = None, {}

    def describe(setting, labels, passes):
        right = labels.reshape(2, -1) == y_val
        not_stopped = runs.get((setting["population_size"], setting["generations"], False))
        row = {
            "data": data.name,
            "layer": LAYERS[name],
            **setting,
            "n_rows": len(X_val),
            "clean_accuracy": round(right[0].mean(), 4),
            "robust_accuracy": round(right[1].mean(), 4),
            "forward_passes": round(passes.mean(), 1),
            "labels_as_authors": round(np.mean(labels == authors), 4),
            "labels_as_not_stopped": None
            if not_stopped is None
            else round(np.mean(labels == not_stopped), 4),
            "version": __version__,
            "torch": torch.__version__,
        }
        print(", ".join(f"{key}={value}" for key, value in row.items()), flush=True)
        return row

    for setting in settings():
        rails = RAILSClassifier(network, layers=LAYERS[name], random_state=0, **setting).fit(X, y)
        response = rails.respond(rows)
        labels, n_generations = response.labels, response.n_generations[LAYERS[name]]
        authors = labels if authors is None else authors
        runs[tuple(setting.values())] = labels
        yield describe(setting, labels, setting["population_size"] * (n_generations + 1))


def plot():
    """Draw the curves of all results that there are."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    paths = sorted(RESULTS.glob("passes_*.csv"))
    fig, axes = plt.subplots(
        (len(paths) + 1) // 2,
        2,
        figsize=(7, 1.6 * len(paths)),
        layout="constrained",
        squeeze=False,
    )
    for ax, path in zip(axes.flat, paths, strict=False):  # one may stay empty
        with path.open() as file:
            rows = list(csv.DictReader(file))
        curves = {
            "True": "T from 25 to 400, G = 10, early stopping",
            "False": "T = 150, G from 0 to 10, no early stopping",
        }
        for early_stopping, label in curves.items():
            chosen = [
                row
                for row in rows[1:]
                if row["early_stopping"] == early_stopping
                and (row["generations"] == "10" or early_stopping == "False")
            ]
            chosen.sort(key=lambda row: float(row["forward_passes"]))
            ax.plot(
                [float(row["forward_passes"]) for row in chosen],
                [float(row["robust_accuracy"]) for row in chosen],
                marker="o",
                label=label,
            )
        (default,) = (
            row
            for row in rows
            if row["early_stopping"] == "True" and row["generations"] == str(DEFAULT_GENERATIONS)
        )
        ax.plot(
            float(default["forward_passes"]),
            float(default["robust_accuracy"]),
            "s",
            label="T = 150, G = 3, early stopping (default)",
        )
        fixed = float(rows[0]["robust_accuracy"])
        ax.plot(11_000, fixed, "k*", label="T = 1000, G = 10")
        ax.axhline(fixed, color="0.8", zorder=0)
        ax.set(
            xscale="log",
            xlabel="forward passes for an image",
            ylabel="robust accuracy",
            title=f"{rows[0]['data'].split()[0]}, {rows[0]['layer']}, {rows[0]['n_rows']} images",
        )
    # The curves are the same on all data sets.
    fig.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", fontsize="small"
    )
    (ROOT / "docs" / "images").mkdir(exist_ok=True)
    fig.savefig(ROOT / "docs" / "images" / "passes.png", dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names", nargs="*", choices=[*LAYERS, []], help="data sets; none: plot only"
    )
    parser.add_argument("--rows", type=int, default=300, help="validation rows")
    parser.add_argument("--data-home")
    options = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    for name in options.names:
        rows = list(compare(name, options.rows, options.data_home))
        with (RESULTS / f"passes_{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)
    plot()


if __name__ == "__main__":
    main()
