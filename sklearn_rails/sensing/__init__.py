"""Threat detectors: one file for each family, and the table of their names.

A detector is a subclass of :class:`~sklearn_rails.sensing.base.Detector` and a line in
:data:`DETECTORS`, which is all that ``ThreatScorer`` knows of it.
"""

from .base import Detector, NeighborDetector
from .layer_choice import score_detection
from .methods import DETECTORS, make_detectors, read_layers
from .samples import CleanSamples, Query, SoftQuery, soft_labels
from .scoring import Evidence, any_needs_outputs, score_clean, score_new

__all__ = [
    "DETECTORS",
    "CleanSamples",
    "Detector",
    "Evidence",
    "NeighborDetector",
    "Query",
    "SoftQuery",
    "any_needs_outputs",
    "make_detectors",
    "read_layers",
    "score_clean",
    "score_detection",
    "score_new",
    "soft_labels",
]
