"""An attack on neighbours and populations, not on the network."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.utils import check_random_state
from torch import Tensor
from torch.nn.functional import one_hot
from tqdm.auto import tqdm

from .._base import as_fitted, validate_rows
from .._compat import Interval, StrOptions, validate_parameter_constraints
from .._dknn import DkNNClassifier
from .._rails import RAILSClassifier
from .._validation import check_same_length, naming, plain_scalar
from ..features.device import RandomStateGuard
from ..features.gradient import NotDifferentiableError, differentiate
from ..features.outputs import class_logits
from ..metrics._arrays import check_labels
from ..neighbors import ClassNeighbors
from ._ball import Ball
from ._surrogates import (
    NeighborSurrogate,
    PopulationSurrogate,
    References,
    ThreatSurrogate,
    soften,
)

# Starting points of the restarts, in turn.
STARTS = ("here", "toward another class", "anywhere", "anywhere", "anywhere")

COUNTS = ("max_iter", "n_restarts", "n_references", "refresh", "n_seeds", "n_checks")

# Where the ascents toward a target start.
TARGET_STARTS = ("here", "target")

# Bytes of reference features that are compared at a time.
BLOCK_BYTES = 128 * 2**20


class AdaptiveKNNAttack:
    """Attack a DkNN or RAILS classifier directly, along gradients of a soft k-NN margin.

    An attack on the network alone does not measure robustness to an attacker who knows the
    defence. This attack differentiates through the layers that the defence uses. In each layer the
    score of a class is the soft maximum of the affinities to its references ``r``, at the
    temperature ``T``::

        s[c] = log(sum(exp(A(f(x), f(r)) / T) for r in references[c]))

    The attack maximizes the sum over layers of ``max(s[c] for c != y) - s[y]`` (in every
    second pair of restarts, the cross-entropy of the scores) by signed gradient steps in an
    L-infinity ball. The references are the nearest training samples of each class; for RAILS, the
    selected offspring of each class in responses to ``x`` under several seeds. They are
    recomputed every ``refresh`` steps and constant in between.

    After the first restart, it moves the samples that are left toward ``n_targets`` training
    samples of other classes, one after the other: signed steps that increase the affinity to their
    features in all layers, from the sample itself and from the point of the ball nearest to the
    target. This costs no responses of RAILS but for a check of where each ends. The other restarts
    follow.

    With ``gate=Arbitration()``, an attacker may target the vote, or the network toward a class
    that the neighbours do not rule out: each restart is made a second time, with the margins of
    the network's logits added to the scores. The references of samples that the gate does not let
    be bred are their neighbours. With ``gate=Triage()``, the references are the
    neighbours, whose vote decides all samples that are not flagged. With a ``threat_weight``, only
    misclassified samples that are not flagged count as a success, and the attack also lowers a soft
    threat score, computed from ``s`` in the layers of the threat scorer.

    Parameters
    ----------
    estimator : fitted DkNNClassifier or RAILSClassifier
        The classifier to attack. ``DkNNClassifier(n_neighbors=k, calibration="leave-one-out")``
        without a network is the k-nearest-neighbours classifier of the input itself. The input must
        be continuous: a network of integers, such as token ids, has no gradient.
    X_train : array-like of shape (n_train, n_features) or (n_train, *input_shape), or torch.Tensor
        The samples that ``estimator`` was fitted on.
    y_train : array-like of shape (n_train,), or torch.Tensor
        Their labels.
    eps : float
        Radius of the L-infinity ball, finite.
    step : float, default=None
        Size of a step. None takes an eighth of ``eps``.
    max_iter : int, default=100
        Number of steps of each restart.
    n_restarts : int, default=5
        Number of restarts: from the sample itself, from the point of the ball nearest to the
        nearest training sample of another class, and then from random points of the ball.
    n_targets : int, default=12
        Number of training samples of other classes, the nearest in the input first, that each
        sample is moved toward. 0 leaves these ascents out.
    n_references : int, default=10
        Number of references of each class in each layer.
    max_steps : int, default=None
        Budget: number of gradient steps of each sample at most, over all targets and restarts. The
        last of these may be cut short, and later ones are left out. None takes all of them,
        ``max_iter * (2 * n_targets + n_restarts)``, with ``gate=Arbitration()`` twice the restarts.
    refresh : int, default=10
        Number of steps after which the references are recomputed and success is checked.
    n_seeds : int, default=3
        Number of seeds under which the attack computes responses of RAILS.
    n_checks : int, default=5
        Number of further seeds, whose majority decides whether RAILS misclassifies a sample.
    threat_weight : float or "selective", default=0
        How the attack evades RAILS's ``threat_scorer``, a :class:`~sklearn_rails.ThreatScorer`. 0
        ignores it. A number subtracts this multiple of the threat score from what is maximized;
        with too large a number the attack is not flagged, but fools nothing. ``"selective"``
        lowers the threat score of samples that are misclassified, and fools the others, as seen
        every ``refresh`` steps [4]_. Try several and take the worst case of each sample.
    clip : "auto", pair of float or None, default="auto"
        Bounds of the attacked samples, besides the ball. ``"auto"`` is the domain of the training
        samples, as RAILS has it: [0, 1] if all their values are in it, else the range of each
        feature; a sample outside of it is not moved further away. All samples must be within a
        pair (low, high). None sets no bounds.
    random_state : int, RandomState or None, default=None
        Seed of the starting points and of the seeds for RAILS.
    verbose : int, default=0
        1 shows a progress bar over the samples of all restarts.

    Attributes
    ----------
    n_steps_ : ndarray of shape (n,), int
        Gradient steps that each sample of the last call of :meth:`generate` took, with those of the
        whole target or restart that fooled. Plot the share of samples that took more steps, or were
        not fooled, against the number of steps: where the curve is flat, more steps are of no use.

    Raises
    ------
    TypeError
        If the estimator, or its threat scorer, is of another kind, or takes integers.
    ValueError
        If a parameter is invalid, ``clip`` does not hold the training samples, or these do not fit
        the estimator.

    Notes
    -----
    A sample on which this attack fails may be misclassified under another one: the attacked
    accuracy is an upper bound of the robust accuracy. Report, for each sample, the worst case over
    all attacks, see :func:`~sklearn_rails.metrics.robust_accuracy_score`. The attack computes
    gradients also where the caller has disabled them. It changes neither the network nor torch's
    random state.

    References
    ----------
    .. [1] C. Sitawarin, D. Wagner, "Minimum-Norm Adversarial Examples on KNN and KNN-Based Models",
       2020, arXiv:2003.06559.
    .. [2] R. Wang, T. Chen, P. Yao, S. Liu, I. Rajapakse, A. Hero, "ASK: Adversarial Soft k-Nearest
       Neighbor Attack and Defense", 2021, arXiv:2106.14300.
    .. [3] A. Athalye, N. Carlini, D. Wagner, "Obfuscated Gradients Give a False Sense of Security",
       ICML 2018, arXiv:1802.00420 (expectation over the defence's randomness).
    .. [4] O. Bryniarski, N. Hingun, P. Pachuca, V. Wang, N. Carlini, "Evading Adversarial Example
       Detection Defenses with Orthogonal Projected Gradient Descent", ICLR 2022, arXiv:2106.15023.

    Examples
    --------
    >>> from sklearn_rails import DkNNClassifier
    >>> from sklearn_rails.attacks import AdaptiveKNNAttack
    >>> from sklearn_rails.datasets import load_digit_images
    >>> digits = load_digit_images()
    >>> X, y = digits.X_train, digits.y_train
    >>> dknn = DkNNClassifier(n_neighbors=5, calibration="leave-one-out").fit(X, y)
    >>> attack = AdaptiveKNNAttack(
    ...     dknn, X, y, eps=0.3, max_iter=20, n_restarts=2, random_state=0
    ... )
    >>> X_test, y_test = digits.X_test[:20], digits.y_test[:20]
    >>> X_attacked = attack.generate(X_test, y_test)
    >>> dknn.score(X_test, y_test), dknn.score(X_attacked, y_test)
    (1.0, 0.0)
    """

    _parameter_constraints = {
        "step": [Interval(Real, 0, None, closed="left"), None],
        "eps": [Interval(Real, 0, None, closed="left")],
        "threat_weight": [Interval(Real, 0, None, closed="left"), StrOptions({"selective"})],
        **{name: [Interval(Integral, 1, None, closed="left")] for name in COUNTS},
        "n_targets": [Interval(Integral, 0, None, closed="left")],
        "max_steps": [Interval(Integral, 1, None, closed="left"), None],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }

    def __init__(
        self,
        estimator: DkNNClassifier | RAILSClassifier,
        X_train: ArrayLike | torch.Tensor,
        y_train: ArrayLike | torch.Tensor,
        *,
        eps: float,
        step: float | None = None,
        max_iter: int = 100,
        n_restarts: int = 5,
        n_targets: int = 12,
        n_references: int = 10,
        max_steps: int | None = None,
        refresh: int = 10,
        n_seeds: int = 3,
        n_checks: int = 5,
        threat_weight: float | Literal["selective"] = 0,
        clip: str | tuple[float, float] | None = "auto",
        random_state: int | np.random.RandomState | None = None,
        verbose: int = 0,
    ) -> None:
        parameters = locals()
        if not isinstance(estimator, DkNNClassifier | RAILSClassifier):
            raise TypeError(
                "estimator must be a fitted DkNNClassifier or RAILSClassifier, got "
                f"{type(estimator).__name__}."
            )
        # What is set after fit does not defend yet.
        estimator = as_fitted(estimator)
        validate_parameter_constraints(
            self._parameter_constraints,
            {name: plain_scalar(parameters[name]) for name in self._parameter_constraints},
            caller_name=type(self).__name__,
        )
        if estimator.feature_map_.integer_input:
            raise TypeError(
                f"estimator is a {type(estimator).__name__} whose network takes integers; the "
                "attack needs gradients, and with them a continuous input."
            )
        self.estimator = estimator
        with naming("eps"):
            self.eps = float(eps)
        with naming("step"):
            self.step = self.eps / 8 if step is None else float(step)
        self.max_iter, self.n_restarts, self.refresh = int(max_iter), int(n_restarts), int(refresh)
        self.n_targets = int(n_targets)
        self.max_steps = None if max_steps is None else int(max_steps)
        self.threat_weight, self.clip, self.verbose = threat_weight, clip, verbose
        # torch takes no integers of numpy.
        n_references, n_seeds, n_checks = int(n_references), int(n_seeds), int(n_checks)
        with naming("random_state"):
            self._rng = check_random_state(random_state)
        train, labels = self._validate(X_train, y_train, "X_train")
        self._defence: NeighborSurrogate | PopulationSurrogate
        self._threat = None
        with _gradients(estimator.feature_map_.device):
            train = estimator.feature_map_.to_device(train)
            self._train: Tensor = train
            # An infinite step would turn a gradient of 0 into NaN.
            self.step = min(self.step, torch.finfo(train.dtype).max)
            self._ball = Ball(train, self.eps, clip)
            self._ball.check(train, "X_train")
            with naming("X_train"):
                self._inputs = ClassNeighbors().fit(train, labels, len(estimator.classes_))
            if isinstance(estimator, RAILSClassifier):
                self._defence = PopulationSurrogate(
                    estimator, n_references, n_seeds, n_checks, self._rng
                )
            else:
                self._defence = NeighborSurrogate(estimator, train, labels, n_references)
            if threat_weight == "selective" or threat_weight > 0:
                self._threat = ThreatSurrogate(estimator, train, labels, n_references)

    def generate(
        self, X: ArrayLike | torch.Tensor, y: ArrayLike | torch.Tensor
    ) -> NDArray[np.floating]:
        """Search the balls around samples for points that are misclassified.

        Parameters
        ----------
        X : array-like of shape (n, n_features) or (n, *input_shape), or torch.Tensor
            The samples.
        y : array-like of shape (n,), or torch.Tensor
            Their true labels.

        Returns
        -------
        ndarray of the shape of ``X``, in the estimator's dtype
            A point that is misclassified (and not flagged, with a ``threat_weight``), where one was
            found. Other samples, also those misclassified from the start, are returned unchanged.

        Raises
        ------
        ValueError
            If the samples do not fit the estimator or are outside of a pair ``clip``, or ``y`` has
            unknown classes.
        """
        samples, labels = self._validate(X, y, "X")
        is_flat = np.ndim(X[0]) < 2 if isinstance(X, list | tuple) else np.ndim(X) < 3
        shape = (samples.shape[1],) if is_flat else self.estimator.input_shape_
        with _gradients(self.estimator.feature_map_.device):
            samples = self.estimator.feature_map_.to_device(samples)
            self._ball.check(samples, "X")
            attacked = self._attack(samples, torch.as_tensor(labels, device=samples.device))
        found: NDArray[np.floating] = attacked.cpu().numpy().reshape(len(samples), *shape)
        return found

    def _attack(self, samples: Tensor, labels: Tensor) -> Tensor:
        attacked = samples.clone()
        n_steps = np.zeros(len(samples), dtype=np.int64)
        robust = (~self._is_fooled(samples, labels)).nonzero()[:, 0]
        sample_bytes = self._defence.sample_bytes
        if self._threat is not None:
            sample_bytes += self._threat.sample_bytes
        size = max(1, BLOCK_BYTES // sample_bytes)
        ascents = self._ascents(samples, labels)
        total = len(robust) * len(ascents)
        with tqdm(total=total, unit="sample", disable=not self.verbose) as progress:
            for number, (ascend, n_iter) in enumerate(ascents, start=1):
                n_steps[robust.cpu().numpy()] += n_iter
                fooled = torch.zeros_like(robust, dtype=torch.bool)
                for i in range(0, len(robust), size):
                    block = robust[i : i + size]
                    points, found = ascend(block)
                    attacked[block[found]] = points[found]
                    fooled[i : i + size] = found
                    # A fooled sample needs no more ascents.
                    progress.update(len(block) + int(found.sum()) * (len(ascents) - number))
                robust = robust[~fooled]
        self.n_steps_ = n_steps
        return attacked

    def _ascents(
        self, samples: Tensor, labels: Tensor
    ) -> list[tuple[Callable[[Tensor], tuple[Tensor, Tensor]], int]]:
        """Return functions from indices of samples to points and which fool, and their steps."""

        def match(block: Tensor, target: int, start: str, n_iter: int) -> tuple[Tensor, Tensor]:
            aims = targets[block, target]
            return self._match(samples[block], labels[block], aims, start, n_iter)

        def ascend(
            block: Tensor, restart: int, with_network: bool, n_iter: int
        ) -> tuple[Tensor, Tensor]:
            return self._ascend(samples[block], labels[block], restart, with_network, n_iter)

        targets = self._targets(samples, labels)
        pairs = itertools.product(range(targets.shape[1]), TARGET_STARTS)
        # The vote can be fooled without the network, but not a label that the network decides.
        aims = (False, True) if self._defence.keeps_network else (False,)
        restarts = itertools.product(range(self.n_restarts), aims)
        climbs = [
            functools.partial(ascend, restart=restart, with_network=aim)
            for restart, aim in restarts
        ]
        # The first restart fools most of the samples that can be fooled, in the fewest steps.
        first, rest = climbs[: len(aims)], climbs[len(aims) :]
        matches = [functools.partial(match, target=t, start=start) for t, start in pairs]
        ascents: list[functools.partial[tuple[Tensor, Tensor]]] = [*first, *matches, *rest]
        budget = len(ascents) * self.max_iter
        if self.max_steps is not None:
            budget = min(budget, self.max_steps)
        return [
            (functools.partial(ascend, n_iter=n_iter), n_iter)
            for i, ascend in enumerate(ascents)
            if (n_iter := min(self.max_iter, budget - i * self.max_iter)) > 0
        ]

    def _validate(
        self, X: ArrayLike | Tensor, y: ArrayLike | Tensor, name: str
    ) -> tuple[NDArray[Any] | Tensor, NDArray[np.intp]]:
        labels_name = name.replace("X", "y")
        with naming(name):
            samples = validate_rows(self.estimator, X)
        y = check_labels(y, labels_name)
        check_same_length(**{name: samples, labels_name: y})
        classes = check_labels(self.estimator.classes_, "classes_")
        known = np.isin(y, classes)
        if not known.all():
            raise ValueError(
                f"{labels_name} has classes that the estimator does not know: "
                f"{np.unique(y[~known])}."
            )
        return samples, np.searchsorted(classes, y)

    def _is_fooled(self, points: Tensor, labels: Tensor) -> Tensor:
        wrong = self._defence.predict(points) != labels
        return wrong if self._threat is None else wrong & ~self._threat.is_flagged(points)

    def _targets(self, samples: Tensor, labels: Tensor) -> Tensor:
        """Return the indices of the nearest training samples of other classes, or -1."""
        n_targets = min(self.n_targets, len(self._train))
        if n_targets == 0:
            return labels.new_empty(len(samples), 0)
        affinity, index = self._inputs.kneighbors(samples, n_targets)
        affinity[torch.arange(len(samples), device=samples.device), labels] = -torch.inf
        nearest = affinity.flatten(1).topk(n_targets, dim=1)
        exists = nearest.values > -torch.inf
        return index.flatten(1).gather(1, nearest.indices).masked_fill(~exists, -1)

    def _match(
        self, samples: Tensor, labels: Tensor, targets: Tensor, start: str, n_iter: int
    ) -> tuple[Tensor, Tensor]:
        """Increase the affinity to targets; return the last points and which fool."""
        low, high = self._ball.bounds(samples)
        aims = torch.where(targets[:, None] >= 0, self._train[targets], samples)
        points = (samples if start == "here" else aims).clamp(low, high)
        feature_map = self.estimator.feature_map_
        exists = torch.ones(len(samples), 1, 1, dtype=torch.bool, device=samples.device)
        references = {
            layer: (features[:, None, None], exists)
            for layer, features in feature_map(aims).items()
        }
        scales = self._defence.scales(samples)
        for iteration in range(n_iter):
            if iteration % self.refresh == 0:
                scores = soften(feature_map, points, self._defence.affinity, references, scales)
                lower_threat = self._soften_threat(
                    points, lambda points: self._defence.guess(points) != labels
                )

            def objective(
                points: Tensor, scores: Any = scores, lower: Any = lower_threat
            ) -> Tensor:
                features = feature_map.with_gradient(points)
                total = torch.cat([scores[layer](f) for layer, f in features.items()], dim=1).sum(1)
                return lower(points, total)

            # Shorter steps toward the end come closer.
            step = self.step * (1 - iteration / n_iter)
            points = points + step * self._gradient(objective, points).sign()
            points = points.clamp(low, high)
        fooled = self._defence.guess(points) != labels
        suspects = fooled.nonzero()[:, 0]
        if len(suspects):
            fooled[suspects] = self._is_fooled(points[suspects], labels[suspects])
        return points, fooled

    def _ascend(
        self, samples: Tensor, labels: Tensor, restart: int, with_network: bool, n_iter: int
    ) -> tuple[Tensor, Tensor]:
        """Maximize the margin from one start; return the last points and which fool."""
        low, high = self._ball.bounds(samples)
        points = self._start(samples, labels, restart).clamp(low, high)
        fooled = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
        left = torch.arange(len(samples), device=samples.device)
        scales = self._defence.scales(samples)
        for iteration in range(n_iter + 1):
            if iteration % self.refresh == 0 or iteration == n_iter:
                references, predicted = self._defence.respond(points[left])
                is_wrong = predicted != labels[left]
                suspects = left[is_wrong]
                if len(suspects):
                    fooled[suspects] = self._is_fooled(points[suspects], labels[suspects])
                    kept = (~fooled[left]).nonzero()[:, 0]
                    left, is_wrong = left[kept], is_wrong[kept]
                    references = {k: (f[kept], e[kept]) for k, (f, e) in references.items()}
                if len(left) == 0 or iteration == n_iter:
                    break
                objective = self._objective(
                    points[left], labels[left], is_wrong, references, scales, restart, with_network
                )
            moved = points[left] + self.step * self._gradient(objective, points[left]).sign()
            points[left] = moved.clamp(low[left], high[left])
        return points, fooled

    def _start(self, samples: Tensor, labels: Tensor, restart: int) -> Tensor:
        start = STARTS[restart % len(STARTS)]
        if start == "anywhere":
            noise = self._rng.uniform(-self.eps, self.eps, size=tuple(samples.shape))
            return samples + torch.from_numpy(noise).to(samples)
        if start == "here" or len(self.estimator.classes_) == 1:
            return samples.clone()
        affinity, index = self._inputs.kneighbors(samples, 1)
        affinity[torch.arange(len(samples), device=samples.device), labels] = -torch.inf
        nearest = affinity[..., 0].argmax(dim=1)
        # The whole way: the ball cuts it short.
        return self._train[index[..., 0].gather(1, nearest[:, None])[:, 0]]

    def _objective(
        self,
        points: Tensor,
        labels: Tensor,
        is_wrong: Tensor,
        references: References,
        scales: dict[str, float],
        restart: int,
        with_network: bool,
    ) -> Callable[[Tensor], Tensor]:
        """Return the function to maximize near some points, with constant references."""
        feature_map = self.estimator.feature_map_
        soft_scores = soften(feature_map, points, self._defence.affinity, references, scales)
        lower_threat = self._soften_threat(points, lambda _: is_wrong)
        own = one_hot(labels, len(self.estimator.classes_)).bool()

        def objective(points: Tensor) -> Tensor:
            behind: Tensor | float = 0
            if with_network:
                found = feature_map.with_gradient(points, (feature_map.output,))
                logits = class_logits(found[feature_map.output])
                # A larger margin than it takes to fool the network is of no use.
                behind = (logits - logits[own][:, None]).clamp(max=0)
            total = torch.zeros_like(points[:, 0])
            for layer, features in feature_map.with_gradient(points).items():
                scores = soft_scores[layer](features) + behind
                if restart % 4 < 2:
                    others = scores.masked_fill(own, -torch.inf).amax(dim=1)
                else:
                    others = torch.logsumexp(scores, dim=1)
                total = total + others - scores[own]
            return lower_threat(points, total)

        return objective

    def _soften_threat(
        self, points: Tensor, find_wrong: Callable[[Tensor], Tensor]
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """Return a function that adds to an objective that the threat be low, near some points."""
        if self._threat is None:
            return lambda points, total: total
        threat = self._threat.soften(points)
        if self.threat_weight == "selective":
            is_wrong = find_wrong(points)
            return lambda points, total: torch.where(is_wrong, -threat(points), total)
        weight = float(self.threat_weight)
        return lambda points, total: total - weight * threat(points)

    def _gradient(self, objective: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
        try:
            gradient = differentiate(objective, points)
        except NotDifferentiableError as error:
            raise ValueError(
                "estimator cannot be attacked by gradients, of the network as far as the layers "
                f"{list(self.estimator.layers_)}: {error}"
            ) from error
        # A class without references has no gradient.
        return gradient.nan_to_num()


@contextmanager
def _gradients(device: torch.device) -> Iterator[None]:
    """Enable gradients, and preserve torch's random state, which the network may use."""
    with torch.inference_mode(False), torch.enable_grad(), RandomStateGuard(device):
        yield
