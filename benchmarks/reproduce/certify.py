"""Certified accuracy: ``python certify.py mnist --rows 200 --data-home DIR``.

Share of test images that are classified correctly, and certainly so within a Euclidean radius: by
``DkNNClassifier.certified_radius`` with one neighbour, and by randomized smoothing (Cohen et al.
2019) of networks, of nearest neighbours and of RAILS. Noise is drawn by a seed. A plot shows the
shares at all radii.
"""

from functools import partial

import matplotlib as mpl
import numpy as np
from common import describe, main, predict_network, share
from matplotlib import pyplot as plt
from scipy.stats import binomtest, norm
from train import load_network

# Cohen et al.: number of noisy images that the label is chosen by, and that it is tested by, and
# the probability that a radius does not hold.
N_CHOOSE, N_TEST, ALPHA = 100, 500, 0.001
IMAGES_AT_ONCE = 10


def smoothed_radii(predict, X, y, sigma):
    """Return the radius of each image, minus 1 where the label is wrong or undecided."""
    rng = np.random.default_rng(0)
    radii = []
    for first in range(0, len(X), IMAGES_AT_ONCE):
        images = X[first : first + IMAGES_AT_ONCE]
        shape = (len(images), N_CHOOSE + N_TEST, *X.shape[1:])
        noisy = images[:, None] + sigma * rng.standard_normal(shape, dtype=np.float32)
        labels = predict(noisy.reshape(-1, *X.shape[1:])).reshape(shape[:2])
        for row, label in zip(labels, y[first:], strict=False):
            values, counts = np.unique(row[:N_CHOOSE], return_counts=True)
            count = int((row[N_CHOOSE:] == values[counts.argmax()]).sum())
            low = binomtest(count, N_TEST).proportion_ci(1 - 2 * ALPHA).low
            is_certified = values[counts.argmax()] == label and low > 0.5
            radii.append(sigma * norm.ppf(low) if is_certified else -1.0)
        print(f"{len(radii)} of {len(X)} images", end="\r", flush=True)
    return np.array(radii)


def draw(path, title, curves):
    """Draw the shares of certified images against the radius."""
    mpl.use("Agg")
    figure, axes = plt.subplots(figsize=(9, 3.5), layout="constrained")
    for name, radii in curves.items():
        ordered = np.sort(radii[radii >= 0])
        counts = np.arange(len(ordered), -1, -1)
        # Each holds up to a radius; the last, none, from the largest on.
        axes.step(
            [0, *ordered, 10], 100 * counts[[0, *range(len(counts))]] / len(radii), label=name
        )
    axes.set(xlabel="Euclidean radius", ylabel="certified accuracy, %", ylim=(0, 100))
    axes.set(xlim=(0, 2), title=title)
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def rows_of(task, settings):
    own, curves = settings["data"][task.name], {}
    for entry in own["classifier"]:
        kind, sigma = entry["kind"], entry.get("sigma")
        parameters = entry.get("parameters", {})
        X, y = (A[: entry.get("n_test")] for A in (task.X_test, task.y_test))
        fitted = None if kind == "network" else task.fit(kind, parameters)
        if sigma is None:
            radii = np.where(fitted.predict(X) == y, fitted.certified_radius(X), -1)
        else:
            network = task.network
            if "network" in entry:
                network = load_network(entry["network"], task.data_home)
            predict = partial(predict_network, network) if fitted is None else fitted.predict
            radii = smoothed_radii(predict, X, y, sigma)
        curves[entry["name"] + (f", sigma {sigma}" if sigma else "")] = radii
        draw(task.results / f"certify_{task.name}.png", task.title.split(" (")[0], curves)
        line = {
            "data": task.title,
            "network": task.name,
            "classifier": entry["name"],
            "parameters": describe(parameters),
            "sigma": "" if sigma is None else sigma,
            "test rows": len(X),
            **{f"radius {radius:g}": share(radii >= radius) for radius in settings["radii"]},
        }
        print(*list(line.values())[2:], flush=True)
        yield line


if __name__ == "__main__":
    main(__file__, rows_of)
