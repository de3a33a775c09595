"""Accuracy and cost of every layer of a network, as dots."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import clone

from .._base import as_fitted, feature_map, validate_rows
from .._dknn import DkNNClassifier
from .._rails import RAILSClassifier
from .._validation import check_same_length, naming
from ..metrics._arrays import check_labels
from ._matplotlib import COLORS, check_drawable, check_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

Attack = Callable[[Any, Any], Any]


class LayerDisplay:
    """Clean accuracy, attacked accuracy and cost of a classifier on each layer of its network.

    Use :meth:`from_estimator` to create a display. All parameters are stored as attributes.

    Parameters
    ----------
    layers : sequence of str
        The layers, in the order of the network.
    clean_accuracy, attacked_accuracy : ndarray of shape (n_layers,)
        Accuracy on clean and on attacked samples with that layer alone.
    seconds : ndarray of shape (n_layers,)
        Time to predict one sample.
    used : sequence of str, default=()
        Layers to mark: those that the classifier uses.

    Attributes
    ----------
    ax_ : matplotlib Axes
        The axes.
    figure_ : matplotlib Figure or SubFigure
        The figure of the axes.

    See Also
    --------
    sklearn_rails.attacks.pgd : An attack on the network.
    sklearn_rails.metrics.make_robust_scorer : Choose layers by cross-validation.

    Examples
    --------
    >>> from functools import partial
    >>> import matplotlib.pyplot as plt
    >>> from sklearn_rails import DkNNClassifier
    >>> from sklearn_rails.attacks import pgd
    >>> from sklearn_rails.datasets import load_digit_images
    >>> from sklearn_rails.demo import train_network
    >>> from sklearn_rails.inspection import LayerDisplay
    >>> digits = load_digit_images()
    >>> X, y = digits.X_train, digits.y_train
    >>> net = train_network(X, y, max_epochs=10, verbose=0)
    >>> dknn = DkNNClassifier(
    ...     net, layers="conv1", n_neighbors=10, random_state=0
    ... )
    >>> dknn.fit(X, y)
    DkNNClassifier(...)
    >>> X_test, y_test = digits.X_test[:100], digits.y_test[:100]
    >>> LayerDisplay.from_estimator(
    ...     dknn, X_test, y_test, partial(pgd, net, eps=0.15)
    ... )  # doctest: +SKIP
    layer    clean  attacked  ms per sample
    input    0.960     0.870          0.021
    conv1 *  0.950     0.780          0.107
    conv2    0.960     0.610          0.155
    conv3    0.950     0.360          0.143
    conv4    0.960     0.240          0.110
    output   0.940     0.130          0.094
    >>> plt.show()
    """

    ax_: Axes
    figure_: Figure | SubFigure

    def __init__(
        self,
        layers: Sequence[str],
        *,
        clean_accuracy: NDArray[np.float64],
        attacked_accuracy: NDArray[np.float64],
        seconds: NDArray[np.float64],
        used: Sequence[str] = (),
    ) -> None:
        self.layers = layers
        self.clean_accuracy = clean_accuracy
        self.attacked_accuracy = attacked_accuracy
        self.seconds = seconds
        self.used = used

    @classmethod
    def from_estimator(
        cls,
        estimator: DkNNClassifier | RAILSClassifier,
        X: ArrayLike | torch.Tensor,
        y: ArrayLike | torch.Tensor,
        attack: Attack | ArrayLike | torch.Tensor,
        *,
        layers: str | Sequence[str] | None = None,
        ax: Axes | None = None,
    ) -> LayerDisplay:
        """Fit a clone of a classifier on each layer alone, measure it, and plot the results.

        The clones are fitted on the training samples of the classifier, without the cells that it
        remembers. To choose a layer, pass samples that are not used to report the accuracy later.

        Parameters
        ----------
        estimator : RAILSClassifier or DkNNClassifier
            A fitted classifier. It is not changed.
        X : array-like of shape (n, n_features) or (n, *input_shape), or torch.Tensor
            Clean samples.
        y : array-like of shape (n,)
            Their classes.
        attack : callable or array-like of the shape of ``X``
            The attacked samples, or a function ``attack(X, y)`` that returns them, such as
            ``functools.partial(pgd, network, eps=0.1)``.
        layers : str or sequence of str, default=None
            The layers to compare. None takes the input and all layers of the network that can be
            used.
        ax : matplotlib Axes, default=None
            Axes to draw on. None creates a figure.

        Returns
        -------
        :class:`~sklearn_rails.inspection.LayerDisplay`
            The display.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        TypeError
            If ``estimator`` is another one.
        ValueError
            If the samples do not fit the classifier, their numbers differ, or a layer cannot be
            used.
        """
        check_matplotlib(f"{cls.__name__}.from_estimator")
        if not isinstance(estimator, DkNNClassifier | RAILSClassifier):
            raise TypeError(
                "estimator must be a fitted DkNNClassifier or RAILSClassifier, got "
                f"{type(estimator).__name__}."
            )
        fitted = as_fitted(estimator)
        X_train, y_train = fitted.training_data()
        labels = check_labels(y, "y")
        attacked = attack(X, y) if callable(attack) else attack
        sets = []
        for name, samples in (("X", X), ("attack", attacked)):
            try:
                rows = validate_rows(fitted, samples)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name} has invalid samples: {error}") from error
            check_same_length(**{name: rows, "y": labels})
            sets.append(rows.reshape(len(rows), *X_train.shape[1:]))

        unfitted = clone(fitted)
        if fitted.train_network:  # the layers are those of one network
            unfitted.set_params(feature_extractor=fitted.network_, train_network=False)
        if isinstance(fitted, RAILSClassifier) and not getattr(fitted.gate, "needs_alarms", False):
            unfitted.set_params(threat_scorer=None)  # it does not change predictions
        if layers is None:
            layers = _find_layers(fitted, X_train)
        measured: dict[str, tuple[float, float, float]] = {}
        with naming("layers"):
            names = [layers] if isinstance(layers, str) else list(layers)
        if not all(isinstance(name, str) for name in names):
            raise TypeError(f"layers={layers!r} must be strings, or None for all.")
        for layer in names:
            alone = clone(unfitted).set_params(layers=layer).fit(X_train, y_train)
            clean, first = _measure(alone, sets[0], labels)
            with naming("attack"):
                robust, second = _measure(alone, sets[1], labels)
            measured[layer] = clean, robust, min(first, second)
        if not measured:
            raise ValueError(f"layers={layers!r} has no layer to compare.")
        clean, robust, seconds = np.array(list(measured.values())).T
        shown = cls(
            tuple(measured),
            clean_accuracy=clean,
            attacked_accuracy=robust,
            seconds=seconds,
            used=tuple(fitted.layers_),
        )
        return shown.plot(ax=ax)

    def plot(self, ax: Axes | None = None) -> LayerDisplay:
        """Plot the accuracies, with the cost beside them.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Axes to draw on. None creates a figure.

        Returns
        -------
        :class:`~sklearn_rails.inspection.LayerDisplay`
            The display itself, with its axes as an attribute.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        """
        check_matplotlib(f"{type(self).__name__}.plot")
        import matplotlib.pyplot as plt

        check_drawable(ax, "ax", "hlines")
        places = np.arange(len(self.layers))
        if ax is None:
            _, ax = plt.subplots(figsize=(6.4, 1.4 + 0.32 * len(places)), layout="constrained")
        ax.hlines(places, self.attacked_accuracy, self.clean_accuracy, color="0.8", zorder=1)
        ax.scatter(self.clean_accuracy, places, color=COLORS[0], marker="o", label="clean")
        ax.scatter(self.attacked_accuracy, places, color=COLORS[1], marker="D", label="attacked")
        names = [f"{layer} (used)" if layer in self.used else layer for layer in self.layers]
        ax.set_yticks(places, names)
        for layer, tick in zip(self.layers, ax.get_yticklabels(), strict=True):
            tick.set_fontweight("bold" if layer in self.used else "normal")
        beside = ax.get_yaxis_transform()
        cost: dict[str, Any] = {
            "transform": beside,
            "ha": "left",
            "va": "center",
            "fontsize": "small",
        }
        ax.text(1.03, -0.9, "ms per\nsample", **cost)
        for place, seconds in enumerate(self.seconds):
            ax.text(1.03, place, f"{1000 * seconds:.3g}", **cost)
        ax.set(xlim=(-0.03, 1.03), ylim=(len(places) - 0.5, -0.5), xlabel="accuracy")
        ax.grid(axis="x", color="0.92")
        ax.set_axisbelow(True)
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
        self.ax_, self.figure_ = ax, ax.figure
        return self

    def __repr__(self) -> str:
        names = [f"{layer} *" if layer in self.used else layer for layer in self.layers]
        width = max(len(name) for name in ("layer", *names))
        lines = [f"{'layer':<{width}}  clean  attacked  ms per sample"]
        numbers = zip(names, self.clean_accuracy, self.attacked_accuracy, self.seconds, strict=True)
        lines += [
            f"{name:<{width}}  {clean:5.3f}  {attacked:8.3f}  {1000 * seconds:13.3f}"
            for name, clean, attacked, seconds in numbers
        ]
        return "\n".join(lines)


def _find_layers(estimator: Any, X_train: NDArray[Any]) -> tuple[str, ...]:
    """Return the layers that can be used, by a map of its own: the estimator's stays as it is."""
    start_layer = getattr(estimator, "start_layer", None)
    features = feature_map(
        estimator, estimator.network_, estimator.layers_, start_layer=start_layer
    )
    if not features.has_network:
        return features.layers
    features.probe(X_train.reshape(len(X_train), -1))
    return features.find_layers()


def _measure(estimator: Any, X: Any, y: NDArray[Any]) -> tuple[float, float]:
    """Return the accuracy, and the seconds that a prediction takes for each sample."""
    start = time.perf_counter()
    predicted = estimator.predict(X)
    seconds = time.perf_counter() - start
    return float(np.mean(predicted == y)), seconds / len(y)
