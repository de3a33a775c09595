"""Displays that show how a prediction came about."""

from ._affinity_curve import AffinityCurveDisplay
from ._immune_response import ImmuneResponseDisplay

__all__ = ["AffinityCurveDisplay", "ImmuneResponseDisplay"]
