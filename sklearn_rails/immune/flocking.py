"""Flocking: the k nearest examples of every class, exactly, ties by index."""

import tempfile
import warnings
from pathlib import Path

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

# What goes to the device of the queries, whatever the storage.
MOVED = ("_index", "_starts", "_center", "_offsets")

# tau="scale" is this share of the spread of a row's flocked neighbours.
TAU_SHARE = 0.2

# Candidates beyond k that are looked at first: rounding in the matrix product rarely moves a
# neighbour by more places, rounding to half precision rarely by more than the second.
SLACK, SLACK_FLOAT16 = 6, 24

# Where the examples' largest difference from their centre goes in half precision, which has its
# full precision between 6e-5 and 65504.
FLOAT16_PEAK, FLOAT16_MAX = 64, 65504


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
    storage : {"memory", "float16"} or path, default="memory"
        Where the examples are kept: in memory, there in half precision, or in a temporary file in
        a folder.

    Attributes
    ----------
    n_samples_ : ndarray of shape (n_classes,)
        Examples in each class.
    """

    def __init__(self, affinity="euclidean", algorithm="auto", n_jobs=None, storage="memory"):
        self.affinity = affinity
        self.algorithm = algorithm
        self.n_jobs = n_jobs
        self.storage = storage

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
        return self.begin(y, n_classes).put(slice(0, len(features)), features).finish()

    def begin(self, y, n_classes):
        """Make ready for examples that come in blocks.

        Parameters
        ----------
        y, n_classes
            As :meth:`fit` takes them.

        Returns
        -------
        ClassNeighbors

        Raises
        ------
        ValueError
            If the storage is unknown, or does not go with the affinity or the algorithm.
        """
        if self.storage not in ("memory", "float16") and not Path(self.storage).is_dir():
            raise ValueError(
                f"storage={str(self.storage)!r} must be 'memory', 'float16' or a folder that "
                "exists."
            )
        if self.storage != "memory" and self.algorithm != "auto":
            raise ValueError(
                f"storage={self.storage!r} needs algorithm='auto', since other indexes keep the "
                f"examples in memory; got algorithm={self.algorithm!r}."
            )
        if self.storage == "float16" and callable(self.affinity):
            raise ValueError(
                "storage='float16' cannot bound what rounding does to an affinity of your own; "
                "use storage='memory' or a folder."
            )
        # A stable sort: within a class the examples keep their order, and so ties do.
        self._index = torch.from_numpy(np.argsort(y, kind="stable"))
        self._place = torch.empty_like(self._index)
        self._place[self._index] = torch.arange(len(y))
        self.n_samples_ = np.bincount(y, minlength=n_classes)
        self._sizes = self.n_samples_.tolist()
        self._starts = torch.tensor([0, *np.cumsum(self._sizes[:-1])])
        self._examples = None
        return self

    def put(self, rows, features):
        """Store the features of some examples.

        Parameters
        ----------
        rows : slice
            Where they stand among all.
        features : torch.Tensor of shape (n, n_features)

        Returns
        -------
        ClassNeighbors
        """
        if self.affinity == "cosine":
            features = normalize(features, dim=1)
        if self._examples is None:
            self._examples = make_room(
                self.storage, (len(self._index), features.shape[1]), features
            )
            self._move_to(features.device)
            self._error = 0.0
            self._scale = 1.0
            self._center = torch.zeros_like(features[0])
            if self.storage == "float16":
                if self._has_distance:
                    self._center = features.mean(dim=0)
                peak = float((features - self._center).abs().max())
                self._scale = FLOAT16_PEAK / peak if peak > 0 else 1.0
        if self.storage == "float16":
            scaled = (features - self._center) * self._scale
            features = scaled.clamp(-FLOAT16_MAX, FLOAT16_MAX).half()
            error = torch.linalg.vector_norm(scaled - features, dim=1).max()
            self._error = max(self._error, float(error))
        place = self._place[rows].to(self._examples.device)
        self._examples.index_copy_(0, place, features.to(self._examples.device))
        return self

    def finish(self):
        """Index the examples that were put.

        Returns
        -------
        ClassNeighbors
        """
        del self._place
        if self.storage != "float16" and self._has_distance:
            # Distances do not feel a shift, rounding does.
            self._center = self._examples.mean(dim=0).to(self._center.device)
        center = 0 if self.storage == "float16" else self._center
        offsets, largest = [], 0.0
        for examples in self._pieces(self._center):
            offsets.append((examples - center).square_().sum(dim=1) / -2)
            largest = max(largest, float(torch.linalg.vector_norm(examples, dim=1).max()))
        self._offsets = torch.cat(offsets)
        if self.affinity == "inner_product":
            self._offsets.zero_()
        self._largest = largest
        self._indexes = None if self.algorithm == "auto" else self._build_indexes()
        return self

    @property
    def _has_distance(self):
        return self.affinity in ("euclidean", "cosine")

    def _pieces(self, like):
        """Give the examples, a piece after the other, as numbers of another tensor's kind."""
        step = max(1, BLOCK_BYTES // (self._examples.shape[1] * like.element_size()))
        for piece in self._examples.split(step):
            yield piece.to(like)

    def _build_indexes(self):
        template = self.algorithm
        if isinstance(template, str):
            if not self._has_distance:
                raise ValueError(
                    f"algorithm={template!r} finds neighbours by a distance, which affinity="
                    f"{self.affinity!r} does not give; use algorithm='auto' or an estimator."
                )
            template = NearestNeighbors(algorithm=template)
        examples = self._examples.cpu().numpy()
        bounds = np.cumsum(self._sizes)[:-1]
        return [clone(template).fit(members) for members in np.split(examples, bounds)]

    def kneighbors(self, queries, n_neighbors, recall=None):
        """Find the nearest examples of every class.

        Parameters
        ----------
        queries : torch.Tensor of shape (n, n_features)
        n_neighbors : int
            Neighbours in each class. A class with fewer examples gives all of them.
        recall : callable, default=None
            With ``storage="float16"`` needed: ``recall(index)`` gives the features (m, n_features)
            of examples in full precision, for their positions (m,) among those of :meth:`fit`.

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

        def take(places):
            if recall is not None:
                examples = recall(self._index[places])
                return normalize(examples, dim=1) if self.affinity == "cosine" else examples
            return self._examples.index_select(0, places.to(self._examples.device)).to(queries)

        if self._indexes is not None:
            places = self._ask_indexes(queries, n_neighbors + SLACK)
            affinity, places = self._rank(queries, places, n_neighbors, take)
        else:
            slack = SLACK_FLOAT16 if self.storage == "float16" else SLACK
            step = max(1, BLOCK_BYTES // (len(self._examples) * queries.element_size()))
            blocks = [
                self._search(block, n_neighbors, n_neighbors + slack, take)
                for block in queries.split(step)
            ]
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

    def _search(self, queries, n_neighbors, n_candidates, take):
        """Find the neighbours of one block of queries."""
        centered = (queries - self._center).mul_(self._scale)
        top, places = self._find_candidates(queries, centered, n_candidates, take)
        # What the error of the scores may have put behind the last that is wanted, or before it.
        wanted = top[..., n_neighbors - 1 : n_neighbors]
        bar = wanted - 2 * self._score_error(centered, wanted)
        contends = top >= bar.clamp_(min=torch.finfo(top.dtype).min)
        n_contenders = max(n_neighbors, int(contends.sum(dim=2).max()))
        affinity, ranked = self._rank(queries, places[..., :n_contenders], n_neighbors, take)
        if n_contenders == n_candidates < max(self._sizes):
            # Something that was left out may stand above the last that is wanted.
            unsure = contends[..., -1].any(dim=1).nonzero()[:, 0]
            if len(unsure):
                affinity[unsure], ranked[unsure] = self._search(
                    queries[unsure], n_neighbors, 2 * n_candidates, take
                )
        return affinity, ranked

    def _find_candidates(self, queries, centered, n_candidates, take):
        """Give the best of each class by a quick score, and their scores."""
        if callable(self.affinity):
            every = torch.arange(len(self._examples), device=queries.device)
            scores = self._exact_affinities(queries, every.expand(len(queries), -1), take)
        else:
            # Minus half the squared distance, but for a constant of each query.
            if self._examples.dtype == queries.dtype and self._examples.device == queries.device:
                scores = torch.addmm(self._offsets, centered, self._examples.T)
            else:
                scores = torch.cat(
                    [torch.mm(centered, piece.T) for piece in self._pieces(queries)], dim=1
                ).add_(self._offsets)
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
        return top, places

    def _score_error(self, centered, wanted):
        """Bound how far a score may be from the true one, about the last that is wanted."""
        if callable(self.affinity):
            return 0.0
        norms = torch.linalg.vector_norm(centered, dim=1)[:, None, None]
        # A blocked sum of d terms errs by about sqrt(d) units, not by the d of a plain one.
        unit = 4 * torch.finfo(centered.dtype).eps * centered.shape[1] ** 0.5
        error = (norms + self._largest) * (unit * self._largest)
        if self._error == 0:
            return error
        if self.affinity == "inner_product":
            return error + self._error * norms
        # An example that is e away from where it should be has a distance that errs by e.
        distance = (norms.square() - 2 * wanted).clamp_(min=0).sqrt_()
        return error + self._error * (distance + self._error)

    def _rank(self, queries, places, n_neighbors, take):
        """Order candidates by their exact affinity, ties by index, and keep the best.

        ``places`` is (n, n_classes, n_candidates), -1 where there is none.
        """
        # A stable sort settles ties if the candidates come in the order of their indices.
        places = places.sort(dim=2).values
        exact = self._exact_affinities(queries, places.clamp(min=0).flatten(1), take)
        exact = exact.reshape(places.shape).masked_fill_(places < 0, -torch.inf)
        ranking = exact.sort(dim=2, descending=True, stable=True)
        best = ranking.indices[..., :n_neighbors]
        return ranking.values[..., :n_neighbors], places.gather(2, best)

    def _exact_affinities(self, queries, places, take):
        n, k = places.shape
        # Whole rows of candidates at a time, or else parts of one.
        n_examples = max(1, CACHE_BYTES // queries[0].nbytes)
        n_rows, n_columns = max(1, n_examples // k), min(k, n_examples)
        exact = queries.new_empty(n, k)
        for top in range(0, n, n_rows):
            rows = slice(top, top + n_rows)
            for left in range(0, k, n_columns):
                part = places[rows, left : left + n_columns]
                examples = take(part.flatten()).reshape(*part.shape, -1)
                exact[rows, left : left + n_columns] = affinity_to(
                    self.affinity, queries[rows], examples, overwrite_features=True
                )
        return exact

    def _move_to(self, device):
        for name in MOVED:
            value = getattr(self, name, None)
            if value is not None and value.device != device:
                setattr(self, name, value.to(device))
        if self.storage in ("memory", "float16"):
            self._examples = self._examples.to(device)

    def __getstate__(self):
        # Plain arrays load where there is no GPU, and joblib can map them from disk.
        return {
            name: value.cpu().numpy() if isinstance(value, torch.Tensor) else value
            for name, value in vars(self).items()
        }

    def __setstate__(self, state):
        vars(self).update(state)
        for name in MOVED:
            setattr(self, name, torch.from_numpy(np.array(state[name])))
        with warnings.catch_warnings():
            # Examples that are mapped from disk stay there; torch warns that they are read-only.
            warnings.simplefilter("ignore", UserWarning)
            self._examples = torch.from_numpy(np.asarray(state["_examples"]))


def make_room(storage, shape, like):
    """Make room for examples.

    Parameters
    ----------
    storage : {"memory", "float16"} or path
        A folder holds a temporary file, which goes with the tensor.
    shape : tuple of int
    like : torch.Tensor
        Tells the device and the dtype.

    Returns
    -------
    torch.Tensor
    """
    if storage == "memory":
        return like.new_empty(shape)
    if storage == "float16":
        return like.new_empty(shape, dtype=torch.float16)
    dtype = torch.empty(0, dtype=like.dtype).numpy().dtype
    with tempfile.TemporaryFile(dir=storage, prefix="sklearn_rails_") as file:
        # The map outlives the file's name, and even its handle.
        return torch.from_numpy(np.memmap(file, dtype, "w+", shape=shape))


def join_flocks(flock, other):
    """Take the nearest of two sets of examples.

    Parameters
    ----------
    flock, other : pair of torch.Tensor of shape (n, n_classes, n_neighbors)
        Affinities, highest first, and positions, as :meth:`ClassNeighbors.kneighbors` gives them.

    Returns
    -------
    affinity, index : torch.Tensor of shape (n, n_classes, n_neighbors)
        Ties go to the first set.
    """
    affinity, index = (torch.cat(parts, dim=2) for parts in zip(flock, other, strict=True))
    ranking = affinity.sort(dim=2, descending=True, stable=True)
    n_neighbors = flock[0].shape[2]
    best = ranking.indices[..., :n_neighbors]
    return ranking.values[..., :n_neighbors], index.gather(2, best)


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


def flock_without_own(neighbors, own, features, n_neighbors, recall=None):
    """Flock for training rows as if they were new: each is left out of its own neighbours.

    Parameters
    ----------
    neighbors : ClassNeighbors
    own : torch.Tensor of shape (n,), int64
        Positions of the rows among the examples.
    features : torch.Tensor of shape (n, n_features)
        Their features.
    n_neighbors : int
    recall
        As :meth:`ClassNeighbors.kneighbors` takes it.

    Returns
    -------
    torch.Tensor of shape (n, n_classes, n_neighbors)
        Affinities, minus infinity where a class has no more.
    """
    flock = neighbors.kneighbors(features, n_neighbors + 1, recall)
    return drop_own(*flock, own)[0]


def scale_of_affinity(neighbors, own, features, n_neighbors, recall=None):
    """Resolve tau="scale": a share of the spread of affinities within a typical flock.

    Parameters
    ----------
    neighbors : ClassNeighbors
    own : torch.Tensor of shape (n,), int64
        Positions of some training rows.
    features : torch.Tensor of shape (n, n_features)
        Their features.
    n_neighbors : int
    recall
        As :meth:`ClassNeighbors.kneighbors` takes it.

    Returns
    -------
    float
        Above 0.
    """
    flocked = flock_without_own(neighbors, own, features, n_neighbors, recall)
    affinity = flocked.flatten(1).cpu().numpy().astype(np.float64)
    affinity[np.isinf(affinity)] = np.nan
    counted = np.isfinite(affinity).sum(axis=1) > 1
    spread = np.nanstd(affinity[counted], axis=1)
    spread = spread[spread > 0]
    # Where all affinities are alike, selection is a fair draw at any temperature.
    return TAU_SHARE * float(np.median(spread)) if len(spread) else 1.0
