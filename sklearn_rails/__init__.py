"""Robust predictions from a trained PyTorch network, inside scikit-learn."""

from ._dknn import DkNNClassifier
from ._extractor import TorchFeatureExtractor
from ._rails import RAILSClassifier
from ._threat import ThreatScorer
from ._version import __version__
from .features import FrozenModule
from .persistence import load, save

__all__ = [
    "DkNNClassifier",
    "FrozenModule",
    "RAILSClassifier",
    "ThreatScorer",
    "TorchFeatureExtractor",
    "__version__",
    "load",
    "save",
]
