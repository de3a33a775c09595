"""Search by scikit-learn's indexes, or by an estimator of the user's, one for each class."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from joblib import Parallel, delayed
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from .._validation import as_array
from .base import Affinity
from .geometry import Geometry
from .order import ClassOrder
from .search import Search, Take
from .store import ExampleStore

# Number of neighbours that an index is asked for beyond n_neighbors. Its distances are rounded as
# those of the matrix product, where a neighbour moved by 2 places at most (see ``exact.SLACK``).
SLACK = 6


class EstimatorSearch(Search):
    """Neighbours by exact affinities of what an index of each class finds.

    Parameters
    ----------
    affinity : Affinity
    order : ClassOrder
    store : ExampleStore
    geometry : Geometry
    blank : torch.Tensor of shape (n_samples,), bool
        Examples that are equally similar to everything, and have no place by distance.
    algorithm : {"brute", "kd_tree", "ball_tree"} or estimator with ``kneighbors``
    n_jobs : int or None
        Threads that ask the indexes.

    Raises
    ------
    ValueError
        If scikit-learn's indexes cannot find neighbours by the affinity.
    """

    def __init__(
        self,
        affinity: Affinity,
        order: ClassOrder,
        store: ExampleStore,
        geometry: Geometry,
        blank: Tensor,
        *,
        algorithm: Any,
        n_jobs: int | None,
    ) -> None:
        super().__init__(affinity, order, store, geometry)
        self._algorithm, self._n_jobs = algorithm, n_jobs
        if isinstance(algorithm, str) and not affinity.is_distance:
            raise ValueError(
                f"algorithm={algorithm!r} finds neighbours by a distance, which "
                f"{affinity.parameter} does not give; use algorithm='auto' or an estimator."
            )
        counted = ~blank.cpu().numpy()
        self._members, self._blanks = [], []
        for start, size in zip(order.starts.tolist(), order.sizes, strict=True):
            places = np.arange(start, start + size)
            self._members.append(places[counted[places]])
            self._blanks.append(places[~counted[places]])
        self._indexes: list[Any] | None = self._fit_indexes()

    def _fit_indexes(self) -> list[Any]:
        store, geometry = self.store, self.geometry
        template: Any
        if isinstance(self._algorithm, str):
            template = NearestNeighbors(algorithm=self._algorithm)
            # Whose distances lose digits far from zero.
            examples = ((store.examples - geometry.center) * geometry.unit).cpu().numpy()
        else:
            template = self._algorithm
            examples = (store.examples + store.shift).cpu().numpy()
        return [
            clone(template).fit(examples[members]) if len(members) else None
            for members in self._members
        ]

    def __getstate__(self) -> dict[str, Any]:
        # scikit-learn's own copy the examples, and are fitted again.
        indexes = None if isinstance(self._algorithm, str) else self._indexes
        return super().__getstate__() | {"_indexes": indexes}

    def find(self, queries: Tensor, n_neighbors: int, take: Take) -> tuple[Tensor, Tensor]:
        """Find neighbours, as :meth:`~sklearn_rails.neighbors.search.Search.find` says."""
        places = torch.from_numpy(self._ask_indexes(queries, n_neighbors)).to(queries.device)
        return self.rank(queries, places, n_neighbors, take)

    def _ask_indexes(self, queries: Tensor, n_neighbors: int) -> NDArray[np.int64]:
        if isinstance(self._algorithm, str):
            queries = (queries - self.geometry.origin) * self.geometry.unit
        rows = queries.cpu().numpy()
        if self._indexes is None:
            self._indexes = self._fit_indexes()
        found = Parallel(n_jobs=self._n_jobs, require="sharedmem")(
            delayed(self._ask)(index, members, rows, n_neighbors)
            for index, members in zip(self._indexes, self._members, strict=True)
        )
        blanks = [blanks[:n_neighbors] for blanks in self._blanks]
        width = max(f.shape[1] + len(b) for f, b in zip(found, blanks, strict=True))
        places = np.full((len(rows), len(found), max(width, n_neighbors)), -1)
        for c, (positions, more) in enumerate(zip(found, blanks, strict=True)):
            places[:, c, : positions.shape[1]] = positions
            places[:, c, positions.shape[1] : positions.shape[1] + len(more)] = more
        # A position that is given twice counts once.
        places = np.sort(places, axis=2)
        places[..., 1:][places[..., 1:] == places[..., :-1]] = -1
        return places

    def _ask(
        self, index: Any, members: NDArray[np.int64], rows: NDArray[Any], n_neighbors: int
    ) -> NDArray[np.int64]:
        if index is None:
            return np.full((len(rows), 0), -1)
        k = min(n_neighbors + SLACK, len(members))
        given = index.kneighbors(rows, n_neighbors=k, return_distance=False)
        found = as_array(given, "algorithm")
        if found.shape != (len(rows), k) or found.dtype.kind not in "iu":
            raise ValueError(
                f"algorithm={self._algorithm!r}: kneighbors must give whole numbers of shape "
                f"{(len(rows), k)}, it gave {found.dtype} of shape {found.shape}."
            )
        found = found.astype(np.int64)
        if found.size and not -1 <= found.min() <= found.max() < len(members):
            raise ValueError(
                f"algorithm={self._algorithm!r}: kneighbors must give positions from 0 to "
                f"{len(members) - 1}, or -1 for none, it gave {found.min()} to {found.max()}."
            )
        return np.where(found < 0, -1, members[found])
