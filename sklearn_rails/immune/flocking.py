"""Flocking: the k nearest examples of every class, exactly, ties by index."""

import numpy as np
import torch
from joblib import Parallel, delayed
from sklearn.base import clone
from sklearn.neighbors import NearestNeighbors
from torch.nn.functional import normalize, pad

from .affinity import affinity_to

# On a CPU examples are compared in pieces of so many bytes, which stay in the caches.
CACHE_BYTES = 2**20

# The block of distances that is held at a time.
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
        See :func:`~sklearn_rails.immune.affinity.affinity_to`.
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
        self._sizes = self.n_samples_.tolist()
        self._starts = torch.tensor([0, *np.cumsum(self._sizes[:-1])], device=features.device)
        self._indexes = None if self.algorithm == "auto" else self._build_indexes()
        self._offsets = (self._examples - self._center).square().sum(dim=1) / -2
        if self.affinity == "inner_product":
            self._offsets.zero_()
        self._largest = float(torch.linalg.vector_norm(self._examples, dim=1).max())
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
        bounds = np.cumsum(self._sizes)[:-1]
        return [clone(template).fit(members) for members in np.split(examples, bounds)]

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
        if self._indexes is not None:
            places = self._ask_indexes(queries, n_neighbors + SLACK)
            affinity, places = self._rank(queries, places, n_neighbors)
        else:
            step = max(1, BLOCK_BYTES // (len(self._examples) * queries.element_size()))
            blocks = [self._search(block, n_neighbors) for block in queries.split(step)]
            affinity, places = (torch.cat(parts) for parts in zip(*blocks, strict=True))
        return affinity, torch.where(places < 0, places, self._index[places])

    def _ask_indexes(self, queries, n_candidates):
        rows = queries.cpu().numpy()

        def ask(index, n_samples):
            k = min(n_candidates, int(n_samples))
            return index.kneighbors(rows, n_neighbors=k, return_distance=False)

        found = Parallel(n_jobs=self.n_jobs, require="sharedmem")(
            delayed(ask)(index, n) for index, n in zip(self._indexes, self.n_samples_, strict=True)
        )
        places = torch.full((len(rows), len(found), n_candidates), -1)
        for c, start in enumerate(self._starts.tolist()):
            places[:, c, : found[c].shape[1]] = torch.from_numpy(found[c] + start)
        return places.to(queries.device)

    def _search(self, queries, n_neighbors):
        """Find the neighbours of one block of queries."""
        n_candidates = n_neighbors + SLACK
        if callable(self.affinity):
            scores, error = self._all_affinities(queries), 0
        else:
            centered = queries - self._center
            # Minus half the squared distance, but for a constant of each query.
            scores = torch.addmm(self._offsets, centered, self._examples.T)
            error = self._rounding_error(centered)[:, None, None]
        best = []
        for members in scores.split(self._sizes, dim=1):
            k = min(n_candidates, members.shape[1])
            values, found = members.topk(k, dim=1)
            if k < n_candidates:
                values = pad(values, (0, n_candidates - k), value=-torch.inf)
                found = pad(found, (0, n_candidates - k))
            best.append((values, found))
        top, places = (torch.stack(parts, dim=1) for parts in zip(*best, strict=True))
        places += self._starts[:, None]
        if min(self._sizes) < n_candidates:
            places.masked_fill_(top == -torch.inf, -1)
        # What rounding may have put behind the last that is wanted, or before it.
        wanted = top[..., n_neighbors - 1 : n_neighbors]
        contends = top >= (wanted - 2 * error).clamp_(min=torch.finfo(top.dtype).min)
        n_contenders = max(n_neighbors, int(contends.sum(dim=2).max()))
        affinity, ranked = self._rank(queries, places[..., :n_contenders], n_neighbors)
        if n_contenders == n_candidates:
            # Something that was left out may stand above the last that is wanted.
            unsure = contends[..., -1].any(dim=1)
            for row in unsure.nonzero()[:, 0].tolist():
                affinity[row], ranked[row] = self._search_exactly(
                    queries[row : row + 1], n_neighbors
                )
        return affinity, ranked

    def _rounding_error(self, centered):
        """Bound what rounding does to a score of the matrix product."""
        # A blocked sum of d terms errs by about sqrt(d) units, not by the d of a plain one.
        unit = 4 * torch.finfo(centered.dtype).eps * centered.shape[1] ** 0.5
        norms = torch.linalg.vector_norm(centered, dim=1)
        return norms.add_(self._largest).mul_(unit * self._largest)

    def _search_exactly(self, query, n_neighbors):
        """Compare one query with every example."""
        exact = self._all_affinities(query)[0]
        affinity = exact.new_full((len(self.n_samples_), n_neighbors), -torch.inf)
        places = torch.full(affinity.shape, -1, device=query.device)
        for c, members in enumerate(exact.split(self._sizes)):
            best = members.sort(descending=True, stable=True)
            k = min(n_neighbors, len(members))
            affinity[c, :k] = best.values[:k]
            places[c, :k] = best.indices[:k] + self._starts[c]
        return affinity, places

    def _rank(self, queries, places, n_neighbors):
        """Order candidates by their exact affinity, ties by index, and keep the best.

        ``places`` is (n, n_classes, n_candidates), -1 where there is none.
        """
        # A stable sort settles ties if the candidates come in the order of their indices.
        places = places.sort(dim=2).values
        exact = self._exact_affinities(queries, places.clamp(min=0).flatten(1))
        exact = exact.reshape(places.shape).masked_fill_(places < 0, -torch.inf)
        ranking = exact.sort(dim=2, descending=True, stable=True)
        best = ranking.indices[..., :n_neighbors]
        return ranking.values[..., :n_neighbors], places.gather(2, best)

    def _exact_affinities(self, queries, places):
        n, k = places.shape
        # Whole rows of candidates at a time, or else parts of one.
        n_examples = max(1, CACHE_BYTES // queries[0].nbytes)
        n_rows, n_columns = max(1, n_examples // k), min(k, n_examples)
        exact = queries.new_empty(n, k)
        for top in range(0, n, n_rows):
            rows = slice(top, top + n_rows)
            for left in range(0, k, n_columns):
                part = places[rows, left : left + n_columns]
                examples = self._examples.index_select(0, part.flatten())
                exact[rows, left : left + n_columns] = affinity_to(
                    self.affinity,
                    queries[rows],
                    examples.reshape(*part.shape, -1),
                    overwrite_features=True,
                )
        return exact

    def _all_affinities(self, queries):
        every = torch.arange(len(self._examples), device=queries.device)
        return self._exact_affinities(queries, every.expand(len(queries), -1))

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
        arrays = ("_index", "_examples", "_center", "_offsets", "_starts")
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
