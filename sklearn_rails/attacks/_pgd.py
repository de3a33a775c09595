"""Projected gradient descent on a network."""

from __future__ import annotations

import warnings
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.utils import check_random_state
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from .._base import NETWORK_CONSTRAINTS
from .._blocks import halve_until_it_fits
from .._compat import Interval, StrOptions, validate_parameter_constraints
from .._extractor import TorchFeatureExtractor
from .._validation import (
    check_same_length,
    check_samples,
    find_user_level,
    naming,
    plain_scalar,
)
from ..features import FeatureMap
from ..features.frozen import as_module
from ..features.gradient import NotDifferentiableError, differentiate, lead_of_others
from ..metrics._arrays import check_labels
from ._ball import Ball

CONSTRAINTS = {
    "eps": [Interval(Real, 0, None, closed="left")],
    "step": [None, Interval(Real, 0, None, closed="neither")],
    "max_iter": [Interval(Integral, 1, None, closed="left")],
    "clip": [None, "array-like"],
    "loss": [StrOptions({"cross_entropy", "margin"})],
    "random_start": ["boolean"],
    "random_state": ["random_state"],
    **{name: NETWORK_CONSTRAINTS[name] for name in ("input_shape", "device", "batch_size")},
}


def pgd(
    network: Any,
    X: ArrayLike | Tensor,
    y: ArrayLike | Tensor | None = None,
    *,
    eps: float,
    step: float | None = None,
    max_iter: int = 20,
    clip: tuple[float, float] | None = (0, 1),
    loss: Literal["cross_entropy", "margin"] = "cross_entropy",
    random_start: bool = False,
    input_shape: tuple[int, ...] | None = None,
    device: str | torch.device = "auto",
    batch_size: int | Literal["auto"] = "auto",
    random_state: int | np.random.RandomState | None = None,
) -> Any:
    """Attack a network by projected gradient descent in an L-infinity ball around each sample.

    Each step moves a sample by ``step`` along the sign of the gradient of the loss, and then back
    into the ball and into ``clip`` [1]_. All steps are made, and the last point is returned,
    whether or not the network misclassifies it.

    Parameters
    ----------
    network : torch.nn.Module, fitted skorch net, FrozenModule or TorchFeatureExtractor
        The network. Its output are logits, one for each class, or a single one for two classes. It
        runs in eval mode, and is not changed.
    X : array-like of shape (n, n_features) or (n, *input_shape), or torch.Tensor
        The samples.
    y : array-like of shape (n,), or torch.Tensor, default=None
        Their true classes, integers from 0 on. None attacks the network's own predictions.
    eps : float
        Radius of the ball, in units of ``X``.
    step : float, default=None
        Size of a step. None takes ``2.5 * eps / max_iter``, with which a sample can reach any point
        of the ball.
    max_iter : int, default=20
        Number of steps.
    clip : pair of float or None, default=(0, 1)
        Bounds of the attacked samples, besides the ball; all samples must be within them. None
        sets no bounds.
    loss : {"cross_entropy", "margin"}, default="cross_entropy"
        What the attack increases.

        - ``"cross_entropy"``: as in the paper. Its gradient is zero, and the sample does not move,
          where the network is so confident that the softmax is rounded to 1. A warning counts such
          samples: the network looks more robust than it is.
        - ``"margin"``: the largest logit of another class minus that of the class [2]_. Choose it
          for such networks.
    random_start : bool, default=False
        Start from a random point of the ball instead of the sample itself.
    input_shape : tuple of int, default=None
        Shape of one sample, such as ``(1, 28, 28)``, where X has two dimensions. None takes the
        extractor's own, else the shape of X.
    device : str, default="auto"
        ``"cpu"``, ``"cuda"``, ``"cuda:<index>"`` or ``"mps"``; ``"auto"`` is CUDA where there is a
        GPU, else the CPU.
    batch_size : int or "auto", default="auto"
        Number of samples that are attacked together.
    random_state : int, RandomState or None, default=None
        Seed of the random starts.

    Returns
    -------
    ndarray, or torch.Tensor if X is one, of the shape of ``X``, float32
        The attacked samples.

    Raises
    ------
    TypeError
        If ``network`` is not a network, or takes integers, which have no gradient.
    sklearn.exceptions.NotFittedError
        If ``network`` is a skorch net that is not fitted.
    ValueError
        If a parameter is invalid, the samples do not fit the network or are outside of ``clip``,
        ``y`` has classes that the network does not have, or the network has no finite gradient.

    See Also
    --------
    AdaptiveKNNAttack : Attacks RAILS and DkNN themselves.
    sklearn_rails.metrics.make_robust_scorer : Accuracy under an attack, for model selection.

    Notes
    -----
    This attack does not take a defence into account: accuracy on its samples says how well a
    defence does against an attacker who only knows the network.

    References
    ----------
    .. [1] A. Madry, A. Makelov, L. Schmidt, D. Tsipras, A. Vladu, "Towards Deep Learning Models
       Resistant to Adversarial Attacks", ICLR 2018, arXiv:1706.06083.
    .. [2] N. Carlini, D. Wagner, "Towards Evaluating the Robustness of Neural Networks", IEEE
       Symposium on Security and Privacy 2017, arXiv:1608.04644, Section V, f6.

    Examples
    --------
    >>> from sklearn_rails.attacks import pgd
    >>> from sklearn_rails.datasets import load_digit_images
    >>> from sklearn_rails.demo import train_network
    >>> digits = load_digit_images()
    >>> net = train_network(
    ...     digits.X_train, digits.y_train, max_epochs=10, verbose=0
    ... )
    >>> X, y = digits.X_test[:100], digits.y_test[:100]
    >>> attacked = pgd(net, X, y, eps=0.2)
    >>> round(net.score(X, y), 1), round(net.score(attacked, y), 1)
    (0.9, 0.0)
    """
    parameters = locals()
    validate_parameter_constraints(
        CONSTRAINTS,
        {name: plain_scalar(parameters[name]) for name in CONSTRAINTS},
        caller_name="pgd",
    )
    if isinstance(network, TorchFeatureExtractor):
        input_shape = network.input_shape if input_shape is None else input_shape
        network = network.module
    rows, shape = check_samples(X, input_shape)
    with torch.inference_mode(False), torch.enable_grad():
        feature_map = FeatureMap(
            as_module(network, "network"),
            None,
            input_shape=input_shape or shape,
            device=device,
            dtype="float32",
            batch_size=batch_size,
            parameter="network",
        )
        feature_map.probe(rows)
        if feature_map.integer_input:
            raise TypeError(
                "network takes integers, such as token ids; pgd needs gradients, and with them a "
                "continuous input."
            )
        samples = feature_map.to_device(rows)
        with naming("eps"):
            eps = float(eps)
        ball = Ball(samples, eps, clip)
        ball.check(samples, "X")
        labels = _check_classes(y, samples, feature_map)
        low, high = ball.bounds(samples)
        attacked = samples.clone()
        if random_start:
            noise = check_random_state(random_state).uniform(-eps, eps, size=tuple(samples.shape))
            attacked = (samples + torch.from_numpy(noise).to(samples)).clamp(low, high)
        max_iter = int(max_iter)
        with naming("step"):
            step = 2.5 * eps / max_iter if step is None else float(step)
        has_slope = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)

        def attack(block: slice) -> None:
            points = attacked[block]
            for _ in range(max_iter):
                gradient = _loss_gradient(feature_map, points, labels[block], loss)
                has_slope[block] |= gradient.flatten(1).any(dim=1)
                points = (points + step * gradient.sign()).clamp(low[block], high[block])
            attacked[block] = points

        for start in range(0, len(samples), feature_map.batch_size):
            halve_until_it_fits(
                attack, slice(start, min(start + feature_map.batch_size, len(samples)))
            )
    if not has_slope.all():
        n_stuck = int((~has_slope).sum())
        advice = "; loss='margin' may move them" if loss == "cross_entropy" else ""
        warnings.warn(
            f"The gradient of loss={loss!r} is 0 for {n_stuck} of {len(samples)} samples, which "
            f"are not attacked{advice}.",
            UserWarning,
            stacklevel=find_user_level(),
        )
    attacked = attacked.reshape(len(attacked), *shape)
    return attacked.to(X.device) if isinstance(X, Tensor) else attacked.cpu().numpy()


def _check_classes(y: Any, samples: Tensor, feature_map: FeatureMap) -> Tensor:
    if y is None:
        return feature_map.predict(samples)
    labels = check_labels(y, "y")
    check_same_length(X=samples, y=labels)
    n_classes = max(2, feature_map.outputs(samples[:1]).shape[1])
    if labels.dtype.kind == "U" or not np.isin(labels, np.arange(n_classes)).all():
        raise ValueError(
            f"y must hold integers from 0 to {n_classes - 1}, the positions of the classes in the "
            f"network's output; got {np.unique(labels)[:10].tolist()}."
        )
    return torch.from_numpy(labels.astype(np.int64)).to(samples.device)


def _loss_gradient(feature_map: FeatureMap, points: Tensor, labels: Tensor, name: str) -> Tensor:
    def loss(points: Tensor) -> Tensor:
        logits = feature_map.with_gradient(points, (feature_map.output,))[feature_map.output]
        if name == "margin":
            return lead_of_others(logits, labels)
        if logits.shape[1] == 1:
            targets = labels.to(logits)
            return binary_cross_entropy_with_logits(logits[:, 0], targets, reduction="sum")
        return cross_entropy(logits, labels, reduction="sum")

    reason = "some are NaN."
    try:
        gradient = differentiate(loss, points)
        if gradient.isfinite().all():
            return gradient
    except NotDifferentiableError as error:
        reason = str(error)
    raise ValueError(f"network cannot be attacked by gradients: {reason}")
