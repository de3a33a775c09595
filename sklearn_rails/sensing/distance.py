"""Detectors by distances of neighbours: that of the k-th one, and intrinsic dimensionality."""

from typing import ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray

from ..neighbors.norms import norm
from ..neighbors.votes import nearest
from .base import BLOCK_BYTES, NeighborDetector
from .samples import CleanSamples, Query


class Distance(NeighborDetector):
    """Distance of the k-th neighbour on L2-normalised features (Sun et al. 2022).

    Attributes
    ----------
    lengths_ : dict of str to torch.Tensor of shape (n,)
        Norms of the clean samples' features in each layer, class after class; infinite for zeros.
    """

    # Distances of normalised features are ordered by their cosines.
    affinity: ClassVar[str | None] = "cosine"

    def fit(self, clean: CleanSamples) -> Self:
        """Store the clean samples and their norms."""
        self.lengths_ = {}
        for layer in clean.neighbors:
            features, _ = clean.examples(layer)
            step = max(1, BLOCK_BYTES // features[0].nbytes)
            lengths = torch.cat([norm(part) for part in features.split(step)])
            self.lengths_[layer] = lengths.masked_fill(lengths == 0, torch.inf)
        return super().fit(clean)

    def score(self, query: Query) -> NDArray[np.float64]:
        """Score samples: an ndarray of shape (n, n_layers), float64."""
        columns = []
        for layer, features in query.features.items():
            lengths = self.lengths_[layer].to(features.device)
            neighbors = self.neighbors_[layer].pooled(features.device, lengths)
            distance, _ = nearest(neighbors, features, self.n_neighbors_, query.self_index)
            columns.append(distance[:, -1])
        return torch.stack(columns, dim=1).cpu().numpy().astype(np.float64)


class LocalIntrinsicDimensionality(NeighborDetector):
    """Local intrinsic dimensionality of the k neighbours (Ma et al. 2018).

    It is infinite where all neighbours are equally far, and 0 where one of them, or all, are at
    distance 0: the estimate's limits from below and from above.
    """

    # With a single one, no distances can be compared.
    min_neighbors: ClassVar[int] = 2

    def score(self, query: Query) -> NDArray[np.float64]:
        """Score samples: an ndarray of shape (n, n_layers), float64."""
        columns = []
        for _, distance, _ in self.nearest(query):
            # The last term is always 0.
            mean = -(distance / distance[:, -1:]).log().mean(dim=1)
            mean = mean.masked_fill(distance[:, 0] == 0, torch.inf)
            # abs, since minus zero has an inverse of its own.
            columns.append(1 / mean.abs())
        return torch.stack(columns, dim=1).numpy()
