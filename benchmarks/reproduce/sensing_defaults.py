"""``ThreatScorer()`` with all its defaults: ``python sensing_defaults.py mnist``.

It is fitted on training images, as within RAILS, and on validation images, which the network has
not seen. The goal on MNIST: 95 % of the test images that PGD fools the network with are flagged, at
false alarms on 5 % of the clean ones.
"""

import time

from common import main, predict_network, share
from train import attack

from sklearn_rails import ThreatScorer


def rows_of(task, settings):
    attacked = attack(task.name, task.network, task.X_test, task.y_test)
    fooled = attacked[predict_network(task.network, attacked) != task.y_test]
    fits = {
        "training": (task.X, task.y),
        "validation": (task.X_validation, task.y_validation),
    }
    for kind, (X, y) in fits.items():
        start = time.process_time()
        scorer = ThreatScorer(task.network, random_state=0).fit(X, y)
        seconds = time.process_time() - start
        start = time.process_time()
        flagged_clean = scorer.predict(task.every_X_test) == -1
        milliseconds = 1000 * (time.process_time() - start) / len(flagged_clean)
        line = {
            "data": task.title,
            "network": task.name,
            "fitted on": kind,
            "rows of fit": len(X),
            "methods": " ".join(scorer.methods_),
            "layers": " ".join(scorer.layers_),
            "alpha": scorer.alpha,
            "seed": 0,
            "fooled rows": len(fooled),
            "clean rows": len(flagged_clean),
            "fooled rows flagged": share(scorer.predict(fooled) == -1),
            "clean rows flagged": share(flagged_clean),
            "CPU seconds of fit": f"{seconds:.1f}",
            "CPU milliseconds of a row": f"{milliseconds:.2f}",
        }
        print(*list(line.values())[1:], flush=True)
        yield line


if __name__ == "__main__":
    main(__file__, rows_of)
