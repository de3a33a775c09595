"""What one immune response produced."""

from dataclasses import dataclass, fields

import numpy as np


@dataclass(frozen=True, repr=False)
class ImmuneResponse:
    """Everything that :meth:`RAILSClassifier.respond` finds out about some rows.

    Dictionaries have the names of the layers as keys, and arrays a leading axis of length n.

    Attributes
    ----------
    proba : ndarray of shape (n, n_classes)
        As ``predict_proba`` gives it.
    labels : ndarray of shape (n,)
        The predicted classes.
    plasma, memory : dict of str to ndarray of shape (n, n_plasma or n_memory, *cell_shape)
        The fittest cells, the best first, in the space that populations live in (the input, or
        the output of ``start_layer``).
    plasma_labels, memory_labels : dict of str to ndarray of shape (n, n_plasma or n_memory)
        Their classes.
    plasma_affinity, memory_affinity : dict of str to ndarray of shape (n, n_plasma or n_memory)
        Their affinities.
    affinity_curve : dict of str to ndarray of shape (n, generations + 1)
        Mean affinity of the population in each generation, 0 being the expansion; NaN after a row
        has stopped early.
    class_curve : dict of str to ndarray of shape (n, generations + 1, n_classes)
        Each class's share of the population; NaN after a row has stopped early.
    n_generations : dict of str to ndarray of shape (n,)
        The last generation that was bred.
    n_forward : int
        Cells that were pushed through the network, over all rows, layers and generations.
    p_values : ndarray of shape (n,) or None
        The p-values that the neighbours give to the network's own labels, with ``arbitration``.
        Where it is above that, the label stands: ``labels`` and ``proba`` are the network's, and
        the rest shows how the vote would have gone.
    threat : ndarray of shape (n,) or None
        The threat scores, if the classifier has a ``threat_scorer``; higher is more suspect.
    """

    proba: np.ndarray
    labels: np.ndarray
    plasma: dict
    plasma_labels: dict
    plasma_affinity: dict
    memory: dict
    memory_labels: dict
    memory_affinity: dict
    affinity_curve: dict
    class_curve: dict
    n_generations: dict
    n_forward: int
    p_values: np.ndarray | None
    threat: np.ndarray | None

    def __repr__(self):
        return (
            f"ImmuneResponse({len(self.labels)} rows, layers {list(self.n_generations)}, "
            f"{self.n_forward:,} cells through the network)"
        )


# What a response holds for each layer.
LAYER_FIELDS = tuple(f.name for f in fields(ImmuneResponse) if f.type is dict)


def join_responses(parts):
    """Join the responses of consecutive blocks of rows.

    Parameters
    ----------
    parts : list of ImmuneResponse

    Returns
    -------
    ImmuneResponse
    """

    def join(values):
        if isinstance(values[0], dict):
            return {name: join([value[name] for value in values]) for name in values[0]}
        if isinstance(values[0], np.ndarray):
            return np.concatenate(values)
        return sum(values) if values[0] is not None else None

    return ImmuneResponse(
        **{f.name: join([getattr(part, f.name) for part in parts]) for f in fields(ImmuneResponse)}
    )
