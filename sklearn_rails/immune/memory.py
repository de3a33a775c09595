"""Memory: remembered cells, how many there may be, and which of them go."""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .response import ImmuneResponse


class MemoryBank:
    """The remembered cells of one layer, with room for the same number of each class.

    Where a class has more than its share of the capacity, the cells that were remembered longest
    ago go first; a cell that is remembered again counts as new. So nobody can crowd other classes
    out, or hold more than one class's share by feeding answers of that class.

    Parameters
    ----------
    capacity : int
        Cells at most; each class has an equal share, rounded down.
    n_classes : int
        Number of classes.
    cell_shape : tuple of int
        Shape of one cell.

    Attributes
    ----------
    cells : ndarray of shape (n_cells, *cell_shape)
        The longest remembered first.
    labels : ndarray of shape (n_cells,), int64
        Their classes, as integers from 0.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn_rails.immune import MemoryBank
    >>> bank = MemoryBank(capacity=4, n_classes=2, cell_shape=(1,))
    >>> cells, labels = np.float32([[1], [2], [3]]), np.array([0, 0, 0])
    >>> bank.with_cells(cells, labels).cells.ravel()
    array([2., 3.], dtype=float32)
    """

    def __init__(self, capacity: int, n_classes: int, cell_shape: tuple[int, ...]) -> None:
        self.capacity = capacity
        self.n_classes = n_classes
        self.cells: NDArray[Any] = np.zeros((0, *cell_shape), dtype=np.float32)
        self.labels: NDArray[Any] = np.zeros(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"MemoryBank({len(self)} cells, capacity {self.capacity})"

    def with_cells(self, cells: NDArray[Any], labels: NDArray[Any]) -> MemoryBank:
        """Return a bank with more cells; this one stays as it is.

        Parameters
        ----------
        cells : ndarray of shape (n, *cell_shape)
            The newest last.
        labels : ndarray of shape (n,)
            Their classes, as integers from 0.

        Returns
        -------
        MemoryBank
            With the cells of this one, but for those that had to go.
        """
        bank = MemoryBank(self.capacity, self.n_classes, cells.shape[1:])
        cells = np.concatenate([self.cells.astype(cells.dtype), cells])
        labels = np.concatenate([self.labels, labels])
        # Of cells that are alike the last place stays.
        last = {(cells[i].tobytes(), labels[i]): i for i in range(len(cells))}
        kept = np.sort(np.fromiter(last.values(), np.int64, len(last)))
        share = self.capacity // self.n_classes
        kept = np.sort(
            np.concatenate([kept[labels[kept] == c][-share:] for c in range(self.n_classes)])
        )
        bank.cells, bank.labels = cells[kept], labels[kept]
        return bank

    def emptied(self) -> MemoryBank:
        """Return a bank of the same size without cells.

        Returns
        -------
        MemoryBank
            This one stays as it is.
        """
        return MemoryBank(self.capacity, self.n_classes, self.cells.shape[1:])

    def with_classes(self, n_classes: int, places: NDArray[Any]) -> MemoryBank:
        """Return the bank of an estimator that has learned of more classes.

        Parameters
        ----------
        n_classes : int
            How many there are now.
        places : ndarray of shape (self.n_classes,)
            What each class is now.

        Returns
        -------
        MemoryBank
            Without the oldest cells, where the shares have become smaller.
        """
        bank = MemoryBank(self.capacity, n_classes, self.cells.shape[1:])
        return bank.with_cells(self.cells, places[self.labels])


def select_memories(
    memory: dict[str, MemoryBank],
    response: ImmuneResponse,
    classes: NDArray[Any],
    y: NDArray[Any] | None,
    confidence: float,
) -> dict[str, MemoryBank]:
    """Add the memory cells of a response to what is remembered.

    Of each sample those cells are kept that are of the class that was predicted, if the plasma
    agreed on it; or, if its class is given, those that are of this class. Samples that were not
    bred leave nothing to remember.

    Parameters
    ----------
    memory : dict of str to MemoryBank
    response : ImmuneResponse
    classes : ndarray of shape (n_classes,)
        The class labels.
    y : ndarray of shape (n,) or None
        The true classes of the samples.
    confidence : float
        Share of the plasma, over all layers, that must be of the predicted class, without ``y``.

    Returns
    -------
    dict of str to MemoryBank

    Raises
    ------
    TypeError, ValueError
        If the response is none, or one of an estimator with other layers, classes or cells.
    """
    if not isinstance(response, ImmuneResponse):
        raise TypeError(f"response must be what respond returned, got {type(response).__name__}.")
    if not isinstance(confidence, Real) or not 0 <= confidence <= 1:
        raise ValueError(f"confidence={confidence!r} must be between 0 and 1.")
    shape = next(iter(memory.values())).cells.shape[1:]
    fits = set(response.memory) == set(memory) and all(
        response.memory[layer].shape[2:] == shape
        and np.isin(response.memory_labels[layer], classes).all()
        for layer in memory
    )
    if not fits:
        raise ValueError(
            "response is that of another estimator: its memory cells must be of the layers "
            f"{list(memory)}, of shape {shape} and of the classes that were fitted."
        )
    if y is None:
        plasma = np.concatenate(list(response.plasma_labels.values()), axis=1)
        agreed = (plasma == response.labels[:, None]).mean(axis=1)
        wanted, kept = response.labels, agreed >= confidence
    else:
        wanted, kept = y, np.ones(len(y), dtype=bool)
    places = np.searchsorted(classes, wanted)
    updated = {}
    for layer, bank in memory.items():
        # The best cells count as the newest of a sample.
        cells = response.memory[layer][:, ::-1]
        labels = np.searchsorted(classes, response.memory_labels[layer][:, ::-1])
        # What was not bred is a copy of training samples.
        bred = kept & (response.n_generations[layer] >= 0)
        chosen = (labels == places[:, None]) & bred[:, None]
        updated[layer] = bank.with_cells(cells[chosen], labels[chosen])
    return updated
