"""What the attack uses of a defence: its layers, references and predictions."""

import numpy as np
import torch
from sklearn.frozen import FrozenEstimator
from torch.nn.functional import normalize, pad

from .._threat import ThreatScorer
from ..immune.consensus import rank_by_affinity
from ..immune.random import draw_seed
from ..neighbors.affinity import affinity_to
from ..neighbors.index import ClassNeighbors
from ..sensing.detectors import soft_labels


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
    return lambda features: affinity_to(affinity, features, members)


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
        self._references = _References(estimator._features, train, labels, n_classes, n_references)
        self.row_bytes = self._references.row_bytes
        self.scales = self._references.scales
        self.features = estimator._features.with_gradient

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
                scorer._features, train, labels, n_classes, n_references, affinity
            )
            for affinity in {_AFFINITY_OF[m] for m in scorer.methods_ if m in _AFFINITY_OF}
        }

    def row_bytes(self, row):
        return sum(r.row_bytes(row) for r in self._references.values())

    def is_alarm(self, points):
        return torch.from_numpy(self._scorer.predict(points) == -1).to(points.device)

    def soften(self, points):
        """Make a threat score that is differentiable near some points."""
        features, layers = self._scorer._features, self._scorer.layers_
        with torch.no_grad():
            here = features.with_gradient(points)
        nearness = {}
        for affinity, references in self._references.items():
            near, scales = references.near_with_scales(points)
            for layer in layers:
                nearness[affinity, layer] = soft_class_scores(
                    affinity, *near[layer], here[layer], scales[layer]
                )
        sensors = dict(zip(self._scorer.methods_, self._scorer._sensors, strict=True))

        def threat(points):
            total = 0
            asked = layers if not features.has_network else (*layers, features.output)
            found = features.with_gradient(points, asked)
            shares = soft_labels(found[features.output]) if features.has_network else None
            for method, sensor in sensors.items():
                if method == "feature_squeezing":
                    total = total + self._soft_squeezing(points, shares, sensor)
                    continue
                for layer in layers:
                    if method == "mahalanobis":
                        squares = sensor.squared_distances(layer, found[layer])
                        total = total + squares.amin(dim=1).log()
                    else:
                        scores = nearness[_AFFINITY_OF[method], layer](found[layer])
                        total = total + _soft_threat(method, scores, shares)
            return total

        return threat

    def _soft_squeezing(self, points, shares, sensor):
        features = self._scorer._features
        moved = []
        for squeezed in sensor.squeeze(points.detach()):
            # Rounding has no useful gradient: use that of the identity (Athalye et al. 2018).
            squeezed = points + (features.to_device(squeezed) - points).detach()
            outputs = features.with_gradient(squeezed, (features.output,))[features.output]
            moved.append((soft_labels(outputs) - shares).abs().sum(dim=1))
        return torch.stack(moved).amax(dim=0)


# The affinity of the neighbours that a method of ThreatScorer uses; normalised features' distances
# are ordered by their cosines.
_AFFINITY_OF = {
    "credibility": "euclidean",
    "disagreement": "euclidean",
    "kernel_density": "euclidean",
    "lid": "euclidean",
    "distance": "cosine",
}


def _soft_threat(method, scores, shares):
    """Compute a soft version of a neighbour-based threat score from the soft class scores."""
    best, every = scores.amax(dim=1), torch.logsumexp(scores, dim=1)
    if method == "credibility":
        return every - best
    if method in ("distance", "lid") or shares is None:
        return -best
    # A class without references has a score of minus infinity.
    own = (shares * scores.clamp_min(-1e6)).sum(dim=1)
    return every - own if method == "disagreement" else -own


class PopulationsView:
    """A RAILS classifier as the attack sees it: a new population for every point."""

    def __init__(self, estimator, n_references, n_seeds, n_checks, rng):
        self._estimator = estimator
        self._n_references = n_references
        self._n_cells = -(-n_references // n_seeds)
        self.affinity = estimator.affinity
        seeds = {estimator.seed_: None}
        while len(seeds) < 1 + n_seeds + n_checks:
            seeds[draw_seed(rng)] = None
        _, *others = [estimator._with({"seed_": seed, "_draws": {}}) for seed in seeds]
        self._known, self._unseen = others[:n_seeds], others[n_seeds:]
        self.has_arbiter = estimator.arbitration is not None
        self.features = estimator._features.with_gradient

    def logits(self, points):
        """Return the network's outputs, one for each class."""
        output = self._estimator._features.output
        outputs = self.features(points, (output,))[output]
        # A single output is the logit of the second of two classes.
        return outputs if outputs.shape[1] > 1 else pad(outputs, (1, 0))

    def row_bytes(self, row):
        widest = max(f[0].nbytes for f in self._estimator._features(row).values())
        return widest * self._n_cells * len(self._known) * len(self._estimator.classes_)

    def predict(self, rows):
        """Return the majority prediction under seeds that the attack does not use otherwise."""
        answers = [_positions(rails, rails.predict(rows), rows) for rails in self._unseen]
        return torch.stack(answers).mode(dim=0).values

    def respond(self, rows):
        """Return the references in each layer, which of them exist, and the predictions."""
        if self._estimator.triage:
            return self._flocked(rows), _positions(
                self._estimator, self._estimator.predict(rows), rows
            )
        references, answers = {}, []
        neighbors = {
            layer: self._estimator._flock(features, layer)[1]
            for layer, features in self._estimator._features(rows).items()
        }
        for rails in self._known:
            votes, ties = 0, 0
            for layer, flocked, population in rails._mature(rows, lambda n: None, keep_cells=True):
                layer_votes, layer_ties, _ = rails._vote(layer, flocked, population)
                votes, ties = votes + layer_votes, ties + layer_ties
                references.setdefault(layer, []).append(
                    self._best(population, neighbors[layer], layer)
                )
            scores = torch.from_numpy(rails._join_votes(votes, ties))
            answers.append(scores.argmax(dim=1).to(rows.device))
        joined = {
            layer: tuple(torch.cat(parts, dim=2) for parts in zip(*bred, strict=True))
            for layer, bred in references.items()
        }
        answers = torch.stack(answers).mode(dim=0).values
        if self.has_arbiter:
            scores, bred, _ = self._estimator._settle(rows, rows)
            settled = torch.from_numpy(scores.argmax(axis=1)).to(rows.device)
            answers = torch.where(torch.from_numpy(bred).to(rows.device), answers, settled)
        return joined, answers

    def _flocked(self, rows):
        """Return the neighbours that vote on samples that are not flagged, with ``triage``."""
        rails, flocked = self._estimator, {}
        for layer, features in rails._features(rows).items():
            index = rails._flock(features, layer)[1][..., : self._n_references]
            cells = rails._find_cells(index.clamp(min=0), layer)
            members = rails._features.features_of_cells(cells.flatten(0, 2), layer)
            flocked[layer] = members.reshape(*index.shape, -1), index >= 0
        return flocked

    def _best(self, population, neighbors, layer):
        """Return the features of each class's best cells, or of its neighbours if it died out."""
        rails, k = self._estimator, self._n_cells
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
        cells = torch.where(
            died_out[..., None], rails._find_cells(index.clamp(min=0), layer), cells
        )
        features = rails._features.features_of_cells(cells.flatten(0, 2), layer)
        return features.reshape(n_rows, n_classes, -1, features.shape[1]), there

    def scales(self, rows):
        """Return a third of the median distance of the k-th neighbour, in each layer."""
        return {
            layer: _scale_of(self._estimator._flock(features, layer)[0], self._n_references)
            for layer, features in self._estimator._features(rows).items()
        }


def _positions(estimator, labels, rows):
    return torch.from_numpy(np.searchsorted(estimator.classes_, labels)).to(rows.device)


def _scale_of(affinity, n_neighbors):
    nearest = affinity.flatten(1).sort(dim=1, descending=True).values
    kth = nearest[:, :n_neighbors][:, -1].abs()
    scale = float(kth[kth.isfinite()].median()) / 3 if kth.isfinite().any() else 0.0
    return scale if scale > 0 else 1.0
