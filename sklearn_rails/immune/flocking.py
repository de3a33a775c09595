"""Flocking: the k nearest examples of every class, exactly, ties by index."""

import numpy as np
import torch
from joblib import Parallel, delayed
from sklearn.base import clone
from sklearn.neighbors import NearestNeighbors
from torch.nn.functional import normalize

from .affinity import paired_affinity

# The block of distances, or of differences, that is held at a time: larger ones leave the caches
# and win nothing.
BLOCK_BYTES = 64 * 2**20

# tau="scale" is this share of the spread of a row's flocked neighbours, over so many rows.
TAU_SHARE = 0.2
TAU_ROWS = 256

# Candidates beyond k that are compared exactly: rounding in the matrix product rarely moves a
# neighbour by more places.
SLACK = 6


class ClassNeighbors:
    """The k examples of highest affinity in every class.

    Parameters
    ----------
    affinity : {"euclidean", "cosine", "inner_product"} or callable
        See :func:`~sklearn_rails.immune.affinity.paired_affinity`.
    algorithm : {"auto", "brute", "kd_tree", "ball_tree"} or estimator, default="auto"
        ``"auto"`` is an exact matrix product on the features' device. The other names build one
        :class:`sklearn.neighbors.NearestNeighbors` a class, and an estimator with ``kneighbors``
        is cloned for every class.
    n_jobs : int, default=None
        Threads for the classes' own indexes; the matrix product uses torch's.

    Attributes
    ----------
    n_samples_ : ndarray of shape (n_classes,)
        Examples in each class.
    """

    def __init__(self, affinity="euclidean", algorithm="auto", n_jobs=None):
        self.affinity = affinity
        self.algorithm = algorithm
        self.n_jobs = n_jobs

    def __repr__(self):
        n = int(self.n_samples_.sum())
        return f"ClassNeighbors({n} examples of {len(self.n_samples_)} classes)"

    def fit(self, features, y, n_classes):
        """Sort the examples by class and index them.

        Parameters
        ----------
        features : torch.Tensor of shape (n, n_features)
        y : ndarray of shape (n,)
            Class of each example, as an integer from 0; every class has one.
        n_classes : int

        Returns
        -------
        ClassNeighbors
        """
        # A stable sort: within a class the examples keep their order, and so ties do.
        order = np.argsort(y, kind="stable")
        self.n_samples_ = np.bincount(y, minlength=n_classes)
        self._index = torch.from_numpy(order).to(features.device)
        self._examples = features[self._index]
        if self.affinity == "cosine":
            self._examples = normalize(self._examples, dim=1)
        if callable(self.affinity) or self.affinity == "inner_product":
            self._center = torch.zeros_like(self._examples[0])
        else:
            # Distances do not feel a shift, rounding does.
            self._center = self._examples.mean(dim=0)
        self._bounds = np.concatenate([[0], np.cumsum(self.n_samples_)])
        self._indexes = None if self.algorithm == "auto" else self._build_indexes()
        self._half_norms = (self._examples - self._center).square().sum(dim=1) / 2
        if self.affinity == "inner_product":
            self._half_norms.zero_()
        self._largest = torch.linalg.vector_norm(self._examples, dim=1).max()
        return self

    def _build_indexes(self):
        template = self.algorithm
        if isinstance(template, str):
            if self.affinity not in ("euclidean", "cosine"):
                raise ValueError(
                    f"algorithm={template!r} finds neighbours by a distance, which affinity="
                    f"{self.affinity!r} does not give; use algorithm='auto' or an estimator."
                )
            template = NearestNeighbors(algorithm=template)
        examples = self._examples.cpu().numpy()
        return [
            clone(template).fit(examples[start:stop])
            for start, stop in zip(self._bounds, self._bounds[1:], strict=False)
        ]

    def kneighbors(self, queries, n_neighbors):
        """Find the nearest examples of every class.

        Parameters
        ----------
        queries : torch.Tensor of shape (n, n_features)
        n_neighbors : int
            Neighbours in each class. A class with fewer examples gives all of them.

        Returns
        -------
        affinity : torch.Tensor of shape (n, n_classes, n_neighbors)
            Highest first; minus infinity where a class has no more examples.
        index : torch.Tensor of shape (n, n_classes, n_neighbors), int64
            Position of the examples among those of :meth:`fit`; -1 where there is none.
        """
        self._move_to(queries.device)
        if self.affinity == "cosine":
            queries = normalize(queries, dim=1)
        n_classes = len(self.n_samples_)
        shape = (len(queries), n_classes, n_neighbors)
        affinity = queries.new_full(shape, -torch.inf)
        place = torch.full(shape, -1, dtype=torch.int64, device=queries.device)
        if self._indexes is not None:
            candidates = self._ask_indexes(queries, n_neighbors)
            self._rank(queries, enumerate(candidates), affinity, place)
        else:
            row_bytes = len(self._examples) * queries.element_size()
            step = max(1, BLOCK_BYTES // row_bytes)
            for start in range(0, len(queries), step):
                rows = slice(start, start + step)
                self._search(queries[rows], affinity[rows], place[rows])
        index = torch.where(place < 0, place, self._index[place])
        return affinity, index

    def _ask_indexes(self, queries, n_neighbors):
        rows = queries.cpu().numpy()

        def ask(index, n_samples):
            # More than asked for, so that ties at the border go by index.
            k = min(n_neighbors + SLACK, int(n_samples))
            return index.kneighbors(rows, n_neighbors=k, return_distance=False)

        found = Parallel(n_jobs=self.n_jobs, require="sharedmem")(
            delayed(ask)(index, n) for index, n in zip(self._indexes, self.n_samples_, strict=True)
        )
        return [
            torch.from_numpy(np.sort(places, axis=1) + start).to(queries.device)
            for places, start in zip(found, self._bounds[:-1], strict=True)
        ]

    def _search(self, queries, affinity, place):
        """Fill in the neighbours of one block of queries."""
        n_neighbors = affinity.shape[2]
        if callable(self.affinity):
            scores, error = self._all_affinities(queries), None
        else:
            centered = queries - self._center
            # Minus half the squared distance, but for a constant of each query.
            scores = torch.addmm(-self._half_norms, centered, self._examples.T)
            error = self._rounding_error(centered)
        candidates, unsure = [], []
        for start, stop in zip(self._bounds, self._bounds[1:], strict=False):
            k = min(n_neighbors + SLACK, stop - start)
            top, places = scores[:, start:stop].topk(k, dim=1)
            candidates.append(places.sort(dim=1).values + start)
            if error is not None and k < stop - start:
                # What was left out may stand above the last that is wanted.
                unsure.append(top[:, -1] + error >= top[:, n_neighbors - 1] - error)
            elif k < stop - start:
                unsure.append(top[:, -1] >= top[:, n_neighbors - 1])
        self._rank(queries, enumerate(candidates), affinity, place)
        if unsure:
            for row in torch.stack(unsure).any(dim=0).nonzero()[:, 0].tolist():
                self._search_row(queries[row : row + 1], affinity[row], place[row])

    def _rounding_error(self, centered):
        """Bound what rounding does to a score of the matrix product."""
        norms = torch.linalg.vector_norm(centered, dim=1)
        unit = torch.finfo(centered.dtype).eps
        # A blocked sum of d terms errs by about sqrt(d) units, not by the d of a plain one.
        return 4 * unit * centered.shape[1] ** 0.5 * (norms + self._largest) * self._largest

    def _search_row(self, query, affinity, place):
        """Compare one query with every example, exactly."""
        for c, (start, stop) in enumerate(zip(self._bounds, self._bounds[1:], strict=False)):
            places = torch.arange(start, stop, device=query.device)[None]
            self._rank(query, [(c, places)], affinity[None], place[None])

    def _rank(self, queries, candidates, affinity, place):
        """Order candidates by exact affinity, ties by index, and keep the best.

        ``candidates`` are pairs of a class and of places, which are sorted by index: a stable
        sort settles ties.
        """
        n_neighbors = affinity.shape[2]
        for c, places in candidates:
            exact = self._exact_affinities(queries, places)
            best = exact.sort(dim=1, descending=True, stable=True).indices[:, :n_neighbors]
            affinity[:, c, : best.shape[1]] = exact.gather(1, best)
            place[:, c, : best.shape[1]] = places.gather(1, best)

    def _exact_affinities(self, queries, places):
        exact = queries.new_empty(places.shape)
        row_bytes = places.shape[1] * queries.shape[1] * queries.element_size()
        step = max(1, BLOCK_BYTES // row_bytes)
        for start in range(0, len(queries), step):
            rows = slice(start, start + step)
            exact[rows] = self._compare(queries[rows], self._examples[places[rows]])
        return exact

    def _all_affinities(self, queries):
        every = torch.arange(len(self._examples), device=queries.device)
        return self._exact_affinities(queries, every.expand(len(queries), -1))

    def _compare(self, queries, examples):
        n, k, d = examples.shape
        pairs = queries[:, None].expand(n, k, d).reshape(n * k, d), examples.reshape(n * k, d)
        return paired_affinity(self.affinity, *pairs).reshape(n, k)

    def _move_to(self, device):
        if self._examples.device != device:
            for name, value in vars(self).items():
                if isinstance(value, torch.Tensor):
                    setattr(self, name, value.to(device))

    def __getstate__(self):
        # Plain arrays load where there is no GPU, and joblib can map them from disk.
        return {
            name: value.cpu().numpy() if isinstance(value, torch.Tensor) else value
            for name, value in vars(self).items()
        }

    def __setstate__(self, state):
        arrays = ("_index", "_examples", "_center", "_half_norms", "_largest")
        vars(self).update(state)
        for name in arrays:
            setattr(self, name, torch.from_numpy(np.array(state[name])))


def drop_own(affinity, index, own):
    """Take a row that is an example itself out of its neighbours, or else the last of them.

    Parameters
    ----------
    affinity, index : torch.Tensor of shape (n, n_classes, n_neighbors)
        As :meth:`ClassNeighbors.kneighbors` gives them.
    own : torch.Tensor of shape (n,)
        Each row's own index among the examples.

    Returns
    -------
    affinity, index : torch.Tensor of shape (n, n_classes, n_neighbors - 1)
    """
    dropped = index == own[:, None, None]
    dropped[..., -1] |= ~dropped.any(dim=2)
    # False sorts before True, and stably.
    kept = dropped.to(torch.uint8).sort(dim=2, stable=True).indices[..., :-1]
    return affinity.gather(2, kept), index.gather(2, kept)


def scale_of_affinity(neighbors, features, n_neighbors):
    """Resolve tau="scale": a share of the spread of affinities within a typical flock.

    Parameters
    ----------
    neighbors : ClassNeighbors
    features : torch.Tensor of shape (n, n_features)
        Of the training rows, in their order.
    n_neighbors : int

    Returns
    -------
    float
        Above 0.
    """
    own = torch.linspace(0, len(features) - 1, min(TAU_ROWS, len(features))).long().unique()
    own = own.to(features.device)
    flock = neighbors.kneighbors(features[own], n_neighbors + 1)
    affinity = drop_own(*flock, own)[0].flatten(1).cpu().numpy().astype(np.float64)
    affinity[np.isinf(affinity)] = np.nan
    counted = np.isfinite(affinity).sum(axis=1) > 1
    spread = np.nanstd(affinity[counted], axis=1)
    spread = spread[spread > 0]
    # Where all affinities are alike, selection is a fair draw at any temperature.
    return TAU_SHARE * float(np.median(spread)) if len(spread) else 1.0
