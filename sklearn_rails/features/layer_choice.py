"""Choose the layer that withstands attacks best, by attacking training samples."""

from __future__ import annotations

import contextlib
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import joblib
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn import get_config
from sklearn.utils import check_random_state

from .._validation import check_samples, find_user_level, naming, validate_labels
from .frozen import as_module
from .gradient import NotDifferentiableError, differentiate, lead_of_others
from .mapping import Array, FeatureMap
from .truncation import INPUT

# Maximum number of layers that are compared, of features of a layer that are used for it, and of
# samples that attacked ones are compared with: the cost is bounded whatever the network and data.
MAX_LAYERS = 12
MAX_FEATURES = 2048
MAX_REFERENCES = 5000

# Number of training samples that are attacked. With fewer than MIN_SAMPLES, the standard error of a
# layer's accuracy would be above 7 points.
N_HELD_OUT = 400
MIN_SAMPLES = 50

# Number of signed gradient steps of an attack, each half as long as its radius.
ATTACK_STEPS = 3

# Radii that are tried, as shares of the range of the input; the number of samples that they are
# tried on; and the largest share of these that may keep the network's prediction.
RADII = 2.0 ** (np.arange(-20, 1) / 2)
RADIUS_SAMPLES = 100
MAX_KEPT = 0.2

# The attacks by which layers are judged, as shares of the radius that was found.
# Beyond it too, since an attacker may go further than it takes to fool the network.
RADIUS_SHARES = np.array([0, 0.5, 1, 2, 3])

# Number of neighbours of each class that an attacked sample is compared with. Their mean predicted
# RAILS' order of the layers better than the nearest one (SVHN, CIFAR-10).
N_NEIGHBORS = 5


@dataclass(frozen=True, repr=False)
class LayerScores(Mapping[str, NDArray[np.float64]]):
    """Scores of layers under attacks of growing radius: a mapping from layer to scores.

    Attributes
    ----------
    scores : dict of str to ndarray of shape (n_radii,)
        For each layer, in the order of the network, its score at each radius.
    radii : ndarray of shape (n_radii,)
        L-infinity radii of the attacks. In the units of the input if all training
        values lie in [0, 1] or a radius was given, else shares of the range of each feature, or for
        images of each channel.
    standard_error : float
        Standard error of the mean score of the best layer.
    best : str
        The last layer whose mean score is at most half a standard error below the highest.
    """

    scores: dict[str, NDArray[np.float64]]
    radii: NDArray[np.float64]
    standard_error: float

    @property
    def best(self) -> str:
        """The chosen layer."""
        means = {layer: float(values.mean()) for layer, values in self.scores.items()}
        limit = max(means.values()) - self.standard_error / 2
        return [layer for layer, mean in means.items() if mean >= limit][-1]

    def __getitem__(self, layer: str) -> NDArray[np.float64]:
        return self.scores[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self.scores)

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        width = max(len(layer) for layer in self.scores)
        lines = [f"{'radius':<{width}}  " + "  ".join(f"{r:5.3f}" for r in self.radii) + "   mean"]
        for layer, values in self.scores.items():
            shown = "  ".join(f"{value:5.3f}" for value in (*values, values.mean()))
            lines.append(f"{layer:<{width}}  {shown}" + (" *" if layer == self.best else ""))
        return "\n".join(lines)


class HeldOutAttack:
    """Training samples that are attacked: the network is moved away from its own predictions.

    Parameters
    ----------
    features : FeatureMap
        After ``probe`` with the network's output.
    X : array of shape (n, n_features)
        The training samples.
    y : ndarray of shape (n,)
        Their classes; as many samples of each as possible are attacked.
    eps : float or None
        Largest radius of the attacks. None finds the smallest that takes the network below a fifth
        of its predictions.
    n_held_out : int
        Maximum number of samples that are attacked.
    rng : numpy.random.Generator

    Attributes
    ----------
    index : ndarray of shape (n_attacked,), int64
        Their positions in X.
    radii : ndarray of shape (5,)
        The radii of the attacks, from 0.
    changed : ndarray of shape (n_attacked,), bool
        Whose prediction the last attack that was yielded has changed.

    Raises
    ------
    NotDifferentiableError
        If the network's output has no gradient.
    """

    def __init__(
        self,
        features: FeatureMap,
        X: Array,
        y: NDArray[Any],
        *,
        eps: float | None,
        n_held_out: int,
        rng: np.random.Generator,
    ) -> None:
        self.index = draw_by_class(y, n_held_out, rng)
        self._features = features
        self._low, self._high, self._unit = input_range(features, X)
        self._clean = features.to_device(X[self.index])
        with torch.no_grad():
            self._labels = features.predict(self._clean)
        if eps is None:
            radius = self._find_radius()
        else:
            self._unit = torch.ones_like(self._unit)
            radius = eps
        self.radii = radius * RADIUS_SHARES
        self.changed = np.zeros(len(self.index), dtype=bool)

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yield the samples attacked at each radius, (n_attacked, n_features)."""
        for radius in self.radii:
            attacked = self._attack(slice(None), radius) if radius else self._clean
            self.changed = self._is_changed(slice(None), attacked).cpu().numpy()
            yield attacked

    def warn_if_weak(self) -> None:
        """Warn if the last attack has left most predictions of the network as they were."""
        if self.changed.mean() < 1 - MAX_KEPT:
            warnings.warn(
                "No attack by which layers are compared changes more than "
                f"{self.changed.mean():.0%} of the network's predictions, so the layers are "
                "compared on samples that are hardly attacked.",
                stacklevel=find_user_level(),
            )

    def _find_radius(self) -> float:
        """Return the smallest radius of the grid that is large enough, or the largest."""
        some = slice(0, RADIUS_SAMPLES)
        low, high = 0, len(RADII) - 1
        while low < high:
            middle = (low + high) // 2
            changed = self._is_changed(some, self._attack(some, RADII[middle]))
            if float(changed.double().mean()) >= 1 - MAX_KEPT:
                high = middle
            else:
                low = middle + 1
        return float(RADII[low])

    def _is_changed(self, rows: slice, attacked: torch.Tensor) -> torch.Tensor:
        return self._features.predict(attacked) != self._labels[rows]

    def _attack(self, rows: slice, radius: float) -> torch.Tensor:
        clean, labels = self._clean[rows], self._labels[rows]
        size = radius * self._unit
        low = torch.maximum(clean - size, self._low)
        high = torch.minimum(clean + size, self._high)
        attacked = clean.clone()
        n_together = self._features.batch_size
        for start in range(0, len(clean), n_together):
            batch = slice(start, start + n_together)
            for _ in range(ATTACK_STEPS):
                direction = self._gradient(attacked[batch], labels[batch]).sign()
                moved = attacked[batch] + size / 2 * direction
                attacked[batch] = moved.clamp(low[batch], high[batch])
        return attacked

    def _gradient(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the margin by which other classes lead that of the network."""
        output = self._features.output

        def margin(x: torch.Tensor) -> torch.Tensor:
            outputs = self._features.with_gradient(x, (output,))[output]
            return lead_of_others(outputs, labels)

        return differentiate(margin, x).nan_to_num(nan=0.0)


# Scores by network and data: the candidates of a search have the same folds. Of the oldest ones no
# more are kept than this.
MAX_SCORED = 64
_SCORED: dict[Any, LayerScores] = {}

# Takes a feature map, samples and their classes, and returns scores, as score_layers does.
ScoreLayers = Callable[[FeatureMap, Array, Any], "LayerScores"]


def choose_layer(
    features: FeatureMap, X: Array, y: NDArray[Any] | None, score: ScoreLayers
) -> tuple[str, LayerScores | None]:
    """Return the layer of the best score, or one in the middle if layers cannot be compared.

    Parameters
    ----------
    features : FeatureMap
        After ``probe`` with the network's output.
    X : array of shape (n, n_features)
        The training samples.
    y : ndarray of shape (n,), or None
        Their classes.
    score : callable
        As :func:`score_layers`.

    Returns
    -------
    layer : str
    scores : LayerScores or None
        None, with a warning, if there are too few samples or the network cannot be attacked.
    """
    if len(X) < MIN_SAMPLES:
        reason = f"there are only {len(X)} training samples, and it takes {MIN_SAMPLES}"
    elif features.integer_input:
        reason = "the network takes integers, which cannot be attacked by small steps"
    else:
        try:
            found = _score_once(features, X, y, score)
        except NotDifferentiableError:
            reason = "the network's output has no gradient with respect to its input"
        else:
            return found.best, found
    layers = features.find_layers(MAX_LAYERS)
    hidden = [layer for layer in layers if layer not in (INPUT, features.output)] or layers
    middle = hidden[(len(hidden) - 1) // 2]
    warnings.warn(
        f"layers='auto' cannot compare the layers under attack, since {reason}. It uses "
        f"{middle!r}, in the middle of the network; name layers to choose others.",
        stacklevel=find_user_level(),
    )
    return middle, None


def _score_once(
    features: FeatureMap, X: Array, y: NDArray[Any] | None, score: ScoreLayers
) -> LayerScores:
    """Score layers, or return the scores of an earlier call with the same network and data."""
    rows, key = X.cpu() if isinstance(X, torch.Tensor) else X, None
    if features.identity is not None:
        # A detector may have no hash.
        with contextlib.suppress(TypeError, AttributeError, pickle.PicklingError):
            key = features.identity, joblib.hash((rows, y, score))
    known = _SCORED.get(key)
    if known is None:
        with torch.inference_mode(False), torch.enable_grad():
            known = score(features, X, y)
        for values in known.scores.values():
            values.flags.writeable = False  # other estimators may get the same
        if key is not None:
            _SCORED[key] = known
            while len(_SCORED) > MAX_SCORED:
                _SCORED.pop(next(iter(_SCORED)), None)
    return known


def score_layers(
    features: FeatureMap,
    X: Array,
    y: NDArray[Any],
    *,
    eps: float | None = None,
    n_held_out: int = N_HELD_OUT,
    seed: int = 0,
) -> LayerScores:
    """Score each layer by how well neighbours in it classify attacked training samples.

    Parameters
    ----------
    features, X, y, eps, n_held_out
        As :class:`HeldOutAttack` takes them.
    seed : int, default=0
        Seed of the draws of samples and features. ``fit`` leaves it at 0, so that its choice is a
        function of the network and the data.

    Returns
    -------
    LayerScores
        Accuracy of the class whose nearest samples have the highest mean cosine.

    Raises
    ------
    NotDifferentiableError
        If the network's output has no gradient.
    """
    y = np.unique(y, return_inverse=True)[1]
    rng = np.random.default_rng(seed)
    layers = features.find_layers(MAX_LAYERS)
    attack = HeldOutAttack(features, X, y, eps=eps, n_held_out=n_held_out, rng=rng)
    sampled = features.sample_features(layers, MAX_FEATURES, X[:1], rng)
    queries = [_in_blocks(sampled, attacked) for attacked in attack]
    joined = {layer: torch.cat([q[layer] for q in queries]) for layer in layers}
    own = torch.from_numpy(np.tile(attack.index, len(queries))).to(features.device)
    references = rng.permutation(len(X))[:MAX_REFERENCES]
    found = _classify(sampled, joined, own, X, y, references)
    classes = np.tile(y[attack.index], len(queries))
    correct = {name: (c == classes).reshape(len(queries), -1) for name, c in found.items()}
    if eps is None:
        attack.warn_if_weak()
    per_sample = {layer: values.mean(axis=0) for layer, values in correct.items()}
    best = max(per_sample.values(), key=lambda values: values.mean())
    error = best.std(ddof=1) / np.sqrt(len(best))
    scores = {layer: values.mean(axis=1) for layer, values in correct.items()}
    return LayerScores(scores, attack.radii, float(error))


def choose_layers(
    network: Any,
    X: ArrayLike | torch.Tensor,
    y: ArrayLike | torch.Tensor,
    *,
    eps: float | None = None,
    n_held_out: int = N_HELD_OUT,
    input_shape: tuple[int, ...] | None = None,
    device: str | torch.device = "auto",
    random_state: int | np.random.RandomState | None = None,
) -> LayerScores:
    """Compare the layers of a network under attack, as ``layers="auto"`` does in ``fit``.

    Some training samples are attacked by a few signed gradient steps away from the network's own
    prediction, at radii around the smallest that takes the network below a fifth of its
    predictions. A layer's score is the share of them that their neighbours in this layer classify
    correctly: of each class the five nearest other training samples, by cosine.

    Parameters
    ----------
    network : torch.nn.Module, fitted skorch net or FrozenModule
        The fitted network; its output is used as logits.
    X : array-like of shape (n, n_features) or (n, *input_shape), or torch.Tensor
        Training samples, 50 or more. At most 5,000 of them serve as neighbours.
    y : array-like of shape (n,)
        Their classes.
    eps : float, default=None
        The radius that matters to you, in the units of X. Layers are then compared at 0, a half,
        once, twice and three times this radius. None finds a radius as described above.
    n_held_out : int, default=400
        Maximum number of samples that are attacked. The standard error of a score is at most
        ``0.5 / sqrt(n_held_out)``.
    input_shape : tuple of int, default=None
        Shape of one input, where X has two dimensions. None takes the shape of X.
    device : str, default="auto"
        As the estimators take it.
    random_state : int, RandomState or None, default=None
        Sets which samples are attacked, which are neighbours, and which features are compared.

    Returns
    -------
    LayerScores
        A mapping from layer to its accuracy at each radius. ``best`` names the layer that
        ``"auto"`` would choose.

    Raises
    ------
    TypeError
        If ``network`` is not a network, or takes integers.
    ValueError
        If there are fewer than 50 samples, a parameter is invalid, or the network does not fit the
        samples or has no gradient.

    See Also
    --------
    sklearn_rails.inspection.LayerDisplay : Draw the accuracy of RAILS or DkNN in every layer.

    Examples
    --------
    >>> from sklearn_rails.datasets import load_digit_images
    >>> from sklearn_rails.demo import train_network
    >>> from sklearn_rails.features import choose_layers
    >>> digits = load_digit_images()
    >>> X, y = digits.X_train, digits.y_train
    >>> net = train_network(X, y, max_epochs=10, verbose=0)
    >>> scores = choose_layers(net, X, y, random_state=0)
    >>> list(scores)
    ['input', 'conv1', 'conv2', 'conv3', 'conv4', 'output']
    >>> scores.best == "output"
    False
    """
    if eps is not None and not (isinstance(eps, Real) and 0 < eps < np.inf):
        raise ValueError(f"eps={eps!r} must be a positive number, or None.")
    if not isinstance(n_held_out, Integral) or n_held_out < 2:
        raise ValueError(f"n_held_out={n_held_out!r} must be an integer, 2 or more.")
    rows, shape = check_samples(X, input_shape)
    features = FeatureMap(
        as_module(network, "network"),
        None,
        input_shape=input_shape or shape,
        device=device,
        dtype="float32",
        batch_size="auto",
        parameter="network",
    )
    labels = validate_labels(y, len(rows))
    if len(rows) < MIN_SAMPLES:
        raise ValueError(f"X must have {MIN_SAMPLES} samples or more, got {len(rows)}.")
    features.probe(rows)
    if features.integer_input:
        raise TypeError("network takes integers, which cannot be attacked by small steps.")
    with naming("random_state"):
        rng = check_random_state(random_state)
    seed = rng.randint(np.iinfo(np.int32).max)
    with naming("eps"):
        radius = None if eps is None else float(eps)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            return score_layers(
                features,
                features.cast(rows),
                labels,
                eps=radius,
                n_held_out=int(n_held_out),
                seed=seed,
            )
    except NotDifferentiableError:
        raise ValueError(
            "network has no gradient of its output with respect to its input, so it cannot be "
            "attacked."
        ) from None


def _classify(
    sampled: FeatureMap,
    queries: dict[str, torch.Tensor],
    own: torch.Tensor,
    X: Array,
    y: NDArray[Any],
    references: NDArray[np.int64],
) -> dict[str, NDArray[Any]]:
    """Predict the class whose N_NEIGHBORS nearest samples have the highest mean cosine.

    Parameters
    ----------
    sampled : FeatureMap
    queries : dict of str to torch.Tensor of shape (n, n_sampled)
        Features by layer.
    own : torch.Tensor of shape (n,), int64
        Position in X of the sample that each query was: no neighbour of it.
    X, y
        The training samples and their classes.
    references : ndarray of shape (n_references,), int64
        Positions of possible neighbours.

    Returns
    -------
    dict of str to ndarray of shape (n,)
    """
    queries = {name: _normalize(values) for name, values in queries.items()}
    best = {name: values.new_full((len(values),), -torch.inf) for name, values in queries.items()}
    labels = {name: np.full(len(values), y[references[0]]) for name, values in queries.items()}
    # One class after another, of which only the nearest are kept.
    references = references[np.argsort(y[references], kind="stable")]
    nearest = {name: values.new_empty((len(values), 0)) for name, values in queries.items()}
    size = _block_size(sampled)
    for start in range(0, len(references), size):
        block = references[start : start + size]
        found = sampled(X[block], check_finite=False)
        edges = np.flatnonzero(np.diff(y[block])) + 1
        for part in np.split(np.arange(len(block)), edges):
            places = torch.from_numpy(block[part]).to(own.device)
            last = start + part[-1] + 1
            is_complete = last == len(references) or y[references[last]] != y[block[part[0]]]
            for name, values in queries.items():
                cosine = values @ _normalize(found[name][part[0] : part[-1] + 1]).T
                cosine = cosine.masked_fill(own[:, None] == places, -torch.inf)
                pool = torch.cat([nearest[name], cosine], dim=1)
                nearest[name] = pool.topk(min(N_NEIGHBORS, pool.shape[1]), dim=1).values
                if is_complete:
                    exists = nearest[name].isfinite()
                    mean = nearest[name].where(exists, 0).sum(1) / exists.sum(1)
                    closer = (mean > best[name]).cpu().numpy()
                    labels[name][closer] = y[block[part[0]]]
                    best[name] = torch.fmax(best[name], mean)
                    nearest[name] = nearest[name][:, :0]
    return labels


def _in_blocks(sampled: FeatureMap, X: Array) -> dict[str, torch.Tensor]:
    """Compute features in blocks that fit into memory."""
    size = _block_size(sampled)
    blocks = [sampled(X[i : i + size], check_finite=False) for i in range(0, len(X), size)]
    return {name: torch.cat([block[name] for block in blocks]) for name in sampled.layers}


def _block_size(sampled: FeatureMap) -> int:
    # The outputs of all layers, and the copies that they are put together from.
    budget = int(get_config()["working_memory"] * 2**20) // 4
    return max(1, min(1024, budget // sampled.row_bytes))


def _normalize(features: torch.Tensor) -> torch.Tensor:
    finite = features.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return torch.nn.functional.normalize(finite, dim=1)


def draw_by_class(y: NDArray[Any], size: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw positions of samples at random, as evenly from the classes as they allow.

    Parameters
    ----------
    y : ndarray of shape (n,)
    size : int
    rng : numpy.random.Generator

    Returns
    -------
    ndarray of shape (min(n, size),), int64
        In random order.
    """
    shuffled = rng.permutation(len(y))
    _, labels = np.unique(y[shuffled], return_inverse=True)
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], np.arange(labels.max() + 1))
    rank = np.empty(len(y), dtype=np.int64)
    rank[order] = np.arange(len(y)) - starts[labels[order]]
    return shuffled[np.argsort(rank, kind="stable")[:size]]


def input_range(features: FeatureMap, X: Array) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the smallest and largest values of the input, and the unit of a radius.

    Parameters
    ----------
    features : FeatureMap
    X : array of shape (n, n_features)

    Returns
    -------
    low, high, unit : torch.Tensor of shape (n_features,)
        0, 1 and 1 if all values lie in [0, 1]; else the range of each feature, or for images of
        each channel.
    """
    shape = features.input_shape
    low = features.to_device(np.asarray(X.min(0)) if isinstance(X, np.ndarray) else X.amin(0))
    high = features.to_device(np.asarray(X.max(0)) if isinstance(X, np.ndarray) else X.amax(0))
    if low.min() >= 0 and high.max() <= 1:
        return torch.zeros_like(low), torch.ones_like(low), torch.ones_like(low)
    if len(shape) > 1:
        low = low.reshape(shape[0], -1).amin(1, keepdim=True).expand(-1, low.numel() // shape[0])
        high = high.reshape(shape[0], -1).amax(1, keepdim=True).expand(-1, high.numel() // shape[0])
        low, high = low.reshape(-1), high.reshape(-1)
    return low, high, high - low
