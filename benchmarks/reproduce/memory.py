"""What memory gains, and what it costs when it is poisoned: ``python memory.py mnist``.

A stream of attacked rows (PGD on the network) is answered and remembered in different ways. Then
come other attacked rows, the rows of the stream attacked anew (in four times as many steps of a
quarter of the size), and clean rows. The poisoner attacks with twice the radius, and of what comes
out feeds the rows that are answered wrong.
"""

import matplotlib as mpl
import numpy as np
from common import describe, difference, main, share
from train import attack_settings

from sklearn_rails.attacks import pgd
from sklearn_rails.inspection import AffinityCurveDisplay


def remember(rails, how, stream, labels, poison):
    """Fill the memory anew."""
    rails.forget()
    if how == "none":
        return
    rows, y = poison if how == "poisoned" else (stream, labels)
    for start in range(0, len(rows), 50):
        part = slice(start, start + 50)
        response = rails.respond(rows[part])
        if how == "labelled":
            rails.remember(response, y[part])
        else:
            rails.remember(response, confidence=0 if how == "all" else 0.9)


def rows_of(task, settings):
    own = settings | settings["data"][task.name]
    eps, step, max_iter = attack_settings(task.name)
    how_hard = {"eps": eps, "step": step, "max_iter": max_iter}
    rails = task.fit("RAILS", own["parameters"])
    attacked = pgd(task.network, task.X_test, task.y_test, **how_hard)
    half = len(task.X_test) // 2
    stream, y_stream = attacked[:half], task.y_test[:half]
    again = pgd(
        task.network, task.X_test[:half], y_stream, eps=eps, step=step / 4, max_iter=4 * max_iter
    )
    tried = {
        "next attacked rows": (attacked[half:], task.y_test[half:]),
        "the stream attacked anew": (again, y_stream),
        "clean rows": (task.X_test[half:], task.y_test[half:]),
    }
    strong = pgd(
        task.network, task.X_test[:half], y_stream, eps=2 * eps, step=2 * step, max_iter=max_iter
    )
    wrong = rails.predict(strong) != y_stream
    poison = strong[wrong], y_stream[wrong]
    bred_all = {"early_stopping": False, "generations": own["generations"]}
    curving = task.fit("RAILS", own["parameters"] | bred_all)
    before = curving.respond(again[: own["n_curve"]])

    base = {}
    for how in ("none", "confident", "labelled", "all", "poisoned"):
        remember(rails, how, stream, y_stream, poison)
        n_cells = {layer: len(bank) for layer, bank in rails.memory_.items()}
        line = {
            "data": task.title,
            "network": task.name,
            "parameters": describe(own["parameters"]),
            "seed": 0,
            "remembered": how,
            "rows fed": 0 if how == "none" else len(poison[0] if how == "poisoned" else stream),
            "cells": " ".join(map(str, n_cells.values())),
        }
        for name, (X, y) in tried.items():
            response = rails.respond(X)
            right = response.labels == y
            generations = np.mean([n.mean() for n in response.n_generations.values()])
            base.setdefault(name, right)
            line[f"{name}: right"] = share(right)
            line[f"{name}: against none"] = difference(right, base[name])
            line[f"{name}: generations"] = round(float(generations), 3)
        print(*list(line.values())[4:], flush=True)
        yield line
        if how == "confident":
            remember(curving, how, stream, y_stream, poison)
            met_again = curving.respond(again[: own["n_curve"]])
            mpl.use("Agg")
            curves = {"before memory": before, "met again": met_again}
            display = AffinityCurveDisplay.from_response(curves)
            display.ax_.set_title(f"{task.title}, {len(before.labels)} attacked rows")
            path = task.results / f"memory_{task.name}.png"
            display.figure_.savefig(path, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main(__file__, rows_of)
