"""Run a network only as far as a named layer, or from one layer to another."""

import copy
import threading

import torch
from torch import nn

# What a network's own input and output are called, unless it has layers of these names.
INPUT, OUTPUT = "input", "output"


class TruncatedNetwork:
    """A private view of a network that runs to named layers and stops there.

    The view shares the network's parameters where device and dtype allow it, but not its hooks,
    its train/eval flags or its modules: whatever happens here, the network is left as it was, and
    two threads may use one view at a time.

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

    Notes
    -----
    A layer is a name of ``module.named_modules()``; ``"input"`` and ``"output"`` stand for the
    network's own input and output unless it has layers of these names (its output is then called
    ``""``). Layers are watched while
    the network's own ``forward`` runs, so functional operations between them are part of the way.
    """

    def __init__(self, module, *, device, dtype, input_shape):
        self.device = device
        self.dtype = dtype
        self.input_shape = tuple(input_shape)
        self._recording = threading.local()
        self._module = None if module is None else _private_copy(module, device, dtype)
        self._places = (
            set()
            if module is None or device.type != "cpu"
            else {tensor.untyped_storage().data_ptr() for tensor in _held_tensors(self._module)}
        )
        self._names = (
            [] if module is None else [name for name, _ in self._module.named_modules() if name]
        )
        # named_modules() itself knows the network as "".
        self.output = "" if OUTPUT in self._names else OUTPUT
        if module is not None:
            # The twin's own hooks see only what this thread has asked for.
            for name, layer in self._module.named_modules(remove_duplicate=False):
                if name:
                    layer.register_forward_hook(self._make_hook(name))

    def resolve_layers(self, layers, parameter):
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
        ValueError
            If a name is unknown or stands twice, or there is none.
        """
        if layers is None:
            return (INPUT if self._module is None else self.output,)
        names = (layers,) if isinstance(layers, str) else tuple(layers)
        known = [*self._names, INPUT] + ([] if self._module is None else [self.output])
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(
                f"{parameter}={layers!r} names layers that the network does not have: {unknown}. "
                f"It has: {known}."
            )
        if not names or len(set(names)) < len(names):
            raise ValueError(
                f"{parameter}={layers!r} must name at least one layer, and each only once."
            )
        return names

    def __call__(self, x, layers, start=None):
        """Give the outputs of some layers.

        Parameters
        ----------
        x : torch.Tensor of shape (n, ...)
            The network's input, or with ``start`` the output of that layer.
        layers : sequence of str
            The layers to give.
        start : str, default=None
            Run only what comes after this layer.

        Returns
        -------
        dict of str to torch.Tensor of shape (n, ...)
            The outputs, in the layers' own shapes.

        Raises
        ------
        ValueError
            If a layer is not reached, or gives something other than one tensor.
        """
        given = {}
        if start is None and self._is_end(INPUT, layers):
            given[INPUT] = x
        if start is not None and start in layers:
            given[start] = x
        wanted = [name for name in layers if name not in given]
        if wanted:
            given |= self._run(x, wanted, start)
        return {name: given[name] for name in layers}

    def check(self, x, layers, start=None):
        """Run a few inputs and complain of layers that cannot be used.

        Parameters
        ----------
        x : torch.Tensor of shape (n, ...)
            A few inputs.
        layers : sequence of str
            The layers to look at.
        start : str, default=None
            The layer from which they are to be reached.

        Raises
        ------
        ValueError
            If a layer is not run, runs more than once, gives something other than a float tensor
            with a row for each input, or depends on more than the output of ``start``.
        """
        if self._module is None:
            return
        watched = [name for name in (*layers, start) if name in self._names]
        counts = dict.fromkeys(watched, 0)

        def count(name, output):
            if name in counts:
                counts[name] += 1
                _check_output(name, output, len(x))

        output = self._forward(x, count)
        if self._is_end(self.output, layers):
            _check_output(self.output, output, len(x))
        for name, n_calls in counts.items():
            if n_calls != 1:
                raise ValueError(
                    f"layers={name!r}: this layer runs {n_calls} times in one pass of the network, "
                    "but it must run exactly once."
                )
        if start in self._names:
            self._check_start(x, layers, start)

    def owns(self, output, x):
        """Say whether nobody else holds the memory of an output, so that it may be overwritten.

        Parameters
        ----------
        output : torch.Tensor
            A layer's output for ``x``.
        x : torch.Tensor
            What was given to the network.

        Returns
        -------
        bool
            Always False beyond the CPU, where it is not worth knowing.
        """
        if output.device.type != "cpu":
            return False
        place = output.untyped_storage().data_ptr()
        return place != x.untyped_storage().data_ptr() and place not in self._places

    def _check_start(self, x, layers, start):
        whole = self(x, (start, *(name for name in layers if name != start)))
        around = f"start_layer={start!r}: the network cannot be run from there to {list(layers)}, "
        try:
            part = self(whole[start], layers, start)
        except RuntimeError as error:  # the shapes of a way around start_layer do not fit
            raise ValueError(around + f"it stops with: {error}") from error
        for name in layers:
            if not torch.allclose(part[name], whole[name], rtol=1e-3, atol=1e-4):
                raise ValueError(
                    around + f"since {name!r} depends on more than the output of that layer (a "
                    "connection goes around it). Start from a layer that all paths go through."
                )

    def _is_end(self, end, layers):
        return end in layers and end not in self._names

    def _run(self, x, wanted, start):
        given = {}
        missing = {name for name in wanted if name in self._names}
        needs_output = len(missing) < len(wanted)
        started = start is None

        def record(name, output):
            nonlocal started
            if name == start:
                started = True
                return x
            if started and name in missing:
                given[name] = _check_output(name, output, len(x))
                missing.discard(name)
                if not missing and not needs_output:
                    raise _Reached
            return None

        try:
            # What stands before `start` runs on a single blank input; its result is thrown away.
            entry = x if started else x.new_zeros((1, *self.input_shape))
            output = self._forward(entry, record)
        except _Reached:
            return given
        if missing:
            raise ValueError(
                f"The network ended before it reached {sorted(missing)}"
                + ("." if start is None else f" from start_layer={start!r}.")
            )
        given[self.output] = _check_output(self.output, output, len(x))
        return given

    def _forward(self, x, record):
        previous = getattr(self._recording, "record", None)
        self._recording.record = record
        try:
            return self._module(x)
        finally:
            self._recording.record = previous

    def _make_hook(self, name):
        def hook(_module, _inputs, output):
            record = getattr(self._recording, "record", None)
            return None if record is None else record(name, output)

        return hook


class _Reached(Exception):
    """All that was asked for is there."""


def _check_output(name, output, n_rows):
    if not isinstance(output, torch.Tensor):
        raise ValueError(
            f"layers={name!r}: the network gives a {type(output).__name__} there, but a layer must "
            "give one tensor. Name a layer that does."
        )
    if output.ndim < 1 or len(output) != n_rows or not output.is_floating_point():
        raise ValueError(
            f"layers={name!r}: for {n_rows} input(s) the network gives a tensor of shape "
            f"{tuple(output.shape)} and type {output.dtype} there, but a layer must give floats, "
            "one row an input."
        )
    return output


def _private_copy(module, device, dtype):
    """Copy a network's structure, in eval mode; share its tensors where they fit."""

    def fit(tensor):
        if tensor.is_floating_point():
            return tensor.detach().to(device=device, dtype=dtype)
        return tensor.detach().to(device=device)

    memo = {}
    for tensor in _held_tensors(module):
        if id(tensor) not in memo:
            copied = fit(tensor)
            if isinstance(tensor, nn.Parameter):
                copied = nn.Parameter(copied, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = copied
    return copy.deepcopy(module, memo).eval()


def _held_tensors(module):
    for layer in module.modules():
        for value in [*layer._parameters.values(), *layer._buffers.values(), *vars(layer).values()]:
            if isinstance(value, torch.Tensor):
                yield value
