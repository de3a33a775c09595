"""What a nearest-neighbour search must know of an affinity: the classes to derive one from."""

from __future__ import annotations

import re
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from .geometry import Geometry
from .norms import dtype_name

# A float, or an array of float64.
Numbers: TypeAlias = Any


class Affinity:
    """Similarity of features, with all that a nearest-neighbour search must know of it.

    A subclass needs only ``__call__``. Equal types with equal attributes are equal.

    Attributes
    ----------
    name : str
        Key in ``AFFINITIES``. The class's name in snake case, unless a subclass sets it.
    is_distance : bool
        Whether the affinity orders examples as minus a Euclidean distance between prepared
        features does: then they may be centred, and indexed by trees.
    permutation_invariant : bool
        Whether reordering the features of both sides in the same way changes nothing but
        rounding. True saves a copy of features that a network gives channels last.
    has_quick_score : bool
        Whether a matrix product finds candidates, as in :class:`ProductAffinity`.

    Examples
    --------
    >>> import numpy as np, torch
    >>> from sklearn_rails.neighbors import Affinity, ClassNeighbors
    >>> class Chebyshev(Affinity):
    ...     def __call__(self, antigens, features, *, overwrite_features=False):
    ...         return -(features - antigens[:, None]).abs().amax(dim=2)
    >>> examples = torch.tensor([[0.0, 0.0], [3.0, 1.0], [2.0, 2.0]])
    >>> neighbors = ClassNeighbors(Chebyshev()).fit(examples, np.zeros(3, int), n_classes=1)
    >>> affinity, index = neighbors.kneighbors(torch.tensor([[1.0, 0.0]]), n_neighbors=3)
    >>> affinity.tolist(), index.tolist()
    ([[[-1.0, -2.0, -2.0]]], [[[0, 1, 2]]])
    """

    name: str = "affinity"
    is_distance: bool = False
    permutation_invariant: bool = False
    has_quick_score: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            cls.name = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()

    def __call__(
        self, antigens: Tensor, features: Tensor, *, overwrite_features: bool = False
    ) -> Tensor:
        """Compute the affinities of each antigen with its own candidates.

        Parameters
        ----------
        antigens : torch.Tensor of shape (n, n_features)
        features : torch.Tensor of shape (n, k, n_features)
        overwrite_features : bool, default=False
            Whether ``features`` may be used as scratch space, which avoids an allocation.

        Returns
        -------
        torch.Tensor of shape (n, k)
        """
        raise NotImplementedError(f"{type(self).__name__} needs a method __call__.")

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(type(self))

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({values})"

    @property
    def parameter(self) -> str:
        """The parameter as error messages write it, such as ``affinity='cosine'``."""
        return f"affinity={self.name!r}"

    def prepare(self, features: Tensor) -> Tensor:
        """Return features as an index stores and compares them: by default unchanged.

        Parameters
        ----------
        features : torch.Tensor of shape (n, n_features)
            Of examples or queries.

        Returns
        -------
        torch.Tensor of shape (n, n_features)
            The prepared features.
        """
        return features

    def find_blank(self, features: Tensor) -> Tensor:
        """Select prepared features that are equally similar to everything: by default none.

        Parameters
        ----------
        features : torch.Tensor of shape (n, n_features)
            Prepared.

        Returns
        -------
        torch.Tensor of shape (n,), bool
            Which samples they are.
        """
        return torch.zeros(len(features), dtype=torch.bool, device=features.device)

    def check_finite(self, affinities: Tensor) -> Tensor:
        """Check the affinities of queries and examples, all of them finite.

        Parameters
        ----------
        affinities : torch.Tensor
            May be overwritten.

        Returns
        -------
        torch.Tensor
            Finite.

        Raises
        ------
        ValueError
            As :meth:`handle_non_finite` raises it.
        """
        low, high = torch.aminmax(affinities)
        if -torch.inf < low.item() <= high.item() < torch.inf:
            return affinities
        return self.handle_non_finite(affinities)

    def handle_non_finite(self, affinities: Tensor) -> Tensor:
        """Replace infinities by the largest numbers of the dtype, and refuse NaN.

        Parameters
        ----------
        affinities : torch.Tensor
            Overwritten.

        Returns
        -------
        torch.Tensor
            The same tensor, finite.

        Raises
        ------
        ValueError
            If there are NaN.
        """
        if affinities.isnan().any():
            raise ValueError(f"{self.parameter} of some rows and training rows is NaN.")
        largest = torch.finfo(affinities.dtype).max
        return affinities.clamp_(-largest, largest)


class ProductAffinity(Affinity):
    """An affinity that a matrix product approximates, up to a known rounding error.

    The score of an example is the product of the prepared query and the stored example, plus an
    offset of the example. Among the examples of a query, scores are in the order of the affinity
    but for their error.

    Attributes
    ----------
    bounds_own_rounding : bool
        Whether :meth:`score_error` is at least what rounds the affinity itself. Then the examples
        that a query is compared with in full do not depend on how scores are computed, and
        sketches may rule out most of them.
    """

    has_quick_score = True
    bounds_own_rounding: bool = True
    permutation_invariant = True

    def offsets(self, norms: Tensor, geometry: Geometry, blank: Tensor) -> Tensor:
        """Return what is added to the product of a query and each example.

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
        raise NotImplementedError

    def score_error(
        self, geometry: Geometry, queries: Tensor, norms: Numbers, scores: Numbers
    ) -> Numbers:
        """Compute a bound of the rounding error of scores near those of the last neighbours.

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
        raise NotImplementedError

    def check_queries(self, geometry: Geometry, norms: Tensor) -> None:
        """Check that the affinities of queries do not underflow: by default they cannot.

        Parameters
        ----------
        geometry : Geometry
            Of the stored examples.
        norms : torch.Tensor of shape (n,)
            Norms of the queries.

        Raises
        ------
        ValueError
            If they may.
        """

    def handle_non_finite(self, affinities: Tensor) -> Tensor:
        """Raise the error for affinities that are not finite.

        Parameters
        ----------
        affinities : torch.Tensor
            Some of them not finite.

        Raises
        ------
        ValueError
            Always: of finite features, that the dtype can compare, they are finite.
        """
        raise ValueError(
            f"{self.parameter} of some rows and training rows is not finite, or beyond what "
            f"{dtype_name(affinities)} holds; scale X, or use dtype='float64'."
        )


class DistanceAffinity(ProductAffinity):
    """An affinity in the order of minus the Euclidean distance of prepared features.

    The score is minus half the squared distance, but for a constant of each query.
    """

    is_distance = True

    def offsets(self, norms: Tensor, geometry: Geometry, blank: Tensor) -> Tensor:
        """Return minus half the squared norms of the examples.

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
        return keep_above_missing(norms.square() / -2)

    @np.errstate(over="ignore")  # with an infinite bound every example is compared
    def score_error(
        self, geometry: Geometry, queries: Tensor, norms: Numbers, scores: Numbers
    ) -> Numbers:
        """Compute a bound of the rounding error of scores near those of the last neighbours.

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
        unit, center = product_rounding(queries), geometry.center_norm
        near = np.minimum(4 * norms, geometry.max_norm)
        error = (norms + near) * near + norms * center
        inner: Numbers = 0.0
        if center > 0:
            inner = torch.mv(queries, geometry.center).cpu().numpy().astype(np.float64)
            inner = inner.item() if isinstance(norms, float) else inner[:, None]
        # Scores of examples that are more than 4 times as far from the centre as the query, which
        # are below -4 |query|^2, err by 10 units of themselves at most.
        far = abs(scores - inner * geometry.unit) - 3 * norms * norms
        error = error + 40 * far * (far > 0)
        error = unit * error + queries.shape[1] * torch.finfo(queries.dtype).tiny
        rounding = geometry.max_rounding_error
        if rounding == 0:
            return error
        # An example that is e away from its true place has a distance that errs by e.
        square = norms * norms - 2 * scores
        return error + rounding * ((square * (square > 0)) ** 0.5 + rounding)


def keep_above_missing(offsets: Tensor) -> Tensor:
    """Raise offsets to an eighth of the lowest number: minus infinity marks a missing example.

    Parameters
    ----------
    offsets : torch.Tensor
        Overwritten.

    Returns
    -------
    torch.Tensor
        The same tensor.
    """
    return offsets.clamp_(min=-torch.finfo(offsets.dtype).max / 8)


def product_rounding(queries: Tensor) -> float:
    """Return the relative rounding error of products with vectors: 4 eps sqrt(n_features).

    A blocked sum of d terms errs by about sqrt(d) units, not by the d of a plain one.

    Parameters
    ----------
    queries : torch.Tensor of shape (n, n_features)

    Returns
    -------
    float
    """
    return float(4 * torch.finfo(queries.dtype).eps * queries.shape[1] ** 0.5)
