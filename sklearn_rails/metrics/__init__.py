"""Metrics of robust classification and of the detection of attacks."""

from ._detection import detection_scores, fpr_at_tpr_score, tpr_at_fpr_score
from ._robustness import make_robust_scorer, robust_accuracy_score

__all__ = [
    "detection_scores",
    "fpr_at_tpr_score",
    "make_robust_scorer",
    "robust_accuracy_score",
    "tpr_at_fpr_score",
]
