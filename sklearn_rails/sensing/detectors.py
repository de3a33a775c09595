"""Sensing: raw threat scores by many methods, higher for more suspect.

A sensor is made from :class:`CleanSamples` and called with :class:`Query`. Its score of a row whose
features are not finite is infinite, never NaN: such a row is the most suspect of all.
"""

import functools
import warnings

import numpy as np
import torch
from scipy.ndimage import median_filter
from torch.nn.functional import one_hot, pad

from .._conformal import sample_rows
from ..neighbors.affinity import norm
from ..neighbors.index import ClassNeighbors, kneighbors_leave_one_out
from ..neighbors.votes import class_margin, nearest

# The block of distances that is held at a time, in bytes.
BLOCK_BYTES = 64 * 2**20

# Clean rows that tell the bandwidth of a density and where a class lies, and, where there are more
# features than this, the rows that tell a covariance: as many eigenvectors are kept at most.
BANDWIDTH_ROWS = 256
COVARIANCE_ROWS = 2000

# What a matrix product may change squared distances by, in squared bandwidths.
MAX_ROUNDING = 1e-9

# Clean rows that are so many times as far from their class as the median do not count in its mean
# and covariance, which a single one of them would decide.
FAR_RATIO = 1e6


class CleanSamples:
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
        """The examples of each layer by class, the only copy that all sensors share."""
        return {
            layer: ClassNeighbors().fit(f, self.labels, self.n_classes)
            for layer, f in self.features.items()
        }

    @functools.cached_property
    def radii(self):
        """Median distance of the k-th neighbour in each layer, by some rows without themselves."""
        own, radii = self.spread(BANDWIDTH_ROWS), {}
        for layer, features in self.features.items():
            pooled = self.neighbors[layer].pooled(features.device)
            radius = float(nearest(pooled, features[own], self.n_neighbors, own)[0][:, -1].median())
            radii[layer] = radius if radius > 0 else 1.0
        return radii

    @functools.cached_property
    def centers(self):
        """Medians of some rows of each class in each layer, (n_classes, n_layer_features)."""
        some = {}
        for c in np.unique(self.labels):
            rows = np.flatnonzero(self.labels == c)
            some[c] = rows[sample_rows(len(rows), BANDWIDTH_ROWS, rng=0)]
        centers = {}
        for layer, f in self.features.items():
            centers[layer] = f.new_zeros(self.n_classes, f.shape[1])
            for c, rows in some.items():
                centers[layer][c] = f[rows].median(dim=0).values
        return centers

    def spread(self, n_rows):
        """Draw positions of some rows at random, the same each time."""
        return sample_rows(len(self.X), n_rows, rng=0)


class Query:
    """Rows that are to be judged; what several sensors ask about them is found once.

    Parameters
    ----------
    X : ndarray or torch.Tensor of shape (n, n_features)
    features : dict of str to torch.Tensor of shape (n, n_layer_features)
    network : FeatureMap
    own : ndarray of shape (n,), default=None
        Each row's index among the clean rows, if it is one of them: it is judged without itself.

    Attributes
    ----------
    usable : ndarray of shape (n,), bool
        Whether a row's features are finite, and distances from it too. Others are replaced by
        zeros.
    """

    def __init__(self, X, features, network, own=None):
        usable = True
        for f in features.values():
            usable = usable & (norm(f) < torch.finfo(f.dtype).max / 4).cpu()
        self.usable = usable.numpy()
        if not self.usable.all():
            features = {
                layer: f.masked_fill(~usable.to(f.device)[:, None], 0)
                for layer, f in features.items()
            }
            if isinstance(X, torch.Tensor):
                X = X.masked_fill(~usable.to(X.device)[:, None], 0)
            else:
                X = np.where(self.usable[:, None], X, X.dtype.type(0))
        self.X = X
        self.features = features
        self.network = network
        self.own = own
        self._nearest = {}

    @functools.cached_property
    def outputs(self):
        """The network's own outputs."""
        return self.network.outputs(self.X, check_finite=False)

    @functools.cached_property
    def labels(self):
        """The network's own labels; a single class where there is no network."""
        if not self.network.has_network:
            return torch.zeros(len(self.X), dtype=torch.int64, device=self.network.device)
        return self.network.label(self.outputs)

    def nearest(self, layer, neighbors, n_neighbors):
        """Find the nearest clean rows, as :func:`~sklearn_rails.neighbors.votes.nearest`."""
        if layer not in self._nearest:
            features = self.features[layer]
            self._nearest[layer] = nearest(
                neighbors[layer].pooled(features.device), features, n_neighbors, self.own
            )
        return self._nearest[layer]


class PicklesToCPU:
    """Holds tensors, and is pickled with plain arrays in their place."""

    def __getstate__(self):
        return {name: _to_arrays(value) for name, value in vars(self).items()}

    def __setstate__(self, state):
        vars(self).update({name: _to_tensors(value) for name, value in state.items()})


class Sensor(PicklesToCPU):
    """What scores rows."""

    def __call__(self, rows):
        """Score new rows.

        Parameters
        ----------
        rows : Query

        Returns
        -------
        ndarray of shape (n, n_scores), float64
            Infinite where a row's features, or the score itself, are not finite numbers.
        """
        scores = self.score(rows)
        return np.where(rows.usable[:, None] & ~np.isnan(scores), scores, np.inf)


def _to_arrays(value):
    if isinstance(value, torch.Tensor):
        return {"tensor": value.cpu().numpy()}
    return {k: _to_arrays(v) for k, v in value.items()} if isinstance(value, dict) else value


def _to_tensors(value):
    if not isinstance(value, dict):
        return value
    if value.keys() == {"tensor"}:
        with warnings.catch_warnings():
            # Arrays that are mapped from disk stay there; torch warns that they are read-only.
            warnings.simplefilter("ignore", UserWarning)
            return torch.from_numpy(np.asarray(value["tensor"]))
    return {k: _to_tensors(v) for k, v in value.items()}


def _in_double(values):
    """Give values in double precision, on the host where their device has none."""
    return (values.cpu() if values.device.type == "mps" else values).double()


class NeighborsSensor(Sensor):
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
    the distance of the k-th neighbour, so that there are no ties: the distance over itself plus
    that of a typical clean row. With a single class only the distance is left.

    A clean row that is left out of its own neighbours has one row fewer of its class near it than
    a new one, which decides where a class has no more rows than k. So it is judged without itself
    and with itself as its nearest neighbour, and the more suspect counts.
    """

    def __init__(self, clean):
        super().__init__(clean)
        self._radii = clean.radii

    def score(self, rows):
        """Score new rows: an ndarray of shape (n, 1), float64."""
        against, against_with_own, distance = 0, 0, 0
        labels = torch.from_numpy(self._labels)
        typical = self._radii.values()
        for (radius, index), unit in zip(self._nearest(rows), typical, strict=True):
            voters = one_hot(labels[index], self._n_classes)
            votes = voters.sum(dim=1)
            against = against + self._n_neighbors - votes
            if rows.own is not None:
                own = one_hot(labels[rows.own], self._n_classes)
                against_with_own = (
                    against_with_own + self._n_neighbors - (votes - voters[:, -1] + own)
                )
            radius = radius[:, -1]
            distance = distance + radius / (unit + radius) / len(rows.features)
        score = against.min(dim=1).values
        if rows.own is not None:
            score = torch.maximum(score, against_with_own.min(dim=1).values)
        return (score + distance).numpy()[:, None]


class Disagreement(Sensor):
    """By how much another class is nearer than the class that the network predicts.

    A class is as near as the nearest of its rows.
    """

    def __init__(self, clean):
        self._neighbors = clean.neighbors

    def score(self, rows):
        """Score new rows: an ndarray of shape (n, n_layers), float64."""
        columns = []
        for layer, features in rows.features.items():
            if rows.own is None:
                flocked, _ = self._neighbors[layer].kneighbors(features, 1)
            else:
                own = torch.from_numpy(rows.own).to(features.device)
                flocked = kneighbors_leave_one_out(self._neighbors[layer], own, features, 1)
            columns.append(class_margin(flocked.cpu().double(), rows.labels.cpu()))
        return torch.stack(columns, dim=1).numpy()


class LocalIntrinsicDimensionality(NeighborsSensor):
    """Dimension in which the neighbours seem to lie (Ma et al. 2018).

    It is infinite where all neighbours are equally far, and 0 where one of them, or all, are at
    distance 0: the estimate's limits from below and from above.
    """

    def score(self, rows):
        """Score new rows: an ndarray of shape (n, n_layers), float64."""
        columns = []
        for distance, _ in self._nearest(rows):
            # The last term is always 0.
            mean = -(distance / distance[:, -1:]).log().mean(dim=1)
            mean = mean.masked_fill(distance[:, 0] == 0, torch.inf)
            # abs, since minus zero has an inverse of its own.
            columns.append(1 / mean.abs())
        return torch.stack(columns, dim=1).numpy()


class Distance(Sensor):
    """Distance of the k-th neighbour on L2-normalised features (Sun et al. 2022)."""

    def __init__(self, clean):
        self._n_neighbors = clean.n_neighbors
        self._neighbors = clean.neighbors
        self._lengths = {}
        for layer, features in clean.features.items():
            lengths = norm(features)[clean.neighbors[layer].index]
            self._lengths[layer] = lengths.masked_fill(lengths == 0, torch.inf)

    def score(self, rows):
        """Score new rows: an ndarray of shape (n, n_layers), float64."""
        columns = []
        for layer, features in rows.features.items():
            lengths = self._lengths[layer].to(features.device)
            neighbors = self._neighbors[layer].pooled(features.device, lengths)
            distance, _ = nearest(neighbors, features, self._n_neighbors, rows.own)
            columns.append(distance[:, -1])
        return torch.stack(columns, dim=1).cpu().numpy().astype(np.float64)


class KernelDensity(Sensor):
    """Minus the log density of the class that the network predicts (Feinman et al. 2017)."""

    def __init__(self, clean):
        self._neighbors = clean.neighbors
        # Without a network all rows are of one class.
        self._has_classes = clean.network.has_network
        self._bandwidth, self._centers = clean.radii, clean.centers
        if not self._has_classes:
            some = clean.spread(BANDWIDTH_ROWS)
            self._centers = {
                layer: features[some].median(dim=0, keepdim=True).values
                for layer, features in clean.features.items()
            }

    def score(self, rows):
        """Score new rows: an ndarray of shape (n, n_layers), float64."""
        columns = []
        for layer, features in rows.features.items():
            own = None if rows.own is None else torch.from_numpy(rows.own).to(features.device)
            neighbors = self._neighbors[layer]
            if not self._has_classes:
                neighbors = neighbors.pooled(features.device)
            centers = self._centers[layer].to(features.device)
            scores = features.new_zeros(len(features), dtype=torch.float64, device="cpu")
            for c in rows.labels.unique().tolist():
                chosen = (rows.labels == c).nonzero()[:, 0]
                examples, index = neighbors.examples_of(c, features.device)
                left_out = None if own is None else own[chosen]
                scores[chosen.cpu()] = self._score_class(
                    features[chosen], examples, centers[c], self._bandwidth[layer], left_out, index
                ).cpu()
            columns.append(scores)
        return torch.stack(columns, dim=1).numpy()

    def _score_class(self, features, examples, center, bandwidth, own, index):
        """Score rows by the density of one class, without their own rows."""
        if len(examples) == 0:
            return torch.full((len(features),), torch.inf, dtype=torch.float64)
        # Differences from within the class, in double precision: small distances are what counts.
        # A matrix product may still round them, where rows of a class are far apart.
        unit = torch.finfo(torch.float64).eps
        center = _in_double(center)
        step = max(1, BLOCK_BYTES // (8 * max(features.shape[1], len(examples))))
        scores = []
        for rows in torch.arange(len(features), device=features.device).split(step):
            moved = _in_double(features[rows]) - center
            near = []
            for piece in examples.split(step):
                other = _in_double(piece) - center
                squares, others = moved.square().sum(dim=1), other.square().sum(dim=1)
                if unit * (squares.max() + others.max()) < MAX_ROUNDING * bandwidth**2:
                    products = torch.addmm(others, moved, other.T, alpha=-2)
                    near.append(products.add_(squares[:, None]).clamp_(min=0))
                else:
                    mode = "donot_use_mm_for_euclid_dist"
                    near.append(torch.cdist(moved, other, compute_mode=mode).square_())
            near = torch.cat(near, dim=1).div_(-(bandwidth**2))
            count = len(examples)
            if own is not None:
                same = (own[rows, None] == index).to(near.device)
                near.masked_fill_(same, -torch.inf)
                count = count - same.sum(dim=1)
            scores.append(torch.as_tensor(count).log() - near.logsumexp(dim=1))
        # A class without any other rows has no density.
        return torch.cat(scores).nan_to_num(nan=torch.inf, posinf=torch.inf)


class Mahalanobis(Sensor):
    """Squared Mahalanobis distance of the nearest class mean (Lee et al. 2018).

    The covariance within the classes is shared by all of them, and shrunk. Rows that are a million
    times as far from their class as others count neither in its mean nor in the covariance.
    """

    def __init__(self, clean):
        self._labels = torch.from_numpy(clean.labels)
        self._counts, self._origin, self._means, self._whiten, self._weight = {}, {}, {}, {}, {}
        for layer, features in clean.features.items():
            labels = self._labels.to(features.device)
            counted = self._count_rows(features, labels, clean.centers[layer])
            # What is far from zero is looked at from near by.
            self._origin[layer] = origin = _in_double(clean.centers[layer].median(dim=0).values)
            used = clean.spread(COVARIANCE_ROWS)
            if features.shape[1] <= COVARIANCE_ROWS:
                used = np.arange(len(features))
            used = used[counted[used].numpy()]
            self._counts[layer] = counts = torch.bincount(
                self._labels[counted], minlength=clean.n_classes
            ).double()
            means = origin.new_zeros(clean.n_classes, features.shape[1])
            step = max(1, BLOCK_BYTES // (8 * features.shape[1]))
            for rows in counted.nonzero()[:, 0].split(step):
                rows = rows.to(features.device)
                values = _in_double(features[rows]) - origin
                means.index_add_(0, labels[rows].to(values.device), values)
            means.div_(counts.clamp(min=1).to(means.device)[:, None])
            residuals = _in_double(features[used]) - origin
            residuals -= means[labels[used].to(means.device)]
            whiten = ShrunkWhitening(residuals)
            self._means[layer], self._whiten[layer] = whiten(means), whiten
            # A row's part in the covariance.
            self._weight[layer] = torch.zeros(len(features), dtype=torch.float64)
            self._weight[layer][used] = (1 - whiten.shrinkage) / len(used)
            self._weight[layer][~counted] = torch.nan

    @staticmethod
    def _count_rows(features, labels, centers):
        """Tell which rows count: a row that is far out by orders of magnitude does not."""
        step = max(1, BLOCK_BYTES // features[0].nbytes)
        parts = [
            norm(features[rows] - centers[labels[rows]])
            for rows in torch.arange(len(features), device=features.device).split(step)
        ]
        away = torch.cat(parts).cpu().double()
        some = away[away > 0]
        return away <= FAR_RATIO * some.median() if len(some) else torch.ones_like(away) > 0

    def score(self, rows):
        """Score new rows: an ndarray of shape (n, n_layers), float64."""
        columns = []
        for layer, features in rows.features.items():
            white, means = self._whitened(layer, features)
            squares = self._squares(layer, white, means).cpu()
            if rows.own is not None:
                squares = self._leave_out(layer, squares, white, means, rows.own)
            columns.append(squares.amin(dim=1))
        return torch.stack(columns, dim=1).numpy()

    def squared_distances(self, layer, features):
        """Compute the squared distances of all class means.

        Parameters
        ----------
        layer : str
        features : torch.Tensor of shape (n, n_layer_features)

        Returns
        -------
        torch.Tensor of shape (n, n_classes), float64
            Infinite for a class without rows.
        """
        return self._squares(layer, *self._whitened(layer, features))

    def _squares(self, layer, white, means):
        # Of differences, never by a matrix product, whose error grows with the means.
        distances = torch.cdist(white, means, compute_mode="donot_use_mm_for_euclid_dist")
        return distances.square().masked_fill(
            self._counts[layer].to(distances.device) == 0, torch.inf
        )

    def _whitened(self, layer, features):
        features = _in_double(features)
        origin, means = (part[layer].to(features.device) for part in (self._origin, self._means))
        return self._whiten[layer](features - origin), means

    def _leave_out(self, layer, squares, white, means, own):
        """Take each row out of its class's mean and of the covariance."""
        labels = self._labels[own]
        residual = white - means[labels.to(means.device)]
        # Products with the differences to all means.
        products = ((white * residual).sum(dim=1)[:, None] - residual @ means.T).cpu()
        counts, weight = self._counts[layer][labels][:, None], self._weight[layer][own][:, None]
        growth = torch.where(counts > 1, counts / (counts - 1), torch.inf)
        # Rows that do not count are in no mean.
        growth, weight = growth.masked_fill(weight.isnan(), 1), weight.nan_to_num(nan=0.0)
        weight = (weight * growth).nan_to_num(nan=0.0, posinf=0.0)
        own_square = residual.square().sum(dim=1)[:, None].cpu()
        left = (1 - weight * own_square).clamp(min=torch.finfo(torch.float32).eps)
        squares = squares + weight * products.square() / left
        own_class = (growth * growth * own_square / left).nan_to_num(nan=torch.inf)
        return squares.scatter(1, labels[:, None], own_class)


class ShrunkWhitening(PicklesToCPU):
    """Whitening by a shrunk covariance, whose shrinkage is that of Ledoit and Wolf (2004).

    The covariance is a share of a multiple of the identity, and the rest that of the residuals: it
    is known by the eigenvectors of the latter, however many features there are.

    Parameters
    ----------
    residuals : torch.Tensor of shape (n, n_features), float64
        Centred rows.

    Attributes
    ----------
    shrinkage : float
    """

    def __init__(self, residuals):
        n, d = residuals.shape
        # Fourth powers are computed, which must not overflow.
        size = residuals.abs().max()
        size = torch.where(size > 0, size, 1)
        rows = residuals / size
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
        self._scales = ((1 - self.shrinkage) * values + floor).rsqrt() / size
        self._rest = float(floor.rsqrt() / size)
        self._vectors = vectors

    def __call__(self, features):
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


class FeatureSqueezing(Sensor):
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

    def score(self, rows):
        """Score new rows: an ndarray of shape (n, 1), float64."""
        before = soft_labels(rows.outputs.cpu().double())
        moved = [
            (
                soft_labels(rows.network.outputs(squeezed, check_finite=False).cpu().double())
                - before
            )
            .abs()
            .sum(dim=1)
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
        # In double precision, in which no difference overflows.
        levels = np.round((X.astype(np.float64) - self._low) / span * self._n_steps)
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
NEEDS_LABELS = ("disagreement", "kernel_density")
NEEDS_OUTPUTS = ("disagreement", "feature_squeezing")
