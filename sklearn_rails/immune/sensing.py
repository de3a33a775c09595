"""Sensing: raw threat scores by many methods, higher for more suspect.

A sensor is made from :class:`CleanRows` and called with :class:`NewRows`.
"""

import functools

import numpy as np
import torch
from scipy.ndimage import median_filter
from torch.nn.functional import normalize, one_hot, pad

from .conformity import disagreement, nearest
from .flocking import ClassNeighbors, flock_without_own

# The block of distances that is held at a time.
BLOCK_BYTES = 64 * 2**20

# Clean rows that tell the bandwidth of a density, and, where there are more features than this,
# the rows that tell a covariance: as many eigenvectors are kept at most.
BANDWIDTH_ROWS = 256
COVARIANCE_ROWS = 2000


class CleanRows:
    """The rows of ``fit``, as sensors learn from them.

    Parameters
    ----------
    X : ndarray or torch.Tensor of shape (n, n_features)
    features : dict of str to torch.Tensor of shape (n, n_layer_features)
    labels : ndarray of shape (n,)
        Their classes, as integers from 0.
    n_classes : int
    n_neighbors : int
        Less than n.
    network : FeatureMap
    """

    def __init__(self, X, features, labels, n_classes, n_neighbors, network):
        self.X = X
        self.features = features
        self.labels = labels
        self.n_classes = n_classes
        self.n_neighbors = n_neighbors
        self.network = network

    @functools.cached_property
    def neighbors(self):
        """The neighbours in each layer, for all sensors that ask for them."""
        return {layer: _as_one_class(f) for layer, f in self.features.items()}

    def spread(self, n_rows):
        """Give positions of some rows, from all over."""
        return np.unique(np.linspace(0, len(self.X) - 1, n_rows).astype(np.int64))


class NewRows:
    """Rows that are to be judged; what several sensors ask about them is found once.

    Parameters
    ----------
    X : ndarray or torch.Tensor of shape (n, n_features)
    features : dict of str to torch.Tensor of shape (n, n_layer_features)
    network : FeatureMap
    own : ndarray of shape (n,), default=None
        Each row's index among the clean rows, if it is one of them: it is judged without itself.
    """

    def __init__(self, X, features, network, own=None):
        self.X = X
        self.features = features
        self.network = network
        self.own = own
        self._nearest = {}

    @functools.cached_property
    def outputs(self):
        """The network's own outputs."""
        return self.network.outputs(self.X)

    @functools.cached_property
    def labels(self):
        """The network's own labels; a single class where there is no network."""
        if not self.network.has_network:
            return torch.zeros(len(self.X), dtype=torch.int64, device=self.network.device)
        return self.network.label(self.outputs)

    def nearest(self, layer, neighbors, n_neighbors):
        """Find the nearest clean rows, as :func:`~sklearn_rails.immune.conformity.nearest`."""
        if layer not in self._nearest:
            self._nearest[layer] = nearest(
                neighbors[layer], self.features[layer], n_neighbors, self.own
            )
        return self._nearest[layer]


class LoadsAnywhere:
    """Holds tensors, and is pickled with these on the host."""

    def __getstate__(self):
        return {name: _on_host(value) for name, value in vars(self).items()}


def _on_host(value):
    if isinstance(value, dict):
        return {key: _on_host(v) for key, v in value.items()}
    return value.cpu() if isinstance(value, torch.Tensor) else value


class NeighborsSensor:
    """A sensor that looks at the k nearest clean rows in each layer."""

    def __init__(self, clean):
        self._labels = clean.labels
        self._n_classes = clean.n_classes
        self._n_neighbors = clean.n_neighbors
        self._neighbors = clean.neighbors

    def _nearest(self, rows):
        for layer in rows.features:
            distance, index = rows.nearest(layer, self._neighbors, self._n_neighbors)
            yield distance.cpu().to(torch.float64), index.cpu()


class Credibility(NeighborsSensor):
    """Nonconformity with the class that conforms best, of which DkNN's credibility is a p-value.

    Neighbours of another class than the most frequent one, over all layers, and less than 1 for
    the distance of the k-th neighbour, so that there are no ties. With a single class only the
    distance is left.
    """

    def __call__(self, rows):
        """Score new rows: an ndarray of shape (n, 1), float64."""
        against, distance = 0, 0
        for radius, index in self._nearest(rows):
            votes = one_hot(torch.from_numpy(self._labels)[index], self._n_classes).sum(dim=1)
            against = against + self._n_neighbors - votes
            radius = radius[:, -1]
            distance = distance + radius / (1 + radius) / len(rows.features)
        return (against.min(dim=1).values + distance).numpy()[:, None]


class Disagreement:
    """By how much another class is nearer than the class that the network predicts.

    A class is as near as the nearest of its rows.
    """

    def __init__(self, clean):
        self._neighbors = {
            layer: ClassNeighbors().fit(f, clean.labels, clean.n_classes)
            for layer, f in clean.features.items()
        }

    def __call__(self, rows):
        """Score new rows: an ndarray of shape (n, n_layers), float64."""
        columns = []
        for layer, features in rows.features.items():
            if rows.own is None:
                flocked, _ = self._neighbors[layer].kneighbors(features, 1)
            else:
                own = torch.from_numpy(rows.own).to(features.device)
                flocked = flock_without_own(self._neighbors[layer], own, features, 1)
            columns.append(disagreement(flocked.cpu().double(), rows.labels.cpu()))
        return torch.stack(columns, dim=1).numpy()


class LocalIntrinsicDimensionality(NeighborsSensor):
    """Dimension in which the neighbours seem to lie (Ma et al. 2018)."""

    def __call__(self, rows):
        """Score new rows: an ndarray of shape (n, n_layers), float64."""
        columns = []
        for distance, _ in self._nearest(rows):
            distance = distance.clamp_min(torch.finfo(distance.dtype).tiny)
            # The last term is always 0.
            columns.append(-1 / (distance / distance[:, -1:]).log().mean(dim=1))
        return torch.stack(columns, dim=1).numpy()


class Distance:
    """Distance of the k-th neighbour on L2-normalised features (Sun et al. 2022)."""

    def __init__(self, clean):
        self._n_neighbors = clean.n_neighbors
        self._neighbors = {
            layer: _as_one_class(normalize(f, dim=1)) for layer, f in clean.features.items()
        }

    def __call__(self, rows):
        """Score new rows: an ndarray of shape (n, n_layers), float64."""
        columns = []
        for layer, features in rows.features.items():
            distance, _ = nearest(
                self._neighbors[layer], normalize(features, dim=1), self._n_neighbors, rows.own
            )
            columns.append(distance[:, -1])
        return torch.stack(columns, dim=1).cpu().numpy().astype(np.float64)


class KernelDensity(LoadsAnywhere):
    """Minus the log density of the class that the network predicts (Feinman et al. 2017)."""

    def __init__(self, clean):
        # Without a network all rows are of one class.
        labels = clean.labels if clean.network.has_network else np.zeros_like(clean.labels)
        self._labels = torch.from_numpy(labels)
        self._examples, self._center, self._bandwidth = {}, {}, {}
        own = clean.spread(BANDWIDTH_ROWS)
        for layer, features in clean.features.items():
            radius = nearest(clean.neighbors[layer], features[own], clean.n_neighbors, own)[0]
            spread = float(radius[:, -1].median())
            self._bandwidth[layer] = spread if spread > 0 else 1.0
            self._center[layer] = features.mean(dim=0)
            self._examples[layer] = features - self._center[layer]

    def __call__(self, rows):
        """Score new rows: an ndarray of shape (n, n_layers), float64."""
        device = rows.labels.device
        own = None if rows.own is None else torch.from_numpy(rows.own).to(device)
        labels = self._labels.to(device)
        columns = []
        for layer, features in rows.features.items():
            examples = self._examples[layer].to(device)
            centered = features - self._center[layer].to(device)
            squares = examples.square().sum(dim=1)
            step = max(1, BLOCK_BYTES // (len(examples) * features.element_size()))
            parts = []
            for block in torch.arange(len(features), device=device).split(step):
                near = torch.addmm(squares, centered[block], examples.T, alpha=-2)
                near = (near + centered[block].square().sum(dim=1)[:, None]).clamp_(min=0)
                counted = labels == rows.labels[block, None]
                if own is not None:
                    counted.scatter_(1, own[block, None], False)
                near = (near / -(self._bandwidth[layer] ** 2)).masked_fill_(~counted, -torch.inf)
                parts.append(counted.sum(dim=1).log() - near.logsumexp(dim=1))
            # A class without any rows has no density.
            columns.append(torch.cat(parts).nan_to_num(nan=torch.inf))
        return torch.stack(columns, dim=1).cpu().numpy().astype(np.float64)


class Mahalanobis(LoadsAnywhere):
    """Squared Mahalanobis distance of the nearest class mean (Lee et al. 2018).

    The covariance within the classes is shared by all of them, and shrunk.
    """

    def __init__(self, clean):
        self._labels = torch.from_numpy(clean.labels)
        self._counts = torch.bincount(self._labels, minlength=clean.n_classes).double()
        self._origin, self._means, self._whiten, self._weight = {}, {}, {}, {}
        for layer, features in clean.features.items():
            labels, counts = self._labels.to(features.device), self._counts.to(features)
            self._origin[layer] = origin = features.mean(dim=0)
            means = features.new_zeros(clean.n_classes, features.shape[1])
            means.index_add_(0, labels, features - origin).div_(counts.clamp(min=1)[:, None])
            used = np.arange(len(features))
            if features.shape[1] > COVARIANCE_ROWS:
                used = clean.spread(COVARIANCE_ROWS)
            whiten = ShrunkWhitening(features[used] - origin - means[labels[used]])
            self._means[layer], self._whiten[layer] = whiten(means), whiten
            # A row's part in the covariance.
            self._weight[layer] = torch.zeros(len(features), dtype=torch.float64)
            self._weight[layer][used] = (1 - whiten.shrinkage) / len(used)

    def __call__(self, rows):
        """Score new rows: an ndarray of shape (n, n_layers), float64."""
        columns = []
        for layer, features in rows.features.items():
            white, means = self._whitened(layer, features)
            squares = self._squares(white, means).cpu().double()
            if rows.own is not None:
                squares = self._leave_out(layer, squares, white, means, rows.own)
            columns.append(squares.amin(dim=1))
        return torch.stack(columns, dim=1).numpy()

    def squared_distances(self, layer, features):
        """Give the squared distances of all class means.

        Parameters
        ----------
        layer : str
        features : torch.Tensor of shape (n, n_layer_features)

        Returns
        -------
        torch.Tensor of shape (n, n_classes)
            Infinite for a class without rows.
        """
        return self._squares(*self._whitened(layer, features))

    def _squares(self, white, means):
        squares = torch.cdist(white, means).square()
        return squares.masked_fill(self._counts.to(squares.device) == 0, torch.inf)

    def _whitened(self, layer, features):
        origin, means = (part[layer].to(features.device) for part in (self._origin, self._means))
        return self._whiten[layer](features - origin), means

    def _leave_out(self, layer, squares, white, means, own):
        """Take each row out of its class's mean and of the covariance."""
        labels = self._labels[own]
        residual = white - means[labels.to(means.device)]
        # Products with the differences to all means.
        products = ((white * residual).sum(dim=1)[:, None] - residual @ means.T).cpu().double()
        counts = self._counts[labels][:, None]
        growth = torch.where(counts > 1, counts / (counts - 1), torch.inf)
        weight = (self._weight[layer][own][:, None] * growth).nan_to_num(posinf=0.0)
        own_square = residual.square().sum(dim=1)[:, None].cpu().double()
        left = (1 - weight * own_square).clamp(min=torch.finfo(torch.float32).eps)
        squares = squares + weight * products.square() / left
        own_class = (growth * growth * own_square / left).nan_to_num(nan=torch.inf)
        return squares.scatter(1, labels[:, None], own_class)


class ShrunkWhitening(LoadsAnywhere):
    """Whitening by a shrunk covariance, whose shrinkage is that of Ledoit and Wolf (2004).

    The covariance is a share of a multiple of the identity, and the rest that of the residuals: it
    is known by the eigenvectors of the latter, however many features there are.

    Parameters
    ----------
    residuals : torch.Tensor of shape (n, n_features)
        Centred rows.

    Attributes
    ----------
    shrinkage : float
    """

    def __init__(self, residuals):
        # Where there is no double precision, the host has it.
        rows = (residuals.cpu() if residuals.device.type == "mps" else residuals).double()
        n, d = rows.shape
        norms = rows.square().sum(dim=1)
        if d <= n:
            values, vectors = torch.linalg.eigh(rows.T @ rows / n)
        else:
            values, vectors = torch.linalg.eigh(rows @ rows.T / n)
            vectors = rows.T @ vectors / (n * values.clamp(min=torch.finfo(rows.dtype).tiny)).sqrt()
        kept = values > values.amax() * 1e-7
        values, vectors = values[kept], vectors[:, kept]
        mean = norms.sum() / (n * d)
        spread = values.square().sum() / d - mean.square()
        noise = (norms.square().sum() / n - values.square().sum()) / (n * d)
        # Never none at all, since the residuals need not span the space.
        self.shrinkage = float((noise / spread).nan_to_num(nan=1.0).clamp(1e-6, 1.0))
        floor = self.shrinkage * mean if mean > 0 else torch.ones_like(mean)
        self._scales = ((1 - self.shrinkage) * values + floor).rsqrt().to(residuals)
        self._rest = float(floor.rsqrt())
        self._vectors = vectors.to(residuals)

    def __call__(self, features):
        """Give coordinates in which the covariance is the identity.

        Parameters
        ----------
        features : torch.Tensor of shape (n, n_features)

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


class FeatureSqueezing:
    """How far the network's probabilities move when the input is simplified (Xu et al. 2018).

    The input is rounded to few levels, and an image is smoothed by a median filter of two by two
    pixels; the larger difference counts.
    """

    def __init__(self, clean):
        self._low, self._high = float(clean.X.min()), float(clean.X.max())
        self._shape = clean.network.input_shape
        # As in the paper: one bit for grey images, five for coloured ones.
        n_bits = 1 if len(self._shape) == 3 and self._shape[0] == 1 else 5
        self._n_steps = 2**n_bits - 1

    def __call__(self, rows):
        """Score new rows: an ndarray of shape (n, 1), float64."""
        before = soft_labels(rows.outputs.cpu().double())
        moved = [
            (soft_labels(rows.network.outputs(squeezed).cpu().double()) - before).abs().sum(dim=1)
            for squeezed in self.squeeze(rows.X)
        ]
        return torch.stack(moved, dim=1).amax(dim=1, keepdim=True).numpy()

    def squeeze(self, X):
        """Give the rows in simpler forms.

        Parameters
        ----------
        X : ndarray or torch.Tensor of shape (n, n_features)

        Yields
        ------
        ndarray of shape (n, n_features)
        """
        X = X.cpu().numpy() if isinstance(X, torch.Tensor) else X
        span = self._high - self._low or 1.0
        levels = np.round((X - self._low) / span * self._n_steps)
        yield (levels / self._n_steps * span + self._low).astype(X.dtype)
        if len(self._shape) == 3:
            images = X.reshape(-1, *self._shape)
            yield median_filter(images, size=(1, 1, 2, 2)).reshape(X.shape)


def soft_labels(outputs):
    """Give the classes' probabilities.

    Parameters
    ----------
    outputs : torch.Tensor of shape (n, n_outputs)
        Logits; a single one is that of the second of two classes.

    Returns
    -------
    torch.Tensor of shape (n, n_classes)
    """
    return (outputs if outputs.shape[1] > 1 else pad(outputs, (1, 0))).softmax(dim=1)


def _as_one_class(features):
    neighbors = ClassNeighbors()
    return neighbors.fit(features, np.zeros(len(features), dtype=np.int64), n_classes=1)


# What ThreatScorer's `method` can be, and what of it is about a network's answers.
SENSORS = {
    "credibility": Credibility,
    "disagreement": Disagreement,
    "distance": Distance,
    "kernel_density": KernelDensity,
    "mahalanobis": Mahalanobis,
    "lid": LocalIntrinsicDimensionality,
    "feature_squeezing": FeatureSqueezing,
}
ABOUT_LABELS = ("disagreement", "kernel_density")
ABOUT_ANSWERS = ("disagreement", "feature_squeezing")
