"""Attacks on the estimators themselves, by somebody who knows the defence."""

from ._adaptive import AdaptiveKNNAttack

__all__ = ["AdaptiveKNNAttack"]
