"""Attacks on the estimators themselves, which take the defence into account."""

from ._adaptive import AdaptiveKNNAttack

__all__ = ["AdaptiveKNNAttack"]
