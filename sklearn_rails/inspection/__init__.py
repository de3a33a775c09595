"""Displays that show how a prediction came about."""

from ._immune_response import ImmuneResponseDisplay

__all__ = ["ImmuneResponseDisplay"]
