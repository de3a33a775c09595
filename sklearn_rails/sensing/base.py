"""The protocol of a detector: fit on clean samples, score, leave one out.

The score of a sample whose features are not finite is infinite, never NaN: it is the most suspect
of all.
"""

import warnings
from collections.abc import Iterator
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray

from ..features.mapping import FeatureMap
from .samples import CleanSamples, Query, SoftQuery

# Size in bytes of the temporary buffers of distances.
BLOCK_BYTES = 64 * 2**20


class PicklesToCPU:
    """Holds tensors, which are pickled as arrays and loaded on the CPU."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: _to_arrays(value) for name, value in vars(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({name: _to_tensors(value) for name, value in state.items()})


def _to_arrays(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return {"tensor": value.cpu().numpy()}
    return {k: _to_arrays(v) for k, v in value.items()} if isinstance(value, dict) else value


def _to_tensors(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if value.keys() == {"tensor"}:
        with warnings.catch_warnings():
            # Arrays that are mapped from disk stay there; torch warns that they are read-only.
            warnings.simplefilter("ignore", UserWarning)
            return torch.from_numpy(np.asarray(value["tensor"]))
    return {k: _to_tensors(v) for k, v in value.items()}


class Detector(PicklesToCPU):
    """Base class of detectors, which score how suspect samples are.

    A detector of your own defines :meth:`fit` and :meth:`score`, sets the attributes below where
    they differ, and stands in ``sklearn_rails.sensing.DETECTORS`` under the name that
    ``ThreatScorer(method=...)`` takes.

    Attributes
    ----------
    layers : tuple of str or None
        The layers that :meth:`fit` and :meth:`score` are given; None for all.
    uses_layers : bool
        Whether the score depends on the features of layers.
    needs_labels : bool
        Whether the score depends on ``query.labels``. A network then needs an output for each
        class; without a network, all samples are of one class.
    needs_outputs : bool
        Whether the score depends on ``query.outputs``: there must be a network.
    needs_float_input : bool
        Whether the input must not be integers, such as token ids.
    min_neighbors : int
        Minimum number of neighbours.
    leaves_one_out : bool
        Whether :meth:`score` can leave a clean sample out. If not, the detector is fitted to
        ``clean.training`` alone, the samples that do not calibrate.
    affinity : str or None
        What orders the neighbours that :meth:`soft_threat` depends on, ``"euclidean"`` or
        ``"cosine"``; None if it depends on none.
    """

    layers: tuple[str, ...] | None = None
    uses_layers: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    needs_outputs: ClassVar[bool] = False
    needs_float_input: ClassVar[bool] = False
    min_neighbors: ClassVar[int] = 1
    leaves_one_out: ClassVar[bool] = True
    affinity: ClassVar[str | None] = None

    @classmethod
    def check(cls, name: str, feature_map: FeatureMap, n_neighbors: int) -> None:
        """Check that the detector can be used, before anything is computed.

        Parameters
        ----------
        name : str
            The method's name, for messages.
        feature_map : FeatureMap
        n_neighbors : int

        Raises
        ------
        ValueError
            If what the detector needs is not there.
        """
        if cls.needs_outputs and not feature_map.has_network:
            raise ValueError(
                f"method={name!r} depends on a network's outputs, but there is no network: give a "
                "feature_extractor, or use another method."
            )
        if cls.needs_float_input and feature_map.integer_input:
            raise ValueError(
                f"method={name!r} changes the input a little, but the network takes integers such "
                "as token ids, which cannot be. Use another method."
            )
        if n_neighbors < cls.min_neighbors:
            raise ValueError(
                f"method={name!r} needs {cls.min_neighbors} neighbours or more, but there are "
                f"n_neighbors={n_neighbors}: set more of them, or give more samples."
            )

    def fit(self, clean: CleanSamples) -> Self:
        """Fit to clean samples.

        Parameters
        ----------
        clean : CleanSamples

        Returns
        -------
        Detector
            The detector itself.
        """
        raise NotImplementedError

    def variants(self, X: NDArray[Any] | torch.Tensor) -> list[NDArray[Any]]:
        """Return changed samples whose outputs the score depends on, by default none.

        Parameters
        ----------
        X : ndarray or torch.Tensor of shape (n, n_features)

        Returns
        -------
        list of ndarray of shape (n, n_features)
            ``query.variant_outputs(self)`` has the network's outputs for them.
        """
        return []

    def score(self, query: Query) -> NDArray[np.float64]:
        """Score samples.

        Parameters
        ----------
        query : Query
            Where it has a ``self_index``, the samples are clean ones, and each is scored as if it
            had not been in :meth:`fit`. With ``leaves_one_out`` False, none of them was.

        Returns
        -------
        ndarray of shape (n, n_scores), float64
            Higher is more suspect. Scores of samples that are not usable do not matter.
        """
        raise NotImplementedError

    def __call__(self, query: Query) -> NDArray[np.float64]:
        """Score samples, those that are not usable included.

        Parameters
        ----------
        query : Query

        Returns
        -------
        ndarray of shape (n, n_scores), float64
            As :meth:`score`, and infinite where a sample is not usable or its score is NaN.
        """
        scores = self.score(query.in_layers(self.layers))
        return np.where(query.usable[:, None] & ~np.isnan(scores), scores, np.inf)

    def soft_threat(self, query: SoftQuery) -> torch.Tensor:
        """Compute a differentiable stand-in for the threat, which an attack lowers.

        Parameters
        ----------
        query : SoftQuery

        Returns
        -------
        torch.Tensor of shape (n,)
            Higher is more suspect, added up over the layers. By default there is none.

        Raises
        ------
        NotImplementedError
            If the detector does not define it.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no differentiable threat, without which an attack cannot "
            "evade it: define its soft_threat(query)."
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class NeighborDetector(Detector):
    """A detector that compares samples with clean ones near by.

    Attributes
    ----------
    neighbors_ : dict of str to ClassNeighbors
        The clean samples in each layer, which all detectors share.
    labels_ : ndarray of shape (n,)
    n_classes_ : int
    n_neighbors_ : int
    """

    affinity: ClassVar[str | None] = "euclidean"

    def fit(self, clean: CleanSamples) -> Self:
        """Store the clean samples."""
        self.labels_ = clean.labels
        self.n_classes_ = clean.n_classes
        self.n_neighbors_ = clean.n_neighbors
        self.neighbors_ = clean.neighbors
        return self

    def nearest(self, query: Query) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """Find the k nearest clean samples in each layer.

        Parameters
        ----------
        query : Query

        Yields
        ------
        layer : str
        distance : torch.Tensor of shape (n, n_neighbors_), float64
        index : torch.Tensor of shape (n, n_neighbors_), int64
        """
        for layer, neighbors in self.neighbors_.items():
            distance, index = query.nearest(layer, neighbors, self.n_neighbors_)
            yield layer, distance.cpu().to(torch.float64), index.cpu()

    def soft_score(
        self, class_scores: torch.Tensor, probabilities: torch.Tensor | None
    ) -> torch.Tensor:
        """Compute a differentiable stand-in for the score in one layer.

        Parameters
        ----------
        class_scores : torch.Tensor of shape (n, n_classes)
            How near the clean samples of each class are, higher for nearer; minus infinity where a
            class has none.
        probabilities : torch.Tensor of shape (n, n_classes) or None
            The network's, if there is one.

        Returns
        -------
        torch.Tensor of shape (n,)
            By default, minus the score of the nearest class.
        """
        return -class_scores.amax(dim=1)

    def soft_threat(self, query: SoftQuery) -> torch.Tensor:
        """Compute a differentiable stand-in for the threat: :meth:`soft_score` over the layers."""
        if self.affinity is None:
            return super().soft_threat(query)
        scores = [
            self.soft_score(query.class_scores(self.affinity, layer), query.probabilities)
            for layer in query.features
        ]
        return torch.stack(scores).sum(dim=0)


def soft_score_of_prediction(
    class_scores: torch.Tensor, probabilities: torch.Tensor
) -> torch.Tensor:
    """Return the soft score of the class that the network predicts.

    Parameters
    ----------
    class_scores, probabilities : torch.Tensor of shape (n, n_classes)

    Returns
    -------
    torch.Tensor of shape (n,)
    """
    # A class without samples has a score of minus infinity.
    return (probabilities * class_scores.clamp_min(-1e6)).sum(dim=1)


def in_double(values: torch.Tensor) -> torch.Tensor:
    """Convert values to double precision, on the CPU where their device has none.

    Parameters
    ----------
    values : torch.Tensor

    Returns
    -------
    torch.Tensor, float64
    """
    return (values.cpu() if values.device.type == "mps" else values).double()
