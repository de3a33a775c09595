"""The paper's Table 1: ``python table1.py mnist --rows 1000 --data-home DIR``.

Clean accuracy and accuracy under PGD on the network (a transfer attack), with 95 % intervals, and
differences that are paired row by row. Grids are searched on validation rows, which neither the
network nor a classifier has seen.
"""

from functools import partial

from common import describe, difference, main, predict_network, share
from train import attack


def rows_of(task, settings):
    paper = settings["data"][task.name]["paper"]
    pgd = partial(attack, task.network_name)
    sets = task.X_test, pgd(task.network, task.X_test, task.y_test)
    right = {"network": [predict_network(task.network, X) == task.y_test for X in sets]}
    chosen = {"network": {}}
    for entry in settings["data"][task.name]["classifier"]:
        name, kind = entry["name"], entry["kind"]
        parameters = entry.get("parameters", {})
        if "grid" in entry:
            parameters = task.tune(kind, entry["grid"], pgd)
        n_rows = entry.get("n_test", len(task.X_test))
        fitted = task.fit(kind, parameters)
        right[name] = [fitted.predict(X[:n_rows]) == task.y_test[:n_rows] for X in sets]
        chosen[name] = parameters
        print(name, parameters, *map(share, right[name]), flush=True)
    for name, (clean, robust) in right.items():
        n_rows = len(clean)
        base_clean, base_robust = (r[:n_rows] for r in right[settings["baseline"]])
        is_base = name == settings["baseline"]
        yield {
            "data": task.title,
            "network": task.network_name,
            "classifier": name,
            "parameters": describe(chosen[name]),
            "seed": 0,
            "test rows": n_rows,
            "clean": share(clean),
            "robust": share(robust),
            "clean against DkNN": "" if is_base else difference(clean, base_clean),
            "robust against DkNN": "" if is_base else difference(robust, base_robust),
            "clean / robust in the paper": paper.get(name, ""),
        }


if __name__ == "__main__":
    main(__file__, rows_of)
