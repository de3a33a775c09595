"""How well a threat score tells attacked rows from clean ones, as a picture."""

import numpy as np
from sklearn.metrics import auc, roc_curve
from sklearn.utils import assert_all_finite, column_or_1d

from ._immune_response import _check_matplotlib


class ThreatDisplay:
    """Threat scores of clean and attacked rows: their distributions, and the ROC curves.

    Use :meth:`from_estimator` or :meth:`from_predictions` to make one. All parameters are stored as
    attributes.

    Parameters
    ----------
    threat : array-like of shape (n,)
        Threat scores of clean rows; higher is more suspect.
    attacked : dict of str to array-like of shape (n_attacked,)
        Those of attacked rows, by the name of the attack.
    threshold : float, default=None
        The score from which on there is an alarm.

    Attributes
    ----------
    roc_auc_ : dict of str to float
        The area under the ROC curve of each attack.
    axes_ : ndarray of matplotlib Axes, of shape (2,)
        What the distributions and the curves were drawn on.
    figure_ : matplotlib Figure or SubFigure
        The figure that they are in.

    See Also
    --------
    ThreatScorer : Gives threat scores.
    sklearn_rails.metrics.detection_scores : The figures that go with it.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> import numpy as np
    >>> from sklearn.datasets import load_digits
    >>> from sklearn_rails import ThreatScorer
    >>> from sklearn_rails.inspection import ThreatDisplay
    >>> X, y = load_digits(return_X_y=True)
    >>> scorer = ThreatScorer(method="distance", random_state=0).fit(X[:1000], y[:1000])
    >>> noise = np.random.default_rng(0).uniform(0, 16, size=(200, 64))
    >>> ThreatDisplay.from_estimator(scorer, X[1000:], {"noise": noise})
    <...>
    >>> plt.show()
    """

    def __init__(self, threat, attacked, *, threshold=None):
        self.threat = threat
        self.attacked = attacked
        self.threshold = threshold

    @classmethod
    def from_estimator(cls, estimator, X, X_attacked, *, axes=None):
        """Score rows, and plot.

        Parameters
        ----------
        estimator : fitted outlier detector
            With ``score_samples``, lower for more suspect, such as
            :class:`~sklearn_rails.ThreatScorer`. Its ``offset_`` is the threshold, if there is one.
        X : array-like
            Clean rows.
        X_attacked : array-like or dict of str to array-like
            Attacked rows, or several kinds of them by name.
        axes : sequence of two matplotlib Axes, default=None
            What to draw on. None makes a new figure.

        Returns
        -------
        :class:`~sklearn_rails.inspection.ThreatDisplay`
            The display.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        ValueError
            As :meth:`plot`.
        """
        _check_matplotlib(f"{cls.__name__}.from_estimator")
        attacked = X_attacked if isinstance(X_attacked, dict) else {"attacked": X_attacked}
        offset = getattr(estimator, "offset_", None)
        return cls.from_predictions(
            -estimator.score_samples(X),
            {name: -estimator.score_samples(rows) for name, rows in attacked.items()},
            threshold=None if offset is None else -offset,
            axes=axes,
        )

    @classmethod
    def from_predictions(cls, threat, threat_attacked, *, threshold=None, axes=None):
        """Plot threat scores.

        Parameters
        ----------
        threat : array-like of shape (n,)
            Threat scores of clean rows; higher is more suspect.
        threat_attacked : array-like of shape (n_attacked,) or dict of str to array-like
            Those of attacked rows, or of several kinds of them by name.
        threshold : float, default=None
            The score from which on there is an alarm.
        axes : sequence of two matplotlib Axes, default=None
            What to draw on. None makes a new figure.

        Returns
        -------
        :class:`~sklearn_rails.inspection.ThreatDisplay`
            The display.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        ValueError
            As :meth:`plot`.
        """
        _check_matplotlib(f"{cls.__name__}.from_predictions")
        is_dict = isinstance(threat_attacked, dict)
        attacked = threat_attacked if is_dict else {"attacked": threat_attacked}
        return cls(threat, attacked, threshold=threshold).plot(axes=axes)

    def plot(self, *, axes=None):
        """Plot distributions and curves.

        Parameters
        ----------
        axes : sequence of two matplotlib Axes, default=None
            What to draw on. None makes a new figure.

        Returns
        -------
        :class:`~sklearn_rails.inspection.ThreatDisplay`
            The display itself, with what was drawn as attributes.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        ValueError
            If there are no scores of clean or of attacked rows, some are not finite or not of one
            dimension, or ``axes`` are not two.
        """
        _check_matplotlib(f"{type(self).__name__}.plot")
        import matplotlib.pyplot as plt

        if not self.attacked:
            raise ValueError(f"attacked={self.attacked!r} must have the scores of one attack.")
        threat = _check_scores("threat", self.threat)
        attacked = {k: _check_scores(f"attacked[{k!r}]", v) for k, v in self.attacked.items()}
        if axes is None:
            _, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
        axes = np.asarray(axes)
        if axes.shape != (2,):
            raise ValueError(f"axes must be two matplotlib Axes, got an array of {axes.shape}.")
        edges = np.histogram_bin_edges(np.concatenate([threat, *attacked.values()]), bins=30)
        how = {"bins": edges, "density": True, "alpha": 0.5}
        axes[0].hist(threat, label="clean", color="gray", **how)
        self.roc_auc_ = {}
        for i, (name, scores) in enumerate(attacked.items()):
            axes[0].hist(scores, label=name, color=f"C{i}", **how)
            is_attacked = np.repeat([0, 1], [len(threat), len(scores)])
            fpr, tpr, _ = roc_curve(is_attacked, np.concatenate([threat, scores]))
            self.roc_auc_[name] = float(auc(fpr, tpr))
            axes[1].plot(fpr, tpr, color=f"C{i}", label=f"{name} (AUC {self.roc_auc_[name]:.3f})")
        if self.threshold is not None and np.isfinite(self.threshold):
            axes[0].axvline(self.threshold, color="black", linestyle=":", label="threshold")
        axes[0].set(xlabel="threat score", ylabel="density")
        axes[0].legend()
        axes[1].legend()
        axes[1].set(xlabel="share of clean rows flagged", ylabel="share of attacked rows flagged")
        self.axes_, self.figure_ = axes, axes[0].figure
        return self


def _check_scores(name, scores):
    scores = column_or_1d(scores)
    if len(scores) == 0:
        raise ValueError(f"{name} must have the score of one row or more.")
    assert_all_finite(scores, input_name=name)
    return scores
