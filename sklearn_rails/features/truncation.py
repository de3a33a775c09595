"""Run a network only as far as a named layer, or from one layer to another."""

import difflib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .._validation import naming
from .contents import StateKey
from .copying import halve_weights, private_copy, reachable
from .hooks import HookKey, remove_hook
from .outputs import LayerError, find_tensor, replace_tensor
from .volatile import VolatileState, state_of

# Names of a network's own input and output, unless it has layers of these names.
INPUT, OUTPUT = "input", "output"

# Takes a layer's name and output during a pass, and returns another output or None.
Record = Callable[[str, Any], Any]


@dataclass(frozen=True)
class NetworkTraits:
    """Properties of a network that :func:`~.checks.check_layers` finds out.

    Attributes
    ----------
    n_blanks : int or None
        Number of inputs to run in front of a start layer; None for one for each cell.
    integer_input : bool
        Whether inputs are integers.
    volatile : tuple of (layer, place, key)
        Attributes that a pass changes.
    watchers : tuple of (layer, key)
        Hooks of the network's own that only watch.
    """

    n_blanks: int | None = 1
    integer_input: bool = False
    volatile: tuple[StateKey, ...] = ()
    watchers: tuple[HookKey, ...] = ()


class _Reached(BaseException):
    """End a pass at the last layer; no ``except Exception`` in the network may catch it."""


class TruncatedNetwork:
    """A private view of a network that runs to named layers and stops there.

    The view shares the network's parameters where device and dtype allow it, but not its buffers,
    its hooks, its train/eval flags or its modules: no pass changes the network, and two threads may
    use one view at a time.

    Parameters
    ----------
    module : torch.nn.Module or None
        The network; None passes its input through, as the layer ``"input"``.
    device : torch.device
        Where it runs.
    dtype : torch.dtype
        Floating-point type of its parameters, inputs and features.
    input_shape : tuple of int
        Shape of one input, without the leading axis.
    half : bool, default=False
        Whether it computes in bfloat16 where torch's autocast does; inputs and features have
        ``dtype``.
    parameter : str, default="feature_extractor"
        The parameter that holds the network, for the errors.
    traits : NetworkTraits, default=None
        The attribute of another view of the same network.

    Attributes
    ----------
    module : torch.nn.Module or None
        The private copy.
    layers : dict of str to None
        The names of its layers, in order.
    output : str
        The name of the network's own output.
    traits : NetworkTraits
    volatile : VolatileState
        What is set back after each pass.

    Raises
    ------
    TypeError, ValueError
        If the network cannot be copied, or its weights do not exist yet.

    Notes
    -----
    A layer is a name of ``module.named_modules()``; ``"input"`` and ``"output"`` stand for the
    network's own input and output unless it has layers of these names (its output is then called
    ``""``). Layers are recorded while the network's own ``forward`` runs, so functional operations
    between them are included.

    Networks compute in place (``nn.ReLU(inplace=True)``, ``out += x``). So each pass gets a copy of
    its input, and records copies as long as the network runs on.
    """

    def __init__(
        self,
        module: nn.Module | None,
        *,
        device: torch.device,
        dtype: torch.dtype,
        input_shape: Sequence[int],
        half: bool = False,
        parameter: str = "feature_extractor",
        traits: NetworkTraits | None = None,
    ) -> None:
        self.device = device
        self.dtype = dtype
        self.half = half
        self.input_shape = tuple(input_shape)
        self.parameter = parameter
        self.traits = traits or NetworkTraits()
        self.layers: dict[str, None] = {}
        self._scripted: list[str] = []
        self._recording = threading.local()
        self._held: set[int] | None = None
        self.module = None
        if module is not None:
            self.module = private_copy(module, device, dtype, parameter)
            if half:
                halve_weights(self.module)
            for name, key in self.traits.watchers:
                remove_hook(self.module.get_submodule(name), key)
            self._register_hooks(self.module)
        self.volatile = VolatileState(self.module)
        self.adopt(self.traits, {} if self.module is None else state_of(self.module))
        # named_modules() itself calls the network "".
        self.output = "" if OUTPUT in self.layers else OUTPUT

    def _register_hooks(self, module: nn.Module) -> None:
        scripted: tuple[str, ...] = ()  # hooks do not run inside of compiled code
        for name, layer in module.named_modules(remove_duplicate=False):
            if isinstance(layer, torch.jit.ScriptModule):
                scripted += (f"{name}." if name else "",)
            if not name:
                continue
            if f"{name}.".startswith(scripted):
                self._scripted.append(name)
            else:
                layer.register_forward_hook(self._make_hook(name))
                self.layers[name] = None

    def _make_hook(self, name: str) -> Callable[..., Any]:
        # A hook records only what its own thread asks for.
        def hook(_module: nn.Module, _inputs: object, output: Any) -> Any:
            record = getattr(self._recording, "record", None)
            return None if record is None else record(name, output)

        hook.records = True  # type: ignore[attr-defined]
        return hook

    def adopt(self, traits: NetworkTraits, state: dict[StateKey, Any]) -> None:
        """Set the traits, and what each pass starts from.

        Parameters
        ----------
        traits : NetworkTraits
        state : dict of (layer, place, key) to object
            The values of the volatile attributes, as :func:`~.volatile.state_of` returns them.
        """
        self.traits = traits
        self.volatile.keep(traits.volatile, state)

    def resolve_layers(self, layers: str | Sequence[str] | None, parameter: str) -> tuple[str, ...]:
        """Turn the ``layers`` parameter into a tuple of names that exist.

        Parameters
        ----------
        layers : None, str or sequence of str
            None stands for the network's output, or for the input where there is no network.
        parameter : str
            The parameter's name, for the error.

        Returns
        -------
        tuple of str

        Raises
        ------
        TypeError
            If a name is not a string.
        ValueError
            If a name is unknown or occurs twice, or there is none.
        """
        if layers is None:
            return (INPUT if self.module is None else self.output,)
        if isinstance(layers, set | frozenset):
            raise ValueError(f"{parameter}={layers!r} has no order; give a list or a tuple.")
        if isinstance(layers, Mapping):
            raise TypeError(
                f"{parameter} must name layers by a string or a list of strings, got {layers!r}. "
                "Only the methods of ThreatScorer have layers of their own."
            )
        known = [*self.layers, INPUT] + ([] if self.module is None else [self.output])
        is_list = isinstance(layers, Iterable) and not isinstance(layers, str | nn.Module)
        with naming(parameter):
            names: tuple[Any, ...] = tuple(layers) if is_list else (layers,)
        others = [name for name in names if not isinstance(name, str)]
        if others:
            example = next((str(o) for o in others if str(o) in known), known[0])
            # A module is named by its class: its repr may be longer than a page.
            given = "" if isinstance(others[0], nn.Module) else f": {others[0]!r}"
            raise TypeError(
                f"{parameter} must name layers by strings, such as {example!r}, as "
                f"module.named_modules() does; got {type(others[0]).__name__}{given}. The network "
                f"has: {known}."
            )
        scripted = [name for name in names if name in self._scripted]
        if scripted:
            raise ValueError(
                f"{parameter}={layers!r} names layers of a TorchScript module, which cannot be "
                f"recorded while it runs: {scripted}. Pass the original torch.nn.Module as "
                f"{self.parameter}, or name one of {known}."
            )
        unknown = [name for name in names if name not in known]
        if unknown:
            lower = {name.lower(): name for name in known}
            near = difflib.get_close_matches(unknown[0].lower(), lower, n=1)
            raise ValueError(
                f"{parameter}={layers!r} names layers that the network does not have: {unknown}. "
                + (f"Did you mean {lower[near[0]]!r}? " if near else "")
                + f"It has: {known}."
            )
        if not names or len(set(names)) < len(names):
            raise ValueError(
                f"{parameter}={layers!r} must name at least one layer, and each only once."
            )
        return names

    def __call__(
        self, x: torch.Tensor, layers: Sequence[str], start: str | None = None
    ) -> dict[str, torch.Tensor]:
        """Compute the outputs of some layers.

        Parameters
        ----------
        x : torch.Tensor of shape (n, ...)
            The network's input, or with ``start`` the output of that layer. It is not changed.
        layers : sequence of str
            The layers to return.
        start : str, default=None
            Run only what comes after this layer.

        Returns
        -------
        dict of str to torch.Tensor of shape (n, ...)
            The outputs, in the layers' own shapes.

        Raises
        ------
        LayerError
            If a layer is not reached, or does not return one tensor.
        """
        known = {}
        if start is None and INPUT in layers and INPUT not in self.layers:
            known[INPUT] = x.to(self.dtype)
        if start is not None and start in layers:
            known[start] = x
        missing = [name for name in layers if name not in known]
        if missing:
            known |= self._run(x.clone(), missing, start)
        return {name: known[name] for name in layers}

    def _run(
        self, x: torch.Tensor, layers: Sequence[str], start: str | None
    ) -> dict[str, torch.Tensor]:
        outputs = {}
        missing = {name for name in layers if name in self.layers}
        needs_output = len(missing) < len(layers)
        started = start is None

        def record(name: str, output: Any) -> Any:
            nonlocal started
            if name == start:
                started = True
                return replace_tensor(name, output, x)
            if started and name in missing:
                values = self.tensor_of(name, output, len(x))
                missing.discard(name)
                if not missing and not needs_output:
                    outputs[name] = values
                    raise _Reached
                outputs[name] = values.clone()
            return None

        if started:
            entry = x
        else:
            # Their outputs are discarded.
            dtype = torch.int64 if self.traits.integer_input else self.dtype
            entry = x.new_zeros((self.traits.n_blanks or len(x), *self.input_shape), dtype=dtype)
        try:
            output = self.forward(entry, record)
        except _Reached:
            return outputs
        if missing:
            raise LayerError(
                f"The network ended before it reached {sorted(missing)}"
                + ("." if start is None else f" from start_layer={start!r}.")
            )
        outputs[self.output] = self.tensor_of(self.output, output, len(x))
        return outputs

    def forward(self, x: torch.Tensor, record: Record) -> Any:
        """Run the whole network, and set back what the pass changes in it.

        Parameters
        ----------
        x : torch.Tensor of shape (n, ...)
            It may be changed.
        record : callable
            Takes the name and the output of each layer; what it returns, if not None, replaces the
            output.

        Returns
        -------
        object
            What the network returns.
        """
        if not self.volatile.values:
            return self._forward(x, record)
        with self.volatile:
            return self._forward(x, record)

    def _forward(self, x: torch.Tensor, record: Record) -> Any:
        assert self.module is not None
        previous = getattr(self._recording, "record", None)
        self._recording.record = record
        try:
            with torch.autocast(self.device.type, torch.bfloat16) if self.half else nullcontext():
                return self.module(x)
        finally:
            self._recording.record = previous

    def tensor_of(self, name: str, output: object, n_inputs: int) -> torch.Tensor:
        """Return a layer's one tensor in the view's dtype, or raise an error.

        Parameters
        ----------
        name : str
            The layer, for the error.
        output : object
            What the layer returned.
        n_inputs : int

        Returns
        -------
        torch.Tensor of shape (n_inputs, ...)

        Raises
        ------
        LayerError
            If there is not one tensor of floats with an entry for each input.
        """
        tensor = output if isinstance(output, torch.Tensor) else find_tensor(output)
        if tensor is None:
            raise LayerError(
                f"layers={name!r}: the network gives a {type(output).__name__} there, but a layer "
                "must give one tensor (alone, as the only one of a tuple or dictionary, or as its "
                "'logits'). Name a layer that does."
            )
        if tensor.is_quantized:
            tensor = tensor.dequantize()
        is_usable = (
            tensor.layout == torch.strided
            and not (tensor.is_nested or tensor.is_meta)
            and tensor.is_floating_point()
            and tensor.ndim > 0
            and len(tensor) == n_inputs
            and tensor.shape[1:].numel() > 0
        )
        if not is_usable:
            shape = "that differs between inputs" if tensor.is_nested else tuple(tensor.shape)
            raise LayerError(
                f"layers={name!r}: for {n_inputs} input(s) the network gives a tensor of shape "
                f"{shape} and type {tensor.dtype} there on {tensor.device}, but "
                "a layer must give floats, one row or more values for each input. Name a layer "
                "that does."
            )
        return tensor.to(self.dtype)

    def is_private_buffer(self, output: torch.Tensor, x: torch.Tensor) -> bool:
        """Check whether the memory of an output is used nowhere else, so it may be overwritten.

        Parameters
        ----------
        output : torch.Tensor
            A layer's output for ``x``.
        x : torch.Tensor
            The input of the network.

        Returns
        -------
        bool
            Always False on devices other than the CPU, where it saves nothing.
        """
        if output.device.type != "cpu":
            return False
        if not output.is_contiguous() and not (
            output.ndim == 4 and output.is_contiguous(memory_format=torch.channels_last)
        ):
            return False
        if self._held is None:
            # After the first passes, to include what a network keeps for the next pass.
            tensors = () if self.module is None else reachable(self.module)
            self._held = {
                t.untyped_storage().data_ptr()
                for t in tensors
                if isinstance(t, torch.Tensor) and t.layout == torch.strided
            }
        address = output.untyped_storage().data_ptr()
        return address != x.untyped_storage().data_ptr() and address not in self._held
