"""What every search for neighbours shares: ranking candidates, and measuring the examples."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .._validation import is_dense
from .base import Affinity
from .geometry import DeviceTensors, Geometry
from .norms import dtype_name, norm
from .order import ClassOrder
from .store import BLOCK_BYTES, ExampleStore

# Bytes of examples that are compared with queries at a time, on a CPU: they stay in its caches.
CACHE_BYTES = 2**20

# A feature is stored as differences from its typical value if that is so many times its spread:
# 3 of the 24 bits of float32.
SHIFT_RATIO = 8

# Typical distances between 2 to minus this power and 2 to this power are compared as they are:
# their squares leave 86 of the 126 binary orders of magnitude of float32 for other examples.
MAX_EXPONENT = 20

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# From places among the stored examples, (m,), to their features, (m, n_features).
Take = Callable[[Tensor], Tensor]
# The same from positions among those of fit.
Recompute = Callable[[Tensor], Tensor]


class Search(DeviceTensors):
    """Neighbours of queries among stored examples: the part that does not depend on the algorithm.

    Parameters
    ----------
    affinity : Affinity
    order : ClassOrder
    store : ExampleStore
    geometry : Geometry
    """

    def __init__(
        self, affinity: Affinity, order: ClassOrder, store: ExampleStore, geometry: Geometry
    ) -> None:
        self.affinity = affinity
        self.order = order
        self.store = store
        self.geometry = geometry

    def find(self, queries: Tensor, n_neighbors: int, take: Take) -> tuple[Tensor, Tensor]:
        """Find the neighbours of each class.

        Parameters
        ----------
        queries : torch.Tensor of shape (n, n_features)
            Prepared.
        n_neighbors : int
        take : callable
            As :meth:`reader` returns it.

        Returns
        -------
        affinity : torch.Tensor of shape (n, n_classes, n_neighbors)
            Highest first; minus infinity where a class has no more.
        places : torch.Tensor of shape (n, n_classes, n_neighbors), int64
            Among the stored examples; -1 where there is none.
        """
        raise NotImplementedError

    def move_to(self, device: torch.device) -> None:
        """Move to a device.

        Parameters
        ----------
        device : torch.device
        """
        if self.order.index.device != device:
            super().move_to(device)
            self.order.move_to(device)
            self.store.move_to(device)
            self.geometry.move_to(device)

    def prepare(self, features: Tensor) -> Tensor:
        """Return features as they are compared.

        Parameters
        ----------
        features : torch.Tensor of shape (n, n_features)

        Returns
        -------
        torch.Tensor of shape (n, n_features)
        """
        return self.affinity.prepare(features)

    def reader(self, like: Tensor, recompute: Recompute | None) -> Take:
        """Return a function that reads examples in full precision, prepared.

        Parameters
        ----------
        like : torch.Tensor
            With the device and dtype that are needed.
        recompute : callable or None
            Computes features anew, for positions among those of ``fit``.

        Returns
        -------
        callable
            The features may be overwritten.
        """
        if recompute is not None:
            return lambda places: self._recompute(places, recompute)
        return lambda places: self.store.take(places, like)

    def _recompute(self, places: Tensor, recompute: Recompute) -> Tensor:
        features = recompute(self.order.index[places])
        expected = (len(places), self.store.examples.shape[1])
        is_usable = is_dense(features) and features.dtype in FLOATS
        if not is_usable or features.shape != expected:
            got = f"one of shape {tuple(features.shape)}" if is_usable else type(features).__name__
            raise ValueError(f"recompute must return floats of shape {expected}, got {got}.")
        return self.prepare(features.contiguous())

    def rank(
        self, queries: Tensor, places: Tensor, n_neighbors: int, take: Take
    ) -> tuple[Tensor, Tensor]:
        """Sort candidates by their exact affinity, ties by index, and keep the best.

        Parameters
        ----------
        queries : torch.Tensor of shape (n, n_features)
        places : torch.Tensor of shape (n, n_classes, n_candidates), int64
            -1 where there is none.
        n_neighbors : int
        take : callable

        Returns
        -------
        affinity, places
            As :meth:`find` returns them.
        """
        # A stable sort settles ties if the candidates come in the order of their indices.
        places = self.order.sort_places(places)
        exact = self.exact_affinities(queries, places.clamp(min=0).flatten(1), take)
        exact = exact.reshape(places.shape).masked_fill_(places < 0, -torch.inf)
        ranking = exact.sort(dim=2, descending=True, stable=True)
        best = ranking.indices[..., :n_neighbors]
        return ranking.values[..., :n_neighbors], places.gather(2, best)

    def exact_affinities(self, queries: Tensor, places: Tensor, take: Take) -> Tensor:
        """Compute the affinities of queries and candidates one by one.

        Parameters
        ----------
        queries : torch.Tensor of shape (n, n_features)
        places : torch.Tensor of shape (n, k), int64
        take : callable

        Returns
        -------
        torch.Tensor of shape (n, k)

        Raises
        ------
        ValueError
            If they are not finite, or not of that shape.
        """
        n, k = places.shape
        # All candidates of some queries at a time, or else some of those of one query.
        n_examples = max(1, CACHE_BYTES // queries[0].nbytes)
        if n * k <= n_examples:
            return self.affinity.check_finite(self._affinities(queries, places, take))
        n_rows, n_columns = max(1, n_examples // k), min(k, n_examples)
        exact = queries.new_empty(n, k)
        for top in range(0, n, n_rows):
            rows = slice(top, top + n_rows)
            for left in range(0, k, n_columns):
                part = places[rows, left : left + n_columns]
                given = self._affinities(queries[rows], part, take)
                exact[rows, left : left + n_columns] = given
        return self.affinity.check_finite(exact)

    def _affinities(self, queries: Tensor, places: Tensor, take: Take) -> Tensor:
        examples = take(places.flatten()).view(*places.shape, -1)
        given = self.affinity(queries, examples, overwrite_features=True)
        if given.shape != places.shape:
            raise ValueError(
                f"{self.affinity.parameter} must give a tensor of shape {tuple(places.shape)}, it "
                f"gave {tuple(given.shape)}."
            )
        return given


def measure_geometry(store: ExampleStore, affinity: Affinity) -> tuple[Geometry, Tensor]:
    """Measure where the examples of a full store lie; check them, and shift them if that helps.

    Parameters
    ----------
    store : ExampleStore
        Features that are far from zero are stored as differences from a constant.
    affinity : Affinity

    Returns
    -------
    geometry : Geometry
    norms : torch.Tensor of shape (n_samples,)
        Distances of the stored examples from the centre, times the geometry's ``unit``.

    Raises
    ------
    ValueError
        If an example is not finite, or its norm is not.
    """
    center, unit, sample = torch.zeros_like(store.shift), 1.0, store.sample()
    if affinity.is_distance and not store.needs_recompute:
        # Distances do not feel a shift, rounding does. A median does not feel a single example.
        center = sample.median(dim=0).values
        spread = (sample - center).abs().median(dim=0).values
        far = (center.abs() > SHIFT_RATIO * spread).nonzero()[:, 0]
        store.shift_features(far, center[far])
        center = center - store.shift
        # A power of two rounds nothing.
        lengths = norm(sample - store.shift - center)
        lengths = lengths[lengths > 0]  # most examples may be at the centre
        typical = float(lengths.median()) if len(lengths) else 0.0
        exponent = np.frexp(typical)[1] if 0 < typical < np.inf else 0
        if abs(exponent) > MAX_EXPONENT:
            # With room for distances that are 2**28 times the typical one.
            furthest = np.frexp(torch.finfo(center.dtype).max)[1] - 28
            unit = 2.0 ** -float(np.clip(exponent, -furthest, furthest))
    norms = []
    for piece in store.pieces(store.shift, BLOCK_BYTES):
        norms.append(norm((piece - center).mul_(unit)))
        if not bool(torch.isfinite(norm(piece)).all()):
            raise ValueError(
                f"The features of some training rows are not finite, or beyond what "
                f"{dtype_name(piece)} holds; scale X, or use dtype='float64'."
            )
    geometry = Geometry(
        # A feature is either stored as differences or has a centre, so the sum rounds nothing.
        origin=store.shift + center,
        center=center,
        center_norm=float(norm(center)) * unit,
        scale=store.scale,
        unit=unit,
        max_norm=max(float(part.max()) for part in norms),
        max_rounding_error=store.max_rounding_error,
    )
    return geometry, torch.cat(norms)
