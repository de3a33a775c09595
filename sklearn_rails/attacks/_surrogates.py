"""A defence as the attack sees it: its layers, references and predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.frozen import FrozenEstimator
from torch import Tensor
from torch.nn.functional import normalize, pad

from .._dknn import DkNNClassifier
from .._rails import RAILSClassifier
from .._threat import ThreatScorer
from ..features import FeatureMap
from ..immune import ImmuneEngine
from ..immune.consensus import rank_by_affinity
from ..immune.layer import Flock, ResponseLayer
from ..immune.maturation import Population
from ..immune.random import draw_seed
from ..neighbors import Affinity, ClassNeighbors, Cosine, Euclidean, resolve_affinity
from ..sensing import SoftQuery

# Features of each layer's references, (n, n_classes, n_references, n_layer_features), and which
# of them exist.
References = dict[str, tuple[Tensor, Tensor]]


def soft_class_scores(
    affinity: Affinity, members: Tensor, exists: Tensor, origin: Tensor, scale: float
) -> Callable[[Tensor], Tensor]:
    """Return a function from features to soft class scores, for features near an origin.

    Parameters
    ----------
    affinity : Affinity
    members : torch.Tensor of shape (n, n_classes, n_members, n_features)
        Constant references, read only once.
    exists : torch.Tensor of shape (n, n_classes, n_members), bool
    origin : torch.Tensor of shape (n, n_features)
    scale : float
        Temperature: affinities are divided by it.

    Returns
    -------
    callable
        From a tensor of shape (n, n_features) to the scores (n, n_classes).
    """
    members = members.flatten(1, 2)
    if affinity == Euclidean():
        # Relative to the origin, small distances are not lost to rounding.
        members = members - origin[:, None]
        squares = members.square().sum(dim=2)
    elif affinity == Cosine():
        members = normalize(members, dim=2)

    def score(features: Tensor) -> Tensor:
        if affinity == Euclidean():
            step = features - origin
            products = torch.bmm(members, step[:, :, None])[..., 0]
            squared = squares - 2 * products + step.square().sum(1)[:, None]
            nearness = -squared.clamp(1e-12).sqrt()
        elif affinity == Cosine():
            nearness = torch.bmm(members, normalize(features, dim=1)[..., None])[..., 0]
        else:
            nearness = affinity(features, members)
        nearness = nearness.reshape(exists.shape).masked_fill(~exists, -torch.inf)
        return torch.logsumexp(nearness / scale, dim=2)

    return score


def soften(
    feature_map: FeatureMap,
    points: Tensor,
    affinity: Affinity,
    references: References,
    scales: dict[str, float],
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return a function from features to soft class scores in each layer, near some points."""
    with torch.no_grad():
        here = feature_map.with_gradient(points)
    return {
        layer: soft_class_scores(affinity, *found, here[layer], scales[layer])
        for layer, found in references.items()
    }


def typical_scale(affinity: Tensor, n_neighbors: int) -> float:
    """Return a third of the median distance of the k-th neighbour, of any class."""
    nearest = affinity.flatten(1).sort(dim=1, descending=True).values
    kth = nearest[:, :n_neighbors][:, -1].abs()
    scale = float(kth[kth.isfinite()].median()) / 3 if kth.isfinite().any() else 0.0
    return scale if scale > 0 else 1.0


class TrainingReferences:
    """The nearest training samples of each class, in the layers of a feature map."""

    def __init__(
        self,
        feature_map: FeatureMap,
        train: Tensor,
        labels: NDArray[np.intp],
        n_classes: int,
        n_references: int,
        affinity: Affinity,
    ) -> None:
        self.affinity, self._features, self._n_references = affinity, feature_map, n_references
        self._examples = feature_map(train)
        self._neighbors = {
            layer: ClassNeighbors(affinity).fit(examples, labels, n_classes)
            for layer, examples in self._examples.items()
        }
        widest = max(examples[0].nbytes for examples in self._examples.values())
        self.sample_bytes = widest * n_references * n_classes

    def near(self, points: Tensor) -> tuple[References, dict[str, float]]:
        """Return the references, and the scale of affinities in each layer."""
        references, scales = {}, {}
        for layer, features in self._features(points).items():
            affinity, index = self._neighbors[layer].kneighbors(features, self._n_references)
            references[layer] = self._examples[layer][index.clamp(min=0)], index >= 0
            scales[layer] = typical_scale(affinity, self._n_references)
        return references, scales


class NeighborSurrogate(TrainingReferences):
    """A DkNN classifier as the attack sees it: neighbours among fixed samples."""

    keeps_network = False

    def __init__(
        self, estimator: DkNNClassifier, train: Tensor, labels: NDArray[np.intp], n_references: int
    ) -> None:
        self._estimator, n_classes = estimator, len(estimator.classes_)
        feature_map = estimator.feature_map_
        super().__init__(feature_map, train, labels, n_classes, n_references, Euclidean())

    def predict(self, points: Tensor) -> Tensor:
        """Predict the classes' positions."""
        return _predict(self._estimator, points)

    guess = predict

    def respond(self, points: Tensor) -> tuple[References, Tensor]:
        """Return the references and the predictions."""
        return self.near(points)[0], self.predict(points)

    def scales(self, points: Tensor) -> dict[str, float]:
        """Return the scale of affinities in each layer."""
        return self.near(points)[1]


class PopulationSurrogate:
    """A RAILS classifier as the attack sees it: a new population for every point."""

    def __init__(
        self,
        estimator: RAILSClassifier,
        n_references: int,
        n_seeds: int,
        n_checks: int,
        rng: np.random.RandomState,
    ) -> None:
        self._estimator = estimator
        self._engine = engine = estimator.engine_
        self._n_references, self._n_cells = n_references, -(-n_references // n_seeds)
        self.affinity = engine.layers[0].affinity
        seeds = {estimator.seed_: None}
        while len(seeds) < 1 + n_seeds + n_checks:
            seeds[draw_seed(rng)] = None
        _, *others = [engine.with_seed(seed) for seed in seeds]
        self.known, self.unseen = others[:n_seeds], others[n_seeds:]
        self.keeps_network = engine.gate is not None and engine.gate.needs_network
        self._triages = engine.gate is not None and engine.gate.needs_alarms
        sample = engine.layers[0].bank.take(torch.zeros(1, 1, 1, dtype=torch.int64))
        widest = max(_features_of(layer, sample).nbytes for layer in engine.layers)
        self.sample_bytes = widest * self._n_cells * n_seeds * len(estimator.classes_)

    def predict(self, points: Tensor) -> Tensor:
        """Predict the classes' positions, by majority under seeds that are not used otherwise."""
        return self._vote(points, self.unseen)

    def guess(self, points: Tensor) -> Tensor:
        """Predict the classes' positions under a single seed, which costs less."""
        return self._vote(points, self.known[:1])

    def _vote(self, points: Tensor, engines: Sequence[ImmuneEngine]) -> Tensor:
        alarms = self._estimator.threat_scorer_.predict(points) == -1 if self._triages else None
        n_jobs = self._estimator.n_jobs
        scores = [engine.scores(points, alarms=alarms, n_jobs=n_jobs) for engine in engines]
        return torch.from_numpy(np.argmax(scores, axis=2)).to(points.device).mode(dim=0).values

    def respond(self, points: Tensor) -> tuple[References, Tensor]:
        """Return the references and the predictions."""
        if self._triages:
            # Neighbours vote on samples that are not flagged.
            return self._nearest(self._flocks(points)), _predict(self._estimator, points)
        flocks, screening = self._engine.screen(points, None)
        predicted = (screening.votes + screening.ties / len(flocks)).argmax(dim=1)
        bred = screening.bred.nonzero()[:, 0]
        references: References = {}
        if len(bred) < len(points):
            # The gate compares the neighbours of samples before any is bred.
            references = self._nearest(zip(self._engine.layers, flocks, strict=True))
        if len(bred):
            found, predicted[bred] = self._breed([flock.take(bred) for flock in flocks])
            references = _replace(references, found, bred) if references else found
        return references, predicted

    def _breed(self, flocks: Sequence[Flock]) -> tuple[References, Tensor]:
        """Return the best cells under each seed that is known, and the majority of predictions."""
        references: References = {}
        parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
        predictions = []
        for engine in self.known:
            votes = ties = torch.zeros(())
            for layer, flock in zip(engine.layers, flocks, strict=True):
                response = layer.respond(flock, keep_cells=True)
                votes, ties = votes + response.votes, ties + response.ties
                best = self._best(response.population, flock.index, layer)
                parts.setdefault(layer.name, []).append(best)
            predictions.append((votes + ties / len(flocks)).argmax(dim=1))
        for name, bred in parts.items():
            members, exists = zip(*bred, strict=True)
            references[name] = torch.cat(members, dim=2), torch.cat(exists, dim=2)
        return references, torch.stack(predictions).mode(dim=0).values

    def _nearest(self, flocks: Iterable[tuple[ResponseLayer, Flock]]) -> References:
        """Return the nearest examples of each class."""
        references: References = {}
        for layer, flock in flocks:
            index = flock.index[..., : self._n_references]
            cells = layer.take_cells(index.clamp(min=0))
            references[layer.name] = _features_of(layer, cells), index >= 0
        return references

    def scales(self, points: Tensor) -> dict[str, float]:
        """Return the scale of affinities in each layer."""
        return {
            layer.name: typical_scale(flock.affinity, self._n_references)
            for layer, flock in self._flocks(points)
        }

    def _flocks(self, points: Tensor) -> list[tuple[ResponseLayer, Flock]]:
        features = self._engine.features(points)
        return [(layer, layer.flock(features[layer.name])) for layer in self._engine.layers]

    def _best(
        self, population: Population, neighbors: Tensor, layer: ResponseLayer
    ) -> tuple[Tensor, Tensor]:
        """Return the features of each class's best cells, or of its neighbours if it died out."""
        assert population.cells is not None
        n_samples, n_classes, _ = neighbors.shape
        classes = torch.arange(n_classes, device=neighbors.device)[:, None]
        of_class = population.labels[:, None] == classes
        affinity = population.affinity[:, None].masked_fill(~of_class, -torch.inf)
        best = rank_by_affinity(affinity.flatten(0, 1), self._n_cells)
        best = best.reshape(n_samples, n_classes, -1)
        exists = affinity.gather(2, best) > -torch.inf
        died_out = ~exists.any(dim=2, keepdim=True)
        index = pad(neighbors, (0, self._n_cells), value=-1)[..., : best.shape[2]]
        rows = torch.arange(n_samples, device=neighbors.device)[:, None, None]
        stand_ins = layer.take_cells(index.clamp(min=0))
        cells = torch.where(died_out[..., None], stand_ins, population.cells[rows, best])
        return _features_of(layer, cells), torch.where(died_out, index >= 0, exists)


def _features_of(layer: ResponseLayer, cells: Tensor) -> Tensor:
    features = layer.features.features_of_cells(cells.flatten(0, 2), layer.name)
    return features.reshape(*cells.shape[:3], -1)


def _replace(references: References, others: References, rows: Tensor) -> References:
    """Return references of which those of some rows are replaced by others."""
    replaced: References = {}
    for layer, (members, exists) in references.items():
        new_members, new_exists = others[layer]
        width = max(exists.shape[2], new_exists.shape[2])
        members = pad(members, (0, 0, 0, width - members.shape[2]))
        exists = pad(exists, (0, width - exists.shape[2]))
        members[rows] = pad(new_members, (0, 0, 0, width - new_members.shape[2]))
        exists[rows] = pad(new_exists, (0, width - new_exists.shape[2]))
        replaced[layer] = members, exists
    return replaced


def _predict(estimator: DkNNClassifier | RAILSClassifier, points: Tensor) -> Tensor:
    positions = np.searchsorted(estimator.classes_, estimator.predict(points))
    return torch.from_numpy(positions).to(points.device)


class ThreatSurrogate:
    """A threat scorer as the attack sees it: scores that can be differentiated."""

    def __init__(
        self,
        estimator: DkNNClassifier | RAILSClassifier,
        train: Tensor,
        labels: NDArray[np.intp],
        n_references: int,
    ) -> None:
        scorer = getattr(estimator, "threat_scorer_", None)
        if isinstance(scorer, FrozenEstimator):
            scorer = scorer.estimator
        if not isinstance(scorer, ThreatScorer):
            raise TypeError(
                "threat_weight needs a RAILSClassifier whose threat_scorer is a ThreatScorer, got "
                f"the threat_scorer {scorer!r}."
            )
        self._scorer = scorer
        n_classes = len(estimator.classes_)
        names = {d.affinity for d in scorer.detectors_.values() if d.affinity is not None}
        self._references = {
            name: TrainingReferences(
                scorer.feature_map_, train, labels, n_classes, n_references, resolve_affinity(name)
            )
            for name in names
        }
        self.sample_bytes = sum(r.sample_bytes for r in self._references.values())

    def is_flagged(self, points: Tensor) -> Tensor:
        """Check which points the scorer flags."""
        return torch.from_numpy(self._scorer.predict(points) == -1).to(points.device)

    def soften(self, points: Tensor) -> Callable[[Tensor], Tensor]:
        """Return a threat score that is differentiable near some points."""
        feature_map = self._scorer.feature_map_
        scores = {
            name: soften(feature_map, points, training.affinity, *training.near(points))
            for name, training in self._references.items()
        }

        def threat(points: Tensor) -> Tensor:
            query = SoftQuery(points, feature_map, lambda name, layer, f: scores[name][layer](f))
            threats = [
                detector.soft_threat(query.in_layers(detector.layers))
                for detector in self._scorer.detectors_.values()
            ]
            return torch.stack(threats).sum(dim=0)

        return threat
