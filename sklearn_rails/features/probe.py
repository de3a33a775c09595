"""Run two samples in fit: whether a network can be used, and what it takes."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from numpy.typing import NDArray

from .batching import PASS_ADVICE
from .checks import batch_tolerance, check_layers
from .device import (
    explain_out_of_memory,
    isolated_pass,
    random_state_of,
    reraise_out_of_memory,
    same_random_state,
    set_random_state,
    to_tensor,
)
from .outputs import LayerError
from .truncation import TruncatedNetwork

# Number of samples from which the two are chosen.
PROBED_SAMPLES = 100


@dataclass(frozen=True)
class ProbeResult:
    """What a network does with two samples.

    Attributes
    ----------
    samples : ndarray of shape (n, *input_shape)
        The samples that were run, repeated for a network that takes batches of one size only.
    shapes : dict of str to tuple of int
        Shape of one sample's output, by layer.
    features : dict of str to ndarray of shape (n, n_layer_features)
    integer_input : bool
        Whether the network takes integers, such as token ids.
    is_exact : bool
        Whether it takes batches of one size only.
    smallest_batch : int
        The smallest batch that it takes.
    draws_random : bool
        Whether it draws from the global random state.
    seconds_per_sample : float
        Time of one sample alone.
    seconds_per_further_sample : float
        Time that a second sample adds to it.
    """

    samples: NDArray[Any]
    shapes: dict[str, tuple[int, ...]]
    features: dict[str, NDArray[Any]]
    integer_input: bool
    is_exact: bool
    smallest_batch: int
    draws_random: bool
    seconds_per_sample: float
    seconds_per_further_sample: float


class Probe:
    """Run two samples through a network.

    Parameters
    ----------
    network : TruncatedNetwork
    layers : sequence of str
    start_layer : str or None
    batch_size : "auto" or int
    """

    def __init__(
        self,
        network: TruncatedNetwork,
        layers: Sequence[str],
        start_layer: str | None,
        batch_size: int | Literal["auto"],
    ) -> None:
        self._network = network
        self.layers = tuple(layers)
        self.start_layer = start_layer
        self._batch_size = batch_size

    def of(self, network: TruncatedNetwork) -> "Probe":
        """Return the same probe of another view of the network."""
        return Probe(network, self.layers, self.start_layer, self._batch_size)

    def run(self, X: NDArray[Any] | torch.Tensor) -> ProbeResult:
        """Find out what the network takes, and raise an error for layers that cannot be used.

        Parameters
        ----------
        X : ndarray or torch.Tensor of shape (n, n_features)

        Returns
        -------
        ProbeResult

        Raises
        ------
        MemoryError
            If a single sample does not fit into memory.
        ValueError
            If the network does not take the samples, or a layer cannot be used.
        """
        errors = []
        for integer_input in self._input_kinds(X):
            try:
                return self._try_samples(self._choose_samples(X, integer_input), integer_input)
            except Exception as error:
                reraise_out_of_memory(error)
                errors.append(error)
        for known in errors:
            if isinstance(known, LayerError):
                raise known
        raise ValueError(self._explain(errors)) from errors[0]

    def _input_kinds(self, X: NDArray[Any] | torch.Tensor) -> tuple[bool, ...]:
        """Return whether to try integers and floats, in the order in which to try them."""
        if to_tensor(X[:1]).is_floating_point() or self._network.module is None:
            return (False,)
        # Some networks take both; floats if they represent the same numbers.
        largest = max(abs(int(X.max())), abs(int(X.min())))
        is_large = largest > 1 / torch.finfo(self._network.dtype).eps
        return (True, False) if is_large else (False, True)

    def _choose_samples(self, X: NDArray[Any] | torch.Tensor, integer_input: bool) -> torch.Tensor:
        """Return the samples of the smallest and the largest norm, shape (2, *input_shape)."""
        x = to_tensor(X[:: max(1, len(X) // PROBED_SAMPLES)][:PROBED_SAMPLES])
        x = x.to(self._network.device, torch.int64 if integer_input else self._network.dtype)
        norms = torch.linalg.vector_norm(x.cpu().double(), dim=1)
        first, second = x[norms.argmin()], x[norms.argmax()]
        if torch.equal(first, second):
            second = second.flip(0)
        return torch.stack([first, second]).reshape(2, *self._network.input_shape)

    def _try_samples(self, x: torch.Tensor, integer_input: bool) -> ProbeResult:
        device = self._network.device
        state = random_state_of(device)
        try:
            with explain_out_of_memory(PASS_ADVICE), torch.no_grad(), isolated_pass(device):
                return self._check_samples(x, integer_input, state)
        finally:
            set_random_state(state, device)

    def _check_samples(
        self, x: torch.Tensor, integer_input: bool, state: dict[str, Any]
    ) -> ProbeResult:
        is_exact, smallest_batch, seconds = False, 1, (0.0, 0.0)
        try:
            outputs = self._check(x)
        except Exception as error:
            reraise_out_of_memory(error)
            if self._batch_size == "auto" or self._batch_size == len(x):
                raise
            # The network may take batches of one size only.
            is_exact = True
            x = _repeat(x, -(-self._batch_size // 2))[: self._batch_size]
            outputs = self._check(x)
        else:
            runs_alone, seconds = self._try_alone(x, outputs)
            smallest_batch = 1 if runs_alone else 2
        draws_random = not same_random_state(state, random_state_of(self._network.device))
        if draws_random:
            # In so few features, random draws may make no difference.
            self._check(x if is_exact else _repeat(x, 8))
        return ProbeResult(
            samples=x.cpu().numpy(),
            shapes={name: tuple(values.shape[1:]) for name, values in outputs.items()},
            features=flat_features(outputs, outputs),
            integer_input=integer_input,
            is_exact=is_exact,
            smallest_batch=smallest_batch,
            draws_random=draws_random,
            seconds_per_sample=seconds[0],
            seconds_per_further_sample=seconds[1],
        )

    def _check(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return check_layers(self._network, x, self.layers, self.start_layer)

    def _try_alone(
        self, x: torch.Tensor, outputs: dict[str, torch.Tensor]
    ) -> tuple[bool, tuple[float, float]]:
        """Check whether one sample alone has the features that it has beside another, and time it.

        Returns
        -------
        runs_alone : bool
        seconds : tuple of float
            Of one sample alone, and of a further one.
        """

        def measure(rows: torch.Tensor) -> tuple[dict[str, torch.Tensor], float]:
            start = time.perf_counter()
            found = self._network(rows, self.layers)
            return found, time.perf_counter() - start

        try:
            measure(x[:1])  # the first pass of a shape may take several times as long
            alone, seconds = measure(x[:1])
        except Exception as error:  # a squeeze() drops the axis of the samples
            reraise_out_of_memory(error)
            return False, (0.0, 0.0)
        _, both = measure(x)
        is_same = all(
            bool(
                (values[0] - outputs[name][0]).abs().max()
                <= batch_tolerance(self._network) * outputs[name][0].abs().max()
            )
            or not outputs[name][0].isfinite().all()
            for name, values in alone.items()
        )
        return is_same, (seconds, max(0.0, both - seconds))

    def _explain(self, errors: Sequence[Exception]) -> str:
        texts = [f"{type(error).__name__}: {error}".rstrip(".") for error in errors]
        shape, said = self._network.input_shape, " ".join(texts)
        hints = ["input_shape sets the shape of a sample, such as (1, 28, 28)."]
        if len(shape) == 2:
            hints += [
                "If X is a single image, pass X[None]; if it has no axis of channels, X[:, None]."
            ]
        if len(shape) == 3 and shape[-1] in (1, 3, 4) and shape[0] not in (1, 3, 4):
            hints = [
                "The channels seem to stand last: torch wants them first, as in "
                "X.transpose(0, 3, 1, 2)."
            ]
        elif len(errors) == 1 and "indices" in said:
            hints = ["If the network takes token ids, pass X as an array of integers."]
        elif "dtype" in said or "type" in said:
            dtype = torch.bfloat16 if self._network.half else self._network.dtype
            name = str(dtype).removeprefix("torch.")
            hints = [
                f"It runs with weights and inputs in dtype={name!r}; a network that casts to "
                "another type inside needs dtype='float64', or a forward that follows the type of "
                "its weights."
            ]
        if self._batch_size == "auto":
            hints += ["If it takes batches of one size only, set batch_size to that size."]
        return (
            f"The network given as {self._network.parameter} does not take samples of shape "
            f"{shape}: {', and as the other kind of number '.join(texts)}. {' '.join(hints)}"
        )


def _repeat(x: torch.Tensor, times: int) -> torch.Tensor:
    return x.repeat(times, *(1,) * (x.ndim - 1))


def flat_features(
    outputs: dict[str, torch.Tensor], layers: Iterable[str]
) -> dict[str, NDArray[Any]]:
    """Return layers' outputs as flat arrays.

    Parameters
    ----------
    outputs : dict of str to torch.Tensor of shape (n, ...)
    layers : iterable of str

    Returns
    -------
    dict of str to ndarray of shape (n, n_layer_features)
    """
    return {name: outputs[name].reshape(len(outputs[name]), -1).cpu().numpy() for name in layers}
