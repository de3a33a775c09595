"""Threat scores of clean and attacked samples as histograms and ROC curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import auc, roc_curve
from sklearn.utils import assert_all_finite

from .._validation import as_array, naming
from ..metrics._arrays import check_scores
from ._matplotlib import COLORS, LINE_STYLES, check_drawable, check_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure


class ThreatDisplay:
    """Distributions of the threat scores of clean and attacked samples, and their ROC curves.

    Use :meth:`from_estimator` or :meth:`from_predictions` to create a display. All parameters are
    stored as attributes.

    Parameters
    ----------
    threat : array-like of shape (n,)
        Threat scores of clean samples; higher is more suspicious.
    attacked : dict of str to array-like of shape (n_attacked,)
        Threat scores of attacked samples, by the name of the attack.
    threshold : float, default=None
        Score above which a sample is flagged.

    Attributes
    ----------
    roc_auc_ : dict of str to float
        The area under the ROC curve of each attack.
    axes_ : ndarray of matplotlib Axes, of shape (2,)
        The axes of the distributions and of the ROC curves.
    figure_ : matplotlib Figure or SubFigure
        The figure of the axes.

    See Also
    --------
    ThreatScorer : Computes threat scores.
    sklearn_rails.metrics.detection_scores : The same as numbers.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> import numpy as np
    >>> from sklearn.datasets import load_digits
    >>> from sklearn_rails import ThreatScorer
    >>> from sklearn_rails.inspection import ThreatDisplay
    >>> X, y = load_digits(return_X_y=True)
    >>> scorer = ThreatScorer(method="distance", random_state=0)
    >>> _ = scorer.fit(X[:1000], y[:1000])
    >>> noise = np.random.default_rng(0).uniform(0, 16, size=(200, 64))
    >>> ThreatDisplay.from_estimator(scorer, X[1000:], {"noise": noise})
    ThreatDisplay(797 clean, 200 noise (AUC 1.000))
    >>> plt.show()
    """

    roc_auc_: dict[str, float]
    axes_: NDArray[np.object_]
    figure_: Figure | SubFigure

    def __init__(
        self,
        threat: ArrayLike,
        attacked: Mapping[str, ArrayLike],
        *,
        threshold: float | None = None,
    ) -> None:
        self.threat = threat
        self.attacked = attacked
        self.threshold = threshold

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: ArrayLike,
        X_attacked: ArrayLike | Mapping[str, ArrayLike],
        *,
        axes: Sequence[Axes] | NDArray[np.object_] | None = None,
    ) -> ThreatDisplay:
        """Score samples with a detector, and plot the scores.

        Parameters
        ----------
        estimator : fitted outlier detector
            A detector with ``score_samples``, lower for more suspicious samples, such as
            :class:`~sklearn_rails.ThreatScorer`. Its ``offset_``, if any, is the threshold.
        X : array-like
            Clean samples.
        X_attacked : array-like or dict of str to array-like
            Attacked samples, or several kinds of them by name.
        axes : sequence of two matplotlib Axes, default=None
            Axes to draw on. None creates a figure.

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
        check_matplotlib(f"{cls.__name__}.from_estimator")
        if isinstance(estimator, type) or not hasattr(estimator, "score_samples"):
            raise TypeError(
                "estimator must be a fitted outlier detector with score_samples, got "
                f"{type(estimator).__name__}."
            )

        def threat_of(samples: Any, name: str) -> NDArray[Any]:
            with naming(name):
                scores = check_scores(estimator.score_samples(samples), "estimator: score_samples")
            return -scores.astype(np.float64)

        attacked = X_attacked if isinstance(X_attacked, Mapping) else {"attacked": X_attacked}
        offset = getattr(estimator, "offset_", None)
        return cls.from_predictions(
            threat_of(X, "X"),
            {name: threat_of(samples, "X_attacked") for name, samples in attacked.items()},
            threshold=None if offset is None else -offset,
            axes=axes,
        )

    @classmethod
    def from_predictions(
        cls,
        threat: ArrayLike,
        threat_attacked: ArrayLike | Mapping[str, ArrayLike],
        *,
        threshold: float | None = None,
        axes: Sequence[Axes] | NDArray[np.object_] | None = None,
    ) -> ThreatDisplay:
        """Plot threat scores.

        Parameters
        ----------
        threat : array-like of shape (n,)
            Threat scores of clean samples; higher is more suspicious.
        threat_attacked : array-like of shape (n_attacked,) or dict of str to array-like
            Threat scores of attacked samples, or of several kinds of them by name.
        threshold : float, default=None
            Score above which a sample is flagged.
        axes : sequence of two matplotlib Axes, default=None
            Axes to draw on. None creates a figure.

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
        check_matplotlib(f"{cls.__name__}.from_predictions")
        attacked: Mapping[str, ArrayLike] = (
            threat_attacked
            if isinstance(threat_attacked, Mapping)
            else {"attacked": threat_attacked}
        )
        return cls(threat, attacked, threshold=threshold).plot(axes=axes)

    def plot(self, *, axes: Sequence[Axes] | NDArray[np.object_] | None = None) -> ThreatDisplay:
        """Plot the distributions and the ROC curves.

        Parameters
        ----------
        axes : sequence of two matplotlib Axes, default=None
            Axes to draw on. None creates a figure.

        Returns
        -------
        :class:`~sklearn_rails.inspection.ThreatDisplay`
            The display itself, with its axes as attributes.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        ValueError
            If there are no scores of clean or of attacked samples, some are not finite or not
            one-dimensional, or ``axes`` are not two.
        """
        check_matplotlib(f"{type(self).__name__}.plot")
        import matplotlib.pyplot as plt

        if not self.attacked:
            raise ValueError(f"attacked={self.attacked!r} must have the scores of one attack.")
        threat = _check_scores("threat", self.threat)
        attacked = {k: _check_scores(f"attacked[{k!r}]", v) for k, v in self.attacked.items()}
        if not (self.threshold is None or isinstance(self.threshold, Real)):
            raise TypeError(f"threshold={self.threshold!r} must be a number, or None.")
        with naming("threshold"):
            threshold = np.nan if self.threshold is None else float(self.threshold)
        pair = None if axes is None else as_array(axes, "axes")
        if pair is not None and pair.shape != (2,):
            raise ValueError(
                f"axes must be two matplotlib Axes, got an array of shape {pair.shape}."
            )
        if pair is None:
            _, pair = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
        for ax in pair:
            check_drawable(ax, "axes", "hist")
        histogram, curves = pair
        with naming("threat"):  # whose range may be too large or too small for bins
            edges = np.histogram_bin_edges(np.concatenate([threat, *attacked.values()]), bins=30)
        histogram.hist(threat, bins=edges, density=True, label="clean", color="0.75")
        self.roc_auc_ = {}
        for i, (name, scores) in enumerate(attacked.items()):
            style: dict[str, Any] = {
                "color": COLORS[i % len(COLORS)],
                "linestyle": LINE_STYLES[i % len(LINE_STYLES)],
                "linewidth": 2,
            }
            # Outlines, since several filled histograms hide each other.
            histogram.hist(scores, bins=edges, density=True, histtype="step", label=name, **style)
            is_attacked = np.repeat([0, 1], [len(threat), len(scores)])
            fpr, tpr, _ = roc_curve(is_attacked, np.concatenate([threat, scores]))
            self.roc_auc_[name] = float(auc(fpr, tpr))
            curves.plot(fpr, tpr, label=f"{name} (AUC {self.roc_auc_[name]:.3f})", **style)
        if np.isfinite(threshold):
            histogram.axvline(threshold, color="black", linestyle=":", label="threshold")
        histogram.set(xlabel="threat score", ylabel="density")
        # Above the axes: inside it would hide bars.
        histogram.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
        curves.legend()
        curves.set(
            xlabel="share of clean samples flagged", ylabel="share of attacked samples flagged"
        )
        self.axes_, self.figure_ = pair, histogram.figure
        return self

    def __repr__(self) -> str:
        sizes = [f"{len(as_array(self.threat, 'threat'))} clean"]
        for name, scores in self.attacked.items():
            auc_text = f" (AUC {self.roc_auc_[name]:.3f})" if hasattr(self, "roc_auc_") else ""
            sizes.append(f"{len(as_array(scores, 'attacked'))} {name}{auc_text}")
        return f"{type(self).__name__}({', '.join(sizes)})"


def _check_scores(name: str, scores: ArrayLike) -> NDArray[Any]:
    array = check_scores(scores, name).astype(np.float64)
    if len(array) == 0:
        raise ValueError(f"{name} must have the score of one sample or more.")
    assert_all_finite(array, input_name=name)
    return array
