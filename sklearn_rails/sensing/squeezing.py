"""A detector by how firm the network's prediction is."""

from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import median_filter

from .base import Detector
from .samples import CleanSamples, Query, SoftQuery, soft_labels


class FeatureSqueezing(Detector):
    """How far the network's probabilities move when the input is simplified (Xu et al. 2018).

    The input is rounded to few levels, and an image is smoothed by a median filter of two by two
    pixels; the larger difference counts.

    Attributes
    ----------
    range_ : tuple of float
        Lowest and highest value of the clean samples.
    input_shape_ : tuple of int
    n_steps_ : int
        Number of levels of the input, less one.
    """

    uses_layers: ClassVar[bool] = False
    needs_outputs: ClassVar[bool] = True
    needs_float_input: ClassVar[bool] = True

    def fit(self, clean: CleanSamples) -> Self:
        """Store the range of the clean samples."""
        self.range_ = float(clean.X.min()), float(clean.X.max())
        self.input_shape_ = clean.feature_map.input_shape
        # As in the paper: one bit for grey images, five for coloured ones.
        n_bits = 1 if len(self.input_shape_) == 3 and self.input_shape_[0] == 1 else 5
        self.n_steps_ = 2**n_bits - 1
        return self

    def score(self, query: Query) -> NDArray[np.float64]:
        """Score samples: an ndarray of shape (n, 1), float64."""
        before = soft_labels(query.outputs.cpu().double())
        moved = []
        for outputs in query.variant_outputs(self):
            after = soft_labels(outputs.cpu().double())
            moved.append((after - before).abs().sum(dim=1))
        return torch.stack(moved, dim=1).amax(dim=1, keepdim=True).numpy()

    def variants(self, X: NDArray[Any] | torch.Tensor) -> list[NDArray[Any]]:
        """Return the samples with few levels, and images smoothed."""
        X = X.cpu().numpy() if isinstance(X, torch.Tensor) else X
        low, high = self.range_
        span = high - low or 1.0
        # In double precision, in which no difference overflows.
        levels = np.round((X.astype(np.float64) - low) / span * self.n_steps_)
        simplified = [(levels / self.n_steps_ * span + low).astype(X.dtype)]
        if len(self.input_shape_) == 3:
            images = X.reshape(-1, *self.input_shape_)
            simplified.append(median_filter(images, size=(1, 1, 2, 2)).reshape(X.shape))
        return simplified

    def soft_threat(self, query: SoftQuery) -> torch.Tensor:
        """Compute how far the probabilities move, with the gradient of the identity."""
        assert query.probabilities is not None  # since needs_outputs
        feature_map, moved = query.feature_map, []
        for array in self.variants(query.X.detach()):
            # Rounding has no useful gradient: use that of the identity (Athalye et al. 2018).
            squeezed = query.X + (feature_map.to_device(array) - query.X).detach()
            found = feature_map.with_gradient(squeezed, (feature_map.output,))
            after = soft_labels(found[feature_map.output])
            moved.append((after - query.probabilities).abs().sum(dim=1))
        return torch.stack(moved).amax(dim=0)
