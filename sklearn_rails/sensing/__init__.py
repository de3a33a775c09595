"""Threat detectors: one file for each family, and the table of their names.

A detector is a subclass of :class:`~sklearn_rails.sensing.base.Detector` and a line in
:data:`DETECTORS`, which is all that ``ThreatScorer`` knows of it.
"""

from .base import Detector, NeighborDetector
from .conformity import Credibility, Disagreement
from .density import KernelDensity
from .distance import Distance, LocalIntrinsicDimensionality
from .mahalanobis import Mahalanobis
from .samples import CleanSamples, Query, SoftQuery, soft_labels
from .scoring import Evidence, any_needs_outputs, score_clean, score_new
from .squeezing import FeatureSqueezing

__all__ = [
    "DETECTORS",
    "CleanSamples",
    "Detector",
    "Evidence",
    "NeighborDetector",
    "Query",
    "SoftQuery",
    "any_needs_outputs",
    "score_clean",
    "score_new",
    "soft_labels",
]

# What ThreatScorer's `method` can be.
DETECTORS: dict[str, type[Detector]] = {
    "credibility": Credibility,
    "disagreement": Disagreement,
    "distance": Distance,
    "kernel_density": KernelDensity,
    "mahalanobis": Mahalanobis,
    "lid": LocalIntrinsicDimensionality,
    "feature_squeezing": FeatureSqueezing,
}
