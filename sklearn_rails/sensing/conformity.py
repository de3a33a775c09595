"""Detectors by the classes of neighbours: credibility and disagreement."""

from typing import ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import one_hot

from ..neighbors.leave_one_out import kneighbors_leave_one_out
from ..neighbors.votes import class_margin
from .base import NeighborDetector, soft_score_of_prediction
from .samples import CleanSamples, Query


class Credibility(NeighborDetector):
    """Nonconformity with the class that conforms best, of which DkNN's credibility is a p-value.

    The number of neighbours that are not of the most frequent class, over all layers. The distance
    of the k-th neighbour adds less than 1, so that there are no ties: the distance over the sum of
    itself and that of a typical clean sample. With a single class only the distance counts.

    A clean sample that is left out of its own neighbours has one sample fewer of its class near it
    than a new one, which matters where a class has no more samples than k. So it is scored without
    itself and with itself as its nearest neighbour, and the more suspect score counts.

    Attributes
    ----------
    radii_ : dict of str to float
        The distance of the k-th neighbour of a typical clean sample, in each layer.
    """

    def fit(self, clean: CleanSamples) -> Self:
        """Store the clean samples and their typical distances."""
        self.radii_ = clean.radii
        return super().fit(clean)

    def score(self, query: Query) -> NDArray[np.float64]:
        """Score samples: an ndarray of shape (n, 1), float64."""
        n, labels = len(query.X), torch.from_numpy(self.labels_)
        against = torch.zeros((n, self.n_classes_), dtype=torch.int64)
        against_with_self = torch.zeros_like(against)
        distance = torch.zeros(n, dtype=torch.float64)
        for layer, radius, index in self.nearest(query):
            voters = one_hot(labels[index], self.n_classes_)
            votes = voters.sum(dim=1)
            against = against + self.n_neighbors_ - votes
            if query.self_index is not None:
                of_self = one_hot(labels[query.self_index], self.n_classes_)
                against_with_self = (
                    against_with_self + self.n_neighbors_ - (votes - voters[:, -1] + of_self)
                )
            radius = radius[:, -1]
            distance = distance + radius / (self.radii_[layer] + radius) / len(query.features)
        score = against.min(dim=1).values
        if query.self_index is not None:
            score = torch.maximum(score, against_with_self.min(dim=1).values)
        return (score + distance).numpy()[:, None]

    def soft_score(
        self, class_scores: torch.Tensor, probabilities: torch.Tensor | None
    ) -> torch.Tensor:
        """Compute by how much all classes together are nearer than the nearest one."""
        return torch.logsumexp(class_scores, dim=1) - class_scores.amax(dim=1)


class Disagreement(NeighborDetector):
    """By how much another class is nearer than the class that the network predicts.

    A class is as near as the nearest of its samples.
    """

    needs_labels: ClassVar[bool] = True
    needs_outputs: ClassVar[bool] = True

    def score(self, query: Query) -> NDArray[np.float64]:
        """Score samples: an ndarray of shape (n, n_layers), float64."""
        columns = []
        for layer, features in query.features.items():
            self_index = query.self_index_on(features.device)
            if self_index is None:
                flocked, _ = self.neighbors_[layer].kneighbors(features, 1)
            else:
                flocked = kneighbors_leave_one_out(self.neighbors_[layer], self_index, features, 1)
            columns.append(class_margin(flocked.cpu().double(), query.labels.cpu()))
        return torch.stack(columns, dim=1).numpy()

    def soft_score(
        self, class_scores: torch.Tensor, probabilities: torch.Tensor | None
    ) -> torch.Tensor:
        """Compute by how much all classes together are nearer than the predicted one."""
        if probabilities is None:
            return super().soft_score(class_scores, probabilities)
        of_prediction = soft_score_of_prediction(class_scores, probabilities)
        return torch.logsumexp(class_scores, dim=1) - of_prediction
