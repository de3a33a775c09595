"""Run a network only as far as a named layer, or from one layer to another."""

import threading
from collections.abc import Mapping
from dataclasses import fields, is_dataclass

import torch

from .copying import copy_state, private_copy, reachable, same_state, state_of

# What a network's own input and output are called, unless it has layers of these names.
INPUT, OUTPUT = "input", "output"

# Features of one sample in two batches may differ by this share of the largest feature before they
# count as different: rounding, also of networks that compute in half precision inside.
COMPANY_TOLERANCE = 1e-4


# In place of the value of an attribute that is not there.
MISSING = object()


class LayerError(ValueError):
    """A layer cannot be used; the message names it."""


class TruncatedNetwork:
    """A private view of a network that runs to named layers and stops there.

    The view shares the network's parameters where device and dtype allow it, but not its buffers,
    its hooks, its train/eval flags or its modules: whatever happens here, the network is left as
    it was, and two threads may use one view at a time.

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
    parameter : str, default="feature_extractor"
        What the network was given as, for the errors.
    traits : dict, default=None
        The attribute of another view of the same network.

    Attributes
    ----------
    output : str
        The name of the network's own output.
    traits : dict
        What :meth:`check` found out: ``"n_blanks"``, inputs to run in front of a start layer (None
        for as many as there are cells); ``"integer_input"``, whether inputs are integers; and
        ``"volatile"``, the layer, place and key of each attribute that a pass changes; and
        ``"watchers"``, the layer and key of each hook of the network's own that only watches.

    Raises
    ------
    TypeError, ValueError
        If the network cannot be copied, or its weights do not exist yet.

    Notes
    -----
    A layer is a name of ``module.named_modules()``; ``"input"`` and ``"output"`` stand for the
    network's own input and output unless it has layers of these names (its output is then called
    ``""``). Layers are watched while the network's own ``forward`` runs, so functional operations
    between them are part of the way.

    Networks compute in place (``nn.ReLU(inplace=True)``, ``out += x``). So each pass gets a copy of
    its input, and what is recorded is a copy as long as the network runs on.
    """

    def __init__(
        self,
        module,
        *,
        device,
        dtype,
        input_shape,
        parameter="feature_extractor",
        traits=None,
    ):
        self.device = device
        self.dtype = dtype
        self.input_shape = tuple(input_shape)
        self._parameter = parameter
        self._recording = threading.local()
        self._module = None
        self._names, self._unwatchable = [], []
        self._held = None
        self.traits = traits or {
            "n_blanks": 1,
            "integer_input": False,
            "volatile": [],
            "watchers": [],
        }
        self._lock = threading.Lock()
        # Buffers and attributes that a pass changes, with the values that each pass starts from.
        self._volatile = {}
        if module is not None:
            self._module = private_copy(module, device, dtype, parameter)
            for name, key in self.traits["watchers"]:
                _remove_hook(self._module.get_submodule(name), key)
            self._watch_layers()
            self._keep_volatile(state_of(self._module))
        # named_modules() itself knows the network as "".
        self.output = "" if OUTPUT in self._names else OUTPUT

    def _watch_layers(self):
        scripted = ()  # hooks do not run inside of compiled code
        for name, layer in self._module.named_modules(remove_duplicate=False):
            if isinstance(layer, torch.jit.ScriptModule):
                scripted += (f"{name}." if name else "",)
            if not name:
                continue
            if f"{name}.".startswith(scripted):
                self._unwatchable.append(name)
            else:
                # The twin's own hooks see only what this thread has asked for.
                layer.register_forward_hook(self._make_hook(name))
                self._names.append(name)

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
        if isinstance(layers, set | frozenset):
            raise ValueError(f"{parameter}={layers!r} has no order; give a list or a tuple.")
        names = (layers,) if isinstance(layers, str) else tuple(layers)
        known = [*self._names, INPUT] + ([] if self._module is None else [self.output])
        scripted = [name for name in names if name in self._unwatchable]
        if scripted:
            raise ValueError(
                f"{parameter}={layers!r} names layers of a TorchScript module, which cannot be "
                f"watched while it runs: {scripted}. Pass the original torch.nn.Module as "
                f"{self._parameter}, or name one of {known}."
            )
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
        """Compute the outputs of some layers.

        Parameters
        ----------
        x : torch.Tensor of shape (n, ...)
            The network's input, or with ``start`` the output of that layer. It is not changed.
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
            given[INPUT] = x.to(self.dtype)
        if start is not None and start in layers:
            given[start] = x
        wanted = [name for name in layers if name not in given]
        if wanted:
            given |= self._run(x.clone(), wanted, start)
        return {name: given[name] for name in layers}

    def check(self, x, layers, start=None):
        """Run a few inputs and raise an error for layers that cannot be used.

        Parameters
        ----------
        x : torch.Tensor of shape (n, ...)
            A few inputs; the first and the last should differ.
        layers : sequence of str
            The layers to look at.
        start : str, default=None
            The layer from which they are to be reached.

        Returns
        -------
        dict of str to torch.Tensor of shape (n, ...)
            The outputs of the layers and of ``start``.

        Raises
        ------
        ValueError
            If a layer is not run, runs more than once, gives something other than a float tensor
            with a row for each input, depends on the other inputs of the batch, or depends on more
            than the output of ``start``.
        """
        self.traits = {
            "n_blanks": 1,
            "integer_input": not x.is_floating_point(),
            "volatile": [],
            "watchers": list(self.traits["watchers"]),  # which are gone already
        }
        asked = tuple(dict.fromkeys((*layers, *([] if start is None else [start]))))
        if self._module is not None:
            before = state_of(self._module)
            self._leave_out_watchers(lambda: self._count_runs(x, asked))
            after = state_of(self._module)
            changed = [
                key
                for key in {**before, **after}
                if not same_state(before.get(key, MISSING), after.get(key, MISSING))
            ]
            self.traits["volatile"] = [list(key) for key in changed]
            self._keep_volatile(before)
            self._restore_state()
        outputs = self(x, asked)
        if self._module is not None:
            self._check_company(x, asked, outputs)
        if start in self._names:
            self._check_start(x, layers, start, outputs)
        return outputs

    def owns(self, output, x):
        """Check whether nobody else uses the memory of an output, so that it may be overwritten.

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
        if output.device.type != "cpu" or not _is_dense(output):
            return False
        if self._held is None:
            # After the first passes, so that what a network keeps for the next pass is there.
            tensors = [] if self._module is None else reachable(self._module)
            self._held = {
                t.untyped_storage().data_ptr()
                for t in tensors
                if isinstance(t, torch.Tensor) and t.layout == torch.strided
            }
        place = output.untyped_storage().data_ptr()
        return place != x.untyped_storage().data_ptr() and place not in self._held

    def _leave_out_watchers(self, run):
        """Remove the network's forward hooks that change nothing in a pass.

        They collect activations, say, for the user and not for every pass of an estimator.
        """
        acting, hooks = set(), {}
        for name, layer in self._module.named_modules():
            if isinstance(layer, torch.jit.ScriptModule):
                continue
            for key, hook in layer._forward_hooks.items():
                if not getattr(hook, "records", False):
                    hooks[name, key] = layer, hook
                    layer._forward_hooks[key] = _report_acts(hook, (name, key), acting)
        try:
            run()
        finally:
            for (_, key), (layer, hook) in hooks.items():
                layer._forward_hooks[key] = hook
        for name, key in hooks.keys() - acting:
            _remove_hook(hooks[name, key][0], key)
            self.traits["watchers"].append([name, key])

    def _count_runs(self, x, layers):
        counts = {name: 0 for name in layers if name in self._names}

        def count(name, output):
            if name in counts:
                counts[name] += 1
                self._take(name, output, len(x))

        output = self._forward(x.clone(), count)
        if self._is_end(self.output, layers):
            self._take(self.output, output, len(x))
        for name, n_calls in counts.items():
            if n_calls != 1:
                raise LayerError(
                    f"layers={name!r}: this layer runs {n_calls} times in one pass of the network, "
                    "but it must run exactly once. Name the module around it, or give each use a "
                    "module of its own (torch.nn.Identity after the operation)."
                )

    def _check_company(self, x, layers, outputs):
        """Compare outputs for inputs in other places, beside others and beside their copies."""
        flipped = self(x.flip(0), layers)
        pairs = [(outputs[name], flipped[name].flip(0), name) for name in layers]
        for place in (0, -1):
            alone = self(x[[place]].expand_as(x), layers)
            pairs += [(outputs[name][[place]], alone[name], name) for name in layers]
        for expected, found, name in pairs:
            if not torch.isfinite(expected).all():
                continue
            largest = max(expected.abs().max(), found.abs().max())
            if (expected - found).abs().max() > COMPANY_TOLERANCE * largest:
                raise LayerError(
                    f"layers={name!r}: the network gives the same input other features in another "
                    "batch, so predictions would depend on the batch. Usual reasons are batch "
                    "normalization without running statistics, dropout that stays on in eval mode, "
                    "dynamic quantization, a recurrent layer that takes samples for time steps "
                    "(batch_first=False), and observers of quantization-aware training. Name a "
                    f"layer before it, or change the network given as {self._parameter}."
                )

    def _check_start(self, x, layers, start, whole):
        around = f"start_layer={start!r}: the network cannot be run from there to {list(layers)}, "
        # Code behind the start layer may take the number of inputs from the network's input.
        for n_blanks in (1, None):
            self.traits["n_blanks"] = n_blanks
            try:
                part = self(whole[start], layers, start)
                break
            except Exception as error:  # the shapes of a way around start_layer do not fit
                if n_blanks is None:
                    raise LayerError(around + f"it stops with: {error}") from error
        for name in layers:
            if not torch.allclose(part[name], whole[name], rtol=1e-3, atol=1e-4, equal_nan=True):
                raise LayerError(
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
                return _replace_tensor(name, output, x)
            if started and name in missing:
                values = self._take(name, output, len(x))
                missing.discard(name)
                if not missing and not needs_output:
                    given[name] = values
                    raise _Reached
                given[name] = values.clone()
            return None

        if started:
            entry = x
        else:
            # Their outputs are thrown away.
            dtype = torch.int64 if self.traits["integer_input"] else self.dtype
            entry = x.new_zeros((self.traits["n_blanks"] or len(x), *self.input_shape), dtype=dtype)
        try:
            output = self._forward(entry, record)
        except _Reached:
            return given
        if missing:
            raise LayerError(
                f"The network ended before it reached {sorted(missing)}"
                + ("." if start is None else f" from start_layer={start!r}.")
            )
        given[self.output] = self._take(self.output, output, len(x))
        return given

    def _forward(self, x, record):
        if not self._volatile:
            return self._forward_once(x, record)
        with self._lock:
            try:
                return self._forward_once(x, record)
            finally:
                self._restore_state()

    def _forward_once(self, x, record):
        previous = getattr(self._recording, "record", None)
        self._recording.record = record
        try:
            return self._module(x)
        finally:
            self._recording.record = previous

    def _keep_volatile(self, state):
        names = [tuple(name) for name in self.traits["volatile"]]
        self._volatile = {name: state.get(name, MISSING) for name in names}

    def _restore_state(self):
        layers = dict(self._module.named_modules()) if self._volatile else {}
        for (layer, place, key), value in self._volatile.items():
            held = vars(layers[layer]) if place == "__dict__" else layers[layer]._buffers
            if value is MISSING:
                held.pop(key, None)
            else:
                held[key] = copy_state(value)

    def _make_hook(self, name):
        def hook(_module, _inputs, output):
            record = getattr(self._recording, "record", None)
            return None if record is None else record(name, output)

        hook.records = True
        return hook

    def _take(self, name, output, n_inputs):
        """Return a layer's one tensor in the view's dtype, or raise an error."""
        tensor = _find_tensor(output)
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
            and tensor.is_floating_point()
            and tensor.ndim > 0
            and len(tensor) == n_inputs
            and tensor.shape[1:].numel() > 0
        )
        if not is_usable:
            raise LayerError(
                f"layers={name!r}: for {n_inputs} input(s) the network gives a tensor of shape "
                f"{tuple(tensor.shape)} and type {tensor.dtype} there, but a layer must give "
                "floats, one row or more values for each input. Name a layer that does."
            )
        return tensor.to(self.dtype)


def _report_acts(hook, name, acting):
    """Wrap a forward hook, to add its name to those that change something."""

    def wrapped(*args):
        before = _version(args[-1])
        result = hook(*args)
        if result is not None or _version(args[-1]) != before:
            acting.add(name)
        return result

    return wrapped


def _version(value):
    is_counted = isinstance(value, torch.Tensor) and not value.is_inference()
    return value._version if is_counted else None


def _remove_hook(layer, key):
    for hooks in (
        layer._forward_hooks,
        layer._forward_hooks_with_kwargs,
        layer._forward_hooks_always_called,
    ):
        hooks.pop(key, None)


class _Reached(BaseException):
    """All that was asked for is there; no ``except Exception`` of the network may stop it."""


def _find_tensor(output):
    """Find the tensor that stands for a layer's output, or None if that is not clear."""
    if isinstance(output, torch.Tensor):
        return output
    values = _values(output)
    if isinstance(values.get("logits"), torch.Tensor):
        return values["logits"]
    tensors = [value for value in values.values() if isinstance(value, torch.Tensor)]
    return tensors[0] if len(tensors) == 1 and len(tensors) == _n_present(values) else None


def _n_present(values):
    return sum(value is not None for value in values.values())


def _values(output):
    if isinstance(output, Mapping):
        return output
    if isinstance(output, tuple) and hasattr(output, "_asdict"):
        return output._asdict()
    if isinstance(output, tuple | list):
        return dict(enumerate(output))
    if is_dataclass(output):
        return {field.name: getattr(output, field.name) for field in fields(output)}
    return getattr(output, "__dict__", {})


def _replace_tensor(name, output, x):
    """Return a layer's output with other values, in the form that the network goes on with."""
    tensor = _find_tensor(output)
    if tensor is None:
        raise LayerError(
            f"start_layer={name!r}: the network gives a {type(output).__name__} there, but cells "
            "need a layer that gives one tensor."
        )
    x = x.to(tensor.dtype)
    if isinstance(output, torch.Tensor):
        return x
    if isinstance(output, tuple | list) and not hasattr(output, "_fields"):
        return type(output)(x if value is tensor else value for value in output)
    raise LayerError(
        f"start_layer={name!r}: the network gives a {type(output).__name__} there, but cells need "
        "a layer that gives a tensor, or a tuple or list with one."
    )


def _is_dense(tensor):
    return tensor.is_contiguous() or (
        tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    )
