"""Everything that touches a torch module."""

from .device import memory_budget
from .extractor import (
    NETWORK_CONSTRAINTS,
    TorchFeatureExtractor,
    feature_map,
    open_parameter,
)
from .frozen import FrozenModule, SharesNetwork

__all__ = [
    "NETWORK_CONSTRAINTS",
    "FrozenModule",
    "SharesNetwork",
    "TorchFeatureExtractor",
    "feature_map",
    "memory_budget",
    "open_parameter",
]
