"""Everything that touches a torch module."""

from .device import is_out_of_memory, memory_budget
from .extractor import (
    LARGEST_SIZE,
    NETWORK_CONSTRAINTS,
    TorchFeatureExtractor,
    prepare_fit,
)
from .frozen import FrozenModule, SharesNetwork

__all__ = [
    "LARGEST_SIZE",
    "NETWORK_CONSTRAINTS",
    "FrozenModule",
    "SharesNetwork",
    "TorchFeatureExtractor",
    "is_out_of_memory",
    "memory_budget",
    "prepare_fit",
]
