"""Single immune responses as images."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.utils.validation import check_is_fitted

from .._base import validate_rows
from .._rails import RAILSClassifier
from .._validation import validate_labels
from ..immune import ImmuneResponse
from ._matplotlib import COLORS, MISCLASSIFIED, check_drawable, check_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.lines import Line2D


class ImmuneResponseDisplay:
    """Immune responses to a few images, one row each.

    A row of the figure shows the input, its nearest training example of the predicted class and of
    the network's class, the plasma cells of highest affinity, and the mean affinity of the
    population over the generations. A cross stands behind labels that are not the true one, and
    an input that RAILS misclassifies has a dashed frame.

    Use :meth:`from_estimator` to create a display. All parameters are stored as attributes.

    Parameters
    ----------
    images : ndarray of shape (n, height, width) or (n, height, width, 3)
        The inputs.
    response : ImmuneResponse
        The responses to the inputs.
    layer : str
        The layer whose neighbours, plasma and affinity are shown.
    neighbors : ndarray of shape (n, height, width) or (n, height, width, 3)
        The nearest training examples of the predicted classes.
    plasma : ndarray of shape (n, n_plasma, height, width) or (n, n_plasma, height, width, 3)
        The plasma cells to show, by descending affinity.
    network_labels : ndarray of shape (n,), default=None
        The classes that the network alone predicts.
    network_neighbors : ndarray of the shape of ``neighbors``, default=None
        The nearest training examples of these classes.
    y : ndarray of shape (n,), default=None
        The true classes.

    Attributes
    ----------
    figure_ : matplotlib Figure or SubFigure
        The figure.
    axes_ : ndarray of matplotlib Axes of shape (n, n_columns)
        The axes.
    lines_ : list of matplotlib Line2D
        The affinity curves.

    See Also
    --------
    RAILSClassifier.respond : The responses as arrays.
    RAILSClassifier.kneighbors : The neighbours of every class.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> from sklearn_rails import RAILSClassifier
    >>> from sklearn_rails.datasets import load_digit_images
    >>> from sklearn_rails.inspection import ImmuneResponseDisplay
    >>> digits = load_digit_images()
    >>> rails = RAILSClassifier(random_state=0).fit(digits.X_train, digits.y_train)
    >>> ImmuneResponseDisplay.from_estimator(
    ...     rails, digits.X_test[:3], y=digits.y_test[:3]
    ... )
    ImmuneResponseDisplay(3 responses, layer='input', 0 misclassified)
    >>> plt.show()
    """

    figure_: Figure | SubFigure
    axes_: NDArray[np.object_]
    lines_: list[Line2D]

    def __init__(
        self,
        images: NDArray[Any],
        *,
        response: ImmuneResponse,
        layer: str,
        neighbors: NDArray[Any],
        plasma: NDArray[Any],
        network_labels: NDArray[Any] | None = None,
        network_neighbors: NDArray[Any] | None = None,
        y: NDArray[Any] | None = None,
    ) -> None:
        self.images = images
        self.response = response
        self.layer = layer
        self.neighbors = neighbors
        self.plasma = plasma
        self.network_labels = network_labels
        self.network_neighbors = network_neighbors
        self.y = y

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: ArrayLike | torch.Tensor,
        *,
        network_labels: ArrayLike | None = None,
        y: ArrayLike | None = None,
        layer: str | None = None,
        n_plasma: int = 3,
        cmap: str | Colormap = "gray_r",
        figure: Figure | SubFigure | None = None,
    ) -> ImmuneResponseDisplay:
        """Compute a classifier's responses to images, and plot them.

        Parameters
        ----------
        estimator : RAILSClassifier
            A fitted classifier of images.
        X : array-like of shape (n, n_features) or (n, *input_shape)
            The inputs; a handful.
        network_labels : array-like of shape (n,), default=None
            The classes that the network alone predicts.
        y : array-like of shape (n,), default=None
            The true classes.
        layer : str, default=None
            The layer to show. None takes the classifier's first.
        n_plasma : int, default=3
            Number of plasma cells to show for each input.
        cmap : str or matplotlib Colormap, default="gray_r"
            Colour map of images with one channel.
        figure : matplotlib Figure or SubFigure, default=None
            Figure to draw on. None creates one.

        Returns
        -------
        :class:`~sklearn_rails.inspection.ImmuneResponseDisplay`
            The display.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        ValueError
            If samples or cells are not images, the classifier does not use the layer, or the
            numbers of labels and inputs differ.
        """
        check_matplotlib(f"{cls.__name__}.from_estimator")
        if not isinstance(estimator, RAILSClassifier):
            raise TypeError(
                f"estimator must be a fitted RAILSClassifier, got {type(estimator).__name__}."
            )
        check_is_fitted(estimator)
        check_drawable(figure, "figure", "subplots")
        if not isinstance(n_plasma, Integral) or n_plasma < 0:
            raise ValueError(f"n_plasma={n_plasma!r} must be an integer, 0 or more.")
        layer = estimator.layers_[0] if layer is None else layer
        if not (isinstance(layer, str) and layer in estimator.layers_):
            raise ValueError(f"layer={layer!r} is none of the layers {list(estimator.layers_)}.")
        if n_plasma > 0 and estimator.start_layer is not None:
            raise ValueError(
                f"With start_layer={estimator.start_layer!r} cells are not images; pass n_plasma=0 "
                "to leave them out."
            )
        images = _as_images(validate_rows(estimator, X), estimator.input_shape_)
        examples = np.concatenate(
            [
                _as_images(estimator.training_data()[0], estimator.input_shape_),
                _remembered_images(estimator, layer),
            ]
        )
        true = None if y is None else validate_labels(y, len(images))
        network = None
        if network_labels is not None:
            network = validate_labels(network_labels, len(images), "network_labels")

        response = estimator.respond(X)
        nearest = estimator.kneighbors(X)[1][layer][:, :, 0]

        def nearest_of(labels: NDArray[Any]) -> NDArray[Any]:
            known = np.isin(labels, estimator.classes_)
            if not known.all():
                raise ValueError(f"network_labels has unknown classes: {set(labels[~known])}.")
            classes = np.searchsorted(estimator.classes_, labels)
            images: NDArray[Any] = examples[nearest[np.arange(len(labels)), classes]]
            return images

        plasma = response.plasma[layer][:, :n_plasma]
        shown = cls(
            images,
            response=response,
            layer=layer,
            neighbors=nearest_of(response.labels),
            plasma=_as_images(plasma, estimator.input_shape_) if n_plasma > 0 else plasma,
            network_labels=network,
            network_neighbors=None if network is None else nearest_of(network),
            y=true,
        )
        return shown.plot(cmap=cmap, figure=figure)

    def plot(
        self, *, cmap: str | Colormap = "gray_r", figure: Figure | SubFigure | None = None
    ) -> ImmuneResponseDisplay:
        """Plot the responses.

        Parameters
        ----------
        cmap : str or matplotlib Colormap, default="gray_r"
            Colour map of images with one channel.
        figure : matplotlib Figure or SubFigure, default=None
            Figure to draw on. None creates one.

        Returns
        -------
        :class:`~sklearn_rails.inspection.ImmuneResponseDisplay`
            The display itself, with its figure and axes as attributes.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        """
        check_matplotlib(f"{type(self).__name__}.plot")
        import matplotlib.pyplot as plt
        from matplotlib.colors import Colormap
        from matplotlib.ticker import MaxNLocator

        if not isinstance(cmap, str | Colormap):
            raise TypeError(f"cmap must be a str or a Colormap, got {type(cmap).__name__}.")
        n_rows, n_plasma = self.plasma.shape[:2]
        network_labels, network_neighbors = self.network_labels, self.network_neighbors
        n_images = 2 + (network_labels is not None) + n_plasma
        if figure is None:
            figure = plt.figure(
                figsize=(1.25 * n_images + 3.6, 1.35 * n_rows + 0.7), layout="constrained"
            )
        axes = figure.subplots(
            n_rows, n_images + 1, squeeze=False, width_ratios=[1] * n_images + [2]
        )
        for ax in axes[1:, -1]:
            ax.sharex(axes[0, -1])
            ax.sharey(axes[0, -1])
        limits = min(0, self.images.min()), max(1, self.images.max())

        def show(ax: Axes, image: NDArray[Any], caption: object) -> None:
            ax.imshow(image, cmap=cmap, vmin=limits[0], vmax=limits[1])
            ax.set_xlabel(str(caption), fontsize="small", labelpad=2)

        self.lines_ = []
        n_points = 1 + max(0, self.response.n_generations[self.layer].max())
        for row, row_axes in enumerate(axes):
            *image_axes, curve_ax = row_axes
            for ax in image_axes:
                ax.set(xticks=[], yticks=[])
                ax.spines[:].set_color("0.8")
            label = self.response.labels[row]
            input_ax, neighbor_ax, *plasma_axes = image_axes
            show(input_ax, self.images[row], self._describe(row))
            if self._is_misclassified(row):
                input_ax.spines[:].set(color=COLORS[1], linewidth=2, linestyle="--")
            show(neighbor_ax, self.neighbors[row], label)
            if network_labels is not None:
                network_ax, *plasma_axes = plasma_axes
                if network_labels[row] == label or network_neighbors is None:
                    network_ax.spines[:].set_visible(False)
                    network_ax.text(0.5, 0.5, "same class", ha="center", va="center", color="0.4")
                else:
                    show(network_ax, network_neighbors[row], network_labels[row])
            for ax, cell, cell_label in zip(
                plasma_axes,
                self.plasma[row],
                self.response.plasma_labels[self.layer][row],
                strict=False,
            ):
                show(ax, cell, cell_label)
            curve = self.response.affinity_curve[self.layer][row, :n_points]
            self.lines_ += curve_ax.plot(curve, marker=".", color=COLORS[0])
            curve_ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            curve_ax.set_xlim(-0.2, n_points - 0.8)
            curve_ax.tick_params(labelsize="small", labelbottom=row == n_rows - 1)
            curve_ax.yaxis.tick_right()
        self._name_columns(axes[0], n_plasma)
        axes[-1, -1].set_xlabel("generation", fontsize="small")
        self.figure_, self.axes_ = figure, axes
        return self

    def _describe(self, row: int) -> str:
        parts = [] if self.y is None else [f"true {self.y[row]}"]
        if self.network_labels is not None:
            parts.append(f"network {self._mark(row, self.network_labels[row])}")
        rails = f"RAILS {self._mark(row, self.response.labels[row])}"
        return "\n".join([", ".join(parts), rails]).lstrip()

    def _mark(self, row: int, label: object) -> str:
        is_correct = self.y is None or label == self.y[row]
        return f"{label}" if is_correct else f"{label} {MISCLASSIFIED}"

    def _is_misclassified(self, row: int) -> bool:
        return self.y is not None and bool(self.response.labels[row] != self.y[row])

    def __repr__(self) -> str:
        n = len(self.images)
        parts = [f"{n} response{'s' if n != 1 else ''}", f"layer={self.layer!r}"]
        if self.y is not None:
            parts.append(f"{sum(map(self._is_misclassified, range(n)))} misclassified")
        return f"{type(self).__name__}({', '.join(parts)})"

    def _name_columns(self, axes: Sequence[Axes], n_plasma: int) -> None:
        titles = ["input", "nearest of\nRAILS's class"]
        if self.network_labels is not None:
            titles.append("nearest of\nnetwork's class")
        titles += ["best\nplasma cells" if i == n_plasma // 2 else "" for i in range(n_plasma)]
        titles.append(f"mean affinity\n(layer: {self.layer})")
        for ax, title in zip(axes, titles, strict=True):
            ax.set_title(title, fontsize="small")


def _remembered_images(estimator: Any, layer: str) -> NDArray[Any]:
    """Return the remembered cells, among the neighbours too; blanks if they are not images."""
    cells = estimator.memory_[layer].cells
    if estimator.start_layer is None:
        return _as_images(cells, estimator.input_shape_)
    return _as_images(
        np.full((len(cells), *estimator.input_shape_), np.nan), estimator.input_shape_
    )


def _as_images(X: ArrayLike | torch.Tensor, input_shape: tuple[int, ...]) -> NDArray[Any]:
    """Reshape samples for matplotlib: (..., height, width), or (..., height, width, 3) for colour.

    Plasma cells have a second leading axis.
    """
    samples = X.detach().cpu().numpy() if isinstance(X, torch.Tensor) else np.asarray(X)
    if len(input_shape) == 3 and input_shape[0] in (1, 3):
        lead = samples.shape[:2] if samples.ndim == 5 else samples.shape[:1]
        images = samples.reshape(*lead, *input_shape)
        return images[..., 0, :, :] if input_shape[0] == 1 else np.moveaxis(images, -3, -1)
    if len(input_shape) == 2:
        lead = samples.shape[:2] if samples.ndim == 4 else samples.shape[:1]
        return samples.reshape(*lead, *input_shape)
    raise ValueError(
        f"Samples of shape {tuple(input_shape)} are not images of one or three channels. Fit the "
        "classifier on images, or give it input_shape=(channels, height, width)."
    )
