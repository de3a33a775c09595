"""Exact search by a matrix product whose rounding error is bounded."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn import get_config
from torch import Tensor
from torch.nn.functional import pad

from .base import Numbers, ProductAffinity, product_rounding
from .geometry import Geometry
from .norms import norm, normalize_rows
from .order import ClassOrder, find_top_scores
from .products import add_split_product, split_is_faster
from .search import Recompute, Search, Take
from .sketch import Sketch
from .store import BLOCK_BYTES, ExampleStore

# Size in bytes of the pieces that examples are converted in for a product on a CPU. Half precision
# in pieces of 1 MiB takes 1.1 to 1.7 times as long as full precision (one query, 6,000 x 4,096 and
# 20,000 x 64 or 512), in pieces of 256 KiB or 4 MiB 1.2 to 3.8 times as long.
PIECE_BYTES = 2**20

# Up to so many queries, and from so many bytes of examples on, their products may be split.
MAX_SPLIT, MIN_SPLIT_BYTES = 4, 2**18

# Share of the examples that sketches may leave over for a query: beyond it the product with all
# examples takes less time.
MAX_SHARE = 1 / 8

# Number of values of a query that ranking one candidate holds at a time: scores, places and masks.
RANKED_VALUES = 12

# Number of candidates beyond n_neighbors in each class that are looked at first, in full and in
# half precision; where rounding may have moved a neighbour by more places, the number is doubled.
# With 10 neighbours of 300 queries (digits; 20,000 x 64; 6,000 x 4,096) the most was 2 and 3.
SLACK, SLACK_FLOAT16 = 6, 24


class QueryBlock(NamedTuple):
    """Queries that are searched for together.

    Attributes
    ----------
    queries : torch.Tensor of shape (n, n_features)
        As they were given.
    moved : torch.Tensor of shape (n, n_features)
        Relative to the origin, as products take them.
    norms : torch.Tensor of shape (n,)
        Of the moved queries.
    """

    queries: Tensor
    moved: Tensor
    norms: Tensor

    def take(self, rows: Tensor) -> QueryBlock:
        """Return some of the queries."""
        return QueryBlock(*(part[rows] for part in self))


class AllPairsSearch(Search):
    """Neighbours by the affinities of a query and all examples."""

    def find(self, queries: Tensor, n_neighbors: int, take: Take) -> tuple[Tensor, Tensor]:
        """Find neighbours, as :meth:`~sklearn_rails.neighbors.search.Search.find` says."""
        found = []
        for start, size in zip(self.order.starts.tolist(), self.order.sizes, strict=True):
            places = torch.arange(start, start + size, device=queries.device)
            places = pad(places, (0, max(0, n_neighbors - size)), value=-1)
            step = block_rows(queries, 0, len(places))
            parts = [
                self.rank(q, places.expand(len(q), 1, -1), n_neighbors, take)
                for q in torch.split(queries, step)
            ]
            found.append([torch.cat(tensors) for tensors in zip(*parts, strict=True)])
        affinity, ranked = (torch.cat(tensors, dim=1) for tensors in zip(*found, strict=True))
        return affinity, ranked


class ProductSearch(AllPairsSearch):
    """Neighbours by exact affinities of the candidates that a matrix product finds.

    Queries for which the product overflows are compared with every example one by one.

    Parameters
    ----------
    affinity : ProductAffinity
    order : ClassOrder
    store : ExampleStore
    geometry : Geometry
    offsets : torch.Tensor of shape (n_samples,)
        As the affinity's ``offsets`` returns them.
    """

    DEVICE_TENSORS: ClassVar[tuple[str, ...]] = ("_offsets",)

    affinity: ProductAffinity

    def __init__(
        self,
        affinity: ProductAffinity,
        order: ClassOrder,
        store: ExampleStore,
        geometry: Geometry,
        offsets: Tensor,
    ) -> None:
        super().__init__(affinity, order, store, geometry)
        self._offsets = offsets
        self.sketch: Sketch | None = None
        # The largest norm of an example, relative to the centre.
        self._reach = geometry.max_norm

    def move_to(self, device: torch.device) -> None:
        """Move to a device.

        Parameters
        ----------
        device : torch.device
        """
        super().move_to(device)
        if self.sketch is not None:
            self.sketch.move_to(device)

    def find(self, queries: Tensor, n_neighbors: int, take: Take) -> tuple[Tensor, Tensor]:
        """Find neighbours, as :meth:`~sklearn_rails.neighbors.search.Search.find` says."""
        slack = SLACK_FLOAT16 if self.store.needs_recompute else SLACK
        n_candidates = n_neighbors + slack
        n_found = len(self.order.sizes) * n_candidates
        step = block_rows(queries, len(self.store.examples), n_found)
        if len(queries) <= step:
            return self._find_block(queries, n_neighbors, n_candidates, take)
        # Allocated once: pieces that stay between the blocks would fragment the memory.
        affinity, places = self._allocate_found(queries, n_neighbors)
        for first in range(0, len(queries), step):
            rows = slice(first, first + step)
            affinity[rows], places[rows] = self._find_block(
                queries[rows], n_neighbors, n_candidates, take
            )
        return affinity, places

    def _allocate_found(self, queries: Tensor, n_neighbors: int) -> tuple[Tensor, Tensor]:
        affinity = queries.new_empty(len(queries), len(self.order.sizes), n_neighbors)
        return affinity, torch.empty_like(affinity, dtype=torch.int64)

    def _find_block(
        self, queries: Tensor, n_neighbors: int, n_candidates: int, take: Take
    ) -> tuple[Tensor, Tensor]:
        moved = self._move_queries(queries)
        block = QueryBlock(queries, moved, norm(moved))
        self.affinity.check_queries(self.geometry, block.norms)
        can_sketch = self._can_sketch(block, n_neighbors)
        find = self._find_by_sketch if can_sketch else self._find_by_product
        return find(block, n_neighbors, n_candidates, take)

    def _find_by_product(
        self, block: QueryBlock, n_neighbors: int, n_candidates: int, take: Take
    ) -> tuple[Tensor, Tensor]:
        queries, moved, norms = block
        top, places = find_top_scores(self._scores(moved), self.order, n_candidates)
        # The decisions below are a few numbers for each query, for which numpy takes less time.
        scores, lengths = top.cpu().numpy(), norms.cpu().numpy().astype(np.float64)
        last = scores[..., n_neighbors - 1].astype(np.float64)
        usable = self._find_usable(lengths, scores[..., :n_neighbors], self._longest(moved))
        if usable is not None:
            return self._find_apart(queries, usable, n_neighbors, n_candidates, take)
        # What the error of the scores may have put behind the last neighbour, or before it.
        lowest = float(last.min())
        if len(queries) == 1 and lowest > -np.inf:
            error = self._score_error(moved, float(lengths[0]), lowest)
        else:
            error = self._score_error(moved, lengths[:, None], last)
        contends = scores >= np.maximum(last - 2 * error, np.finfo(scores.dtype).min)[..., None]
        n_contenders = max(n_neighbors, int(contends.sum(axis=2).max()))
        affinity, ranked = self.rank(queries, places[..., :n_contenders], n_neighbors, take)
        if n_contenders == n_candidates < max(self.order.sizes):
            # Something that was left out may stand above the last neighbour.
            unsure = torch.from_numpy(contends[..., -1].any(axis=1)).nonzero()[:, 0]
            if len(unsure):
                unsure = unsure.to(queries.device)
                affinity[unsure], ranked[unsure] = self._find_by_product(
                    block.take(unsure), n_neighbors, 2 * n_candidates, take
                )
        return affinity, ranked

    def _can_sketch(self, block: QueryBlock, n_neighbors: int) -> bool:
        """Check whether there are sketches, and their bounds hold for these queries."""
        moved = block.moved
        is_plain = moved.device.type == "cpu" and product_is_exact(moved)
        if self.sketch is None or not is_plain or self.order.smallest < n_neighbors:
            return False
        longest = self._longest(moved)
        if self.affinity.is_distance:
            # Distances from a query that is farther out than every example are rounded by more
            # than their scores err, and which examples tie depends on those that are compared.
            longest = min(longest, self.geometry.max_norm)
        return bool(block.norms.max() < longest)

    def _find_by_sketch(
        self, block: QueryBlock, n_neighbors: int, n_candidates: int, take: Take
    ) -> tuple[Tensor, Tensor]:
        """Find neighbours among the examples that sketches do not rule out."""
        assert self.sketch is not None
        queries, moved, norms = block
        # Scores differ from those relative to the centre by a constant of each query.
        constants = torch.mv(moved, self.geometry.center).mul_(self.geometry.unit)
        bounds = add_product(self._offsets, self.sketch(moved), self.sketch.examples)
        bounds += constants[:, None]
        promising = find_top_scores(bounds, self.order, n_neighbors)[1].flatten(1)
        known = self._scores_at(moved, promising).view(len(moved), -1, n_neighbors)
        last = known.amin(dim=2).numpy().astype(np.float64)
        # Bounds err as products do, and a little more since the basis is rounded as well.
        lengths = norms.numpy().astype(np.float64)[:, None]
        bar = last - 10 * self._score_error(moved, lengths, last)
        bars = torch.from_numpy(np.repeat(bar, self.order.sizes, axis=1))
        # A bound that is NaN rules out nothing.
        contends = (bounds < bars).logical_not_().scatter_(1, promising, True)
        is_short = contends.sum(dim=1) <= MAX_SHARE * contends.shape[1]
        if not is_short.any():
            return self._find_by_product(block, n_neighbors, n_candidates, take)
        affinity, places = self._allocate_found(queries, n_neighbors)
        for i in is_short.nonzero()[:, 0].tolist():
            left = contends[i].nonzero()[:, 0]
            affinity[i], places[i] = self._rank_some(queries[i : i + 1], left, n_neighbors, take)
        if not is_short.all():
            others = ~is_short
            affinity[others], places[others] = self._find_by_product(
                block.take(others), n_neighbors, n_candidates, take
            )
        return affinity, places

    def _rank_some(
        self, query: Tensor, places: Tensor, n_neighbors: int, take: Take
    ) -> tuple[Tensor, Tensor]:
        """Rank some examples, ascending by place, as :meth:`rank` does those of each class."""
        if not self.order.is_sorted:
            places = places[self.order.index[places].argsort()]
        exact = self.exact_affinities(query, places[None], take)[0]
        classes = torch.searchsorted(self.order.starts, places, right=True) - 1
        counts = classes.bincount(minlength=len(self.order.sizes))
        columns = torch.arange(len(places)) - (counts.cumsum(0) - counts)[classes]
        affinity = exact.new_full((len(counts), int(counts.max())), -torch.inf)
        affinity[classes, columns] = exact
        of_class = torch.zeros(affinity.shape, dtype=torch.int64)
        of_class[classes, columns] = places
        # Stable, so that ties stay in the order of their indices.
        ranking = affinity.sort(dim=1, descending=True, stable=True)
        best = ranking.indices[:, :n_neighbors]
        return ranking.values[:, :n_neighbors], of_class.gather(1, best)

    def _scores_at(self, moved: Tensor, places: Tensor) -> Tensor:
        scores = []
        for query, few in zip(moved * self.geometry.unit, places, strict=True):
            examples = self.store.examples.index_select(0, few).to(moved)
            scores.append(torch.addmv(self._offsets[few], examples, query))
        return torch.stack(scores)

    def _longest(self, queries: Tensor) -> float:
        # Squares of the norms are compared with scores, in double precision.
        limit = torch.finfo(queries.dtype).max / 16
        return min(limit / (self._reach + self.geometry.center_norm + 1), 2.0**500)

    def _find_usable(
        self, norms: NDArray[np.float64], top: NDArray[Any], longest: float
    ) -> NDArray[np.bool_] | None:
        """Check which queries have no score that may have overflowed; None if all of them."""
        limit = float(np.finfo(top.dtype).max) / 16
        # The highest scores come first, NaN before them.
        if norms.max() < longest and top[..., 0].max() < limit and top[..., -1].min() > -limit:
            return None
        within = (np.abs(top) < limit) | (top == -np.inf)
        usable: NDArray[np.bool_] = (norms < longest) & within.all(axis=(1, 2))
        return None if usable.all() else usable

    def _find_apart(
        self,
        queries: Tensor,
        usable: NDArray[np.bool_],
        n_neighbors: int,
        n_candidates: int,
        take: Take,
    ) -> tuple[Tensor, Tensor]:
        """Compare the queries whose scores overflow with every example."""
        mask = torch.from_numpy(usable).to(queries.device)
        affinity, places = self._allocate_found(queries, n_neighbors)
        affinity[~mask], places[~mask] = super().find(queries[~mask], n_neighbors, take)
        if usable.any():
            affinity[mask], places[mask] = self._find_block(
                queries[mask], n_neighbors, n_candidates, take
            )
        return affinity, places

    def _move_queries(self, queries: Tensor) -> Tensor:
        moved = queries - self.geometry.origin
        if self.geometry.query_scale != 1:
            moved.mul_(self.geometry.query_scale)
        return moved

    def _scores(self, moved: Tensor) -> Tensor:
        unit, examples = self.geometry.unit, self.store.examples
        scaled = moved if unit == 1 else moved * unit
        is_plain = examples.dtype == moved.dtype and examples.device == moved.device
        if is_plain and product_is_exact(scaled):
            return add_product(self._offsets, scaled, examples)
        return self._products(scaled).add_(self._offsets)

    def _products(self, queries: Tensor) -> Tensor:
        """Return products with the examples, in the queries' dtype, whatever theirs is."""
        exact, examples = product_is_exact(queries), self.store.examples
        wide = queries if exact else queries.double()
        if exact and examples.dtype == queries.dtype and examples.device == queries.device:
            return torch.mm(queries, examples.T)
        n_bytes = PIECE_BYTES if queries.device.type == "cpu" else BLOCK_BYTES
        pieces = self.store.pieces(wide, n_bytes)
        return torch.cat([torch.mm(wide, piece.T).to(queries) for piece in pieces], dim=1)

    def _score_error(self, moved: Tensor, norms: Numbers, scores: Numbers) -> Numbers:
        return self.affinity.score_error(self.geometry, moved, norms, scores)


class UnitLengthSearch(ProductSearch):
    """Neighbours by distance after division by the norms, among examples that are stored whole.

    Parameters
    ----------
    plain : ProductSearch
        By Euclidean distance, in full precision.
    order : ClassOrder
    lengths : torch.Tensor of shape (n_samples,)
        Norms of the examples, infinite for vectors of zeros.
    """

    DEVICE_TENSORS: ClassVar[tuple[str, ...]] = ("_offsets", "_lengths")

    def __init__(self, plain: ProductSearch, order: ClassOrder, lengths: Tensor) -> None:
        super().__init__(plain.affinity, order, plain.store, plain.geometry, plain._offsets)
        self._lengths, self._reach = lengths, 1.0

    def prepare(self, features: Tensor) -> Tensor:
        """Return features divided by their norms.

        Parameters
        ----------
        features : torch.Tensor of shape (n, n_features)

        Returns
        -------
        torch.Tensor of shape (n, n_features)
        """
        return normalize_rows(features)

    def reader(self, like: Tensor, recompute: Recompute | None) -> Take:
        """Return a function that reads examples, as ``Search.reader`` says."""
        if recompute is not None:
            return super().reader(like, recompute)
        return lambda places: normalize_rows(self.store.take(places, like))

    def _move_queries(self, queries: Tensor) -> Tensor:
        return queries

    def _scores(self, moved: Tensor) -> Tensor:
        # (s + shift) q / |x| - 1/2, which is minus half the squared distance but for 1/2.
        shifted = (moved * self.store.shift).sum(dim=1, keepdim=True)
        scores = self._products(moved).add_(shifted).div_(self._lengths)
        return scores.sub_(self._lengths.isfinite().to(scores), alpha=0.5)

    def _score_error(self, moved: Tensor, norms: Numbers, scores: Numbers) -> float:
        shift = float(norm(self.store.shift))
        return product_rounding(moved) * (2 + 2 * shift / float(self._lengths.min()))


def add_product(offsets: Tensor, queries: Tensor, examples: Tensor) -> Tensor:
    """Return offsets plus the products of queries and examples, the faster of two ways.

    Parameters
    ----------
    offsets : torch.Tensor of shape (n,)
    queries : torch.Tensor of shape (m, n_features)
    examples : torch.Tensor of shape (n, n_features)

    Returns
    -------
    torch.Tensor of shape (m, n)
    """
    is_few = len(queries) <= MAX_SPLIT and examples.nbytes >= MIN_SPLIT_BYTES
    if is_few and examples.device.type == "cpu" and examples.is_contiguous():
        n_threads = torch.get_num_threads()
        if split_is_faster(examples.shape[1], examples.dtype, n_threads):
            return add_split_product(offsets, queries, examples, n_threads)
    return torch.addmm(offsets, queries, examples.T)


def product_is_exact(tensor: Tensor) -> bool:
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
    backends: Any = torch.backends
    backend = backends.cuda if tensor.is_cuda else backends.mkldnn
    # Since torch 2.9; a setting that is not made is that of what it belongs to.
    owners = (getattr(backend, "matmul", None), backend, backends)
    settings = [getattr(owner, "fp32_precision", None) for owner in owners]
    if settings[0] is None:
        return torch.get_float32_matmul_precision() == "highest"
    made = [setting for setting in settings if setting not in (None, "none")]
    return not made or made[0] == "ieee"


def block_rows(queries: Tensor, n_scores: int, n_candidates: int) -> int:
    """Return the number of queries that are searched for at a time.

    Parameters
    ----------
    queries : torch.Tensor of shape (n, n_features)
    n_scores, n_candidates : int
        Number of scores of a query, and of candidates that are ranked.

    Returns
    -------
    int
        So many that they take a block, and at most half of scikit-learn's ``working_memory``.
    """
    budget = min(BLOCK_BYTES, int(get_config()["working_memory"] * 2**19))
    # The candidates' scores, places, order and copies of these.
    n_values = n_scores + queries.shape[1] + RANKED_VALUES * n_candidates
    return max(1, budget // (n_values * queries.element_size()))
