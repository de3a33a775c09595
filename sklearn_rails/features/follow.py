"""Notice when the user's network changes after fit, and copy it again."""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .checks import check_layers
from .contents import checksum
from .device import DTYPES, isolated_pass, keep_freed_memory, reraise_out_of_memory
from .frozen import freeze
from .probe import ProbeResult, flat_features
from .truncation import NetworkTraits, TruncatedNetwork

# Threads that notice a change at the same time copy the network once.
_FOLLOWING = threading.Lock()

# Attributes that belong to this machine and process, and are not pickled.
TRANSIENT = ("network", "_current", "_differs")


class FollowedNetwork:
    """The private copy of a network that the user may change.

    Parameters
    ----------
    module : torch.nn.Module or None
    device : torch.device
    dtype : {"float32", "float64", "bfloat16"}
    input_shape : tuple of int
    parameter : str
        The parameter that holds the network, for the errors.

    Attributes
    ----------
    module : torch.nn.Module or None
        The user's network.
    dtype : str
        In which type the network computes.
    network : TruncatedNetwork
        The copy that runs.
    samples : ndarray of shape (n, *input_shape)
        The samples that were probed; known after :meth:`start`.

    Raises
    ------
    TypeError, ValueError
        If the network cannot be copied.
    """

    network: TruncatedNetwork
    samples: NDArray[Any]

    def __init__(
        self,
        module: nn.Module | None,
        device: torch.device,
        dtype: str,
        input_shape: tuple[int, ...],
        parameter: str,
    ) -> None:
        self.module = module
        self.dtype = dtype
        self._input_shape = input_shape
        self._parameter = parameter
        self._traits: NetworkTraits | None = None
        # Of the network as it runs here, and as fit saw it; known after start().
        self._current: tuple[str, str] | None = None
        self._fitted: tuple[str, str] | None = None
        # Whether the features of the probed samples have changed since fit.
        self._differs = False
        self.run_on(device)

    def run_on(self, device: torch.device) -> None:
        """Copy the network to a device.

        Parameters
        ----------
        device : torch.device
        """
        if device.type == "cpu":
            keep_freed_memory()
        self.network = TruncatedNetwork(
            self.module,
            device=device,
            dtype=DTYPES[self.dtype],
            half=self.dtype == "bfloat16",
            input_shape=self._input_shape,
            parameter=self._parameter,
            traits=self._traits,
        )

    def in_dtype(self, dtype: str) -> "FollowedNetwork":
        """Return a copy that computes in another type, not yet started.

        Parameters
        ----------
        dtype : {"float32", "float64", "bfloat16"}

        Returns
        -------
        FollowedNetwork
        """
        device = self.network.device
        return FollowedNetwork(self.module, device, dtype, self._input_shape, self._parameter)

    @property
    def checksum(self) -> tuple[str, str] | None:
        """Of the network as it was last copied; None if it may have changed since."""
        return self._current

    def start(self, probed: ProbeResult, layers: Sequence[str], start_layer: str | None) -> None:
        """Take the network as it is now for that of fit.

        Parameters
        ----------
        probed : ProbeResult
        layers : sequence of str
            The layers whose features must keep their size.
        start_layer : str or None
        """
        self._layers, self._start_layer = tuple(layers), start_layer
        self.samples, self._draws_random = probed.samples, probed.draws_random
        self._features = {name: probed.features[name] for name in layers}
        self._traits = self.network.traits
        self._current = self._fitted = self._find_checksum()

    def _find_checksum(self) -> tuple[str, str] | None:
        if self.module is None:
            return None
        return checksum(self.module, self._traits.volatile if self._traits else ())

    def follow(self) -> bool:
        """Copy the network again if it has changed.

        Returns
        -------
        bool
            Whether it was copied.

        Raises
        ------
        ValueError
            If the network does not have the layers any more, or they have other shapes.
        """
        found = self._find_checksum()
        if found == self._current:
            return False
        with _FOLLOWING:
            if found == self._current:
                return False
            try:
                self._copy_again()
            except ValueError:
                self._current = None  # so that the next call raises it again
                raise
            # Without what a pass changes now.
            self._current = self._find_checksum()
        return True

    @property
    def has_changed(self) -> bool:
        """Whether the network, as last copied, computes something else than in fit."""
        if self._current is None or self._fitted is None:
            return False
        (network, hooks), (network_of_fit, hooks_of_fit) = self._current, self._fitted
        # Hooks may only watch.
        return network != network_of_fit or (hooks != hooks_of_fit and self._differs)

    def accept(self) -> bool:
        """Take the network as it is now for that of fit, if it gives the same features.

        Returns
        -------
        bool
            Whether it does.
        """
        self.follow()
        if self._differs:
            return False
        self._fitted = self._current
        return True

    def _copy_again(self) -> None:
        """Copy the network as it is now, and run it on the probed samples."""
        self._traits = None
        try:
            self.run_on(self.network.device)
            self.network.resolve_layers(self._layers, "layers")
            features = self._probe_again()
            self._traits = self.network.traits
        except Exception as error:
            reraise_out_of_memory(error)
            raise ValueError(
                f"The network given as {self._parameter} has changed since fit, and cannot be used "
                f"any more. Call fit again. {type(error).__name__}: {error}"
            ) from error
        for name, values in features.items():
            expected = self._features[name]
            if values.shape != expected.shape:
                raise ValueError(
                    f"The network given as {self._parameter} has changed since fit: "
                    f"layers={name!r} has {values[0].size} features, but had {expected[0].size}. "
                    "Call fit again."
                )
        self._differs = any(
            not np.allclose(values, self._features[name], rtol=1e-4, atol=1e-6, equal_nan=True)
            for name, values in features.items()
        )

    def _probe_again(self) -> dict[str, Any]:
        device = self.network.device
        x = torch.from_numpy(self.samples).to(device)
        with torch.no_grad(), isolated_pass(device, draws_random=self._draws_random):
            outputs = check_layers(self.network, x, self._layers, self._start_layer)
        return flat_features(outputs, self._layers)

    def rebased(self) -> "FollowedNetwork":
        """Return a copy that takes the network as it is now for that of fit.

        Returns
        -------
        FollowedNetwork
        """
        renewed = object.__new__(FollowedNetwork)
        vars(renewed).update(vars(self), _fitted=self._current)
        if self.module is not None:
            # Not this one's copy, which threads may be using and a failure must not change.
            renewed.run_on(self.network.device)
            renewed._features = renewed._probe_again()
            renewed._traits = renewed.network.traits
        return renewed

    def __getstate__(self) -> dict[str, Any]:
        state = {k: v for k, v in vars(self).items() if k not in TRANSIENT}
        return state | {"module": None if self.module is None else freeze(self.module)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        handle = state["module"]
        self.module = None if handle is None else handle.module
        self._differs = False
        # None if the network had changed before it was pickled, to be copied at the next call.
        self._current = self._fitted if self._find_checksum() == self._fitted else None
