"""The paper's CIFAR-10 row and saturated networks: ``python saturation.py --data-home DIR``.

The gradient of the cross-entropy is zero in float32 where a network's softmax is rounded to 1, and
the paper's attack then leaves an image as it is. Each classifier is tried on the images of this
attack, of the same attack on the margin of the logits, which does not vanish, and of AutoAttack,
with the network's logits multiplied by several factors. Clean and attacked accuracy are printed for
all images, and for those that the attack moved.
"""

import matplotlib as mpl
import torch
from attacks import network_attacks
from common import describe, difference, main, predict_network, share
from matplotlib import pyplot as plt
from torch import nn
from train import attack_settings

from sklearn_rails.attacks import pgd


class Scaled(nn.Module):
    """A network whose logits are multiplied by a factor, which changes no label."""

    def __init__(self, network, factor):
        super().__init__()
        self.network, self.factor = network, factor

    def forward(self, x):
        return self.factor * self.network(x)


def draw(path, title, lines):
    """Draw accuracy under the paper's attack against the factor of the logits."""
    mpl.use("Agg")
    figure, axes = plt.subplots(figsize=(5, 3.5))
    curves = {}
    for line in lines:
        if line["attack"] == "PGD, cross-entropy":
            curves.setdefault(line["classifier"], []).append(
                (line["factor"], float(line["robust"].split()[0]), float(line["moved"].split()[0]))
            )
    for name, points in curves.items():
        factors, robust, moved = zip(*points, strict=True)
        axes.plot(factors, robust, marker="o", label=name)
    axes.plot(factors, moved, color="gray", linestyle=":", label="images moved by the attack")
    axes.set(xscale="log", xlabel="factor of the logits", ylabel="%", ylim=(0, 102))
    axes.set_title(f"{title}: PGD on the cross-entropy")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def rows_of(task, settings):
    own = settings | settings["data"][task.name]
    X, y = task.X_test, task.y_test
    eps, step, max_iter = attack_settings(task.name)
    fitted = {
        entry["name"]: task.fit(entry["kind"], entry["parameters"]) for entry in own["classifier"]
    }
    predict = {"network": lambda A: predict_network(task.network, A)}
    predict |= {name: classifier.predict for name, classifier in fitted.items()}
    parameters = {entry["name"]: entry["parameters"] for entry in own["classifier"]}
    clean = {name: labels(X) == y for name, labels in predict.items()}
    with torch.no_grad():
        logits = task.network(torch.from_numpy(X))
    sure = logits.double().softmax(dim=1).amax(dim=1)
    print(f"median of 1 - softmax: {float((1 - sure).median()):.1e}", flush=True)

    lines = []

    def lines_of(factor, kind, attacked):
        moved = (attacked != X).any(axis=(1, 2, 3))
        right = {name: labels(attacked) == y for name, labels in predict.items()}
        for name, r in right.items():
            line = {
                "data": task.title,
                "network": task.name,
                "factor": factor,
                "attack": kind,
                "classifier": name,
                "parameters": describe(parameters.get(name, {})),
                "test rows": len(y),
                "moved": share(moved),
                "clean": share(clean[name]),
                "robust": share(r),
                "robust, moved images": share(r[moved]) if moved.any() else "",
                "robust, images not moved": share(r[~moved]) if not moved.all() else "",
                "against network, moved images": (
                    ""
                    if name == "network" or not moved.any()
                    else difference(r[moved], right["network"][moved])
                ),
                "clean / robust in the paper": own["paper"].get(name, ""),
            }
            print(*list(line.values())[2:5], *list(line.values())[7:], flush=True)
            lines.append(line)
            yield line

    settings_of_pgd = {"eps": eps, "step": step, "max_iter": max_iter}
    for factor in own["factors"]:
        network = Scaled(task.network, factor)
        yield from lines_of(factor, "PGD, cross-entropy", pgd(network, X, y, **settings_of_pgd))
    draw(task.results / f"saturation_{task.name}.png", task.title.split(" (")[0], lines)
    by_margin = pgd(task.network, X, y, loss="margin", **settings_of_pgd)
    yield from lines_of(1, "PGD, margin", by_margin)
    yield from lines_of(1, "AutoAttack", network_attacks(task)["AutoAttack"](X, y))


if __name__ == "__main__":
    main(__file__, rows_of)
