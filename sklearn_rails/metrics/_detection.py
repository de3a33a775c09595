"""Metrics of detectors that separate attacked samples from clean ones."""

from __future__ import annotations

from numbers import Real

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from .._validation import check_same_length
from ._arrays import check_scores


def fpr_at_tpr_score(
    y_true: ArrayLike | torch.Tensor, threat: ArrayLike | torch.Tensor, *, tpr: float = 0.95
) -> float:
    """Compute the lowest false-alarm rate at which a share of the attacked samples is flagged.

    Parameters
    ----------
    y_true : array-like of shape (n,), or torch.Tensor
        Nonzero or True for attacked samples.
    threat : array-like of shape (n,), or torch.Tensor
        Threat scores; higher is more suspicious. Only their order matters: infinite scores rank
        first or last.
    tpr : float, default=0.95
        Share of the attacked samples that must be flagged, above 0 and at most 1.

    Returns
    -------
    float
        Smallest share of clean samples above a threshold that flags at least ``tpr`` of the
        attacked samples.

    Raises
    ------
    ValueError
        If all samples are attacked or all are clean, ``y_true`` or ``threat`` holds NaN or
        something other than real numbers, or ``tpr`` is not a number in its range.

    References
    ----------
    .. [1] D. Hendrycks, K. Gimpel, "A Baseline for Detecting Misclassified and
       Out-of-Distribution Examples in Neural Networks", ICLR 2017, arXiv:1610.02136.

    Examples
    --------
    >>> from sklearn_rails.metrics import fpr_at_tpr_score
    >>> fpr_at_tpr_score([0, 0, 0, 0, 1, 1], [0.1, 0.2, 0.3, 0.6, 0.5, 0.9])
    0.25
    """
    if not isinstance(tpr, Real) or not 0 < tpr <= 1:
        raise ValueError(f"tpr={tpr!r} must be a share, above 0 and at most 1.")
    fprs, tprs, _ = roc_curve(*_check(y_true, threat), drop_intermediate=False)
    return float(fprs[tprs >= tpr].min())


def tpr_at_fpr_score(
    y_true: ArrayLike | torch.Tensor, threat: ArrayLike | torch.Tensor, *, fpr: float = 0.05
) -> float:
    """Compute the highest share of attacked samples that is flagged at a false-alarm rate.

    Parameters
    ----------
    y_true : array-like of shape (n,), or torch.Tensor
        Nonzero or True for attacked samples.
    threat : array-like of shape (n,), or torch.Tensor
        Threat scores; higher is more suspicious. Only their order matters: infinite scores rank
        first or last.
    fpr : float, default=0.05
        Largest share of the clean samples that may be flagged, from 0 to 1.

    Returns
    -------
    float
        Largest share of attacked samples above a threshold that flags at most ``fpr`` of the
        clean samples.

    Raises
    ------
    ValueError
        If all samples are attacked or all are clean, ``y_true`` or ``threat`` holds NaN or
        something other than real numbers, or ``fpr`` is not a number in its range.

    Examples
    --------
    >>> from sklearn_rails.metrics import tpr_at_fpr_score
    >>> tpr_at_fpr_score([0, 0, 0, 0, 1, 1], [0.1, 0.2, 0.3, 0.6, 0.5, 0.9])
    0.5
    """
    if not isinstance(fpr, Real) or not 0 <= fpr <= 1:
        raise ValueError(f"fpr={fpr!r} must be a share, from 0 to 1.")
    fprs, tprs, _ = roc_curve(*_check(y_true, threat), drop_intermediate=False)
    return float(tprs[fprs <= fpr].max())


def detection_scores(
    y_true: ArrayLike | torch.Tensor, threat: ArrayLike | torch.Tensor
) -> dict[str, float]:
    """Compute the usual detection metrics.

    Parameters
    ----------
    y_true : array-like of shape (n,), or torch.Tensor
        Nonzero or True for attacked samples. Count as attacked only samples whose attack succeeded,
        and as clean only samples that are classified correctly.
    threat : array-like of shape (n,), or torch.Tensor
        Threat scores; higher is more suspicious. Only their order matters: infinite scores rank
        first or last.

    Returns
    -------
    dict of str to float
        ``"auroc"``, area under the ROC curve; ``"aupr_out"`` and ``"aupr_in"``, average precision
        with the attacked and with the clean samples as positives; ``"fpr_at_95_tpr"`` and
        ``"tpr_at_5_fpr"``, see :func:`fpr_at_tpr_score` and :func:`tpr_at_fpr_score`.

    Raises
    ------
    ValueError
        If all samples are attacked or all are clean, or ``y_true`` or ``threat`` holds NaN or
        something other than real numbers.

    Examples
    --------
    >>> from sklearn_rails.metrics import detection_scores
    >>> scores = detection_scores(
    ...     [0, 0, 0, 0, 1, 1], [0.1, 0.2, 0.3, 0.6, 0.5, 0.9]
    ... )
    >>> scores["auroc"], scores["fpr_at_95_tpr"]
    (0.875, 0.25)
    """
    is_attacked, ranks = _check(y_true, threat)
    return {
        "auroc": float(roc_auc_score(is_attacked, ranks)),
        "aupr_out": float(average_precision_score(is_attacked, ranks)),
        "aupr_in": float(average_precision_score(~is_attacked, -ranks)),
        "fpr_at_95_tpr": fpr_at_tpr_score(is_attacked, ranks, tpr=0.95),
        "tpr_at_5_fpr": tpr_at_fpr_score(is_attacked, ranks, fpr=0.05),
    }


def _check(
    y_true: ArrayLike | torch.Tensor, threat: ArrayLike | torch.Tensor
) -> tuple[NDArray[np.bool_], NDArray[np.intp]]:
    """Check the arguments, and replace the threat scores by their ranks."""
    labels, scores = check_scores(y_true, "y_true"), check_scores(threat, "threat")
    check_same_length(y_true=labels, threat=scores)
    is_attacked = labels.astype(bool)
    if is_attacked.all() or not is_attacked.any():
        raise ValueError(
            f"y_true must have attacked and clean samples, got {is_attacked.sum()} attacked of "
            f"{len(is_attacked)}."
        )
    # Negated unsigned integers wrap around, and differences of infinite scores are NaN.
    return is_attacked, np.unique(scores, return_inverse=True)[1]
