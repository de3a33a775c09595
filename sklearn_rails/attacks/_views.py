"""What the attack uses of a defence: its layers, references and predictions."""

import numpy as np
import torch
from sklearn.frozen import FrozenEstimator
from torch.nn.functional import normalize, pad

from .._threat import ThreatScorer
from ..immune.consensus import rank_by_affinity
from ..immune.random import draw_seed
from ..neighbors import ClassNeighbors, resolve_affinity
from ..sensing import SoftQuery


def soft_class_scores(affinity, members, there, origin, scale):
    """Make a function from features to soft class scores.

    Parameters
    ----------
    affinity : {"euclidean", "cosine", "inner_product"} or callable
    members : torch.Tensor of shape (n, n_classes, n_members, n_features)
        Constant references.
    there : torch.Tensor of shape (n, n_classes, n_members)
        Which of them exist.
    origin : torch.Tensor of shape (n, n_features)
        Features near those that will be scored.
    scale : float
        Temperature: affinities are divided by it.

    Returns
    -------
    callable
        From a tensor of shape (n, n_features) to the scores (n, n_classes).
    """
    nearness = nearness_to(affinity, members.flatten(1, 2), origin)

    def score(features):
        close = nearness(features).reshape(there.shape).masked_fill(~there, -torch.inf)
        return torch.logsumexp(close / scale, dim=2)

    return score


def nearness_to(affinity, members, origin):
    """Make a function that compares features with constant references, read only once.

    Parameters
    ----------
    affinity : {"euclidean", "cosine", "inner_product"} or callable
    members : torch.Tensor of shape (n, n_members, n_features)
    origin : torch.Tensor of shape (n, n_features)
        Features near those that will be compared.

    Returns
    -------
    callable
        From a tensor of shape (n, n_features) to the affinities (n, n_members).
    """
    if affinity == "euclidean":
        # Relative to the origin, small distances are not lost to rounding.
        moved = members - origin[:, None]
        squares = moved.square().sum(dim=2)

        def nearness(features):
            step = features - origin
            products = torch.bmm(moved, step[:, :, None])[..., 0]
            return -(squares - 2 * products + step.square().sum(1)[:, None]).clamp(1e-12).sqrt()

        return nearness
    if affinity == "cosine":
        members = normalize(members, dim=2)
        return lambda features: torch.bmm(members, normalize(features, dim=1)[..., None])[..., 0]
    return lambda features: resolve_affinity(affinity)(features, members)


class _References:
    """The nearest training samples of each class, in some layers."""

    def __init__(self, features, train, labels, n_classes, n_references, affinity="euclidean"):
        self._features = features
        self._n_classes = n_classes
        self._n_references = n_references
        self.affinity = affinity
        self._examples = features(train)
        self._neighbors = {
            layer: ClassNeighbors(affinity).fit(examples, labels, n_classes)
            for layer, examples in self._examples.items()
        }

    def row_bytes(self, row):
        widest = max(f[0].nbytes for f in self._features(row).values())
        return widest * self._n_references * self._n_classes

    def near(self, rows):
        """Return the references in each layer, and which of them exist."""
        return self.near_with_scales(rows)[0]

    def scales(self, rows):
        """Return a third of the median distance of the k-th neighbour, in each layer."""
        return self.near_with_scales(rows)[1]

    def near_with_scales(self, rows):
        references, scales = {}, {}
        for layer, features in self._features(rows).items():
            affinity, index = self._neighbors[layer].kneighbors(features, self._n_references)
            references[layer] = self._examples[layer][index.clamp(min=0)], index >= 0
            scales[layer] = _scale_of(affinity, self._n_references)
        return references, scales


class NeighborsView:
    """A DkNN classifier as the attack sees it: neighbours among fixed samples."""

    affinity = "euclidean"
    has_arbiter = False

    def __init__(self, estimator, train, labels, n_references):
        self._estimator = estimator
        n_classes = len(estimator.classes_)
        self._references = _References(
            estimator.feature_map_, train, labels, n_classes, n_references
        )
        self.row_bytes = self._references.row_bytes
        self.scales = self._references.scales
        self.features = estimator.feature_map_.with_gradient

    def predict(self, rows):
        return _positions(self._estimator, self._estimator.predict(rows), rows)

    def respond(self, rows):
        """Return the references in each layer, which of them exist, and the predictions."""
        return self._references.near(rows), self.predict(rows)


class ThreatView:
    """A threat scorer as the attack sees it: scores that can be differentiated."""

    def __init__(self, rails, train, labels, n_references):
        scorer = getattr(rails, "threat_scorer_", None)
        if isinstance(scorer, FrozenEstimator):
            scorer = scorer.estimator
        if not isinstance(scorer, ThreatScorer):
            raise TypeError(
                "threat_weight needs a RAILSClassifier whose threat_scorer is a ThreatScorer, got "
                f"the threat_scorer {scorer!r}."
            )
        self._scorer = scorer
        n_classes = len(rails.classes_)
        self._references = {
            affinity: _References(
                scorer.feature_map_, train, labels, n_classes, n_references, affinity
            )
            for affinity in {d.affinity for d in scorer.detectors_.values()} - {None}
        }

    def row_bytes(self, row):
        return sum(r.row_bytes(row) for r in self._references.values())

    def is_alarm(self, points):
        return torch.from_numpy(self._scorer.predict(points) == -1).to(points.device)

    def soften(self, points):
        """Make a threat score that is differentiable near some points."""
        features, layers = self._scorer.feature_map_, self._scorer.layers_
        with torch.no_grad():
            here = features.with_gradient(points)
        nearness = {}
        for affinity, references in self._references.items():
            near, scales = references.near_with_scales(points)
            for layer in layers:
                nearness[affinity, layer] = soft_class_scores(
                    affinity, *near[layer], here[layer], scales[layer]
                )

        def class_scores(affinity, layer, features):
            return nearness[affinity, layer](features)

        def threat(points):
            query = SoftQuery(points, features, class_scores)
            return sum(d.soft_threat(query) for d in self._scorer.detectors_.values())

        return threat


class PopulationsView:
    """A RAILS classifier as the attack sees it: a new population for every point."""

    def __init__(self, estimator, n_references, n_seeds, n_checks, rng):
        self._estimator = estimator
        self._engine = engine = estimator.engine_
        self._n_references = n_references
        self._n_cells = -(-n_references // n_seeds)
        self.affinity = estimator.affinity
        seeds = {estimator.seed_: None}
        while len(seeds) < 1 + n_seeds + n_checks:
            seeds[draw_seed(rng)] = None
        _, *others = [engine.with_seed(seed) for seed in seeds]
        self._known, self._unseen = others[:n_seeds], others[n_seeds:]
        self.has_arbiter = engine.gate is not None and engine.gate.needs_network
        self._triages = engine.gate is not None and engine.gate.needs_alarms
        self.features = engine.features.with_gradient

    def logits(self, points):
        """Return the network's outputs, one for each class."""
        output = self._engine.features.output
        outputs = self.features(points, (output,))[output]
        # A single output is the logit of the second of two classes.
        return outputs if outputs.shape[1] > 1 else pad(outputs, (1, 0))

    def row_bytes(self, row):
        widest = max(f[0].nbytes for f in self._engine.features(row).values())
        return widest * self._n_cells * len(self._known) * len(self._estimator.classes_)

    def predict(self, rows):
        """Return the majority prediction under seeds that the attack does not use otherwise."""
        alarms = None
        if self._triages:
            alarms = self._estimator.threat_scorer_.predict(rows) == -1
        scores = [
            engine.scores(rows, alarms=alarms, n_jobs=self._estimator.n_jobs)
            for engine in self._unseen
        ]
        predictions = [torch.from_numpy(s.argmax(axis=1)).to(rows.device) for s in scores]
        return torch.stack(predictions).mode(dim=0).values

    def respond(self, rows):
        """Return the references in each layer, which of them exist, and the predictions."""
        if self._triages:
            labels = self._estimator.predict(rows)
            return self._flocked(rows), _positions(self._estimator, labels, rows)
        flocks, screening = self._engine.screen(rows, None)
        references, predictions = {}, []
        for engine in self._known:
            votes, ties = 0, 0
            for layer, flock in zip(engine.layers, flocks, strict=True):
                response = layer.respond(flock, keep_cells=True)
                votes, ties = votes + response.votes, ties + response.ties
                references.setdefault(layer.name, []).append(
                    self._best(response.population, flock.index, layer)
                )
            predictions.append((votes + ties / len(flocks)).argmax(dim=1))
        joined = {
            name: tuple(torch.cat(parts, dim=2) for parts in zip(*bred, strict=True))
            for name, bred in references.items()
        }
        kept = (screening.votes + screening.ties / len(flocks)).argmax(dim=1)
        majority = torch.stack(predictions).mode(dim=0).values
        return joined, torch.where(screening.bred, majority, kept)

    def _flocked(self, rows):
        """Return the neighbours that vote on samples that are not flagged, with a Triage gate."""
        features, flocked = self._engine.features(rows), {}
        for layer in self._engine.layers:
            index = layer.flock(features[layer.name]).index[..., : self._n_references]
            flocked[layer.name] = self._features_of(layer, index), index >= 0
        return flocked

    def _best(self, population, neighbors, layer):
        """Return the features of each class's best cells, or of its neighbours if it died out."""
        k = self._n_cells
        n_rows, n_classes, _ = neighbors.shape
        classes = torch.arange(n_classes, device=neighbors.device)[:, None]
        of_class = population.labels[:, None] == classes
        affinity = population.affinity[:, None].masked_fill(~of_class, -torch.inf)
        places = rank_by_affinity(affinity.flatten(0, 1), k).reshape(n_rows, n_classes, -1)
        there = affinity.gather(2, places) > -torch.inf
        rows = torch.arange(n_rows, device=neighbors.device)[:, None, None]
        cells = population.cells[rows, places]
        index = pad(neighbors, (0, k), value=-1)[..., : places.shape[2]]
        died_out = ~there.any(dim=2, keepdim=True)
        there = torch.where(died_out, index >= 0, there)
        stand_ins = layer.take_cells(index.clamp(min=0))
        cells = torch.where(died_out[..., None], stand_ins, cells)
        features = layer.features.features_of_cells(cells.flatten(0, 2), layer.name)
        return features.reshape(n_rows, n_classes, -1, features.shape[1]), there

    def _features_of(self, layer, index):
        cells = layer.take_cells(index.clamp(min=0))
        features = layer.features.features_of_cells(cells.flatten(0, 2), layer.name)
        return features.reshape(*index.shape, -1)

    def scales(self, rows):
        """Return a third of the median distance of the k-th neighbour, in each layer."""
        features = self._engine.features(rows)
        return {
            layer.name: _scale_of(layer.flock(features[layer.name]).affinity, self._n_references)
            for layer in self._engine.layers
        }


def _positions(estimator, labels, rows):
    return torch.from_numpy(np.searchsorted(estimator.classes_, labels)).to(rows.device)


def _scale_of(affinity, n_neighbors):
    nearest = affinity.flatten(1).sort(dim=1, descending=True).values
    kth = nearest[:, :n_neighbors][:, -1].abs()
    scale = float(kth[kth.isfinite()].median()) / 3 if kth.isfinite().any() else 0.0
    return scale if scale > 0 else 1.0
