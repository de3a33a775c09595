"""Attacks on the network and on the defences: ``python attacks.py mnist --data-home DIR``.

Transfer attacks are made on the network; the others know the defence: the adaptive attack by its
gradients, Square by its scores, HopSkipJump by its answers. A row counts as robust if it is right
under every attack that was tried on it. Where there is a threat scorer, an alarm is as good as a
right answer.
"""

import functools
import random
import re

import matplotlib as mpl
import numpy as np
import torch
from art.attacks.evasion import AutoAttack, FastGradientMethod, HopSkipJump, SquareAttack
from art.estimators.classification import (
    BlackBoxClassifier,
    BlackBoxClassifierNeuralNetwork,
    PyTorchClassifier,
)
from common import describe, is_held, main, predict_network, share
from matplotlib import pyplot as plt
from scipy.spatial.distance import cdist
from torch import nn
from train import attack_settings

from sklearn_rails import ThreatScorer
from sklearn_rails.attacks import pgd


def seeded(attack):
    """Make an attack of a library, which draws from the global random states, repeatable."""

    @functools.wraps(attack)
    def run(*args, **kwargs):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        torch.manual_seed(0)
        return attack(*args, **kwargs)

    return run


def network_attacks(task):
    """Give the attacks on the bare network, by name: functions of rows and labels."""
    eps, step, max_iter = attack_settings(task.name)
    target = PyTorchClassifier(
        task.network,
        loss=nn.CrossEntropyLoss(),
        input_shape=task.X.shape[1:],
        nb_classes=10,
        clip_values=(0, 1),
        device_type="cpu",
    )
    auto = AutoAttack(target, eps=eps, eps_step=eps / 4)
    for part in auto.attacks:
        part.set_params(verbose=False)
    attacks = {
        "PGD": lambda X, y: pgd(task.network, X, y, eps=eps, step=step, max_iter=max_iter),
        "FGSM": FastGradientMethod(target, eps=eps).generate,
        "Square": SquareAttack(target, eps=eps, max_iter=1000, verbose=False).generate,
        "AutoAttack": auto.generate,
    }
    return {name: seeded(attack) for name, attack in attacks.items()}


@seeded
def by_square(fitted, X, y, eps):
    """Attack by the scores."""
    target = BlackBoxClassifierNeuralNetwork(
        fitted.predict_proba, input_shape=X.shape[1:], nb_classes=10, clip_values=(0, 1)
    )
    return SquareAttack(target, eps=eps, max_iter=500, verbose=False).generate(X, y)


@seeded
def by_hop_skip_jump(predict, X, eps, starts, max_iter=10):
    """Attack by the answers; a row for which the ball is too small comes back as it was.

    It starts at the nearest of some images with another label.
    """
    distances = cdist(X.reshape(len(X), -1), starts.reshape(len(starts), -1))
    distances[predict(X)[:, None] == predict(starts)] = np.inf
    nearest = starts[distances.argmin(axis=1)]
    target = BlackBoxClassifier(
        lambda rows: np.eye(10)[predict(rows.astype(np.float32))],
        input_shape=X.shape[1:],
        nb_classes=10,
        clip_values=(0, 1),
    )
    attack = HopSkipJump(
        target, norm=np.inf, max_iter=max_iter, max_eval=300, init_eval=50, verbose=False
    )
    attacked = attack.generate(X, x_adv_init=nearest)
    near = np.abs(attacked - X).max(axis=(1, 2, 3)) <= eps
    return np.where(near[:, None, None, None], attacked, X)


def draw(path, lines):
    """Draw accuracy against the radius of the adaptive attack, with 95 % intervals."""
    curves = {}
    for line in lines:
        if line["attack"] in ("none", "adaptive") and line["classifier"] != "network":
            eps = 0 if line["attack"] == "none" else int(line["eps"].split("/")[0])
            points = curves.setdefault(line["classifier"], {})
            points[eps] = [float(number) for number in re.findall(r"[\d.]+", line["right"])]
    mpl.use("Agg")
    figure, axes = plt.subplots(figsize=(5, 3.5))
    for name, points in curves.items():
        eps = sorted(points)
        if len(eps) < 3:  # no curve was asked for
            continue
        right, low, high = (np.array(part) for part in zip(*[points[e] for e in eps], strict=True))
        axes.errorbar(eps, right, (right - low, high - right), marker="o", capsize=3, label=name)
    axes.set(xlabel="eps · 255", ylabel="accuracy, %", ylim=(0, 100))
    axes.set_title(lines[0]["data"].split(" (")[0])
    if axes.has_data():
        axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def rows_of(task, settings):
    own = settings | settings["data"][task.name]
    X, y = task.X_test, task.y_test
    eps = attack_settings(task.name)[0]
    transferred = {name: make(X, y) for name, make in network_attacks(task).items()}

    lines = []

    def row(name, parameters, kind, radius, right):
        line = {
            "data": task.title,
            "network": task.name,
            "classifier": name,
            "parameters": describe(parameters),
            "seed": 0,
            "attack": kind,
            "eps": f"{radius * 255:.0f}/255",
            "test rows": len(right),
            "right": share(right),
        }
        print(*list(line.values())[2:], flush=True)
        lines.append(line)
        return line

    def adaptive(fitted, X, y, eps, threat_weight=0):
        return task.attack_adaptively(
            fitted, X, y, eps, threat_weight=threat_weight, **own["adaptive"]
        )

    right = {"none": predict_network(task.network, X) == y}
    right |= {k: predict_network(task.network, Z) == y for k, Z in transferred.items()}
    for kind, r in right.items():
        yield row("network", {}, kind, eps, r)
    yield row("network", {}, "worst", eps, np.all(list(right.values()), axis=0))
    direct = {
        "adaptive": (adaptive, own["n_adaptive"]),
        "Square on scores": (by_square, own["n_square"]),
        "HopSkipJump": (
            lambda fitted, X, y, eps: by_hop_skip_jump(fitted.predict, X, eps, task.X[:500]),
            own["n_hop_skip_jump"],
        ),
    }
    for entry in own["classifier"]:
        name, parameters = entry["name"], entry["parameters"]
        fitted = task.fit(entry["kind"], parameters)
        right = {"none": fitted.predict(X) == y}
        right |= {k: fitted.predict(Z) == y for k, Z in transferred.items()}
        for kind, r in right.items():
            yield row(name, parameters, kind, eps, r)
        for kind, (make, n_rows) in direct.items():
            n = min(n_rows, len(X))
            if n == 0:
                continue
            attacked = make(fitted, X[:n], y[:n], eps).astype(np.float32)
            right[kind] = fitted.predict(attacked) == y[:n]
            yield row(name, parameters, kind, eps, right[kind])
        # Over the rows of the adaptive attack; the dearer attacks count where they were tried.
        worst = right["adaptive"].copy()
        for r in right.values():
            worst[: len(r)] &= r[: len(worst)]
        yield row(name, parameters, "worst", eps, worst)

        n = min(own["n_curve"], len(X))
        for factor in own["eps_factors"]:
            attacked = adaptive(fitted, X[:n], y[:n], factor * eps)
            right = fitted.predict(attacked) == y[:n]
            yield row(name, parameters, "adaptive", factor * eps, right)
        draw(task.results / f"attacks_{task.name}.png", lines)

        if "threat" in entry:
            scorer = ThreatScorer(task.network, random_state=0, **entry["threat"])
            fitted = task.fit(entry["kind"], {**parameters, "threat_scorer": scorer})
            n = min(own["n_adaptive"], len(X))
            for weight in (0, 1):
                attacked = adaptive(fitted, X[:n], y[:n], eps, threat_weight=weight)
                kind = f"adaptive, threat weight {weight}; right or alarmed"
                known = {**parameters, "threat_scorer": entry["threat"]}
                yield row(name, known, kind, eps, is_held(fitted, attacked, y[:n]))


if __name__ == "__main__":
    main(__file__, rows_of)
