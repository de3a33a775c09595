"""Where an attack may move samples to."""

from __future__ import annotations

import torch
from torch import Tensor

from ..immune.domain import find_domain


class Ball:
    """An L-infinity ball around each sample, within a domain.

    Parameters
    ----------
    train : torch.Tensor of shape (n, n_features)
        The training samples.
    eps : float
        The radius.
    clip : "auto", pair of float or None
        The domain, as :class:`AdaptiveKNNAttack` takes it.
    """

    def __init__(self, train: Tensor, eps: float, clip: object) -> None:
        self._eps, self._clip = eps, clip
        self._domain = None
        if clip is None:
            return
        domain = find_domain(train, clip)
        low, high = (
            torch.as_tensor(bound, dtype=train.dtype, device=train.device)
            for bound in (domain.low, domain.high)
        )
        is_name = isinstance(clip, str) and clip != "auto"
        if is_name or not (low.isfinite() & high.isfinite()).all():
            raise ValueError(
                f"clip={clip!r} must be 'auto', None or a pair of finite numbers, low < high."
            )
        self._domain = low, high

    def check(self, samples: Tensor, name: str) -> None:
        """Check that a pair ``clip`` holds all samples, and that the balls are finite."""
        if self._clip is None and not torch.cat(self.bounds(samples)).isfinite().all():
            raise ValueError(
                f"eps={self._eps:g} is too large for {name} in {samples.dtype}: without clip, the "
                "balls contain infinite points. Pass clip, or a smaller eps."
            )
        if self._domain is None or isinstance(self._clip, str):
            return
        if (samples < self._domain[0]).any() or (samples > self._domain[1]).any():
            raise ValueError(
                f"clip={self._clip!r} does not hold {name}, whose values are from "
                f"{samples.min():g} to {samples.max():g}. Pass their range, or None for no bounds."
            )

    def bounds(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Return the lowest and the highest values that points around samples may have."""
        low, high = samples - self._eps, samples + self._eps
        # Rounding must not carry a bound out of the ball.
        low = torch.where(samples - low > self._eps, low.nextafter(samples), low)
        high = torch.where(high - samples > self._eps, high.nextafter(samples), high)
        if self._domain is None:
            return low, high
        # A sample that is outside of the domain itself stays within its ball.
        return (
            torch.maximum(low, torch.minimum(samples, self._domain[0])),
            torch.minimum(high, torch.maximum(samples, self._domain[1])),
        )
