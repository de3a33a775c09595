"""The paper's Figure 2: ``python figure2.py mnist --data-home DIR``.

Mean affinity of populations over the generations: to the antigen that they were flocked and bred
for, and to another one, of another class. A population at generation g is what ``generations=g``
gives, since random numbers are a function of seed, layer and generation. Before generation 0, the
mutated clones, stand the clones of the flocked neighbours as they are. Beside it, the share of
cells that are of the antigen's own class.
"""

import matplotlib as mpl
import numpy as np
from common import Task, parse, write
from matplotlib import pyplot as plt

from sklearn_rails import TorchFeatureExtractor
from sklearn_rails.inspection import AffinityCurveDisplay


def curves_of(task, settings):
    """Return the curves of the antigens, and of others with which the populations do not match."""
    own = settings["data"][task.name]
    rails = task.fit("RAILS", own["parameters"])
    layer = rails.layers_[0]
    X, y = task.X_test, task.y_test
    # The next row of another class.
    others = np.array([i + 1 + np.argmax(np.roll(y, -i - 1) != y[i]) for i in range(len(X))])
    others %= len(X)
    extract = TorchFeatureExtractor(task.network, layers=layer, input_shape=X.shape[1:]).fit(X)
    antigens = extract.transform(X)
    curves, shares = {"antigen": [], "mismatched antigen": []}, []

    def add(rails):
        """Add one point to every curve."""
        points = {name: [] for name in curves}
        own_class = []
        for i in range(len(X)):
            response = rails.respond(X[i : i + 1])
            cells = extract.transform(response.memory[layer][0])
            for name, j in zip(curves, (i, others[i]), strict=True):
                points[name].append(-np.linalg.norm(cells - antigens[j], axis=1).mean())
            own_class.append(np.mean(response.memory_labels[layer][0] == y[i]))
        for name, values in points.items():
            curves[name].append(values)
        shares.append(own_class)
        print(*(f"{name}: {np.mean(p):.3f}" for name, p in points.items()), flush=True)

    # All cells, and not the best of them.
    whole = own["parameters"] | {"memory_fraction": 1.0, "early_stopping": False}
    n_generations, rho = rails.generations, rails.rho
    for generation, changes in ((0, 0), *((g, rho) for g in range(n_generations + 1))):
        add(task.fit("RAILS", whole | {"generations": generation, "rho": changes}))
    curves = {name: np.array(points).T for name, points in curves.items()}
    return curves, np.array(shares).T, layer


def draw(path, title, curves, shares, layer):
    """Draw affinity and the share of the own class against the generation."""
    figure, (by_affinity, by_class) = plt.subplots(ncols=2, figsize=(10, 3.8), layout="constrained")
    bred = {label: values[:, 1:] for label, values in curves.items()}
    display = AffinityCurveDisplay(bred, layer=layer).plot(ax=by_affinity)
    for line, values in zip(display.lines_, curves.values(), strict=True):
        by_affinity.plot([-1, 0], values[:, :2].mean(axis=0), ":.", color=line.get_color())
    generations = range(-1, shares.shape[1] - 1)
    by_class.plot(generations, 100 * shares.mean(axis=0), ".-")
    by_class.set(xlabel="generation", ylabel="cells of the antigen's class, %", ylim=(0, 100))
    for axes in (by_affinity, by_class):
        axes.set_xticks(generations, ["clones", *generations[1:]])
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main():
    options, settings = parse(__file__)
    mpl.use("Agg")
    for name in options.names:
        task = Task(name, settings, options)
        curves, shares, layer = curves_of(task, settings)
        title = f"{task.title}, {len(task.X_test)} test rows"
        draw(options.results / f"figure2_{name}.png", title, curves, shares, layer)
        lines = [
            {
                "data": task.title,
                "network": name,
                "layer": layer,
                "parameters": settings["data"][name]["parameters"],
                "seed": 0,
                "test rows": len(values),
                "curve": label,
                "generation": generation - 1 if generation else "clones",
                "mean affinity": round(float(values[:, generation].mean()), 4),
                "standard error": round(
                    float(values[:, generation].std(ddof=1) / len(values) ** 0.5), 4
                ),
                "cells of the antigen's class": round(float(shares[:, generation].mean()), 4),
            }
            for label, values in curves.items()
            for generation in range(values.shape[1])
        ]
        write("figure2", lines, options)


if __name__ == "__main__":
    main()
