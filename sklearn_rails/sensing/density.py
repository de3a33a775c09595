"""A detector by the density of the predicted class."""

from typing import ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray

from .base import BLOCK_BYTES, NeighborDetector, in_double, soft_score_of_prediction
from .samples import TYPICAL_SAMPLES, CleanSamples, Query

# Maximum rounding error of squared distances from a matrix product, in squared bandwidths.
MAX_ROUNDING = 1e-9


class KernelDensity(NeighborDetector):
    """Minus the log density of the class that the network predicts (Feinman et al. 2017).

    Attributes
    ----------
    bandwidth_ : dict of str to float
        The median distance of the k-th neighbour in each layer.
    centers_ : dict of str to torch.Tensor of shape (n_classes, n_layer_features)
        Where each class lies.
    """

    needs_labels: ClassVar[bool] = True

    def fit(self, clean: CleanSamples) -> Self:
        """Store the clean samples and the bandwidth."""
        # Without a network all samples are of one class.
        self.has_classes_ = clean.feature_map.has_network
        self.bandwidth_ = clean.radii
        if self.has_classes_:
            self.centers_ = clean.centers
        else:
            drawn = clean.draw(TYPICAL_SAMPLES)
            self.centers_ = {
                layer: clean.features_of(layer, drawn).median(dim=0, keepdim=True).values
                for layer in clean.neighbors
            }
        return super().fit(clean)

    def score(self, query: Query) -> NDArray[np.float64]:
        """Score samples: an ndarray of shape (n, n_layers), float64."""
        columns = []
        for layer, features in query.features.items():
            self_index = query.self_index_on(features.device)
            neighbors = self.neighbors_[layer]
            if not self.has_classes_:
                neighbors = neighbors.pooled(features.device)
            centers = self.centers_[layer].to(features.device)
            scores = features.new_zeros(len(features), dtype=torch.float64, device="cpu")
            for c in query.labels.unique().tolist():
                chosen = (query.labels == c).nonzero()[:, 0]
                examples, index = neighbors.examples_of(c, features.device)
                left_out = None if self_index is None else self_index[chosen]
                scores[chosen.cpu()] = self._score_class(
                    features[chosen], examples, centers[c], self.bandwidth_[layer], left_out, index
                ).cpu()
            columns.append(scores)
        return torch.stack(columns, dim=1).numpy()

    def _score_class(
        self,
        features: torch.Tensor,
        examples: torch.Tensor,
        center: torch.Tensor,
        bandwidth: float,
        self_index: torch.Tensor | None,
        index: torch.Tensor,
    ) -> torch.Tensor:
        """Score samples by the density of one class, without themselves."""
        if len(examples) == 0:
            return torch.full((len(features),), torch.inf, dtype=torch.float64)
        # Differences from within the class, in double precision: small distances are what counts.
        # A matrix product may still round them, where samples of a class are far apart.
        unit = torch.finfo(torch.float64).eps
        center = in_double(center)
        step = max(1, BLOCK_BYTES // (8 * max(features.shape[1], len(examples))))
        scores = []
        for block in torch.arange(len(features), device=features.device).split(step):
            moved = in_double(features[block]) - center
            parts = []
            for piece in examples.split(step):
                other = in_double(piece) - center
                squares, others = moved.square().sum(dim=1), other.square().sum(dim=1)
                if unit * (squares.max() + others.max()) < MAX_ROUNDING * bandwidth**2:
                    products = torch.addmm(others, moved, other.T, alpha=-2)
                    parts.append(products.add_(squares[:, None]).clamp_(min=0))
                else:
                    mode = "donot_use_mm_for_euclid_dist"
                    parts.append(torch.cdist(moved, other, compute_mode=mode).square_())
            exponents = torch.cat(parts, dim=1).div_(-(bandwidth**2))
            count = torch.tensor(len(examples))
            if self_index is not None:
                same = (self_index[block, None] == index).to(exponents.device)
                exponents.masked_fill_(same, -torch.inf)
                count = len(examples) - same.sum(dim=1)
            scores.append(count.log() - exponents.logsumexp(dim=1))
        # A class without any other samples has no density.
        return torch.cat(scores).nan_to_num(nan=torch.inf, posinf=torch.inf)

    def soft_score(
        self, class_scores: torch.Tensor, probabilities: torch.Tensor | None
    ) -> torch.Tensor:
        """Compute minus the score of the predicted class, of the nearest one without a network."""
        if probabilities is None:
            return super().soft_score(class_scores, probabilities)
        return -soft_score_of_prediction(class_scores, probabilities)
