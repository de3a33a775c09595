"""Attack a small network and compare defences: ``python -m sklearn_rails.demo``."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from skorch import NeuralNetClassifier
from threadpoolctl import threadpool_limits
from torch import nn
from torch.nn.functional import max_pool2d

from . import DkNNClassifier, RAILSClassifier
from .attacks import pgd
from .datasets import fetch_image_benchmark, load_digit_images
from .inspection import ImmuneResponseDisplay

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Radius and step of the attack.
EPS, STEP = 60 / 255, 20 / 255

# Chosen by the mean of clean and robust accuracy on held-out training images, attacked in the same
# way: k, rho and the like on 20 splits of the digits and 8 of MNIST, each with its own network, and
# layers on some of them. No hidden layer or combination of layers was clearly better than pixels
# for DkNN or RAILS, so DkNN is the nearest neighbour here.
SETTINGS: dict[str, dict[str, Any]] = {
    "digits": {
        "max_epochs": 30,
        "pixel k-NN": {"n_neighbors": 1},
        "DkNN": {"layers": "input", "n_neighbors": 1, "calibration": "leave-one-out"},
        "RAILS": {"layers": "input", "n_neighbors": 3, "generations": 10, "rho": 0.7},
    },
    "mnist": {
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


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format the result of :func:`compare` as a Markdown table.

    Parameters
    ----------
    rows : list of dict

    Returns
    -------
    str
    """
    lines = [
        f"| {'classifier':<10} | clean accuracy | robust accuracy | seconds per 1,000 images |",
        f"| :{'-' * 9} | {'-' * 13}: | {'-' * 14}: | {'-' * 23}: |",
    ]
    lines += [
        f"| {row['name']:<10} | {row['clean_accuracy']:>14.1%} | {row['robust_accuracy']:>15.1%} "
        f"| {row['seconds_per_1000']:>24.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demo.

    Parameters
    ----------
    arguments : list of str, default=None
        Command-line arguments. None takes those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m sklearn_rails.demo", description=__doc__)
    parser.add_argument("--data", choices=list(SETTINGS), default="digits")
    parser.add_argument("--data-home", help="folder of mnist.npz, or for the download from OpenML")
    parser.add_argument("--output", type=Path, default=Path("demo_results"))
    parser.add_argument(
        "--max-train", type=int, default=10_000, help="maximum number of training images"
    )
    parser.add_argument("--max-test", type=int, default=500, help="maximum number of test images")
    options = parser.parse_args(arguments)

    # The digits' network is too small to gain from threads, and with one thread the table does not
    # depend on the number of cores.
    with threadpool_limits(1 if options.data == "digits" else None):
        run(options)


def run(options: argparse.Namespace) -> None:
    """Train and attack a network, compare the defences, and write the results.

    Parameters
    ----------
    options : argparse.Namespace
        The options of :func:`main`.
    """
    if options.data == "digits":
        data = load_digit_images()
    else:
        data = fetch_image_benchmark(options.data, data_home=options.data_home)
    X_train, y_train = data.X_train[: options.max_train], data.y_train[: options.max_train]
    X_test, y_test = data.X_test[: options.max_test], data.y_test[: options.max_test]
    settings = SETTINGS[options.data]

    print(f"{data.name}: training a network on {len(X_train):,} images.")
    network = train_network(X_train, y_train, max_epochs=settings["max_epochs"])
    print(f"\nAttacking the network on {len(X_test):,} test images.")
    X_attacked = pgd(network, X_test, y_test, eps=EPS, step=STEP)

    classifiers = {
        "pixel k-NN": make_pipeline(
            FunctionTransformer(flatten), KNeighborsClassifier(**settings["pixel k-NN"])
        ),
        "DkNN": DkNNClassifier(network, **settings["DkNN"]),
        "RAILS": RAILSClassifier(network, **settings["RAILS"], random_state=0),
    }
    print("Fitting the defences:")
    for name, classifier in classifiers.items():
        classifier.fit(X_train, y_train)
        print(f"- {name} with {', '.join(f'{k}={v!r}' for k, v in settings[name].items())}")
    rows = compare({"network": network} | classifiers, X_test, X_attacked, y_test)
    print(f"\n{format_table(rows)}\n")
    print(f"Robust accuracy is measured under PGD (L-infinity, eps {EPS * 255:.0f}/255) on the")
    print("network alone. An attack that targets the defence may be stronger.")

    options.output.mkdir(parents=True, exist_ok=True)
    summary = {"rows": rows, "n_test": len(X_test), "eps": EPS}
    (options.output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    network_labels = network.predict(X_attacked)
    # The first images that the network misclassifies only under attack, whether or not RAILS
    # classifies them correctly.
    fooled = (network.predict(X_test) == y_test) & (network_labels != y_test)
    first = np.argsort(~fooled, kind="stable")[:4]
    display = ImmuneResponseDisplay.from_estimator(
        # All generations, so that the curves have their full length.
        clone(classifiers["RAILS"]).set_params(early_stopping=False).fit(X_train, y_train),
        X_attacked[first],
        network_labels=network_labels[first],
        y=y_test[first],
    )
    figure = cast("Figure", display.figure_)  # no SubFigure was passed
    figure.suptitle("RAILS on attacked images")
    figure.savefig(options.output / "response.png", dpi=150)
    print(f"\nWritten: {options.output}/summary.json and response.png")


if __name__ == "__main__":
    main()
