"""How well a threat score tells attacked inputs from clean ones."""

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from sklearn.utils import assert_all_finite, check_consistent_length, column_or_1d


def fpr_at_tpr_score(y_true, threat, *, tpr=0.95):
    """False-alarm rate that it takes to catch a share of the attacked rows.

    Parameters
    ----------
    y_true : array-like of shape (n,)
        Truthy for attacked rows.
    threat : array-like of shape (n,)
        Threat scores; higher is more suspect.
    tpr : float, default=0.95
        Share of the attacked rows that is to be caught, above 0.

    Returns
    -------
    float
        Smallest share of the clean rows that a threshold flags which catches at least ``tpr`` of
        the attacked ones.

    Raises
    ------
    ValueError
        If the rows are all attacked or all clean, a score is not finite, or ``tpr`` is not a share.

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
    rates_false, rates_true = _operating_points(y_true, threat, tpr=tpr)
    return float(rates_false[rates_true >= tpr].min())


def tpr_at_fpr_score(y_true, threat, *, fpr=0.05):
    """Share of the attacked rows that is caught at a false-alarm rate.

    Parameters
    ----------
    y_true : array-like of shape (n,)
        Truthy for attacked rows.
    threat : array-like of shape (n,)
        Threat scores; higher is more suspect.
    fpr : float, default=0.05
        Share of the clean rows that may be flagged.

    Returns
    -------
    float
        Largest share of the attacked rows that a threshold catches which flags at most ``fpr`` of
        the clean ones.

    Raises
    ------
    ValueError
        If the rows are all attacked or all clean, a score is not finite, or ``fpr`` is not a share.

    Examples
    --------
    >>> from sklearn_rails.metrics import tpr_at_fpr_score
    >>> tpr_at_fpr_score([0, 0, 0, 0, 1, 1], [0.1, 0.2, 0.3, 0.6, 0.5, 0.9])
    0.5
    """
    rates_false, rates_true = _operating_points(y_true, threat, fpr=fpr)
    return float(rates_true[rates_false <= fpr].max())


def detection_scores(y_true, threat):
    """Give the usual scores of a detector at once.

    Parameters
    ----------
    y_true : array-like of shape (n,)
        Truthy for attacked rows. Count as attacked only rows whose attack succeeded, and among the
        clean ones only those that are classified correctly.
    threat : array-like of shape (n,)
        Threat scores; higher is more suspect.

    Returns
    -------
    dict of str to float
        ``"auroc"``, area under the ROC curve; ``"aupr_out"`` and ``"aupr_in"``, average precision
        with the attacked and with the clean rows as positives; ``"fpr_at_95_tpr"`` and
        ``"tpr_at_5_fpr"``, see :func:`fpr_at_tpr_score` and :func:`tpr_at_fpr_score`.

    Raises
    ------
    ValueError
        If the rows are all attacked or all clean, or a score is not finite.

    Examples
    --------
    >>> from sklearn_rails.metrics import detection_scores
    >>> scores = detection_scores([0, 0, 0, 0, 1, 1], [0.1, 0.2, 0.3, 0.6, 0.5, 0.9])
    >>> scores["auroc"], scores["fpr_at_95_tpr"]
    (0.875, 0.25)
    """
    y_true, threat = _check(y_true, threat)
    return {
        "auroc": float(roc_auc_score(y_true, threat)),
        "aupr_out": float(average_precision_score(y_true, threat)),
        "aupr_in": float(average_precision_score(~y_true, -threat)),
        "fpr_at_95_tpr": fpr_at_tpr_score(y_true, threat, tpr=0.95),
        "tpr_at_5_fpr": tpr_at_fpr_score(y_true, threat, fpr=0.05),
    }


def _check(y_true, threat):
    y_true, threat = column_or_1d(y_true).astype(bool), column_or_1d(threat)
    check_consistent_length(y_true, threat)
    assert_all_finite(threat, input_name="threat")
    if y_true.all() or not y_true.any():
        raise ValueError(
            f"y_true must have attacked and clean rows, got {y_true.sum()} attacked of "
            f"{len(y_true)}."
        )
    return y_true, threat


def _operating_points(y_true, threat, **share):
    ((name, value),) = share.items()
    if not 0 <= value <= 1 or (name == "tpr" and value == 0):
        raise ValueError(f"{name}={value!r} must be a share, between 0 and 1.")
    rates_false, rates_true, _ = roc_curve(*_check(y_true, threat), drop_intermediate=False)
    return np.asarray(rates_false), np.asarray(rates_true)
