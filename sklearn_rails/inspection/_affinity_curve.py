"""Mean affinity of populations over the generations, for many inputs."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm
from sklearn.utils.validation import check_is_fitted

from .._rails import RAILSClassifier
from .._validation import as_array, naming
from ..immune import ImmuneResponse
from ._matplotlib import COLORS, MARKERS, check_drawable, check_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import PolyCollection
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.lines import Line2D


class AffinityCurveDisplay:
    """Mean affinity of populations over the generations, with a confidence band.

    The band is the normal-approximation confidence interval of the mean over the samples. A sample
    that stopped early keeps its last affinity: a mean over only the samples that are still running
    would compare different samples at different generations. Several lines compare responses, as
    [1]_ does for populations flocked for the input itself and for another one.

    Use :meth:`from_estimator` or :meth:`from_response` to create a display. All parameters are
    stored as attributes.

    Parameters
    ----------
    curves : dict of str to ndarray of shape (n, generations + 1)
        The affinity curves of each line, by its label in the legend; NaN after a sample has
        stopped early. A line with the label None is not in the legend.
    layer : str
        The layer in which affinity was measured.
    confidence : float, default=0.95
        Confidence level of the bands, between 0 and 1. The band of a single sample has no width.

    Attributes
    ----------
    lines_ : list of matplotlib Line2D
        The means, in the order of ``curves``.
    bands_ : list of matplotlib PolyCollection
        Their confidence intervals.
    ax_ : matplotlib Axes
        The axes.
    figure_ : matplotlib Figure or SubFigure
        The figure of the axes.

    See Also
    --------
    ImmuneResponseDisplay : Single responses as images.
    RAILSClassifier.respond : The responses as arrays.

    References
    ----------
    .. [1] R. Wang, T. Chen, S. Lindsly, C. Stansbury, I. Rajapakse, A. Hero, "Immuno-mimetic Deep
       Neural Networks (Immuno-Net)", 2021, arXiv:2107.02842.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> from sklearn.datasets import load_digits
    >>> from sklearn_rails import RAILSClassifier
    >>> from sklearn_rails.inspection import AffinityCurveDisplay
    >>> X, y = load_digits(return_X_y=True)
    >>> X = X / 16
    >>> rails = RAILSClassifier(
    ...     population_size=50, generations=5, early_stopping=False, random_state=0
    ... ).fit(X[:500], y[:500])
    >>> AffinityCurveDisplay.from_estimator(
    ...     rails, {"digits": X[500:510], "negatives": 1 - X[500:510]}
    ... )
    AffinityCurveDisplay(10 digits, 10 negatives, layer='input')
    >>> plt.show()
    """

    lines_: list[Line2D]
    bands_: list[PolyCollection]
    ax_: Axes
    figure_: Figure | SubFigure

    def __init__(
        self, curves: Mapping[str | None, ArrayLike], *, layer: str, confidence: float = 0.95
    ) -> None:
        self.curves = curves
        self.layer = layer
        self.confidence = confidence

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: ArrayLike | torch.Tensor | Mapping[str | None, ArrayLike | torch.Tensor],
        *,
        layer: str | None = None,
        confidence: float = 0.95,
        ax: Axes | None = None,
        **line_kwargs: Any,
    ) -> AffinityCurveDisplay:
        """Compute a classifier's responses to samples, and plot their affinity curves.

        Parameters
        ----------
        estimator : RAILSClassifier
            A fitted classifier.
        X : array-like of shape (n, n_features) or (n, *input_shape), or dict of str to array-like
            The samples, or several sets of them to compare, by their labels in the legend.
        layer : str, default=None
            As :meth:`from_response` takes it.
        confidence : float, default=0.95
            As :meth:`from_response` takes it.
        ax : matplotlib.axes.Axes, default=None
            As :meth:`from_response` takes it.
        **line_kwargs
            As :meth:`from_response` takes them.

        Returns
        -------
        :class:`~sklearn_rails.inspection.AffinityCurveDisplay`
            The display.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        ValueError
            As :meth:`from_response`, or if the samples do not fit the classifier.
        """
        check_matplotlib(f"{cls.__name__}.from_estimator")
        if not isinstance(estimator, RAILSClassifier):
            raise TypeError(
                f"estimator must be a fitted RAILSClassifier, got {type(estimator).__name__}."
            )
        check_is_fitted(estimator)
        sets = X if isinstance(X, Mapping) else {None: X}
        responses = {label: estimator.respond(samples) for label, samples in sets.items()}
        return cls.from_response(
            responses, layer=layer, confidence=confidence, ax=ax, **line_kwargs
        )

    @classmethod
    def from_response(
        cls,
        response: ImmuneResponse | Mapping[str | None, ImmuneResponse],
        *,
        layer: str | None = None,
        confidence: float = 0.95,
        ax: Axes | None = None,
        **line_kwargs: Any,
    ) -> AffinityCurveDisplay:
        """Plot the affinity curves of a response, or of several to compare.

        A sample that stopped early keeps its last affinity.

        Parameters
        ----------
        response : ImmuneResponse or dict of str to ImmuneResponse
            Result of :meth:`RAILSClassifier.respond`. Each response of a dictionary has a line of
            its own, with its key in the legend.
        layer : str, default=None
            The layer to show. None takes the first of the (first) response.
        confidence : float, default=0.95
            Confidence level of the bands, between 0 and 1. The band of a single sample has no
            width.
        ax : matplotlib Axes, default=None
            Axes to draw on. None creates a figure.
        **line_kwargs : dict
            Passed to matplotlib's ``plot``, for every line.

        Returns
        -------
        :class:`~sklearn_rails.inspection.AffinityCurveDisplay`
            The display.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        ValueError
            If there is no response, one lacks the layer or has no samples, or ``confidence`` is
            not between 0 and 1.
        """
        check_matplotlib(f"{cls.__name__}.from_response")
        responses: Mapping[str | None, ImmuneResponse] = (
            response if isinstance(response, Mapping) else {None: response}
        )
        if not responses:
            raise ValueError("response={} must have one response or more.")
        for label, one in responses.items():
            if not isinstance(one, ImmuneResponse):
                raise TypeError(f"response must be an ImmuneResponse, got {type(one).__name__}.")
            if layer is not None and not (isinstance(layer, str) and layer in one.affinity_curve):
                owner = "response" if label is None else f"response[{label!r}]"
                raise ValueError(
                    f"layer={layer!r} is none of the layers {list(one.affinity_curve)} of {owner}."
                )
        if layer is None:
            layer = next(iter(next(iter(responses.values())).affinity_curve))
        curves = {label: one.affinity_curve[layer] for label, one in responses.items()}
        return cls(curves, layer=layer, confidence=confidence).plot(ax=ax, **line_kwargs)

    def plot(self, *, ax: Axes | None = None, **line_kwargs: Any) -> AffinityCurveDisplay:
        """Plot the curves.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Axes to draw on. None creates a figure.
        **line_kwargs : dict
            Passed to matplotlib's ``plot``, for every line.

        Returns
        -------
        :class:`~sklearn_rails.inspection.AffinityCurveDisplay`
            The display itself, with its lines and axes as attributes.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        ValueError
            If there are no curves, some are not of shape (n, generations + 1) or do not begin with
            a finite affinity, or ``confidence`` is not between 0 and 1.
        """
        check_matplotlib(f"{type(self).__name__}.plot")
        import matplotlib.pyplot as plt
        from matplotlib.ticker import MaxNLocator

        # Computed before a figure is created, so that an error leaves no empty one behind.
        intervals = self._intervals()
        check_drawable(ax, "ax", "fill_between")
        if ax is None:
            _, ax = plt.subplots(layout="constrained")
        self.lines_, self.bands_ = [], []
        for i, (label, (mean, half_width)) in enumerate(intervals.items()):
            style = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}
            (line,) = ax.plot(mean, **(style | {"label": label, "markersize": 4} | line_kwargs))
            band = ax.fill_between(
                np.arange(len(mean)),
                mean - half_width,
                mean + half_width,
                color=line.get_color(),
                alpha=0.2,
                linewidth=0,
            )
            self.lines_.append(line)
            self.bands_.append(band)
        # With generations=0 the axis has only one integer tick.
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        ax.set(xlabel="generation", ylabel=f"mean affinity (layer: {self.layer})")
        # Matplotlib labels a line without a label "_child0" and leaves it out of legends.
        if not all(str(line.get_label()).startswith("_") for line in self.lines_):
            ax.legend()
        self.ax_, self.figure_ = ax, ax.figure
        return self

    def __repr__(self) -> str:
        sizes = [
            f"{len(as_array(curves, 'curves'))} {'samples' if label is None else label}"
            for label, curves in self.curves.items()
        ]
        return f"{type(self).__name__}({', '.join([*sizes, f'layer={self.layer!r}'])})"

    def _intervals(self) -> dict[str | None, tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """Return the mean and half the width of its confidence interval, for each label."""
        if not self.curves:
            raise ValueError(f"curves={self.curves!r} must have the curves of one line or more.")
        if not (isinstance(self.confidence, Real) and 0 < self.confidence < 1):
            raise ValueError(
                f"confidence={self.confidence!r} must be between 0 and 1, both excluded."
            )
        z = norm.ppf((1 + float(self.confidence)) / 2)
        intervals = {}
        for label, curves in self.curves.items():
            filled = _carry_forward(label, curves)
            n = len(filled)
            # The deviation of a single sample is not defined with ddof=1; with ddof=0 it is 0.
            deviation = filled.std(axis=0, ddof=1 if n > 1 else 0)
            intervals[label] = filled.mean(axis=0), z * deviation / np.sqrt(n)
        return intervals


def _carry_forward(label: str | None, curves: ArrayLike) -> NDArray[np.float64]:
    """Fill the generations after a sample has stopped with its last affinity."""
    with naming(f"curves[{label!r}]"):
        array = as_array(curves, f"curves[{label!r}]").astype(np.float64)
    if array.ndim != 2 or array.size == 0:
        raise ValueError(
            f"curves[{label!r}] has shape {array.shape}; it must be (n, generations + 1), with "
            "one sample or more."
        )
    known = np.isfinite(array[:, 0])
    if not known.all():
        raise ValueError(
            f"curves[{label!r}] must begin with a finite affinity for every sample, got "
            f"{array[~known, 0][0]} for sample {np.flatnonzero(~known)[0]}."
        )
    last_bred = np.where(np.isnan(array), 0, np.arange(array.shape[1]))
    return np.take_along_axis(array, np.maximum.accumulate(last_bred, axis=1), axis=1)
