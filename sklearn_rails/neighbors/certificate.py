"""Radii within which the class of the nearest example cannot change."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .store import BLOCK_BYTES, ExampleStore

# Number of nearest examples of the predicted class that the bound is maximized over. With 1, 5 and
# 100 the mean radius in MNIST's pixels is 1.344, 1.359 and 1.359 (200 images, 9,000 examples).
N_OWN = 5

# Number of examples of other classes that are looked at first: of the lowest bounds.
N_FIRST = 16


@torch.no_grad()
def certified_radii(
    queries: Tensor, store: ExampleStore, classes: Tensor, predicted: Tensor
) -> NDArray[np.float64]:
    """Bound the distances to the next places with another nearest class from below.

    No point nearer to a query x than (d_j^2 - d_i^2) / (2 ||t_i - t_j||) is nearer to the example
    t_j than to t_i, where d are their distances from x: that is the distance of x from the
    hyperplane between the two. The bound is the minimum over the examples j of other classes of the
    maximum over some examples i of the predicted class.

    Rounding is taken off: that of the distances which a search compares, of queries that are cast
    to the dtype of the search, and of this computation.

    Parameters
    ----------
    queries : torch.Tensor of shape (n, n_features)
        In the dtype in which a search compares.
    store : ExampleStore
        Examples in full precision.
    classes : torch.Tensor of shape (n_examples,), int64
        Of the examples, in the order in which they are stored.
    predicted : torch.Tensor of shape (n,), int64
        Class of the example that a search finds.

    Returns
    -------
    ndarray of shape (n,), float64
        0 or more; infinite where all examples are of one class.
    """
    quick, error = _squared_distances(queries, store)
    unit = _rounding_unit(queries)
    return np.array(
        [
            _certify(query.double(), store, squares, classes == own, error, unit)
            for query, squares, own in zip(queries, quick, predicted, strict=True)
        ]
    )


def _certify(
    query: Tensor, store: ExampleStore, quick: Tensor, is_own: Tensor, error: float, unit: float
) -> float:
    """Bound the radius of one query, given squared distances and a bound of their error."""
    others = (~is_own).nonzero()[:, 0]
    if not len(others):
        return np.inf
    n_own = min(N_OWN, int(is_own.sum()))
    places = quick.masked_fill(~is_own, torch.inf).topk(n_own, largest=False).indices
    own = store.take(places, query)
    own_squares = (own - query).square().sum(dim=1)
    nearest_other = store.take(others[quick[others].argmin()][None], query)[0]
    # There the class is another, or tied: no radius is larger.
    limit = float(torch.linalg.vector_norm(nearest_other - query))
    # A search compares distances that err by half as many units as a sum of squares of differences,
    # and one more. The squares of two that it cannot tell apart differ by at most this.
    of_search = (len(query) / 2 + 4) * unit
    share = ((1 + of_search) / (1 - of_search)) ** 2 - 1
    slack = share * (own_squares.sqrt() + limit).square()
    # Lower bounds of the bisectors' distances, since ||t_i - t_j|| is at most d_i + d_j.
    squares = quick[others].double()
    reach = own_squares.min().sqrt() + (squares + error).sqrt()
    low = (squares - error - own_squares.min() - slack[own_squares.argmin()]) / (2 * reach)
    low = low.nan_to_num_(nan=-torch.inf)  # where squares of the queries' dtype overflow
    rounding = 4 * len(query) * torch.finfo(torch.float64).eps

    def bound(members: Tensor) -> float:
        examples = store.take(others[members], query)
        squares = (examples - query).square().sum(dim=1) * (1 - rounding)
        between = torch.cdist(own, examples, compute_mode="donot_use_mm_for_euclid_dist")
        margins = squares - (own_squares * (1 + rounding) + slack)[:, None]
        bounds = margins / (2 * between).clamp(min=torch.finfo(between.dtype).tiny)
        # NaN where squares overflow.
        return float(bounds.nan_to_num_(nan=0).amax(dim=0).min())

    # Those of low bounds lower the radius, so that few others are left to look at.
    radius = min(limit, bound(low.topk(min(N_FIRST, len(low)), largest=False).indices))
    left = (low < radius).nonzero()[:, 0]
    for members in left.split(max(1, BLOCK_BYTES // (8 * (len(query) + n_own)))):
        radius = min(radius, bound(members))
    of_cast = 2 * unit * (float(torch.linalg.vector_norm(query)) + limit)
    return max(0.0, radius * (1 - rounding) - of_cast)


def _rounding_unit(queries: Tensor) -> float:
    """Return the relative error of one rounding."""
    return torch.finfo(queries.dtype).eps / 2


def _squared_distances(queries: Tensor, store: ExampleStore) -> tuple[Tensor, float]:
    """Return squared distances by a product, clipped at 0, and a bound of their error."""
    lengths = queries.square().sum(dim=1)
    squares = lengths.new_empty(len(queries), len(store.examples))
    step = max(1, BLOCK_BYTES // queries[0].nbytes)
    largest = 0.0
    for first in range(0, squares.shape[1], step):
        members = slice(first, min(first + step, squares.shape[1]))
        examples = store.read(members).to(queries)
        norms = examples.square().sum(dim=1)
        largest = max(largest, float(norms.max()))
        squares[:, members] = torch.addmm(norms, queries, examples.T, alpha=-2)
    total = (float(lengths.max()) ** 0.5 + largest**0.5) ** 2
    error = 4 * (queries.shape[1] + 4) * _rounding_unit(queries) * total
    return squares.add_(lengths[:, None]).clamp_(min=0), error
