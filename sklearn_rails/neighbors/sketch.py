"""Short vectors whose products bound those of long ones: they rule out most examples."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from .._conformal import sample_rows
from .base import product_rounding
from .geometry import DeviceTensors, Geometry
from .norms import norm
from .order import ClassOrder
from .store import BLOCK_BYTES, ExampleStore

# Features of at least so many values get sketches: projections on principal directions, and the
# norm of the rest. Sketches and directions each take at most MAX_SHARE of the features' memory.
MIN_FEATURES, MAX_SIZE, MAX_SHARE = 512, 512, 1 / 32

# Number of examples that the directions are estimated from, and of others by which the size is
# chosen. With 256 instead of 1,024 of MNIST's 10,000 in conv1, four times as many are left over.
SAMPLE_ROWS = 1024

# Number of those others that stand for queries.
SAMPLE_QUERIES = 64

# Time of comparing an example that sketches leave over in full, in times of one in a product with
# all: it is copied first, and ranked. And the share of the product's time that sketches may take.
TIME_OF_LEFT, MAX_TIME = 8, 0.5

# Number of samples of a class that the share is estimated from, at least.
MIN_MEMBERS = 8


class Sketch(DeviceTensors):
    """Short vectors of examples, whose products with those of queries are never less.

    A vector is split into its projection on a few orthonormal directions and the rest. The product
    of two vectors is that of their projections plus that of their rests, which is at most the
    product of the norms of the rests.

    Parameters
    ----------
    basis : torch.Tensor of shape (n_features, size - 1)
        Orthonormal columns.
    """

    DEVICE_TENSORS: ClassVar[tuple[str, ...]] = ("basis", "examples")

    examples: Tensor

    def __init__(self, basis: Tensor) -> None:
        self.basis = basis

    def __call__(self, vectors: Tensor) -> Tensor:
        """Return the sketches of vectors.

        Parameters
        ----------
        vectors : torch.Tensor of shape (n, n_features)
            Relative to the centre, times the geometry's ``unit``.

        Returns
        -------
        torch.Tensor of shape (n, size)
        """
        return _with_rest(vectors @ self.basis, norm(vectors), product_rounding(vectors))


def _with_rest(projected: Tensor, lengths: Tensor, rounding: float) -> Tensor:
    """Append the norm of what a projection leaves of a vector, rounded up."""
    tiny = torch.finfo(lengths.dtype).tiny
    share = norm(projected) / lengths.clamp(min=tiny)
    rest = lengths * (1 - share.square()).clamp_(min=0).add_(2 * rounding).sqrt_()
    return torch.cat([projected, rest[:, None]], dim=1)


@torch.no_grad()
def make_sketch(store: ExampleStore, geometry: Geometry, order: ClassOrder) -> Sketch | None:
    """Return sketches of the stored examples, or None where they would not save time.

    Parameters
    ----------
    store : ExampleStore
    geometry : Geometry
    order : ClassOrder

    Returns
    -------
    Sketch or None
    """
    n, d = store.examples.shape
    like = geometry.center
    n_rows = min(SAMPLE_ROWS, n // 2, BLOCK_BYTES // (d * like.element_size()))
    largest = min(int(MAX_SHARE * min(n, d)), MAX_SIZE, n_rows // 2)
    if d < MIN_FEATURES or largest < 2 or like.device.type != "cpu":
        return None

    def read(rows: np.ndarray) -> Tensor:
        return (store.examples[rows].to(like) - geometry.center).mul_(geometry.unit)

    drawn = sample_rows(n, 2 * n_rows, rng=0)
    sample, others = read(drawn[::2]), torch.from_numpy(drawn[1::2].copy())
    sample /= sample.abs().max().clamp(min=torch.finfo(sample.dtype).tiny)
    directions = torch.linalg.eigh((sample @ sample.T).double()).eigenvectors.flip(1)
    size = choose_size(
        sample.T @ directions[:, : largest - 1].to(like),
        read(others.numpy()),
        torch.searchsorted(order.starts, others, right=True),
        n,
    )
    if size is None:
        return None
    wide = sample.double().T @ directions[:, : size - 1]
    sketch = Sketch(torch.linalg.qr(wide).Q.to(like))
    del sample, wide
    sketch.examples = torch.cat(
        [
            sketch((piece - geometry.center).mul_(geometry.unit))
            for piece in store.pieces(like, BLOCK_BYTES)
        ]
    )
    return sketch


def choose_size(basis: Tensor, vectors: Tensor, classes: Tensor, n_examples: int) -> int | None:
    """Choose the size of sketches that saves most time, by a sample.

    Parameters
    ----------
    basis : torch.Tensor of shape (n_features, largest_size - 1)
        Orthogonal directions, the most important first.
    vectors : torch.Tensor of shape (n, n_features)
        Examples that the directions were not estimated from.
    classes : torch.Tensor of shape (n,), int64
        Of these examples.
    n_examples : int
        Number of all examples.

    Returns
    -------
    int or None
        None if no size saves time enough.
    """
    projected = vectors @ (basis / norm(basis.T).clamp(min=torch.finfo(basis.dtype).tiny))
    lengths = norm(vectors)
    queries = torch.arange(min(SAMPLE_QUERIES, len(vectors)))
    half_squares = lengths.square() / 2
    scores = vectors[queries] @ vectors.T - half_squares
    groups = [(classes == c).nonzero()[:, 0] for c in classes.unique().tolist()]
    groups = [members for members in groups if len(members) >= MIN_MEMBERS]
    times: dict[int, float] = {}
    size = basis.shape[1] + 1
    while groups and size >= 2 and len(times) < 4:
        short = _with_rest(projected[:, : size - 1], lengths, product_rounding(vectors))
        bounds = short[queries] @ short.T - half_squares
        bounds[queries, queries] = -torch.inf
        left = []
        for members in groups:
            bound, score = bounds[:, members], scores[:, members]
            bar = score.gather(1, bound.argmax(dim=1, keepdim=True))
            # Besides the nearest one itself.
            left.append((bound >= bar).double().mean() - 1 / len(members))
        share = float(torch.stack(left).mean())
        times[size] = size / vectors.shape[1] + size / n_examples + TIME_OF_LEFT * share
        size //= 2
    best = min(times, key=times.__getitem__, default=None)
    return best if best is not None and times[best] <= MAX_TIME else None
