"""What one immune response produced."""

from dataclasses import dataclass, fields
from typing import Any

from numpy.typing import NDArray


@dataclass(frozen=True, repr=False)
class ImmuneResponse:
    """Everything that :meth:`RAILSClassifier.respond` produced for some samples.

    Dictionaries have the names of the layers as keys, and arrays a leading axis of length n.

    Attributes
    ----------
    proba : ndarray of shape (n, n_classes)
        As ``predict_proba`` returns it.
    labels : ndarray of shape (n,)
        The predicted classes.
    plasma, memory : dict of str to ndarray of shape (n, n_plasma or n_memory, *cell_shape)
        The fittest cells, the best first, in the space that populations live in (the input, or
        the output of ``start_layer``). Of a sample that was not bred, the nearest training samples.
    plasma_labels, memory_labels : dict of str to ndarray of shape (n, n_plasma or n_memory)
        Their classes.
    plasma_affinity, memory_affinity : dict of str to ndarray of shape (n, n_plasma or n_memory)
        Their affinities.
    affinity_curve : dict of str to ndarray of shape (n, generations + 1)
        Mean affinity of the population in each generation, 0 being the expansion; NaN after
        breeding has stopped early. Of a sample that was not bred, the first value is that of the
        nearest training samples.
    class_curve : dict of str to ndarray of shape (n, generations + 1, n_classes)
        Each class's share of the population; NaN likewise.
    n_generations : dict of str to ndarray of shape (n,)
        The last generation that was bred: 0 is the expansion, -1 says that the flock has settled
        the vote and nothing was bred.
    n_forward : int
        Number of cells that were passed through the network, over all samples, layers and
        generations.
    p_values : ndarray of shape (n,) or None
        The p-values that the neighbours give to the network's predictions, if the gate is an
        :class:`Arbitration`. Where one is above ``alpha``, ``labels`` and ``proba`` are the
        network's, and the rest shows how the vote would have gone.
    threat : ndarray of shape (n,) or None
        The threat scores, if the classifier has a ``threat_scorer``; higher is more suspect.
    """

    proba: NDArray[Any]
    labels: NDArray[Any]
    plasma: dict[str, NDArray[Any]]
    plasma_labels: dict[str, NDArray[Any]]
    plasma_affinity: dict[str, NDArray[Any]]
    memory: dict[str, NDArray[Any]]
    memory_labels: dict[str, NDArray[Any]]
    memory_affinity: dict[str, NDArray[Any]]
    affinity_curve: dict[str, NDArray[Any]]
    class_curve: dict[str, NDArray[Any]]
    n_generations: dict[str, NDArray[Any]]
    n_forward: int
    p_values: NDArray[Any] | None
    threat: NDArray[Any] | None

    def __repr__(self) -> str:
        return (
            f"ImmuneResponse({len(self.labels)} samples, layers {list(self.n_generations)}, "
            f"{self.n_forward:,} cells through the network)"
        )


# What a response holds for each layer.
LAYER_FIELDS = tuple(f.name for f in fields(ImmuneResponse) if str(f.type).startswith("dict"))
