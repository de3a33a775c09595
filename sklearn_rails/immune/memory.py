"""Memory: remembered cells, how many there may be, and which of them go."""

import numpy as np


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
    >>> bank.with_cells(np.float32([[1], [2], [3]]), np.array([0, 0, 0])).cells.ravel()
    array([2., 3.], dtype=float32)
    """

    def __init__(self, capacity: int, n_classes: int, cell_shape: tuple[int, ...]) -> None:
        self.capacity = capacity
        self.n_classes = n_classes
        self.cells = np.zeros((0, *cell_shape), dtype=np.float32)
        self.labels = np.zeros(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"MemoryBank({len(self)} cells, capacity {self.capacity})"

    def with_cells(self, cells: np.ndarray, labels: np.ndarray) -> "MemoryBank":
        """Give a bank with more cells; this one stays as it is.

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

    def with_classes(self, n_classes: int, places: np.ndarray) -> "MemoryBank":
        """Give the bank of an estimator that has learned of more classes.

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
