"""Attacks on a network, and on the estimators that defend it."""

from ._adaptive import AdaptiveKNNAttack
from ._pgd import pgd

__all__ = ["AdaptiveKNNAttack", "pgd"]
