"""Where stored examples lie, and how tensors move between devices and pickles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor


class DeviceTensors:
    """An object with tensors that follow the queries to their device."""

    DEVICE_TENSORS: ClassVar[tuple[str, ...]] = ()

    def move_to(self, device: torch.device) -> None:
        """Move the tensors named in ``DEVICE_TENSORS`` to a device.

        Parameters
        ----------
        device : torch.device
        """
        for name in self.DEVICE_TENSORS:
            setattr(self, name, getattr(self, name).to(device))

    def __getstate__(self) -> dict[str, Any]:
        # Plain arrays load where there is no GPU, and joblib can map them from disk.
        return {
            name: value.cpu().numpy() if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        for name in self.DEVICE_TENSORS:
            setattr(self, name, torch.from_numpy(np.array(state[name])))


@dataclass(eq=False)
class Geometry(DeviceTensors):
    """Where the stored examples lie: what a bound of the rounding error depends on.

    An example x is stored as s = (x - shift) * scale. A query q is turned into
    (q - shift - center) * scale * unit, and compared with (s - center) * unit.

    Parameters
    ----------
    origin : torch.Tensor of shape (n_features,)
        ``shift + center``, in the units of the features.
    center : torch.Tensor of shape (n_features,)
        Typical stored example, or zeros.
    center_norm : float
        Norm of the centre, times ``unit``.
    scale : float
        Factor that half precision stores features with, or 1.
    unit : float
        Power of 2 that keeps squares of distances within the range of the dtype, or 1.
    max_norm : float
        Largest distance of a stored example from the centre, times ``unit``.
    max_rounding_error : float
        Largest distance between a stored example and its true place: 0 in full precision.
    """

    DEVICE_TENSORS: ClassVar[tuple[str, ...]] = ("origin", "center")

    origin: Tensor
    center: Tensor
    center_norm: float
    scale: float
    unit: float
    max_norm: float
    max_rounding_error: float

    @property
    def query_scale(self) -> float:
        """Factor that differences from the origin are compared with."""
        return self.scale * self.unit
