"""Displays that explain predictions, compare layers, and show threat scores."""

from ._affinity_curve import AffinityCurveDisplay
from ._immune_response import ImmuneResponseDisplay
from ._layers import LayerDisplay
from ._threat import ThreatDisplay

__all__ = ["AffinityCurveDisplay", "ImmuneResponseDisplay", "LayerDisplay", "ThreatDisplay"]
