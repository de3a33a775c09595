"""The paper's Table 1: ``python table1.py mnist --rows 1000 --data-home DIR``.

Clean accuracy and accuracy under PGD on the network (a transfer attack), with 95 % intervals, and
differences that are paired row by row. Grids are searched on validation rows, which neither the
network nor a classifier has seen.
"""

from functools import partial
from time import perf_counter

from common import describe, difference, main, predict_network, share
from train import attack


def rows_of(task, settings):
    own = settings["data"][task.name]
    pgd = partial(attack, task.name)
    sets = task.X_test, pgd(task.network, task.X_test, task.y_test)
    right, seconds, chosen = {}, {}, {"network": {}}

    def answer(name, predict, n_rows):
        """Predict all sets, and take the time of it."""
        start = perf_counter()
        right[name] = [predict(X[:n_rows]) == task.y_test[:n_rows] for X in sets]
        seconds[name] = (perf_counter() - start) / (2 * len(right[name][0]))

    answer("network", partial(predict_network, task.network), len(task.X_test))

    def against(name, baseline, kind):
        if name == baseline or baseline not in right:
            return ""
        own, base = (right[n][kind] for n in (name, baseline))
        return difference(own, base[: len(own)])

    def row(name):
        clean, robust = right[name]
        line = {
            "data": task.title,
            "network": task.name,
            "classifier": name,
            "parameters": describe(chosen[name]),
            "seed": 0,
            "test rows": len(clean),
            "clean": share(clean),
            "robust": share(robust),
            **{
                f"{kind} against {baseline}": against(name, baseline, i)
                for baseline in settings["baselines"]
                for i, kind in enumerate(("clean", "robust"))
            },
            "milliseconds a row": f"{1000 * seconds[name]:.1f}",
            "clean / robust in the paper": own.get("paper", {}).get(name, ""),
        }
        print(*list(line.values())[2:-1], flush=True)
        return line

    names = [entry["name"] for entry in own["classifier"]]
    missing = set(settings["baselines"]) & set(names)
    waiting = ["network"]
    for entry in own["classifier"]:
        name, kind = entry["name"], entry["kind"]
        parameters = entry.get("parameters", {})
        if "grid" in entry:
            # What was chosen for another classifier stays.
            base = chosen[entry["base"]] if "base" in entry else {}
            grid = {k: [v] for k, v in base.items()} | entry["grid"]
            parameters = task.tune(kind, grid, pgd)
        n_rows = entry.get("n_test", len(task.X_test))
        answer(name, task.fit(kind, parameters).predict, n_rows)
        chosen[name] = parameters
        waiting.append(name)
        missing -= {name}
        if not missing:
            yield from map(row, waiting)
            waiting = []


if __name__ == "__main__":
    main(__file__, rows_of)
