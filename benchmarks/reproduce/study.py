"""Where a gain comes from: ``python study.py mnist --data-home DIR``.

Varies one thing at a time about RAILS's defaults and compares clean and robust accuracy (PGD on
the network) on the same validation rows, row by row.
"""

from common import describe, difference, main, share
from train import attack


def rows_of(task, settings):
    own = settings["data"][task.name]
    X, y = task.X_validation, task.y_validation
    sets = X, attack(task.name, task.network, X, y)
    base = tau = None
    for entry in [{}, *settings["variation"], *own.get("variation", [])]:
        parameters = {**own["base"], **entry}
        factor = parameters.pop("tau_factor", None)
        if factor is not None:
            parameters["tau"] = factor * tau
        fitted = task.fit("RAILS", parameters)
        right = [fitted.predict(rows) == y for rows in sets]
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
