"""Affinities: how similar an antigen's features are to an example's (higher is more similar).

An affinity is an object of a class in ``AFFINITIES``. To add one, write a file with a class
derived from :class:`~sklearn_rails.neighbors.base.Affinity`, with a ``__call__`` and a docstring,
and add a line to the table: the defaults compare a query with every example. Affinities that a
matrix product approximates derive from :class:`~sklearn_rails.neighbors.base.ProductAffinity`
instead, and an index looks only at the most promising examples.

Non-finite affinities follow one rule everywhere. A cell whose features or affinity are NaN has an
affinity of minus infinity: it is not selected, not a parent and does not vote while other cells
have one. Plus infinity counts as the largest number of the dtype. A neighbour search refuses NaN,
and distances or products that the dtype cannot represent, since training examples and inputs are
finite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._validation import is_dense
from .base import (
    Affinity,
    DistanceAffinity,
    Numbers,
    ProductAffinity,
    keep_above_missing,
    product_rounding,
)
from .geometry import Geometry
from .norms import dtype_name, is_within, norm, normalize_rows

__all__ = [
    "AFFINITIES",
    "Affinity",
    "CallableAffinity",
    "Cosine",
    "Euclidean",
    "InnerProduct",
    "resolve_affinity",
]


class Euclidean(DistanceAffinity):
    """Minus the Euclidean distance.

    Right for distances that the dtype can represent, where their squares cannot be represented.

    Examples
    --------
    >>> import torch
    >>> from sklearn_rails.neighbors import Euclidean
    >>> Euclidean()(torch.tensor([[0.0, 0.0]]), torch.tensor([[[3.0, 4.0], [3e30, 4e30]]])).tolist()
    [[-5.0, -4.99...e+30]]
    """

    def __call__(
        self, antigens: Tensor, features: Tensor, *, overwrite_features: bool = False
    ) -> Tensor:
        """Compute affinities, as :meth:`Affinity.__call__` says."""
        out = features if overwrite_features else None
        return -norm(torch.sub(features, antigens[:, None], out=out))


class Cosine(DistanceAffinity):
    """Cosine of the angle between the features; 0 with a vector of zeros.

    An index stores features divided by their norms, whose distances order them as the cosine.

    Examples
    --------
    >>> import torch
    >>> from sklearn_rails.neighbors import Cosine
    >>> Cosine()(torch.tensor([[1.0, 0.0]]), torch.tensor([[[2.0, 0.0], [0.0, 3.0]]])).tolist()
    [[1.0, 0.0]]
    """

    # Scores are relative to the centre. Near it they tell vectors apart whose cosines are equal.
    bounds_own_rounding = False

    def __call__(
        self, antigens: Tensor, features: Tensor, *, overwrite_features: bool = False
    ) -> Tensor:
        """Compute affinities, as :meth:`Affinity.__call__` says."""
        out = features if overwrite_features else None
        lengths = norm(features)
        is_plain = is_within(lengths, torch.finfo(lengths.dtype).eps ** 4)
        features = features if is_plain else normalize_rows(features)
        products = torch.mul(features, normalize_rows(antigens)[:, None], out=out).sum(dim=2)
        return products / lengths if is_plain else products

    def prepare(self, features: Tensor) -> Tensor:
        """Return features divided by their norms.

        Parameters
        ----------
        features : torch.Tensor of shape (n, n_features)
            Of examples or queries.

        Returns
        -------
        torch.Tensor of shape (n, n_features)
            Zeros where the features are zeros.
        """
        return normalize_rows(features)

    def find_blank(self, features: Tensor) -> Tensor:
        """Select samples whose features are all zeros.

        Parameters
        ----------
        features : torch.Tensor of shape (n, n_features)
            Prepared.

        Returns
        -------
        torch.Tensor of shape (n,), bool
            Which samples they are.
        """
        return ~features.any(dim=1)

    def offsets(self, norms: Tensor, geometry: Geometry, blank: Tensor) -> Tensor:
        """Return minus half the squared norms of the examples, and less for zeros.

        Parameters
        ----------
        norms : torch.Tensor of shape (n_samples,)
            Distances of the stored examples from the centre, times the geometry's ``unit``.
        geometry : Geometry
            Of the stored examples.
        blank : torch.Tensor of shape (n_samples,), bool
            Examples that :meth:`Affinity.find_blank` selects.

        Returns
        -------
        torch.Tensor of shape (n_samples,)
            The offsets.
        """
        offsets = super().offsets(norms, geometry, blank)
        # Minus half a squared distance is the cosine, but for a constant, if both have length 1.
        # A vector of zeros is then half too near.
        far = torch.tensor(geometry.query_scale, dtype=offsets.dtype, device=offsets.device)
        offsets[blank] -= 0.5 * far.square()
        return keep_above_missing(offsets)


class InnerProduct(ProductAffinity):
    """Inner product of the features, which prefers large ones.

    Examples
    --------
    >>> import torch
    >>> from sklearn_rails.neighbors import InnerProduct
    >>> InnerProduct()(torch.tensor([[1.0, 2.0]]), torch.tensor([[[3.0, 4.0]]])).tolist()
    [[11.0]]
    """

    def __call__(
        self, antigens: Tensor, features: Tensor, *, overwrite_features: bool = False
    ) -> Tensor:
        """Compute affinities, as :meth:`Affinity.__call__` says."""
        out = features if overwrite_features else None
        return torch.mul(features, antigens[:, None], out=out).sum(dim=2)

    def offsets(self, norms: Tensor, geometry: Geometry, blank: Tensor) -> Tensor:
        """Return zeros: the product of a query and an example is the affinity.

        Parameters
        ----------
        norms : torch.Tensor of shape (n_samples,)
            Distances of the stored examples from the centre, times the geometry's ``unit``.
        geometry : Geometry
            Of the stored examples.
        blank : torch.Tensor of shape (n_samples,), bool
            Examples that :meth:`Affinity.find_blank` selects.

        Returns
        -------
        torch.Tensor of shape (n_samples,)
            The offsets.
        """
        return torch.zeros_like(norms)

    def score_error(
        self, geometry: Geometry, queries: Tensor, norms: Numbers, scores: Numbers
    ) -> Numbers:
        """Compute a bound of the rounding error of products.

        Parameters
        ----------
        geometry : Geometry
            Of the stored examples.
        queries : torch.Tensor of shape (n, n_features)
            Relative to the origin, and scaled.
        norms : ndarray of shape (n, 1), or float
            Norms of the queries.
        scores : ndarray of shape (n, n_classes), or float
            Of the last neighbour in each class; minus infinity where there is none. A float is
            the lowest of all classes, for a single query whose norm is a float as well.

        Returns
        -------
        ndarray that broadcasts to (n, n_classes), or float
            The bound. Of a float it holds for every score from there to that of the nearest.
        """
        error = product_rounding(queries) * geometry.max_norm + geometry.max_rounding_error
        return norms * error

    def check_queries(self, geometry: Geometry, norms: Tensor) -> None:
        """Check that the products of queries and examples do not underflow.

        Parameters
        ----------
        geometry : Geometry
            Of the stored examples.
        norms : torch.Tensor of shape (n,)
            Norms of the queries.

        Raises
        ------
        ValueError
            If the products of a query with all examples vanish.
        """
        info = torch.finfo(norms.dtype)
        # As they are without the scale of half precision, so that all storages refuse the same.
        true_norms = norms.double() / geometry.scale**2
        too_small = (true_norms > 0) & (true_norms * geometry.max_norm < info.tiny / info.eps)
        if geometry.max_norm > 0 and too_small.any():
            raise ValueError(
                f"{self.parameter} of some rows and all training rows is below what "
                f"{dtype_name(norms)} holds; scale X, or use dtype='float64'."
            )


class CallableAffinity(Affinity):
    """An affinity that a function computes.

    Parameters
    ----------
    function : callable
        Takes two tensors of shape (m, n_features) and returns one of shape (m,).

    Examples
    --------
    >>> import torch
    >>> from sklearn_rails.neighbors import CallableAffinity
    >>> manhattan = CallableAffinity(lambda a, b: -(a - b).abs().sum(dim=1))
    >>> manhattan(torch.tensor([[0.0, 0.0]]), torch.tensor([[[3.0, 4.0]]])).tolist()
    [[-7.0]]
    """

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.function = function

    @property
    def parameter(self) -> str:
        """The parameter as error messages write it, with the function."""
        return f"affinity={self.function!r}"

    def __call__(
        self, antigens: Tensor, features: Tensor, *, overwrite_features: bool = False
    ) -> Tensor:
        """Compute affinities, as :meth:`Affinity.__call__` says.

        Raises
        ------
        ValueError
            If the function returns something else, or NaN for finite features.
        """
        n, k, d = features.shape
        antigens, features = antigens.repeat_interleave(k, dim=0), features.reshape(n * k, d)
        given: Any = self.function(antigens, features)
        if not is_dense(given) or given.shape != (n * k,):
            got = tuple(given.shape) if is_dense(given) else type(given).__name__
            raise ValueError(
                f"affinity must give a tensor of shape (n,) for two of shape (n, n_features); for "
                f"n={n * k} it gave {got}."
            )
        if given.is_complex():
            raise ValueError(f"{self.parameter} must give real numbers, it gave {given.dtype}.")
        missing = given.isnan()
        if missing.any():
            finite = antigens[missing].isfinite() & features[missing].isfinite()
            if finite.all(1).any():
                raise ValueError(
                    f"{self.parameter} gave NaN for features that are finite; it must give a "
                    "number for any two rows, also for two that are the same."
                )
        return given.to(features.dtype).reshape(n, k)


# The affinities by name.
AFFINITIES: dict[str, type[Affinity]] = {
    "euclidean": Euclidean,
    "cosine": Cosine,
    "inner_product": InnerProduct,
}


def resolve_affinity(affinity: str | Callable[[Tensor, Tensor], Tensor] | Affinity) -> Affinity:
    """Return the affinity object that a parameter means.

    Parameters
    ----------
    affinity : str, callable or Affinity
        A name in ``AFFINITIES``, a function as :class:`CallableAffinity` takes it, or an object,
        which is returned as it is.

    Returns
    -------
    Affinity
        The object.

    Raises
    ------
    ValueError
        If there is no such name.

    Examples
    --------
    >>> from sklearn_rails.neighbors import resolve_affinity
    >>> resolve_affinity("cosine")
    Cosine()
    """
    if isinstance(affinity, Affinity):
        return affinity
    if isinstance(affinity, str) and affinity in AFFINITIES:
        return AFFINITIES[affinity]()
    if callable(affinity):
        return CallableAffinity(affinity)
    raise ValueError(
        f"affinity={affinity!r} must be one of {sorted(AFFINITIES)}, a callable or an Affinity."
    )
