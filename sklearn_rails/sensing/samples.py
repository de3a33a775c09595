"""What detectors are given: clean samples in fit, and samples to be scored."""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray

from .._blocks import for_blocks
from .._conformal import sample_rows
from ..features.mapping import FeatureMap
from ..features.outputs import class_logits
from ..neighbors.index import ClassNeighbors
from ..neighbors.norms import norm
from ..neighbors.votes import nearest

# Number of clean samples of which the typical radius and the center of a class are medians.
TYPICAL_SAMPLES = 256


class ByLayer:
    """Samples of which something is known in each layer."""

    # The attribute that holds it, by the names of the layers.
    by_layer: ClassVar[str] = "features"

    def in_layers(self, layers: Sequence[str] | None) -> Self:
        """Return the same samples with some of the layers alone.

        Parameters
        ----------
        layers : sequence of str or None
            None for all.

        Returns
        -------
        ByLayer
            Of the same type.
        """
        if layers is None:
            return self
        view = copy.copy(self)
        known = getattr(self, self.by_layer)
        setattr(view, self.by_layer, {layer: known[layer] for layer in layers})
        return view


class IndexedSamples(ByLayer):
    """The features of samples, as they are stored once in the indexes of their neighbours.

    Parameters
    ----------
    neighbors : dict of str to ClassNeighbors
        The samples in each layer by class.
    labels : ndarray of shape (n,)
        Their classes, as integers from 0.
    n_classes : int
    """

    by_layer: ClassVar[str] = "neighbors"

    def __init__(
        self, neighbors: dict[str, ClassNeighbors], labels: NDArray[np.int64], n_classes: int
    ) -> None:
        self.neighbors = neighbors
        self.labels = labels
        self.n_classes = n_classes

    def examples(self, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the features of all samples in a layer, class after class.

        Parameters
        ----------
        layer : str

        Returns
        -------
        features : torch.Tensor of shape (n, n_layer_features)
        index : torch.Tensor of shape (n,), int64
            Positions of the samples in X.
        """
        neighbors = self.neighbors[layer]
        device = neighbors.index.device
        return neighbors.pooled(device).examples_of(0, device)

    def features_of(self, layer: str, positions: NDArray[np.int64]) -> torch.Tensor:
        """Return the features of some samples in a layer.

        Parameters
        ----------
        layer : str
        positions : ndarray of shape (m,)
            Their positions in X.

        Returns
        -------
        torch.Tensor of shape (m, n_layer_features)
        """
        neighbors = self.neighbors[layer]
        return neighbors.take(torch.from_numpy(positions).to(neighbors.index.device))

    @functools.cached_property
    def centers(self) -> dict[str, torch.Tensor]:
        """Medians of samples of each class in each layer, (n_classes, n_layer_features)."""
        centers = {}
        for layer in self.neighbors:
            medians: dict[int, torch.Tensor] = {}
            for c in np.unique(self.labels).tolist():
                members = np.flatnonzero(self.labels == c)
                drawn = members[sample_rows(len(members), TYPICAL_SAMPLES, rng=0)]
                medians[c] = self.features_of(layer, drawn).median(dim=0).values
            blank = torch.zeros_like(next(iter(medians.values())))
            centers[layer] = torch.stack([medians.get(c, blank) for c in range(self.n_classes)])
        return centers

    def draw(self, size: int) -> NDArray[np.int64]:
        """Draw positions of samples at random, the same each time.

        Parameters
        ----------
        size : int
            Number of positions; all of them if there are not more.

        Returns
        -------
        ndarray of shape (min(n, size),), int64
            In ascending order.
        """
        return sample_rows(len(self.labels), size, rng=0)

    def __getstate__(self) -> dict[str, Any]:
        # Computed again where they are needed: a copy may have fewer layers.
        return {k: value for k, value in vars(self).items() if k not in ("centers", "radii")}


@dataclass(frozen=True)
class OuterIndexes:
    """Indexes of the samples of ``fit`` that an estimator has which holds a threat scorer.

    Attributes
    ----------
    feature_map : FeatureMap
    labels : ndarray of shape (n,)
        Classes of the samples, as integers from 0.
    neighbors : dict of str to ClassNeighbors
    """

    feature_map: FeatureMap
    labels: NDArray[np.int64]
    neighbors: Mapping[str, ClassNeighbors]

    def usable(
        self, feature_map: FeatureMap, labels: NDArray[np.int64], n_classes: int
    ) -> dict[str, ClassNeighbors]:
        """Return the indexes that detectors would build themselves.

        Parameters
        ----------
        feature_map : FeatureMap
            Of the threat scorer.
        labels : ndarray of shape (n,)
            The classes of the samples as the threat scorer knows them.
        n_classes : int

        Returns
        -------
        dict of str to ClassNeighbors
        """
        same = feature_map.computes_as(self.feature_map) and np.array_equal(labels, self.labels)
        return {
            layer: neighbors
            for layer, neighbors in self.neighbors.items()
            if same and len(neighbors.n_samples_) == n_classes and neighbors.is_default
        }


class CleanSamples(IndexedSamples):
    """The samples of ``fit``, from which detectors learn.

    The features are stored once, in the index of the neighbours, which is filled in blocks.

    Parameters
    ----------
    X : ndarray or torch.Tensor of shape (n, n_features)
    labels : ndarray of shape (n,)
        Their classes, as integers from 0.
    n_classes : int
    n_neighbors : int
        Less than n.
    feature_map : FeatureMap
    training : ndarray of int, default=None
        Positions of the samples that do not calibrate, for detectors that cannot leave one out.
        None takes all.
    known : dict of str to ClassNeighbors, default=None
        Indexes of the same samples by the same map and classes, if there are any.

    Attributes
    ----------
    neighbors : dict of str to ClassNeighbors
        The samples in each layer by class, which all detectors share.

    Raises
    ------
    ValueError
        If a feature is not finite.
    """

    def __init__(
        self,
        X: NDArray[Any] | torch.Tensor,
        labels: NDArray[np.int64],
        n_classes: int,
        n_neighbors: int,
        feature_map: FeatureMap,
        training: NDArray[np.int64] | None = None,
        known: Mapping[str, ClassNeighbors] | None = None,
    ) -> None:
        known = known or {}
        super().__init__(
            {
                layer: known.get(layer) or ClassNeighbors().start(labels, n_classes)
                for layer in feature_map.layers
            },
            labels,
            n_classes,
        )
        self.X = X
        self.training = np.arange(len(X)) if training is None else training
        self.n_neighbors = n_neighbors
        self.feature_map = feature_map
        missing = {layer: n for layer, n in self.neighbors.items() if layer not in known}

        def add(block: slice) -> None:
            features = feature_map(X[block])
            for layer, neighbors in missing.items():
                neighbors.add(block, features[layer])

        if missing:
            for_blocks(add, len(X), feature_map.row_bytes, feature_map.device)
        for neighbors in missing.values():
            neighbors.build()

    @functools.cached_property
    def radii(self) -> dict[str, float]:
        """Median distance of the k-th neighbour in each layer, of samples without themselves."""
        self_index, radii = self.draw(TYPICAL_SAMPLES), {}
        for layer, neighbors in self.neighbors.items():
            features = self.features_of(layer, self_index)
            pooled = neighbors.pooled(features.device)
            distance, _ = nearest(pooled, features, self.n_neighbors, self_index)
            radius = float(distance[:, -1].median())
            radii[layer] = radius if radius > 0 else 1.0
        return radii


class Query(ByLayer):
    """Samples that are to be scored; what several detectors need of them is computed once.

    Parameters
    ----------
    X : ndarray or torch.Tensor of shape (n, n_features)
    features : dict of str to torch.Tensor of shape (n, n_layer_features)
    feature_map : FeatureMap
    self_index : ndarray of shape (n,), default=None
        The position of each sample among the clean ones, if it is one of them: it is then left
        out of these.
    outputs : torch.Tensor of shape (n, n_outputs), default=None
        The network's outputs, if they are already known.
    variants : dict of object to list of torch.Tensor of shape (n, n_outputs), default=None
        The network's outputs for the variants of some detectors, if they are already known.
    n_classes : int, default=None
        Number of classes of the clean samples. Labels of the network are clipped to it, since
        with a single class both labels of a single output are that class.

    Attributes
    ----------
    usable : ndarray of shape (n,), bool
        Whether the features of a sample are finite, and distances from it too. The features of
        other samples are replaced by zeros.
    """

    def __init__(
        self,
        X: NDArray[Any] | torch.Tensor,
        features: Mapping[str, torch.Tensor],
        feature_map: FeatureMap,
        self_index: NDArray[np.int64] | None = None,
        *,
        outputs: torch.Tensor | None = None,
        variants: Mapping[Any, list[torch.Tensor]] | None = None,
        n_classes: int | None = None,
    ) -> None:
        usable = torch.ones(len(X), dtype=torch.bool)
        for f in features.values():
            usable &= (norm(f) < torch.finfo(f.dtype).max / 4).cpu()
        self.usable = usable.numpy()
        if not self.usable.all():
            features = {
                layer: f.masked_fill(~usable.to(f.device)[:, None], 0)
                for layer, f in features.items()
            }
            if isinstance(X, torch.Tensor):
                X = X.masked_fill(~usable.to(X.device)[:, None], 0)
            else:
                X = np.where(self.usable[:, None], X, X.dtype.type(0))
        self.X = X
        self.features = features
        self.feature_map = feature_map
        self.self_index = self_index
        self._variants = variants or {}
        self._n_classes = n_classes
        self._nearest: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        if outputs is not None:
            self.outputs = outputs

    @functools.cached_property
    def outputs(self) -> torch.Tensor:
        """The network's outputs, (n, n_outputs)."""
        return self.feature_map.outputs(self.X, check_finite=False)

    def variant_outputs(self, detector: Any) -> list[torch.Tensor]:
        """Return the network's outputs for the variants of a detector.

        Parameters
        ----------
        detector : Detector

        Returns
        -------
        list of torch.Tensor of shape (n, n_outputs)
        """
        if detector in self._variants:
            return self._variants[detector]
        outputs = self.feature_map.outputs
        return [outputs(changed, check_finite=False) for changed in detector.variants(self.X)]

    @functools.cached_property
    def labels(self) -> torch.Tensor:
        """The labels that the network predicts, (n,); 0 where there is no network."""
        if not self.feature_map.has_network:
            return torch.zeros(len(self.X), dtype=torch.int64, device=self.feature_map.device)
        labels = self.feature_map.label(self.outputs)
        return labels if self._n_classes is None else labels.clamp(max=self._n_classes - 1)

    def self_index_on(self, device: torch.device) -> torch.Tensor | None:
        """Return ``self_index`` as a tensor.

        Parameters
        ----------
        device : torch.device

        Returns
        -------
        torch.Tensor of shape (n,), int64, or None
        """
        return None if self.self_index is None else torch.from_numpy(self.self_index).to(device)

    def nearest(
        self, layer: str, neighbors: ClassNeighbors, n_neighbors: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the nearest clean samples in a layer.

        Parameters
        ----------
        layer : str
        neighbors : ClassNeighbors
            The clean samples in that layer; those of the first call count.
        n_neighbors : int

        Returns
        -------
        distance, index : torch.Tensor of shape (n, n_neighbors)
            As :func:`~sklearn_rails.neighbors.votes.nearest` returns them.
        """
        if layer not in self._nearest:
            features = self.features[layer]
            self._nearest[layer] = nearest(
                neighbors.pooled(features.device), features, n_neighbors, self.self_index
            )
        return self._nearest[layer]


class SoftQuery(ByLayer):
    """Samples whose threat is differentiated by an attack.

    Parameters
    ----------
    X : torch.Tensor of shape (n, n_features)
        On the map's device and in its dtype.
    feature_map : FeatureMap
    class_scores : callable, default=None
        ``class_scores(affinity, layer, features)`` returns a differentiable score (n, n_classes)
        for how near the clean samples of each class are, higher for nearer, by the affinity that
        a detector's attribute of this name says. Only needed by such detectors.
    """

    def __init__(
        self,
        X: torch.Tensor,
        feature_map: FeatureMap,
        class_scores: Callable[[str, str, torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self.X = X
        self.feature_map = feature_map
        wanted = feature_map.layers
        if feature_map.has_network:
            wanted = (*wanted, feature_map.output)
        found = feature_map.with_gradient(X, wanted)
        self.features = {layer: found[layer] for layer in feature_map.layers}
        self.outputs = found[feature_map.output] if feature_map.has_network else None
        self.probabilities = None if self.outputs is None else soft_labels(self.outputs)
        self._score_classes = class_scores
        self._class_scores: dict[tuple[str, str], torch.Tensor] = {}

    def class_scores(self, affinity: str, layer: str) -> torch.Tensor:
        """Compute how near the clean samples of each class are.

        Parameters
        ----------
        affinity : str
        layer : str

        Returns
        -------
        torch.Tensor of shape (n, n_classes)
            Higher for nearer; computed once.
        """
        if self._score_classes is None:
            raise ValueError(f"A soft threat by {affinity} neighbours needs class_scores.")
        if (affinity, layer) not in self._class_scores:
            self._class_scores[affinity, layer] = self._score_classes(
                affinity, layer, self.features[layer]
            )
        return self._class_scores[affinity, layer]


def soft_labels(outputs: torch.Tensor) -> torch.Tensor:
    """Return the probabilities of the classes.

    Parameters
    ----------
    outputs : torch.Tensor of shape (n, n_outputs)
        Logits; a single one is that of the second of two classes.

    Returns
    -------
    torch.Tensor of shape (n, n_classes)
    """
    return class_logits(outputs).softmax(dim=1)
