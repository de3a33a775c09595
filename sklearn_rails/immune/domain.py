"""The domain that cells live in, and the unit of a mutation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Domain:
    """Where cells live and how far a mutation moves them.

    Attributes
    ----------
    unit : array of shape (n_features,) or float
        What delta is counted in: each feature's range, or 1.
    low, high : array of shape (n_features,), float or None
        The bounds that cells are clipped to.
    """

    unit: Any
    low: Any
    high: Any

    def on(self, cells: torch.Tensor) -> Domain:
        """Return the domain as tensors on the device of some cells.

        Parameters
        ----------
        cells : torch.Tensor

        Returns
        -------
        Domain
        """

        def move(value: Any) -> Any:
            if not isinstance(value, np.ndarray):
                return value
            return torch.as_tensor(value, device=cells.device, dtype=cells.dtype)

        return Domain(move(self.unit), move(self.low), move(self.high))


def find_domain(cells: torch.Tensor, clip: object) -> Domain:
    """Find where cells live: the paper's [0, 1], or each feature's range.

    Parameters
    ----------
    cells : torch.Tensor of shape (n, n_features)
        The training data, in the cells' space.
    clip : "auto", None or pair of float

    Returns
    -------
    Domain

    Raises
    ------
    ValueError
        If ``clip`` is none of these, or a feature's range overflows.
    """
    low, high = cells.amin(dim=0), cells.amax(dim=0)
    in_unit_interval = bool((low >= 0).all() and (high <= 1).all())
    unit = 1.0 if in_unit_interval else (high - low).cpu().numpy()
    if not np.isfinite(unit).all():
        raise ValueError(
            f"The range of a feature of X is beyond what {str(cells.dtype).removeprefix('torch.')} "
            "holds; scale X, or use dtype='float64'."
        )
    if clip is None:
        return Domain(unit, None, None)
    if not isinstance(clip, str):
        try:
            bounds = np.asarray(clip, dtype=float)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            bounds = np.empty(0)
        if bounds.shape != (2,) or not bounds[0] < bounds[1]:
            raise ValueError(f"clip={clip!r} must be 'auto', None or a pair (low, high).")
        # Infinity leaves a side open; a number beyond the dtype would overflow inside of torch.
        if (np.isfinite(bounds) & (np.abs(bounds) > torch.finfo(cells.dtype).max)).any():
            raise ValueError(
                f"clip={clip!r} is beyond what {str(cells.dtype).removeprefix('torch.')} holds."
            )
        return Domain(unit, *bounds.tolist())
    if in_unit_interval:
        return Domain(unit, 0.0, 1.0)
    return Domain(unit, low.cpu().numpy(), high.cpu().numpy())
