"""The layer that ``layers="auto"`` chooses, and every other: ``python layers.py mnist``.

RAILS is fitted in each layer that the choice compares. Clean accuracy, and accuracy under the
paper's PGD on the network, are those of validation images, which neither the network nor the choice
has seen. The goal: the mean of both accuracies is within 2 points of the best layer's.
"""

import time

from common import difference, main, share
from train import attack


def rows_of(task, settings):
    parameters = settings["parameters"]
    X, y = task.X_validation, task.y_validation
    sets = X, attack(task.name, task.network, X, y)

    def measure(layer):
        fitted, seconds = fit(task, parameters | {"layers": layer})
        return [fitted.predict(samples) == y for samples in sets], seconds

    auto, seconds_with_choice = fit(task, parameters | {"layers": "auto"})
    (chosen,) = auto.layers_
    measured = {chosen: measure(chosen)}
    (chosen_clean, chosen_attacked), _ = measured[chosen]
    for layer, scores in auto.layer_scores_.items():
        (clean, attacked), seconds = measured.get(layer) or measure(layer)
        mean = (clean + attacked.astype(float)) / 2
        line = {
            "data": task.title,
            "network": task.name,
            "layer": layer,
            "chosen": layer == chosen,
            "score of the choice": f"{100 * scores.mean():.1f}",
            "seed": 0,
            "validation rows": len(y),
            "clean": share(clean),
            "attacked": share(attacked),
            "mean": f"{100 * mean.mean():.1f}",
            "mean against the chosen": difference(mean, (chosen_clean + 1.0 * chosen_attacked) / 2),
            "CPU seconds of fit": f"{seconds:.1f}",
            "CPU seconds of fit with choice": f"{seconds_with_choice:.1f}",
        }
        print(*list(line.values())[1:], flush=True)
        yield line


def fit(task, parameters):
    """Fit RAILS, and take the time of the processor, which other processes do not change."""
    start = time.process_time()
    fitted = task.fit("RAILS", parameters)
    return fitted, time.process_time() - start


if __name__ == "__main__":
    main(__file__, rows_of)
