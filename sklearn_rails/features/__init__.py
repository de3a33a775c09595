"""Everything that touches a torch module."""

from .extractor import (
    NETWORK_CONSTRAINTS,
    FeatureMap,
    TorchFeatureExtractor,
    feature_map,
    open_parameter,
)
from .frozen import FrozenModule, SharesNetwork

__all__ = [
    "NETWORK_CONSTRAINTS",
    "FeatureMap",
    "FrozenModule",
    "SharesNetwork",
    "TorchFeatureExtractor",
    "feature_map",
    "open_parameter",
]
