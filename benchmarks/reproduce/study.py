"""Where a gain comes from: ``python study.py mnist --data-home DIR``.

Varies one thing at a time about RAILS's defaults and compares clean and robust accuracy (PGD on
the network) on the same validation rows, row by row.
"""

import numpy as np
from common import describe, difference, main, share
from train import attack

# The generations whose votes are looked at together.
N_GENERATIONS = 5


def predict(task, parameters, fitted, X, over_generations):
    """Predict labels by the last generation, or by the plasma of all."""
    if over_generations is None:
        return fitted.predict(X)
    shares = []
    for generation in range(N_GENERATIONS + 1):
        bred = parameters | {"generations": generation, "early_stopping": False}
        shares.append(task.fit("RAILS", bred).predict_proba(X))
    shares = np.array(shares)
    if over_generations == "sum":
        return fitted.classes_[shares.sum(axis=0).argmax(axis=1)]
    # A stopping rule without labels: each row takes the first generation with the clearest vote.
    clearest = shares.max(axis=2).argmax(axis=0)
    return fitted.classes_[shares[clearest, np.arange(len(X))].argmax(axis=1)]


def rows_of(task, settings):
    own = settings["data"][task.name]
    X, y = task.X_validation, task.y_validation
    sets = X, attack(task.name, task.network, X, y)
    base = tau = None
    for entry in [{}, *settings["variation"], *own.get("variation", [])]:
        parameters = {**own["base"], **entry}
        over_generations = parameters.pop("over_generations", None)
        factor = parameters.pop("tau_factor", None)
        if factor is not None:
            parameters["tau"] = factor * tau
        fitted = task.fit("RAILS", parameters)
        right = [predict(task, parameters, fitted, rows, over_generations) == y for rows in sets]
        if base is None:
            base, tau = right, fitted.tau_[fitted.layers_[0]]
        line = {
            "data": task.title,
            "network": task.name,
            "layer": own["base"]["layers"],
            "changed": describe(entry) if entry else "nothing (the defaults)",
            "seed": 0,
            "validation rows": len(y),
            "clean": share(right[0]),
            "robust": share(right[1]),
            "clean against defaults": difference(right[0], base[0]),
            "robust against defaults": difference(right[1], base[1]),
        }
        print(*list(line.values())[3:], flush=True)
        yield line


if __name__ == "__main__":
    main(__file__, rows_of)
