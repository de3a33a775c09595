"""The nearest examples of every class, exactly, ties by index."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from numbers import Integral
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._compat import HasMethods, Interval, StrOptions, validate_parameter_constraints
from .._conformal import sample_rows
from .._validation import as_array, is_dense
from .affinity import Euclidean, resolve_affinity
from .base import ProductAffinity
from .estimators import EstimatorSearch
from .exact import AllPairsSearch, ProductSearch, UnitLengthSearch, product_is_exact
from .order import ClassOrder
from .search import Recompute, Search, measure_geometry
from .sketch import make_sketch
from .store import BLOCK_BYTES, TYPICAL_ROWS, ExactNeighbors, ExampleStore

# Sizes of tensors, and numbers of threads, beyond this overflow before memory runs out.
LARGEST_SIZE = 2**31 - 1

N_JOBS_CONSTRAINT = [None, Interval(Integral, -LARGEST_SIZE, LARGEST_SIZE, closed="both")]

ALGORITHM_CONSTRAINT = [
    StrOptions({"auto", "brute", "kd_tree", "ball_tree"}),
    ExactNeighbors,
    HasMethods(["fit", "kneighbors"]),
]


class ClassNeighbors:
    """The k examples of highest affinity in every class.

    Parameters
    ----------
    affinity : {"euclidean", "cosine", "inner_product"}, callable or Affinity, default="euclidean"
        See :func:`~sklearn_rails.neighbors.resolve_affinity`.
    algorithm : {"auto", "brute", "kd_tree", "ball_tree"} or estimator, default="auto"
        How neighbours are found. ``"auto"`` is an exact matrix product on the features' device,
        :class:`~sklearn_rails.neighbors.ExactNeighbors`, which also sets where examples are kept.
        The other names build one :class:`sklearn.neighbors.NearestNeighbors` for each class, and
        an estimator with ``kneighbors`` is cloned for every class. Where it finds fewer neighbours
        than it is asked for, it may fill up with -1.
    n_jobs : int, default=None
        Number of threads for the classes' own indexes; the matrix product uses torch's.

    Attributes
    ----------
    affinity : Affinity
    store : ExampleStore
        The examples as they are kept.
    n_samples_ : ndarray of shape (n_classes,)
        Number of examples in each class.

    Notes
    -----
    Candidates are found by a matrix product whose rounding error is bounded; affinities of all
    that could be among the neighbours are then computed one by one. On a CPU, from 512 features
    on, products with the examples' principal components may bound the scores of most examples
    closely enough to rule them out: :meth:`fit` measures on a sample whether that saves time. The
    product compares differences from a centre: features that are far from zero are stored as
    differences from a constant, where no example loses a bit by that. Queries for which the
    product overflows are compared with every example one by one, as are all queries by an affinity
    that no product approximates.

    Examples
    --------
    >>> import numpy as np, torch
    >>> from sklearn_rails.neighbors import ClassNeighbors
    >>> features = torch.tensor([[0.0], [1.0], [2.0], [5.0]])
    >>> labels = np.array([0, 1, 0, 1])
    >>> neighbors = ClassNeighbors().fit(features, labels, n_classes=2)
    >>> query = torch.tensor([[1.5]])
    >>> affinity, index = neighbors.kneighbors(query, n_neighbors=2)
    >>> affinity.tolist(), index.tolist()
    ([[[-0.5, -1.5], [-0.5, -3.5]]], [[[2, 0], [1, 3]]])
    """

    store: ExampleStore
    n_samples_: NDArray[np.int64]
    _search: Search

    def __init__(
        self, affinity: Any = "euclidean", algorithm: Any = "auto", n_jobs: int | None = None
    ) -> None:
        validate_parameter_constraints(
            {"algorithm": ALGORITHM_CONSTRAINT, "n_jobs": N_JOBS_CONSTRAINT},
            {"algorithm": algorithm, "n_jobs": n_jobs},
            caller_name="ClassNeighbors",
        )
        self.affinity = resolve_affinity(affinity)
        self.algorithm = algorithm
        self.n_jobs = n_jobs

    def __repr__(self) -> str:
        n = int(self.n_samples_.sum())
        return f"ClassNeighbors({n} examples of {len(self.n_samples_)} classes)"

    def fit(self, features: Tensor, y: NDArray[np.integer], n_classes: int) -> ClassNeighbors:
        """Sort the examples by class and index them.

        Parameters
        ----------
        features : torch.Tensor of shape (n, n_features)
            Finite.
        y : ndarray of shape (n,)
            Class of each example, as an integer from 0. A class may have none.
        n_classes : int
            Number of classes.

        Returns
        -------
        ClassNeighbors
            Itself.

        Raises
        ------
        ValueError
            If features are not finite, or as :meth:`start` and :meth:`build` raise it.
        """
        _check_features(features, "features")
        self.start(y, n_classes)
        if len(y) != len(features):
            raise ValueError(f"y has {len(y)} labels, but features has {len(features)} rows.")
        # Of all examples, which the first block need not be typical of.
        sample = features[sample_rows(len(features), TYPICAL_ROWS, rng=0)]
        self._allocate(self.affinity.prepare(sample))
        # What is computed on the way takes as much memory as a block, not as all features.
        step = max(1, BLOCK_BYTES // max(1, features[:1].nbytes))
        for first in range(0, len(features), step):
            rows = slice(first, min(first + step, len(features)))
            self.add(rows, features[rows])
        return self.build()

    def start(self, y: NDArray[np.integer], n_classes: int) -> ClassNeighbors:
        """Prepare for examples that come in blocks.

        Parameters
        ----------
        y : ndarray of shape (n,)
            Class of each example, as an integer from 0. A class may have none.
        n_classes : int
            Number of classes.

        Returns
        -------
        ClassNeighbors
            Itself.

        Raises
        ------
        ValueError
            If the storage is unknown, or does not go with the affinity.
        """
        n_classes = _check_count(n_classes, "n_classes")
        if n_classes > LARGEST_SIZE:
            raise ValueError(f"n_classes={n_classes} must be at most {LARGEST_SIZE}.")
        y = as_array(y, "y")
        is_valid = y.ndim == 1 and y.dtype.kind in "iu"
        if not is_valid or (len(y) and not 0 <= y.min() <= y.max() < n_classes):
            raise ValueError(
                f"y must hold integers from 0 to {n_classes - 1} for {n_classes=}, in one "
                f"dimension, got shape {y.shape} of {y.dtype}."
            )
        is_exact = isinstance(self.algorithm, ExactNeighbors)
        exact = self.algorithm if is_exact else ExactNeighbors()
        self.store = exact.make_store(self.affinity)
        self._order = ClassOrder(y, n_classes)
        self.n_samples_ = np.array(self._order.sizes)
        return self

    def add(self, rows: slice, features: Tensor) -> ClassNeighbors:
        """Store the features of some examples.

        Parameters
        ----------
        rows : slice
            Their positions among all.
        features : torch.Tensor of shape (n, n_features)
            Finite.

        Returns
        -------
        ClassNeighbors
            Itself.

        Raises
        ------
        OSError
            If the disk of the storage's folder has not enough space.
        """
        self._add_prepared(rows, self.affinity.prepare(features))
        return self

    def add_index(self, other: ClassNeighbors) -> ClassNeighbors:
        """Store all examples of another index, as the first of these.

        Parameters
        ----------
        other : ClassNeighbors
            An index by the same affinity that keeps examples in full precision.

        Returns
        -------
        ClassNeighbors
            Itself.

        Raises
        ------
        OSError
            If the disk of the storage's folder has not enough space.
        """
        step = max(1, BLOCK_BYTES // other.store.examples[0].nbytes)
        for start in range(0, len(other.index), step):
            members = slice(start, start + step)
            self._add_prepared(other.index[members].cpu(), other.store.read(members))
        return self

    def _add_prepared(self, rows: slice | Tensor, features: Tensor) -> None:
        if self.store.is_empty:
            self._allocate(features)
        places = self._order.inverse()[rows].to(features.device)
        self._blank[places] = self.affinity.find_blank(features)
        self.store.add(places, features)

    def _allocate(self, sample: Tensor) -> None:
        n_samples = len(self._order.index)
        self._blank = torch.zeros(n_samples, dtype=torch.bool, device=sample.device)
        self.store.allocate(n_samples, sample)

    def build(self) -> ClassNeighbors:
        """Index the examples that were added.

        Returns
        -------
        ClassNeighbors
            Itself.

        Raises
        ------
        ValueError
            If features are not finite, or the algorithm needs a distance that the affinity does
            not give.
        """
        geometry, norms = measure_geometry(self.store, self.affinity)
        self._order.move_to(self.store.shift.device)
        parts = self.affinity, self._order, self.store, geometry
        if self.algorithm != "auto" and not isinstance(self.algorithm, ExactNeighbors):
            self._search = EstimatorSearch(
                *parts, self._blank, algorithm=self.algorithm, n_jobs=self.n_jobs
            )
        elif isinstance(self.affinity, ProductAffinity):
            offsets = self.affinity.offsets(norms, geometry, self._blank)
            search = ProductSearch(self.affinity, *parts[1:], offsets)
            if self.affinity.bounds_own_rounding and product_is_exact(norms):
                with torch.autocast(norms.device.type, enabled=False):
                    search.sketch = make_sketch(self.store, geometry, self._order)
            self._search = search
        else:
            self._search = AllPairsSearch(*parts)
        del self._blank
        return self

    @torch.no_grad()  # an affinity may have parameters of its own
    def kneighbors(
        self, queries: Tensor, n_neighbors: int, recompute: Recompute | None = None
    ) -> tuple[Tensor, Tensor]:
        """Find the nearest examples of every class.

        Parameters
        ----------
        queries : torch.Tensor of shape (n, n_features)
            Finite.
        n_neighbors : int
            Maximum number of neighbours in each class; clipped to the size of the largest class.
        recompute : callable, default=None
            Required where :attr:`needs_recompute`: ``recompute(index)`` returns the features
            (m, n_features) of examples in full precision, for their positions (m,) among those of
            :meth:`fit`.

        Returns
        -------
        affinity : torch.Tensor of shape (n, n_classes, n_neighbors)
            Highest first; minus infinity where a class has no more examples.
        index : torch.Tensor of shape (n, n_classes, n_neighbors), int64
            Position of the examples among those of :meth:`fit`; -1 where there is none.

        Raises
        ------
        ValueError
            If an affinity is NaN or cannot be represented, or an index gives no valid positions.
        """
        _check_features(queries, "queries")
        if queries.shape[1] != self.store.examples.shape[1]:
            raise ValueError(
                f"queries has {queries.shape[1]} features, but the examples have "
                f"{self.store.examples.shape[1]}."
            )
        n_neighbors = _check_count(n_neighbors, "n_neighbors")
        if self.needs_recompute and recompute is None:
            raise ValueError(
                "storage='float16' keeps no example in full precision: give recompute."
            )
        search = self._search
        search.move_to(queries.device)
        queries = search.prepare(queries)
        take = search.reader(queries, recompute)
        n_neighbors = min(n_neighbors, max(1, *self._order.sizes))
        # The caller's autocast would compute products in half precision.
        kind = queries.device.type
        is_cast = kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)
        with torch.autocast(kind, enabled=False) if is_cast else nullcontext():
            affinity, places = search.find(queries, n_neighbors, take)
            return affinity, self._order.index[places].masked_fill_(places < 0, -1)

    @property
    def needs_recompute(self) -> bool:
        """Whether :meth:`kneighbors` needs ``recompute``, since examples are in half precision."""
        return self.store.needs_recompute

    @property
    def is_default(self) -> bool:
        """Whether distances are Euclidean, and examples exact, wherever they are kept."""
        is_exact = self.algorithm == "auto" or isinstance(self.algorithm, ExactNeighbors)
        return type(self.affinity) is Euclidean and is_exact and not self.needs_recompute

    @property
    def index(self) -> Tensor:
        """Positions of the examples among those of :meth:`fit`, class after class."""
        return self._order.index

    def move_to(self, device: torch.device) -> None:
        """Move to a device.

        Parameters
        ----------
        device : torch.device
            Where queries will be.
        """
        self._search.move_to(device)

    def holds(self, features: Tensor) -> bool:
        """Check whether the examples are kept in memory as they were given.

        Parameters
        ----------
        features : torch.Tensor of shape (n_samples, n_features)
            All examples of :meth:`fit`.

        Returns
        -------
        bool
            False also where they are in a file, or rounded.
        """
        store = self.store
        if store.folder is not None or store.examples.shape != features.shape:
            return False
        step = max(1, BLOCK_BYTES // features[0].nbytes)
        blocks = torch.arange(len(features), device=self.index.device).split(step)
        return all(
            torch.equal(self.take(block), features[block[0] : block[-1] + 1]) for block in blocks
        )

    def pooled(self, device: torch.device, lengths: Tensor | None = None) -> ClassNeighbors:
        """Return the same examples as a single class.

        Parameters
        ----------
        device : torch.device
            Of the queries.
        lengths : torch.Tensor of shape (n_samples,), default=None
            Norms of the examples, in the order of :attr:`index`, infinite for vectors of zeros:
            both they and the queries are then divided by their norms. Only for the Euclidean
            affinity in full precision.

        Returns
        -------
        ClassNeighbors
            That shares memory with this one. Ties go by index.
        """
        self.move_to(device)
        view = copy.copy(self)
        view.n_samples_ = np.array([len(self.index)])
        view._order = self._order.pooled()
        if lengths is not None:
            assert isinstance(self._search, ProductSearch)
            view._search = UnitLengthSearch(self._search, view._order, lengths)
        else:
            view._search = copy.copy(self._search)
            view._search.order = view._order
        return view

    def on_disk(self) -> ClassNeighbors:
        """Return the same neighbours with the examples in a temporary file, if there is room.

        Returns
        -------
        ClassNeighbors
            This one where the examples are not its own to move (``algorithm`` other than
            :class:`ExactNeighbors`), or the disk is full.
        """
        if isinstance(self._search, EstimatorSearch):
            return self
        try:
            store = self.store.on_disk()
        except OSError:
            return self
        view = copy.copy(self)
        view.store = store
        view._search = copy.copy(self._search)
        view._search.store = store
        return view

    def take(self, index: Tensor) -> Tensor:
        """Return examples as they are prepared for comparison.

        Parameters
        ----------
        index : torch.Tensor of shape (n,), int64
            Their positions among those of :meth:`fit`.

        Returns
        -------
        torch.Tensor of shape (n, n_features)
            A copy, in full precision unless :attr:`needs_recompute`.
        """
        return self.store.take(self._order.inverse()[index], self.store.shift)

    def examples_of(self, c: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the examples of a class, as they are prepared for comparison.

        Parameters
        ----------
        c : int
            The class.
        device : torch.device
            Where they are needed; a temporary file stays where it is.

        Returns
        -------
        features : torch.Tensor of shape (n, n_features)
            In full precision, unless :attr:`needs_recompute`.
        index : torch.Tensor of shape (n,), int64
            Their positions among those of :meth:`fit`.
        """
        self.move_to(device)
        start = int(self._order.starts[c])
        members = slice(start, start + self._order.sizes[c])
        return self.store.read(members), self.index[members]


def merge_flocks(
    flock: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], n_neighbors: int
) -> tuple[Tensor, Tensor]:
    """Return the nearest of two sets of neighbours.

    Parameters
    ----------
    flock, other : pair of torch.Tensor of shape (n, n_classes, n_found)
        Affinities, highest first, and positions, as :meth:`ClassNeighbors.kneighbors` returns
        them.
    n_neighbors : int
        At most the number in both sets together.

    Returns
    -------
    affinity, index : torch.Tensor of shape (n, n_classes, n_neighbors)
        Ties go to the first set.
    """
    affinity, index = (torch.cat(parts, dim=2) for parts in zip(flock, other, strict=True))
    ranking = affinity.sort(dim=2, descending=True, stable=True)
    best = ranking.indices[..., :n_neighbors]
    return ranking.values[..., :n_neighbors], index.gather(2, best)


def _check_count(value: Any, name: str) -> int:
    if not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name}={value!r} must be a positive integer.")
    return int(value)


def _check_features(features: Any, name: str) -> None:
    is_usable = is_dense(features) and features.is_floating_point()
    if not (is_usable and features.ndim == 2):
        got = tuple(features.shape) if is_usable else type(features).__name__
        raise TypeError(
            f"{name} must be a torch.Tensor of floats of shape (n, n_features), got {got}."
        )
