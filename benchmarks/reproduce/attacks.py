"""Attacks on the network and on the defences: ``python attacks.py mnist --data-home DIR``.

Transfer attacks are made on the network; the others know the defence: the adaptive attack by its
gradients, Square by its scores, HopSkipJump by its answers. The last two are slow, and are tried
on the first rows that the adaptive attack leaves. A row counts as robust if it is right under every
attack that was tried on it.

Where a classifier has a threat scorer, which is fitted on validation rows, flagged rows count as
abstentions: each attack is to be answered rightly or flagged, and the adaptive attack then evades
the scorer too. The same is tried with the network alone, flagged if its margin is small.
"""

import functools
import json
import random
import re
from time import perf_counter

import matplotlib as mpl
import numpy as np
import torch
from art.attacks.evasion import (
    AutoAttack,
    AutoProjectedGradientDescent,
    FastGradientMethod,
    HopSkipJump,
    SquareAttack,
)
from art.estimators.classification import (
    BlackBoxClassifier,
    BlackBoxClassifierNeuralNetwork,
    PyTorchClassifier,
)
from common import describe, is_held, logits_of, main, predict_network, share
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
    """Return the attacks on the bare network, by name: functions of rows and labels."""
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
    # One run of each part, as in the authors' implementation, instead of the library's five, and
    # 1,000 queries instead of 5,000: an image that withstands them all would take minutes.
    once = {
        AutoProjectedGradientDescent: {"nb_random_init": 1},
        SquareAttack: {"nb_restarts": 1, "max_iter": 1000},
    }
    for part in auto.attacks:
        part.set_params(verbose=False, **once.get(type(part), {}))
    attacks = {
        "PGD": lambda X, y: pgd(task.network, X, y, eps=eps, step=step, max_iter=max_iter),
        "FGSM": FastGradientMethod(target, eps=eps).generate,
        "Square": SquareAttack(target, eps=eps, max_iter=1000, verbose=False).generate,
        "AutoAttack": auto.generate,
    }
    return {name: seeded(attack) for name, attack in attacks.items()}


def network_margin_attacks(task, n):
    """Return rows attacked for a large margin, from which the network then does not abstain."""
    eps = attack_settings(task.name)[0]
    X, y, options = task.X_test[:n], task.y_test[:n], {"eps": eps, "step": eps / 8, "max_iter": 100}
    return {
        f"PGD, margin, start {seed}": pgd(
            task.network, X, y, loss="margin", random_start=True, random_state=seed, **options
        )
        for seed in range(3)
    }


def predict_with_margin(network, X):
    """Return the network's own labels, and by how much their logits exceed the next ones."""
    values, labels = logits_of(network, X).topk(2, dim=1)
    return labels[:, 0].numpy(), (values[:, 0] - values[:, 1]).numpy()


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
    """Draw accuracy under the adaptive attack, with 95 % intervals: against radius and steps."""
    mpl.use("Agg")
    figure, (by_radius, by_steps) = plt.subplots(ncols=2, figsize=(9, 3.5), layout="constrained")
    curves = {}
    for line in lines:
        name = line["classifier"]
        if line["attack"] in ("none", "adaptive") and name != "network":
            eps = 0 if line["attack"] == "none" else int(line["eps"].split("/")[0])
            points = curves.setdefault(name, {})
            points[eps] = [float(number) for number in re.findall(r"[\d.]+", line["right"])]
        if line["attack"] == "adaptive" and line["eps"] == lines[0]["eps"]:
            steps, left = zip(*json.loads(line["left after steps"]), strict=True)
            by_steps.step(steps, left, where="post", label=name)
    for name, points in curves.items():
        eps = sorted(points)
        if len(eps) < 3:  # no curve was asked for
            continue
        right, low, high = (np.array(part) for part in zip(*[points[e] for e in eps], strict=True))
        error = right - low, high - right
        by_radius.errorbar(eps, right, error, marker="o", capsize=3, label=name)
    by_radius.set(xlabel="eps · 255", ylabel="accuracy, %", ylim=(0, 100))
    by_steps.set(xlabel="gradient steps of each image", ylim=(0, 100))
    figure.suptitle(lines[0]["data"].split(" (")[0])
    for axes in (by_radius, by_steps):
        if axes.has_data():
            axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def left_after_steps(right, n_steps):
    """Return the shares of right rows, in per cent, after each number of steps where some fell."""
    ends = np.unique([0, *n_steps]).tolist()
    return [(n, round(100 * float(np.mean(right | (n_steps > n))), 1)) for n in ends]


def rows_of(task, settings):
    own = settings | settings["data"][task.name]
    X, y = task.X_test, task.y_test
    eps = attack_settings(task.name)[0]
    transferred = {name: make(X, y) for name, make in network_attacks(task).items()}

    lines = []

    def row(name, parameters, kind, radius, right, seconds="", steps=""):
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
            "seconds a row": seconds,
            "left after steps": steps,
        }
        print(*list(line.values())[2:-1], flush=True)
        lines.append(line)
        return line

    def adaptive(fitted, n, radius, threat_weight=0):
        """Return attacked rows, the seconds of each, and the number of steps it took."""
        options = own["adaptive"] | {"threat_weight": threat_weight, "verbose": 1}
        attack = task.adaptive_attack(fitted, radius, **options)
        start = perf_counter()
        attacked = attack.generate(X[:n], y[:n])
        return attacked, round((perf_counter() - start) / n, 2), attack.n_steps_

    def abstaining(name, parameters, flagged, right):
        """Return the lines of a classifier that may abstain: right or flagged under each attack."""
        yield row(name, parameters, "none; flagged", eps, flagged)
        for kind, (r, seconds) in right.items():
            yield row(name, parameters, f"{kind}; right or flagged", eps, r, seconds)
        worst = np.all([r for r, _ in right.values()], axis=0)
        yield row(name, parameters, "worst; right or flagged", eps, worst)

    n_adaptive, n_curve = (min(own[name], len(X)) for name in ("n_adaptive", "n_curve"))
    right = {"none": predict_network(task.network, X) == y}
    right |= {k: predict_network(task.network, Z) == y for k, Z in transferred.items()}
    for kind, r in right.items():
        yield row("network", {}, kind, eps, r)
    worst = np.all(list(right.values()), axis=0)[:n_adaptive]
    yield row("network", {}, "worst", eps, worst)
    if any("threat" in entry for entry in own["classifier"]):
        _, known = predict_with_margin(task.network, task.X_validation)
        least = np.quantile(known, 0.05)
        attacked = {**transferred, **network_margin_attacks(task, n_adaptive)}
        labels, margins = predict_with_margin(task.network, X)
        held = {"none": (((labels == y) | (margins < least))[:n_adaptive], "")}
        for kind, Z in attacked.items():
            found, margin = predict_with_margin(task.network, Z[:n_adaptive])
            held[kind] = (found == y[:n_adaptive]) | (margin < least), ""
        yield from abstaining("network, by its margin", {}, margins < least, held)
    slower = {
        "Square on scores": (by_square, own["n_square"]),
        "HopSkipJump": (
            lambda fitted, X, y, eps: by_hop_skip_jump(fitted.predict, X, eps, task.X[:500]),
            own["n_hop_skip_jump"],
        ),
    }
    for entry in own["classifier"]:
        n_adaptive = min(entry.get("n_adaptive", own["n_adaptive"]), len(X))
        name, parameters = entry["name"], entry["parameters"]
        fitted = task.fit(entry["kind"], parameters)
        right = {"none": fitted.predict(X) == y}
        right |= {k: fitted.predict(Z) == y for k, Z in transferred.items()}
        for kind, r in right.items():
            yield row(name, parameters, kind, eps, r)
        unaware, seconds, n_steps = adaptive(fitted, n_adaptive, eps)
        right["adaptive"] = fitted.predict(unaware) == y[:n_adaptive]
        steps = describe(left_after_steps(right["adaptive"], n_steps))
        yield row(name, parameters, "adaptive", eps, right["adaptive"], seconds, steps)
        worst = np.all([r[:n_adaptive] for r in right.values()], axis=0)
        for kind, (make, n_rows) in slower.items():
            left = worst.nonzero()[0][:n_rows]
            if len(left) == 0:
                continue
            start = perf_counter()
            attacked = make(fitted, X[left], y[left], eps).astype(np.float32)
            seconds = round((perf_counter() - start) / len(left), 2)
            r = fitted.predict(attacked) == y[left]
            yield row(name, parameters, f"{kind}, rows left", eps, r, seconds)
            worst[left] &= r
        yield row(name, parameters, "worst", eps, worst)

        for factor in own["eps_factors"]:
            attacked, seconds, _ = adaptive(fitted, n_curve, factor * eps)
            r = fitted.predict(attacked) == y[:n_curve]
            yield row(name, parameters, "adaptive", factor * eps, r, seconds)
        draw(task.results / f"attacks_{task.name}.png", lines)

        if "threat" in entry:
            scorer = ThreatScorer(task.network, random_state=0, **entry["threat"])
            fitted = task.fit(entry["kind"], {**parameters, "threat_scorer": scorer})
            # Samples that the network was trained on are more typical than new ones.
            fitted.threat_scorer_.fit(task.X_validation, task.y_validation)
            n = n_adaptive
            attacked = {"none": (X, ""), "adaptive": (unaware, "")}
            attacked |= {kind: (Z, "") for kind, Z in transferred.items()}
            for weight in own["threat_weights"]:
                Z, seconds, _ = adaptive(fitted, n, eps, weight)
                attacked[f"adaptive, threat weight {weight}"] = Z, seconds
            held = {k: (is_held(fitted, Z[:n], y[:n]), t) for k, (Z, t) in attacked.items()}
            flagged = fitted.threat_scorer_.predict(X) == -1
            known = {**parameters, "threat_scorer": entry["threat"]}
            yield from abstaining(name, known, flagged, held)


if __name__ == "__main__":
    main(__file__, rows_of)
