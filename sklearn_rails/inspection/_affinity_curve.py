"""How the affinity of populations grew over the generations, as a mean over many inputs."""

import numpy as np
from scipy.stats import norm

from ._immune_response import _check_matplotlib


class AffinityCurveDisplay:
    """Mean affinity of populations against the generation, over many inputs, with its band.

    The band is the normal-approximation confidence interval of the mean over the rows. A row that
    stopped early carries its last affinity forward: a mean over only the rows that are still
    running would compare different rows at different generations. Several lines compare
    responses, as [1]_ does for populations flocked for the input itself and for another one.

    Use :meth:`from_response` to make one. All parameters are stored as attributes.

    Parameters
    ----------
    curves : dict of str to ndarray of shape (n, generations + 1)
        The affinity curves of each line, by the label it has in the legend; NaN after a row has
        stopped early. The label None keeps a line out of the legend.
    layer : str
        The layer that the affinity was measured in.
    confidence : float, default=0.95
        Confidence level of the bands, between 0 and 1. The band of a single row has zero width.

    Attributes
    ----------
    lines_ : list of matplotlib Line2D
        The means, in the order of ``curves``.
    bands_ : list of matplotlib PolyCollection
        Their confidence intervals.
    ax_ : matplotlib Axes
        What was drawn on.
    figure_ : matplotlib Figure or SubFigure
        The figure that it is in.

    See Also
    --------
    ImmuneResponseDisplay : Single responses, one row each.
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
    >>> digits, negatives = rails.respond(X[500:510]), rails.respond(1 - X[500:510])
    >>> AffinityCurveDisplay.from_response({"digits": digits, "negatives": negatives})
    <...>
    >>> plt.show()
    """

    def __init__(self, curves, *, layer, confidence=0.95):
        self.curves = curves
        self.layer = layer
        self.confidence = confidence

    @classmethod
    def from_response(cls, response, *, layer=None, confidence=0.95, ax=None, **line_kwargs):
        """Plot the affinity curves of a response, or of several to compare.

        A row that stopped early carries its last affinity forward.

        Parameters
        ----------
        response : ImmuneResponse or dict of str to ImmuneResponse
            What :meth:`RAILSClassifier.respond` gave. Each response of a dictionary has a line of
            its own, and its key in the legend.
        layer : str, default=None
            The layer to show. None takes the first of the (first) response.
        confidence : float, default=0.95
            Confidence level of the bands, between 0 and 1. The band of a single row has zero
            width.
        ax : matplotlib Axes, default=None
            What to draw on. None makes a new figure.
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
            If there is no response, one does not have the layer or has no rows, or ``confidence``
            is not between 0 and 1.
        """
        _check_matplotlib(f"{cls.__name__}.from_response")
        responses = response if isinstance(response, dict) else {None: response}
        if not responses:
            raise ValueError("response={} must have one response or more.")
        if layer is None:
            layer = next(iter(next(iter(responses.values())).affinity_curve))
        for label, one in responses.items():
            if layer not in one.affinity_curve:
                owner = "response" if label is None else f"response[{label!r}]"
                raise ValueError(
                    f"layer={layer!r} is none of the layers {list(one.affinity_curve)} of {owner}."
                )
        curves = {label: one.affinity_curve[layer] for label, one in responses.items()}
        return cls(curves, layer=layer, confidence=confidence).plot(ax=ax, **line_kwargs)

    def plot(self, *, ax=None, **line_kwargs):
        """Plot the curves.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            What to draw on. None makes a new figure.
        **line_kwargs : dict
            Passed to matplotlib's ``plot``, for every line.

        Returns
        -------
        :class:`~sklearn_rails.inspection.AffinityCurveDisplay`
            The display itself, with what was drawn as attributes.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        ValueError
            If there are no curves, some are not of shape (n, generations + 1) or do not begin with
            a finite affinity, or ``confidence`` is not between 0 and 1.
        """
        _check_matplotlib(f"{type(self).__name__}.plot")
        import matplotlib.pyplot as plt
        from matplotlib.ticker import MaxNLocator

        # Before a figure is made, which an error would leave behind empty.
        intervals = self._intervals()
        if ax is None:
            _, ax = plt.subplots()
        self.lines_, self.bands_ = [], []
        for label, (mean, half_width) in intervals.items():
            (line,) = ax.plot(mean, **({"label": label, "marker": "."} | line_kwargs))
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
        # Without any generation bred there is but one tick that is an integer.
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        ax.set(xlabel="generation", ylabel=f"mean affinity (layer: {self.layer})")
        # Matplotlib names a line without a label "_child0", and leaves it out of legends.
        if not all(line.get_label().startswith("_") for line in self.lines_):
            ax.legend()
        self.ax_, self.figure_ = ax, ax.figure
        return self

    def _intervals(self):
        """Give each label's mean, and half the width of its confidence interval."""
        if not self.curves:
            raise ValueError(f"curves={self.curves!r} must have the curves of one line or more.")
        if not 0 < self.confidence < 1:
            raise ValueError(
                f"confidence={self.confidence!r} must be between 0 and 1, both excluded."
            )
        z = norm.ppf((1 + self.confidence) / 2)
        intervals = {}
        for label, curves in self.curves.items():
            curves = _carry_forward(label, curves)
            n = len(curves)
            # A single row has no sample deviation; with ddof=0 it is 0.
            deviation = curves.std(axis=0, ddof=1 if n > 1 else 0)
            intervals[label] = curves.mean(axis=0), z * deviation / np.sqrt(n)
        return intervals


def _carry_forward(label, curves):
    """Fill the generations after a row has stopped with its last affinity."""
    curves = np.asarray(curves, dtype=np.float64)
    if curves.ndim != 2 or curves.size == 0:
        raise ValueError(
            f"curves[{label!r}] has shape {curves.shape}; it must be (n, generations + 1), with "
            "one row or more."
        )
    known = np.isfinite(curves[:, 0])
    if not known.all():
        raise ValueError(
            f"curves[{label!r}] must begin with a finite affinity in every row, got "
            f"{curves[~known, 0][0]} in row {np.flatnonzero(~known)[0]}."
        )
    last_bred = np.where(np.isnan(curves), 0, np.arange(curves.shape[1]))
    return np.take_along_axis(curves, np.maximum.accumulate(last_bred, axis=1), axis=1)
