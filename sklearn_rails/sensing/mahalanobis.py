"""A detector by the Mahalanobis distance from the means of the classes."""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from ..neighbors.norms import norm
from .base import BLOCK_BYTES, Detector, PicklesToCPU, in_double
from .samples import CleanSamples, IndexedSamples, Query, SoftQuery

# Where there are more features than this, the number of clean samples that estimate the
# covariance: as many eigenvectors are kept at most.
COVARIANCE_SAMPLES = 2000

# Clean samples more than this many times as far from their class as the median are left out of its
# mean and of the covariance, which a single one of them would decide.
FAR_RATIO = 1e6

# What takes more than this share of the memory of the clean samples' features is not pickled, but
# estimated from them again after loading.
PICKLED_SHARE = 0.05


class ShrunkWhitening(PicklesToCPU):
    """Whitening by a shrunk covariance, whose shrinkage is that of Ledoit and Wolf (2004).

    The covariance is a weighted mean of a multiple of the identity and that of the residuals, of
    which only the eigenvectors are stored, however many features there are.

    Parameters
    ----------
    residuals : torch.Tensor of shape (n, n_features), float64
        Centred samples; used as scratch space, which avoids an allocation.

    Attributes
    ----------
    shrinkage : float
    """

    def __init__(self, residuals: torch.Tensor) -> None:
        n, d = residuals.shape
        # Fourth powers are computed, which must not overflow.
        low, high = residuals.aminmax()
        size = torch.maximum(-low, high)
        size = torch.where(size > 0, size, 1)
        scaled = residuals.div_(size)
        step = max(1, BLOCK_BYTES // (8 * d))
        norms = torch.cat([part.square().sum(dim=1) for part in scaled.split(step)])
        if d <= n:
            values, vectors = torch.linalg.eigh(scaled.T @ scaled / n)
        else:
            values, vectors = torch.linalg.eigh(scaled @ scaled.T / n)
            smallest = torch.finfo(scaled.dtype).tiny
            vectors = scaled.T @ vectors / (n * values.clamp(min=smallest)).sqrt()
        kept = values > values.amax() * 1e-7
        values, vectors = values[kept], vectors[:, kept]
        mean = norms.sum() / (n * d)
        spread = values.square().sum() / d - mean.square()
        noise = (norms.square().sum() / n - values.square().sum()) / (n * d)
        # Never none at all, since the residuals need not span the space.
        self.shrinkage = float((noise / spread).nan_to_num(nan=1.0).clamp(1e-6, 1.0))
        floor = self.shrinkage * mean if mean > 0 else torch.ones_like(mean)
        self._scales = ((1 - self.shrinkage) * values + floor).rsqrt() / size
        self._rest = float(floor.rsqrt() / size)
        self._vectors = vectors

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Compute coordinates in which the covariance is the identity.

        Parameters
        ----------
        features : torch.Tensor of shape (n, n_features), float64

        Returns
        -------
        torch.Tensor of shape (n, n_coordinates)
            Along the eigenvectors and, if these are fewer than the features, what is left.
        """
        vectors = self._vectors.to(features.device)
        along = features @ vectors
        white = along * self._scales.to(features.device)
        if vectors.shape[1] == len(vectors):
            return white
        return torch.cat([white, (features - along @ vectors.T) * self._rest], dim=1)

    @property
    def n_bytes(self) -> int:
        """Size of the eigenvectors."""
        return self._vectors.nbytes


@dataclass(frozen=True, eq=False)
class Gaussians(PicklesToCPU):
    """What is estimated in one layer: the means of the classes, and their covariance.

    Attributes
    ----------
    origin : torch.Tensor of shape (n_layer_features,), float64
        What features are compared relative to.
    counts : torch.Tensor of shape (n_classes,), float64
        Number of samples in the mean of each class.
    means : torch.Tensor of shape (n_classes, n_coordinates), float64
        Whitened, relative to the origin.
    whitening : ShrunkWhitening
    weight : torch.Tensor of shape (n,), float64
        Share of each sample in the covariance; NaN for those that are in no mean.
    """

    origin: torch.Tensor
    counts: torch.Tensor
    means: torch.Tensor
    whitening: ShrunkWhitening
    weight: torch.Tensor

    @property
    def n_bytes(self) -> int:
        """Size in memory."""
        return self.means.nbytes + self.weight.nbytes + self.whitening.n_bytes


class Mahalanobis(Detector):
    """Squared Mahalanobis distance of the nearest class mean (Lee et al. 2018).

    The covariance within the classes is shared by all of them, and shrunk. Samples that are a
    million times as far from their class as others are left out of its mean and the covariance.

    Attributes
    ----------
    estimates_ : dict of str to Gaussians
        By layer. After loading, those of many features are there once they are needed.
    """

    def fit(self, clean: CleanSamples) -> Self:
        """Estimate the means and the covariance."""
        self._samples: IndexedSamples = clean
        self.estimates_: dict[str, Gaussians] = {}
        for layer in clean.neighbors:
            self._estimate(layer)
        large = {
            layer: neighbors
            for layer, neighbors in clean.neighbors.items()
            if self.estimates_[layer].n_bytes > PICKLED_SHARE * neighbors.store.examples.nbytes
        }
        self._samples = IndexedSamples(large, clean.labels, clean.n_classes)
        return self

    def __getstate__(self) -> dict[str, Any]:
        large = self._samples.neighbors
        kept = {layer: e for layer, e in self.estimates_.items() if layer not in large}
        return super().__getstate__() | {"estimates_": kept}

    def _estimate(self, layer: str) -> Gaussians:
        if layer not in self.estimates_:
            with torch.no_grad():
                self.estimates_[layer] = self._estimate_anew(layer)
        return self.estimates_[layer]

    def _estimate_anew(self, layer: str) -> Gaussians:
        samples = self._samples
        features, index = samples.examples(layer)
        all_labels = torch.from_numpy(samples.labels)
        labels = all_labels.to(features.device)[index]
        is_counted = self._are_counted(features, labels, samples.centers[layer])
        # Differences, since products of features that are far from zero lose digits.
        origin = in_double(samples.centers[layer].median(dim=0).values)
        counts = torch.bincount(labels.cpu()[is_counted], minlength=samples.n_classes).double()
        means = origin.new_zeros(samples.n_classes, features.shape[1])
        step = max(1, BLOCK_BYTES // (8 * features.shape[1]))
        for places in is_counted.nonzero()[:, 0].split(step):
            places = places.to(features.device)
            values = in_double(features[places]) - origin
            means.index_add_(0, labels[places].to(values.device), values)
        means.div_(counts.clamp(min=1).to(means.device)[:, None])

        counted = torch.empty_like(is_counted)
        counted[index.cpu()] = is_counted
        used = np.arange(len(features))
        if features.shape[1] > COVARIANCE_SAMPLES:
            used = samples.draw(COVARIANCE_SAMPLES)
        used = used[counted[used].numpy()]
        residuals = origin.new_empty(len(used), features.shape[1])
        for places in torch.arange(len(used)).split(step):
            block = used[places.numpy()]
            values = in_double(samples.features_of(layer, block)) - origin
            residuals[places] = values - means[all_labels[block].to(means.device)]
        whiten = ShrunkWhitening(residuals)
        weight = torch.zeros(len(features), dtype=torch.float64)
        weight[used] = (1 - whiten.shrinkage) / len(used)
        weight[~counted] = torch.nan
        return Gaussians(origin, counts, whiten(means), whiten, weight)

    @staticmethod
    def _are_counted(
        features: torch.Tensor, labels: torch.Tensor, centers: torch.Tensor
    ) -> torch.Tensor:
        """Check which samples count: one that is far out by orders of magnitude does not."""
        step = max(1, BLOCK_BYTES // features[0].nbytes)
        parts = [
            norm(features[block] - centers[labels[block]])
            for block in torch.arange(len(features), device=features.device).split(step)
        ]
        away = torch.cat(parts).cpu().double()
        some = away[away > 0]
        return away <= FAR_RATIO * some.median() if len(some) else torch.ones_like(away) > 0

    def score(self, query: Query) -> NDArray[np.float64]:
        """Score samples: an ndarray of shape (n, n_layers), float64."""
        columns = []
        for layer, features in query.features.items():
            estimate = self._estimate(layer)
            white, means = self._whitened(estimate, features)
            squares = self._squares(estimate, white, means).cpu()
            if query.self_index is not None:
                squares = self._leave_out(estimate, squares, white, means, query.self_index)
            columns.append(squares.amin(dim=1))
        return torch.stack(columns, dim=1).numpy()

    def squared_distances(self, layer: str, features: torch.Tensor) -> torch.Tensor:
        """Compute the squared distances of all class means.

        Parameters
        ----------
        layer : str
        features : torch.Tensor of shape (n, n_layer_features)

        Returns
        -------
        torch.Tensor of shape (n, n_classes), float64
            Infinite for a class without samples.
        """
        estimate = self._estimate(layer)
        return self._squares(estimate, *self._whitened(estimate, features))

    def soft_threat_of(self, layer: str, features: torch.Tensor) -> torch.Tensor:
        """Compute the log of the smallest squared distance, for an attack to differentiate.

        Parameters
        ----------
        layer : str
        features : torch.Tensor of shape (n, n_layer_features)

        Returns
        -------
        torch.Tensor of shape (n,), float64
        """
        return self.squared_distances(layer, features).amin(dim=1).log()

    def soft_threat(self, query: SoftQuery) -> torch.Tensor:
        """Compute a differentiable threat: :meth:`soft_threat_of` over the layers."""
        logs = [self.soft_threat_of(layer, f) for layer, f in query.features.items()]
        return torch.stack(logs).sum(dim=0)

    @staticmethod
    def _squares(estimate: Gaussians, white: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
        # Of differences, never by a matrix product, whose error grows with the means.
        distances = torch.cdist(white, means, compute_mode="donot_use_mm_for_euclid_dist")
        is_empty = estimate.counts.to(distances.device) == 0
        return distances.square().masked_fill(is_empty, torch.inf)

    @staticmethod
    def _whitened(estimate: Gaussians, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = in_double(features)
        origin, means = estimate.origin.to(features.device), estimate.means.to(features.device)
        return estimate.whitening(features - origin), means

    def _leave_out(
        self,
        estimate: Gaussians,
        squares: torch.Tensor,
        white: torch.Tensor,
        means: torch.Tensor,
        self_index: NDArray[np.int64],
    ) -> torch.Tensor:
        """Take each sample out of the mean of its class and out of the covariance."""
        labels = torch.from_numpy(self._samples.labels[self_index])
        residual = white - means[labels.to(means.device)]
        # Products with the differences to all means.
        products = ((white * residual).sum(dim=1)[:, None] - residual @ means.T).cpu()
        counts = estimate.counts[labels][:, None]
        weight = estimate.weight[self_index][:, None]
        growth = torch.where(counts > 1, counts / (counts - 1), torch.inf)
        # Samples that do not count are in no mean.
        growth, weight = growth.masked_fill(weight.isnan(), 1), weight.nan_to_num(nan=0.0)
        weight = (weight * growth).nan_to_num(nan=0.0, posinf=0.0)
        square = residual.square().sum(dim=1)[:, None].cpu()
        left = (1 - weight * square).clamp(min=torch.finfo(torch.float32).eps)
        squares = squares + weight * products.square() / left
        of_class = (growth * growth * square / left).nan_to_num(nan=torch.inf)
        return squares.scatter(1, labels[:, None], of_class)
