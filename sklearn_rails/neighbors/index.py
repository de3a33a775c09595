"""Flocking: the k nearest examples of every class, exactly, ties by index."""

import copy
import errno
import os
import tempfile
import warnings
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from joblib import Parallel, delayed
from sklearn.base import clone
from sklearn.neighbors import NearestNeighbors
from torch.nn.functional import pad

from .._conformal import sample_rows
from .affinity import affinity_to, norm, normalize_rows

# On a CPU examples are compared in pieces of this many bytes, which stay in the caches.
CACHE_BYTES = 2**20

# The block of distances that is held at a time, in bytes.
BLOCK_BYTES = 64 * 2**20

# Pieces of examples that are converted for a product, in bytes. On a CPU 2 MiB take as long as
# examples that need no conversion (6,000 x 4,096, one query), 64 MiB 7 times as long.
PIECE_BYTES = 2 * 2**20

# What goes to the device of the queries, whatever the storage.
MOVED = ("_index", "_starts", "_shift", "_origin", "_center", "_offsets")

# tau="scale" is this share of the spread of a row's flocked neighbours.
TAU_SHARE = 0.2

# Candidates beyond k that are looked at first: rounding in the matrix product rarely moves a
# neighbour by more places, rounding to half precision rarely by more than the second.
SLACK, SLACK_FLOAT16 = 6, 24

# Where the examples' median difference from their centre goes in half precision, which has its
# full precision between 6e-5 and 65504.
FLOAT16_TYPICAL, FLOAT16_MAX = 16, 65504

# Examples that tell where the others are, and at which scale.
TYPICAL_ROWS = 256

# A feature is stored as differences from a constant if this is so many times its spread.
SHIFT_RATIO = 8

# Typical distances up to 2 to this power, or its inverse, are compared without scaling.
MAX_EXPONENT = 20


class ClassNeighbors:
    """The k examples of highest affinity in every class.

    Parameters
    ----------
    affinity : {"euclidean", "cosine", "inner_product"} or callable
        See :func:`~sklearn_rails.neighbors.affinity.affinity_to`.
    algorithm : {"auto", "brute", "kd_tree", "ball_tree"} or estimator, default="auto"
        ``"auto"`` is an exact matrix product on the features' device. The other names build one
        :class:`sklearn.neighbors.NearestNeighbors` a class, and an estimator with ``kneighbors``
        is cloned for every class. Where it finds fewer neighbours than it is asked for, it may
        fill up with -1.
    n_jobs : int, default=None
        Threads for the classes' own indexes; the matrix product uses torch's.
    storage : {"memory", "float16"} or path, default="memory"
        Where the examples are kept: in memory, there in half precision, or in a temporary file in
        a folder.

    Attributes
    ----------
    n_samples_ : ndarray of shape (n_classes,)
        Examples in each class.

    Notes
    -----
    Candidates are found by a matrix product whose rounding error is bounded; affinities of all
    that could be among the neighbours are then computed one by one. The product compares
    differences from a centre: features that are far from zero are stored as differences from a
    constant, where no example loses a bit by that. Queries for which the product overflows are
    compared with every example one by one.
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
            Finite.
        y : ndarray of shape (n,)
            Class of each example, as an integer from 0. A class may have none.
        n_classes : int

        Returns
        -------
        ClassNeighbors

        Raises
        ------
        ValueError
            If features are not finite, or as :meth:`begin` raises it.
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
        is_folder = str(self.storage) and Path(self.storage).is_dir()
        if self.storage not in ("memory", "float16") and not is_folder:
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
        self._pooled, self._lengths = False, None
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
            features = normalize_rows(features)
        if self._examples is None:
            self._examples = allocate(self.storage, (len(self._index), features.shape[1]), features)
            self._move_to(features.device)
            self._blank = torch.zeros(len(self._index), dtype=torch.bool, device=features.device)
            self._error, self._scale = 0.0, 1.0
            self._shift = torch.zeros_like(features[0])
            if self.storage == "float16":
                sample = features[sample_rows(len(features), TYPICAL_ROWS, rng=0)]
                if self._has_distance:
                    self._shift = sample.median(dim=0).values
                peak = float((sample - self._shift).abs().amax(dim=1).median())
                self._scale = min(FLOAT16_TYPICAL / peak, 2.0**100) if peak > 0 else 1.0
        place = self._place[rows].to(features.device)
        self._blank[place] = ~features.any(dim=1)
        if self.storage == "float16":
            scaled = (features - self._shift) * self._scale
            features = scaled.clamp(-FLOAT16_MAX, FLOAT16_MAX).half()
            error = torch.linalg.vector_norm(scaled - features, dim=1).max()
            self._error = max(self._error, min(float(error), torch.finfo(error.dtype).max))
        place = place.to(self._examples.device)
        self._examples.index_copy_(0, place, features.to(self._examples.device))
        return self

    def finish(self):
        """Index the examples that were put.

        Returns
        -------
        ClassNeighbors
        """
        del self._place
        self._blank = self._blank if self.affinity == "cosine" else torch.zeros_like(self._blank)
        sample = self._examples[sample_rows(len(self._examples), TYPICAL_ROWS, rng=0)].to(
            self._shift
        )
        self._center, self._unit = torch.zeros_like(self._shift), 1.0
        if self.storage != "float16" and self._has_distance:
            # Distances do not feel a shift, rounding does. A median does not feel a single row.
            self._center = sample.median(dim=0).values
            self._shift_examples(self._center, (sample - self._center).abs().median(dim=0).values)
            self._center = self._center - self._shift
            # A power of two rounds nothing.
            typical = float(norm(sample - self._shift - self._center).median())
            exponent = np.frexp(typical)[1] if 0 < typical < np.inf else 0
            if abs(exponent) > MAX_EXPONENT:
                self._unit = 2.0 ** -float(np.clip(exponent, -100, 100))
        # A feature is either stored as differences or has a centre, so this rounds nothing.
        self._origin, self._has_shift = self._shift + self._center, bool(self._shift.any())
        self._center_norm = float(norm(self._center)) * self._unit
        offsets, largest = [], 0.0
        # So that no example has the score of one that is not there.
        lowest = -torch.finfo(self._shift.dtype).max / 8
        for piece in self._pieces(self._shift, BLOCK_BYTES):
            distance = norm((piece - self._center).mul_(self._unit))
            if not bool(torch.isfinite(norm(piece)).all()):
                raise ValueError(
                    f"The features of some training rows are not finite, or beyond what "
                    f"{str(piece.dtype).removeprefix('torch.')} holds; scale X, or use "
                    "dtype='float64'."
                )
            offsets.append((distance.square() / -2).clamp_(min=lowest))
            largest = max(largest, float(distance.max()))
        self._offsets = torch.cat(offsets)
        if self.affinity == "inner_product":
            self._offsets.zero_()
        # Minus half a squared distance is the cosine, but for a constant, if both rows are of
        # length 1. A row of zeros is then half too near.
        self._offsets[self._blank] -= 0.5 * (self._scale * self._unit) ** 2
        self._largest = largest
        self._indexes = None if self.algorithm == "auto" else self._build_indexes()
        return self

    def _shift_examples(self, constants, spread):
        """Store features that are far from zero as differences, if no example loses by that."""
        far = (constants.abs() > SHIFT_RATIO * spread).nonzero()[:, 0]
        step = max(1, BLOCK_BYTES // self._examples[0].nbytes)
        pieces = self._examples.split(step) if len(far) else ()
        kept, constant = torch.ones_like(far, dtype=torch.bool), constants[far]
        for piece in pieces:
            values = piece[:, far.to(piece.device)].to(constant)
            kept &= ((values - constant) + constant == values).all(dim=0)
        self._shift[far[kept]] = constant[kept]
        if kept.any():
            for piece in pieces:
                piece -= self._shift.to(piece.device)

    @property
    def _has_distance(self):
        return self.affinity in ("euclidean", "cosine")

    def _pieces(self, like, n_bytes):
        """Give the stored examples, piece after piece, as numbers of another tensor's kind."""
        step = max(1, n_bytes // (self._examples.shape[1] * like.element_size()))
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
        if self.algorithm is template:
            examples = (self._examples + self._shift).cpu().numpy()
        else:  # whose distances lose digits far from zero
            examples = ((self._examples - self._center) * self._unit).cpu().numpy()
        # Rows of zeros have the same cosine with all others, and no place among them by distance.
        counted = ~self._blank.cpu().numpy()
        self._members, self._blanks = [], []
        for start, size in zip(self._starts.tolist(), self._sizes, strict=True):
            places = np.arange(start, start + size)
            self._members.append(places[counted[places]])
            self._blanks.append(places[~counted[places]])
        return [
            clone(template).fit(examples[members]) if len(members) else None
            for members in self._members
        ]

    def kneighbors(self, queries, n_neighbors, recompute=None):
        """Find the nearest examples of every class.

        Parameters
        ----------
        queries : torch.Tensor of shape (n, n_features)
            Finite.
        n_neighbors : int
            Maximum number of neighbours in each class; clipped to the size of the largest class.
        recompute : callable, default=None
            With ``storage="float16"`` needed: ``recompute(index)`` returns the features
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
        return self._find(queries, self._clip(n_neighbors), recompute)

    def _clip(self, n_neighbors):
        return min(n_neighbors, max(1, *self._sizes))

    @torch.no_grad()  # an affinity may have parameters of its own
    def _find(self, queries, n_neighbors, recompute):
        if self.storage == "float16" and recompute is None:
            raise ValueError(
                "storage='float16' keeps no example in full precision: give recompute."
            )
        self._move_to(queries.device)
        unit_length = self.affinity == "cosine" or self._lengths is not None
        if unit_length:
            queries = normalize_rows(queries)

        def take(places):
            if recompute is not None:
                examples = recompute(self._index[places])
            else:
                places = places.to(self._examples.device)
                examples = self._examples.index_select(0, places).to(queries)
                if self._has_shift:
                    examples.add_(self._shift)
                if self._lengths is None:
                    return examples
            return normalize_rows(examples) if unit_length else examples

        # The caller's autocast would compute products in half precision.
        kind = queries.device.type
        is_cast = kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)
        with torch.autocast(kind, enabled=False) if is_cast else nullcontext():
            if self._indexes is not None:
                places = self._ask_indexes(queries, n_neighbors)
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

    def _ask_indexes(self, queries, n_neighbors):
        if isinstance(self.algorithm, str):
            queries = (queries - self._origin) * self._unit
        rows = queries.cpu().numpy()

        def ask(index, members):
            if index is None:
                return np.full((len(rows), 0), -1)
            k = min(n_neighbors + SLACK, len(members))
            found = np.asarray(index.kneighbors(rows, n_neighbors=k, return_distance=False))
            if found.shape != (len(rows), k) or found.dtype.kind not in "iu":
                raise ValueError(
                    f"algorithm={self.algorithm!r}: kneighbors must give whole numbers of shape "
                    f"{(len(rows), k)}, it gave {found.dtype} of shape {found.shape}."
                )
            found = found.astype(np.int64)
            if found.size and not -1 <= found.min() <= found.max() < len(members):
                raise ValueError(
                    f"algorithm={self.algorithm!r}: kneighbors must give positions from 0 to "
                    f"{len(members) - 1}, or -1 for none, it gave {found.min()} to {found.max()}."
                )
            return np.where(found < 0, -1, members[found])

        found = Parallel(n_jobs=self.n_jobs, require="sharedmem")(
            delayed(ask)(index, members)
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
        return torch.from_numpy(places).to(queries.device)

    def _search(self, queries, n_neighbors, n_candidates, take):
        """Find the neighbours of one block of queries."""
        if callable(self.affinity):
            return self._compare_with_all(queries, n_neighbors, take)
        if self._lengths is None:
            moved = queries - self._origin
            if self._scale * self._unit != 1:
                moved.mul_(self._scale * self._unit)
        else:
            moved = queries
        norms = norm(moved)
        if self.affinity == "inner_product":
            self._refuse_underflow(norms)
        top, places = self._find_candidates(moved, n_candidates)
        # What the error of the scores may have put behind the last that is wanted, or before it.
        wanted = top[..., n_neighbors - 1 : n_neighbors]
        overflows = self._find_overflows(norms, top[..., :n_neighbors])
        if overflows is not None:
            usable = ~overflows
            affinity = queries.new_empty(*top.shape[:2], n_neighbors)
            ranked = places.new_empty(affinity.shape)
            for rows, search in (
                (overflows, self._compare_with_all),
                (usable, lambda q, k, take: self._search(q, k, n_candidates, take)),
            ):
                if rows.any():
                    affinity[rows], ranked[rows] = search(queries[rows], n_neighbors, take)
            return affinity, ranked
        bar = wanted - 2 * self._score_error(moved, norms[:, None, None], wanted)
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

    def _compare_with_all(self, queries, n_neighbors, take):
        """Find neighbours by the affinities of all examples."""
        found = []
        for start, size in zip(self._starts.tolist(), self._sizes, strict=True):
            places = torch.arange(start, start + size, device=queries.device)
            places = pad(places, (0, max(0, n_neighbors - size)), value=-1)
            # As much memory as a block of scores takes.
            step = max(1, BLOCK_BYTES // (len(places) * queries.element_size()))
            parts = [
                self._rank(q, places.expand(len(q), 1, -1), n_neighbors, take)
                for q in queries.split(step)
            ]
            found.append([torch.cat(values) for values in zip(*parts, strict=True)])
        affinity, ranked = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
        return affinity, ranked

    def _find_candidates(self, moved, n_candidates):
        """Give the best of each class by a quick score, and their scores."""
        # Minus half the squared distance, but for a constant of each query.
        scaled = moved if self._unit == 1 or self._lengths is not None else moved * self._unit
        exact = product_is_exact(scaled)
        plain = self._examples.dtype == moved.dtype and self._examples.device == moved.device
        if plain and exact and self._lengths is None:
            scores = torch.addmm(self._offsets, scaled, self._examples.T)
        else:
            wide = scaled if exact else scaled.double()
            n_bytes = PIECE_BYTES if moved.device.type == "cpu" else BLOCK_BYTES
            pieces = [self._examples] if plain and exact else self._pieces(wide, n_bytes)
            scores = torch.cat([torch.mm(wide, piece.T).to(moved) for piece in pieces], dim=1)
            if self._lengths is None:
                scores.add_(self._offsets)
            else:
                scores.add_((moved * self._shift).sum(dim=1, keepdim=True)).div_(self._lengths)
                scores.sub_(self._lengths.isfinite().to(scores), alpha=0.5)
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
            sizes = torch.tensor(self._sizes, device=places.device)[:, None]
            places.masked_fill_(torch.arange(n_candidates, device=places.device) >= sizes, -1)
        return top, places

    def _score_error(self, moved, norms, wanted):
        """Bound how far a score may be from the true one, about the last that is wanted."""
        info = torch.finfo(moved.dtype)
        # A blocked sum of d terms errs by about sqrt(d) units, not by the d of a plain one.
        unit = 4 * info.eps * moved.shape[1] ** 0.5
        if self._lengths is not None:
            shift = float(norm(self._shift))
            return unit * (2 + 2 * shift / float(self._lengths.min()))
        if self.affinity == "inner_product":
            return norms * (unit * self._largest + self._error)
        score = wanted
        if self._center_norm > 0:
            score = wanted - torch.mv(moved, self._center)[:, None, None] * self._unit
        near = (4 * norms).clamp_(max=self._largest)
        error = (norms + near).mul_(near).add_(norms, alpha=self._center_norm)
        # Scores of examples that are more than 4 times as far from the centre as the query, which
        # are below -4 |query|^2, err by 10 units of themselves at most.
        far = score.abs().sub_(norms.square(), alpha=3).relu_()
        error = torch.add(error, far, alpha=40).mul_(unit).add_(moved.shape[1] * info.tiny)
        if self._error == 0:
            return error
        # An example that is e away from where it should be has a distance that errs by e.
        distance = (norms.square() - 2 * score).clamp_(min=0).sqrt_()
        return error + self._error * (distance + self._error)

    def _refuse_underflow(self, norms):
        info = torch.finfo(norms.dtype)
        # As they are without the scale of half precision, whatever the storage.
        true_norms = norms.double() / self._scale**2
        too_small = (true_norms > 0) & (true_norms * self._largest < info.tiny / info.eps)
        if self._largest > 0 and too_small.any():
            raise ValueError(
                "affinity='inner_product' of some rows and all training rows is below what "
                f"{str(norms.dtype).removeprefix('torch.')} holds; scale X, or use dtype='float64'."
            )

    def _find_overflows(self, norms, top):
        """Tell for which queries the scores may have overflowed; None if for none."""
        limit = torch.finfo(top.dtype).max / 16
        reach = 1.0 if self._lengths is not None else self._largest
        reach = reach + self._center_norm
        low, high = torch.aminmax(top)
        if norms.max().item() * reach < limit and -limit < low.item() and high.item() < limit:
            return None
        there = top.masked_fill(top == -torch.inf, 0)
        overflows = ~((norms * reach < limit) & (there.abs() < limit).all(dim=2).all(dim=1))
        return overflows if overflows.any() else None

    def _rank(self, queries, places, n_neighbors, take):
        """Order candidates by their exact affinity, ties by index, and keep the best.

        ``places`` is (n, n_classes, n_candidates), -1 where there is none.
        """
        # A stable sort settles ties if the candidates come in the order of their indices.
        if self._pooled:
            order = self._index[places.clamp(min=0)].masked_fill_(places < 0, -1).argsort(dim=2)
            places = places.gather(2, order)
        else:
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
        low, high = torch.aminmax(exact)
        if not -torch.inf < low.item() <= high.item() < torch.inf:
            if not callable(self.affinity):
                raise ValueError(
                    f"affinity={self.affinity!r} of some rows and training rows is not finite, or "
                    f"beyond what {str(exact.dtype).removeprefix('torch.')} holds; scale X, or use "
                    "dtype='float64'."
                )
            largest = torch.finfo(exact.dtype).max
            exact.clamp_(-largest, largest)
        return exact

    def pooled(self, device, lengths=None):
        """Return the same examples as a single class.

        Parameters
        ----------
        device : torch.device
            Where queries will be.
        lengths : torch.Tensor of shape (n_samples,), default=None
            Norms of the examples, in the order of :attr:`index`, infinite for rows of zeros: both
            they and the queries are then divided by their norms. Only for the Euclidean affinity
            in full precision.

        Returns
        -------
        ClassNeighbors
            That shares memory with this one. Ties go by index.
        """
        self._move_to(device)
        view = copy.copy(self)
        view.n_samples_ = np.array([len(self._index)])
        view._sizes = view.n_samples_.tolist()
        view._starts = self._starts[:1]
        view._pooled, view._lengths = True, lengths
        return view

    def on_disk(self):
        """Return the same neighbours with the examples in a temporary file, if there is room.

        Returns
        -------
        ClassNeighbors
            This one where the examples are not its own to move (``algorithm`` other than
            ``"auto"``), or the disk is full.
        """
        if self._indexes is not None:
            return self
        try:
            examples = allocate(tempfile.gettempdir(), self._examples.shape, self._examples)
        except OSError:
            return self
        view = copy.copy(self)
        view._examples = examples.copy_(self._examples)
        return view

    @property
    def index(self):
        """Positions of the examples among those of :meth:`fit`, class after class."""
        return self._index

    def examples_of(self, c, device):
        """Return the examples of a class.

        Parameters
        ----------
        c : int
        device : torch.device

        Returns
        -------
        features : torch.Tensor of shape (n, n_features)
        index : torch.Tensor of shape (n,), int64
            Their positions among those of :meth:`fit`.
        """
        self._move_to(device)
        start = int(self._starts[c])
        members = slice(start, start + self._sizes[c])
        examples = self._examples[members]
        if self._has_shift:
            examples = examples + self._shift
        return examples, self._index[members]

    def _move_to(self, device):
        if self._index.device == device:
            return
        for name in MOVED:
            if hasattr(self, name):
                setattr(self, name, getattr(self, name).to(device))
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


def product_is_exact(tensor):
    """Check whether torch's settings leave matrix products the precision of their dtype.

    Parameters
    ----------
    tensor : torch.Tensor

    Returns
    -------
    bool
        False for float32 where ``torch.set_float32_matmul_precision``, or a setting of the
        device, allows products in bfloat16 or TF32.
    """
    if tensor.dtype != torch.float32 or tensor.device.type not in ("cpu", "cuda"):
        return True
    backends = torch.backends
    backend = backends.cuda if tensor.is_cuda else backends.mkldnn
    # Since torch 2.9; a setting that is not made is that of what it belongs to.
    owners = (getattr(backend, "matmul", None), backend, backends)
    settings = [getattr(owner, "fp32_precision", None) for owner in owners]
    if settings[0] is None:
        return torch.get_float32_matmul_precision() == "highest"
    made = [setting for setting in settings if setting not in (None, "none")]
    return not made or made[0] == "ieee"


def allocate(storage, shape, like):
    """Allocate memory for examples.

    Parameters
    ----------
    storage : {"memory", "float16"} or path
        A folder holds a temporary file, which is deleted with the tensor.
    shape : tuple of int
    like : torch.Tensor
        Tells the device and the dtype.

    Returns
    -------
    torch.Tensor

    Raises
    ------
    OSError
        If the folder's disk has not enough space.
    """
    if storage == "memory":
        return like.new_empty(shape)
    if storage == "float16":
        return like.new_empty(shape, dtype=torch.float16)
    dtype = torch.empty(0, dtype=like.dtype).numpy().dtype
    n_bytes = int(np.prod(shape)) * dtype.itemsize
    with tempfile.TemporaryFile(dir=storage, prefix="sklearn_rails_") as file:
        try:
            reserve(file, n_bytes)
        except OSError as error:
            raise OSError(
                error.errno,
                f"storage={str(storage)!r} has no room for {n_bytes / 2**20:.1f} MiB of features: "
                f"{error.strerror}",
            ) from error
        # The map outlives the file's name, and even its handle.
        return torch.from_numpy(np.memmap(file, dtype, "r+", shape=shape))


def reserve(file, n_bytes):
    """Reserve space on the disk: writing to a map of a file that has none kills the process.

    Parameters
    ----------
    file : file object
        Open for writing, empty.
    n_bytes : int
    """
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, n_bytes)
            return
        except OSError as error:
            # Not every file system can do it.
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
    zeros = bytes(min(n_bytes, 2**20))
    for start in range(0, n_bytes, len(zeros)):
        file.write(zeros[: n_bytes - start])
    file.flush()


def merge_flocks(flock, other, n_neighbors):
    """Take the nearest of two sets of examples.

    Parameters
    ----------
    flock, other : pair of torch.Tensor of shape (n, n_classes, n_found)
        Affinities, highest first, and positions, as :meth:`ClassNeighbors.kneighbors` gives them.
    n_neighbors : int
        Not more than both sets have together.

    Returns
    -------
    affinity, index : torch.Tensor of shape (n, n_classes, n_neighbors)
        Ties go to the first set.
    """
    affinity, index = (torch.cat(parts, dim=2) for parts in zip(flock, other, strict=True))
    ranking = affinity.sort(dim=2, descending=True, stable=True)
    best = ranking.indices[..., :n_neighbors]
    return ranking.values[..., :n_neighbors], index.gather(2, best)


def drop_self(affinity, index, own):
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


def kneighbors_leave_one_out(neighbors, own, features, n_neighbors, recompute=None):
    """Flock for training rows as if they were new: each is left out of its own neighbours.

    Parameters
    ----------
    neighbors : ClassNeighbors
    own : torch.Tensor of shape (n,), int64
        Positions of the rows among the examples.
    features : torch.Tensor of shape (n, n_features)
        Their features.
    n_neighbors : int
    recompute
        As :meth:`ClassNeighbors.kneighbors` takes it.

    Returns
    -------
    torch.Tensor of shape (n, n_classes, n_neighbors)
        Affinities, minus infinity where a class has no more; as many as the largest class has
        examples at most.
    """
    flock = neighbors._find(features, neighbors._clip(n_neighbors) + 1, recompute)
    return drop_self(*flock, own)[0]


def scale_of_affinity(neighbors, own, features, n_neighbors, recompute=None):
    """Resolve tau="scale": a share of the spread of affinities within a typical flock.

    Parameters
    ----------
    neighbors : ClassNeighbors
    own : torch.Tensor of shape (n,), int64
        Positions of some training rows.
    features : torch.Tensor of shape (n, n_features)
        Their features.
    n_neighbors : int
    recompute
        As :meth:`ClassNeighbors.kneighbors` takes it.

    Returns
    -------
    float
        Above 0.
    """
    flocked = kneighbors_leave_one_out(neighbors, own, features, n_neighbors, recompute)
    affinity = flocked.flatten(1).cpu().numpy().astype(np.float64)
    affinity[np.isinf(affinity)] = np.nan
    counted = np.isfinite(affinity).sum(axis=1) > 1
    spread = np.nanstd(affinity[counted], axis=1)
    spread = spread[spread > 0]
    # Where all affinities are alike, selection is a fair draw at any temperature.
    return TAU_SHARE * float(np.median(spread)) if len(spread) else 1.0
