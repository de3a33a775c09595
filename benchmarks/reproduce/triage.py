"""Skip the genetic algorithm for inputs that are not flagged.

``python triage.py mnist --data-home DIR``

RAILS breeds all rows, only those that its threat scorer raises an alarm on, or none (it then
answers by its flock). Accuracy on clean rows and under PGD on the network, cells that go through
the network for a clean row, time for clean rows, and what is left under adaptive attacks that keep
away from alarms: with several weights of the threat, aimed at either way. A row counts as right or
alarmed if it is so under all of them.
"""

import itertools
from statistics import median
from time import perf_counter

import numpy as np
from common import describe, difference, is_held, main, share
from train import attack, attack_settings

from sklearn_rails import ThreatScorer
from sklearn_rails.immune import Triage

N_TIMINGS = 3


class Never(ThreatScorer):
    """Raises no alarm, so that no row is bred."""

    def predict(self, X):
        return np.ones(len(X), dtype=np.int64)


def rows_of(task, settings):
    own = settings | settings["data"][task.name]
    X, y = task.X_test, task.y_test
    eps = attack_settings(task.name)[0]
    attacked = attack(task.name, task.network, X, y)
    scorer = ThreatScorer(task.network, random_state=0, **own["threat"])
    never = Never(task.network, random_state=0, **own["threat"])
    # Fitted before, so that every classifier has the same, and on rows new to the network.
    ways = {
        name: task.fit("RAILS", {**own["parameters"], "threat_scorer": s, "gate": g})
        for name, s, g in (
            ("all", scorer, None),
            ("alarms", scorer, Triage()),
            ("none", never, Triage()),
        )
    }
    for rails in ways.values():
        rails.threat_scorer_.fit(task.X_validation, task.y_validation)
    times = {name: [] for name in ways}
    for _ in range(N_TIMINGS):
        for name, rails in ways.items():
            start = perf_counter()
            rails.predict(X)
            times[name].append(perf_counter() - start)
    alarm = ways["alarms"].threat_scorer_.predict(X) == -1
    bred_in = {"all": X, "alarms": X[alarm], "none": X[:0]}
    aims = list(itertools.product(("all", "alarms"), own["threat_weights"]))
    n, options = own["n_adaptive"], {name: own[name] for name in ("n_restarts", "n_targets")}
    evading = {
        (name, weight): task.adaptive_attack(
            ways[name], eps, threat_weight=weight, **options
        ).generate(X[:n], y[:n])
        for name, weight in (aims if n else ())
    }
    base = None
    for name, rails in ways.items():
        right = [rails.predict(rows) == y for rows in (X, attacked)]
        base = base or right
        bred = bred_in[name]
        cells = rails.respond(bred).n_forward / len(X) if len(bred) else 0
        line = {
            "data": task.title,
            "network": task.name,
            "parameters": describe(own["parameters"]),
            "threat scorer": describe(own["threat"]),
            "seed": 0,
            "bred": name,
            "test rows": len(y),
            "clean": share(right[0]),
            "robust": share(right[1]),
            "clean against all": difference(right[0], base[0]),
            "robust against all": difference(right[1], base[1]),
            "cells for a clean row": round(cells, 1),
            "time for clean rows, against all": round(
                median(t / u for t, u in zip(times[name], times["all"], strict=True)), 3
            ),
        }
        held = {}
        if name != "none":
            held = {aim: is_held(rails, rows, y[:n]) for aim, rows in evading.items()}
        for aim, weight in aims:
            key = f"right or alarmed, aim {aim}, weight {weight}"
            line[key] = share(held[aim, weight]) if held else ""
        line["right or alarmed, worst"] = share(np.all(list(held.values()), axis=0)) if held else ""
        print(*list(line.values())[5:], flush=True)
        yield line


if __name__ == "__main__":
    main(__file__, rows_of)
