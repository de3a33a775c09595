"""Everything that touches a torch module."""

from .device import is_out_of_memory
from .frozen import FrozenModule
from .layer_choice import LayerScores, choose_layers
from .mapping import FeatureMap

__all__ = ["FeatureMap", "FrozenModule", "LayerScores", "choose_layers", "is_out_of_memory"]
