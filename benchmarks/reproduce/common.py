"""What the scripts of this folder share: settings, tuned classifiers, intervals, results."""

import argparse
import csv
import json
import tomllib
from pathlib import Path

import numpy as np
import scipy
import sklearn
import torch
from scipy.stats import binomtest, norm
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from train import load_data, load_network, split_rows

import sklearn_rails
from sklearn_rails import DkNNClassifier, RAILSClassifier
from sklearn_rails.attacks import AdaptiveKNNAttack
from sklearn_rails.immune import Arbitration
from sklearn_rails.metrics import make_robust_scorer

RESULTS = Path(__file__).parents[1] / "results"
CLASSIFIERS = {"DkNN": DkNNClassifier, "RAILS": RAILSClassifier}


def parse(script):
    """Read the command line and the settings, which by default stand beside a script."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", help="networks; none: all of the settings")
    parser.add_argument("--settings", type=Path, default=Path(script).with_suffix(".toml"))
    parser.add_argument("--rows", type=int, help="test rows at most")
    parser.add_argument("--data-home", help="folder of the data sets, else what OpenML gives")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the CSV files go")
    options = parser.parse_args()
    settings = tomllib.loads(options.settings.read_text())
    options.names = options.names or list(settings["data"])
    unknown = set(options.names) - set(settings["data"])
    if unknown:
        parser.error(f"names must be of {list(settings['data'])}, got {sorted(unknown)}.")
    return options, settings


def main(script, rows_of):
    """Write the results of a script, one network after the other, as they come."""
    options, settings = parse(script)
    for name in options.names:
        rows = []
        for row in rows_of(Task(name, settings, options), settings):
            rows.append(row)
            write(Path(script).stem, rows, options)


class Task:
    """A network, its data, and the rows that a script looks at."""

    def __init__(self, name, settings, options):
        self.name = name
        self.results = options.results
        self.data_home = options.data_home
        self.results.mkdir(parents=True, exist_ok=True)
        data = load_data(name, options.data_home)
        self.title = data.name
        self.network = load_network(name, options.data_home)
        # A network's own numbers of rows come before those of the file.
        settings = settings | settings["data"][name]
        n_validation = settings["n_validation"]
        self.X, self.y, X_held_out, y_held_out = split_rows(
            name, data, n_validation + settings["n_calibration"], settings["n_train"]
        )
        self.X_validation, self.y_validation = X_held_out[:n_validation], y_held_out[:n_validation]
        self.X_calibration, self.y_calibration = (
            X_held_out[n_validation:],
            y_held_out[n_validation:],
        )
        self.given = {
            # All training rows stay neighbours.
            "DkNN": {"calibration": (self.X_calibration, self.y_calibration)},
            "RAILS": {"random_state": 0},
        }
        n_rows = min(settings["n_test"], options.rows or settings["n_test"])
        self.X_test, self.y_test = data.X_test[:n_rows], data.y_test[:n_rows]
        # For what costs little, also beyond the rows of the settings.
        self.every_X_test = data.X_test[: options.rows]

    def make(self, kind, parameters):
        """Make a classifier with given parameters."""
        nested = {name: value for name, value in parameters.items() if "__" in name}
        plain = {name: value for name, value in parameters.items() if name not in nested}
        if "gate__alpha" in nested:
            plain["gate"] = Arbitration()
        estimator = CLASSIFIERS[kind](self.network, **self.given[kind], **plain)
        return estimator.set_params(**nested)

    def fit(self, kind, parameters):
        """Fit a classifier with given parameters."""
        return self.make(kind, parameters).fit(self.X, self.y)

    def adaptive_attack(self, fitted, eps, **options):
        """Return an attack on a classifier that was fitted on the training rows."""
        return AdaptiveKNNAttack(fitted, self.X, self.y, eps=eps, random_state=0, **options)

    def tune(self, kind, grid, attack):
        """Choose parameters by the mean of clean and robust accuracy on validation rows."""
        fold = np.repeat([-1, 0], [len(self.X), len(self.X_validation)])
        search = GridSearchCV(
            self.make(kind, {name: grid[name][0] for name in grid if "__" in name}),
            grid,
            scoring={"clean": "accuracy", "robust": make_robust_scorer(attack)},
            cv=PredefinedSplit(fold),
            refit=False,
            error_score="raise",
            verbose=2,
        ).fit(
            np.concatenate([self.X, self.X_validation]),
            np.concatenate([self.y, self.y_validation]),
        )
        results = search.cv_results_
        best = np.argmax(results["mean_test_clean"] + results["mean_test_robust"])
        return results["params"][best]


def logits_of(network, X):
    """Return the network's outputs."""
    with torch.no_grad():
        parts = [network(torch.from_numpy(rows)) for rows in np.array_split(X, -(-len(X) // 256))]
    return torch.cat(parts)


def predict_network(network, X):
    """Return the network's own labels."""
    return logits_of(network, X).argmax(dim=1).numpy()


def is_held(rails, rows, y):
    """Check which rows are classified correctly or flagged."""
    return (rails.predict(rows) == y) | (rails.threat_scorer_.predict(rows) == -1)


def share(right):
    """Return a share in per cent with its 95 % interval (Wilson)."""
    low, high = binomtest(int(np.sum(right)), len(right)).proportion_ci(0.95, "wilson")
    return f"{100 * np.mean(right):.1f} ({100 * low:.1f} to {100 * high:.1f})"


def difference(right, other):
    """Return a paired difference of shares in points with its 95 % interval."""
    paired = right.astype(float) - other
    half = norm.ppf(0.975) * paired.std(ddof=1) / np.sqrt(len(paired))
    return f"{100 * paired.mean():+.1f} ± {100 * half:.1f}"


def describe(parameters):
    """Write parameters so that JSON reads them."""
    return json.dumps(parameters)


def write(name, rows, options):
    """Write results beside the versions they were made with; replace the same network's."""
    path = options.results / f"{name}.csv"
    versions = f"{sklearn_rails.__version__}, torch {torch.__version__}, scikit-learn "
    versions += f"{sklearn.__version__}, numpy {np.__version__}, scipy {scipy.__version__}"
    rows = [{**row, "versions": versions} for row in rows]
    kept = []
    if path.is_file():
        done = {row["network"] for row in rows}
        with path.open(newline="") as file:
            kept = [row for row in csv.DictReader(file) if row["network"] not in done]
    rows = sorted(kept + rows, key=lambda row: (row["data"], row["network"]))
    # Older rows may lack columns, or have others.
    columns = dict.fromkeys(column for row in rows for column in row)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(columns))
        writer.writeheader()
        writer.writerows(rows)
