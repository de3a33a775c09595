"""Everything that touches a torch module."""

from .device import is_out_of_memory
from .frozen import FrozenModule
from .mapping import FeatureMap

__all__ = ["FeatureMap", "FrozenModule", "is_out_of_memory"]
