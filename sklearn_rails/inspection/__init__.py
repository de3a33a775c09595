"""Displays that explain predictions and show threat scores."""

from ._affinity_curve import AffinityCurveDisplay
from ._immune_response import ImmuneResponseDisplay
from ._threat import ThreatDisplay

__all__ = ["AffinityCurveDisplay", "ImmuneResponseDisplay", "ThreatDisplay"]
