"""Threat detectors: one file for each family, and the table of their names."""

from .detectors import NEEDS_LABELS, NEEDS_OUTPUTS, SENSORS, CleanSamples, Query

__all__ = ["NEEDS_LABELS", "NEEDS_OUTPUTS", "SENSORS", "CleanSamples", "Query"]
