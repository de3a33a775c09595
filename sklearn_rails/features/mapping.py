"""The maps f_l from samples to layers' features, as a fitted estimator keeps them."""

import contextlib
import functools
import threading
import time
import warnings
import weakref

import numpy as np
import torch

from .._validation import find_user_level
from .batching import (
    Layout,
    fastest_layout,
    fill_up,
    halve_until_it_fits,
    iterate_batches,
    iterate_tiles,
    no_room_for_a_row,
    rows_layout,
)
from .copying import checksum
from .device import (
    DTYPES,
    RandomStateGuard,
    is_out_of_memory,
    keep_freed_memory,
    random_state_of,
    resolve_device,
    same_random_state,
    set_random_state,
)
from .frozen import freeze
from .truncation import COMPANY_TOLERANCE, LayerError, TruncatedNetwork

# Samples among which the two are chosen that the network is tried on.
PROBED_SAMPLES = 100

# What the search for the fastest micro-batches may take: seconds, or if that is more, a share of
# the time that the training samples take to pass through the network.
TRIAL_SECONDS, TRIAL_SHARE = 1.0, 0.2

# Values that lie beyond the range of fit by this many times its width are taken for another unit,
# such as pixels from 0 to 255 after a fit on 0 to 1.
RANGE_MARGIN = 3

# network -> {way through it: layout}: a search over other parameters measures a network once.
_LAYOUTS = weakref.WeakKeyDictionary()

# What belongs to this machine and this process, and is not pickled.
TRANSIENT = (
    "device",
    "_checksum",
    "_max_trial_seconds",
    "_differs",
    "_network",
    "_seconds_per_row",
    "_warned",
)

# Threads that notice at the same time that a network has changed copy it once.
_FOLLOWING = threading.Lock()


class FeatureMap:
    """The maps f_l from samples to layers' features, on one device and in one dtype.

    Parameters
    ----------
    module : torch.nn.Module or None
        None passes samples through as the layer ``"input"``.
    layers : None, str or sequence of str
        Names of the layers; None for the network's output.
    input_shape : tuple of int
        Shape of one sample.
    device, dtype, batch_size
        As the estimators take them.
    start_layer : str, default=None
        The layer that :meth:`embed_cells` runs to and populations live in.
    parameter : str, default="feature_extractor"
        What the network was given as, for the errors.

    Attributes
    ----------
    layers : tuple of str
    device : torch.device
    integer_input : bool
        Whether the network takes integers, such as token ids; :meth:`probe` finds out.
    n_features_out : int
        Number of features of all layers together; known after :meth:`probe`.

    Raises
    ------
    TypeError, ValueError
        If the network, a layer or the device cannot be used.
    """

    def __init__(
        self,
        module,
        layers,
        *,
        input_shape,
        device,
        dtype,
        batch_size,
        start_layer=None,
        parameter="feature_extractor",
    ):
        self._module = module
        self._parameter = parameter
        self._device_name = str(device)
        self._dtype_name = dtype
        self.input_shape = tuple(int(size) for size in input_shape)
        self.integer_input = False
        self._batch_size = batch_size if batch_size == "auto" else int(batch_size)
        # Whether batches must have exactly `batch_size` samples, and the smallest that work.
        self._is_exact, self._smallest_batch = False, 1
        self._draws_random = False
        self._value_range = None
        self._layouts = {}
        self._traits = None
        self._max_trial_seconds, self._seconds_per_row = TRIAL_SECONDS, 0.0
        self._run_on(resolve_device(device))
        if self.device.type == "mps" and dtype == "float64":
            raise ValueError("dtype='float64' cannot be had on device='mps'; use 'float32'.")
        # Known after probe(): that of the network as it runs here, and as fit saw it.
        self._checksum = self._fitted_checksum = None
        # Whether the samples that fit tried have other features now.
        self._differs = False
        self.layers = self._network.resolve_layers(layers, "layers")
        self.start_layer = start_layer
        if start_layer is not None:
            self._network.resolve_layers(start_layer, "start_layer")
        self.cell_shape = self.input_shape

    @property
    def dtype(self):
        """The floating-point type of features and cells."""
        return DTYPES[self._dtype_name]

    @property
    def has_network(self):
        """Whether there is a network, and not the input alone."""
        return self._module is not None

    def _run_on(self, device):
        self.device = device
        self._warned = set()
        if device.type == "cpu":
            keep_freed_memory()
        self._network = TruncatedNetwork(
            self._module,
            device=device,
            dtype=self.dtype,
            input_shape=self.input_shape,
            parameter=self._parameter,
            traits=self._traits,
        )

    def warn_once(self, topic, message):
        """Warn, but of each topic only once in the life of the map.

        Parameters
        ----------
        topic : str
        message : str
        """
        if topic not in self._warned:
            self._warned.add(topic)
            warnings.warn(message, stacklevel=find_user_level())

    def follow_network(self, *, consequence=None):
        """Take over what has changed in the network since fit, and warn about it once.

        Parameters
        ----------
        consequence : str, default=None
            What the change does to the estimator; None does not warn.

        Raises
        ------
        ValueError
            If the network does not have the layers any more, or gives something else there.
        """
        if self._module is None:
            return
        found = self._find_checksum()
        if found != self._checksum:
            with _FOLLOWING:
                if found != self._checksum:
                    try:
                        self._follow()
                    except ValueError:
                        self._checksum = None  # to be found again at the next call
                        raise
                    # By what a pass changes now.
                    found = self._checksum = self._find_checksum()
        (network, hooks), (network_of_fit, hooks_of_fit) = found, self._fitted_checksum
        # Hooks may only watch.
        has_changed = network != network_of_fit or (hooks != hooks_of_fit and self._differs)
        if consequence and has_changed:
            self.warn_once(
                "network",
                f"The network given as {self._parameter} has changed since fit (trained further, "
                f"cast to another type, or edited): {consequence} Call fit again.",
            )

    def _find_checksum(self):
        if self._module is None:
            return None
        return checksum(self._module, (self._traits or {}).get("volatile", ()))

    def _follow(self):
        """Copy the network as it is now, and run it on the samples that fit tried it on."""
        self._traits = None
        try:
            self._run_on(self.device)
            self._network.resolve_layers(self.layers, "layers")
            features = self._probe_features(self._try_network(self._probe))
            self._traits = self._network.traits
        except Exception as error:
            raise ValueError(
                f"The network given as {self._parameter} has changed since fit, and cannot be used "
                f"any more. Call fit again. {type(error).__name__}: {error}"
            ) from error
        for name, values in features.items():
            if values.shape != self._probed[name].shape:
                raise ValueError(
                    f"The network given as {self._parameter} has changed since fit: "
                    f"layers={name!r} has {values[0].size} features, but had "
                    f"{self._probed[name][0].size}. Call fit again."
                )
        self._differs = any(
            not np.allclose(values, self._probed[name], rtol=1e-4, atol=1e-6, equal_nan=True)
            for name, values in features.items()
        )

    def _try_network(self, x):
        with torch.no_grad(), self._guard():
            x = self._to_tensor(x).to(self.device)
            return self._network.check(x, self.layers, self.start_layer)

    def _probe_features(self, outputs):
        return {
            name: outputs[name].reshape(len(outputs[name]), -1).cpu().numpy()
            for name in self.layers
        }

    def rebased(self):
        """Return a map of the network as it is now, for an index that is made anew."""
        self.follow_network()
        renewed = object.__new__(FeatureMap)
        vars(renewed).update(vars(self), _fitted_checksum=self._checksum, _warned=set())
        if self.has_network:
            renewed._probed = self._probe_features(self._try_network(self._probe))
        return renewed

    def probe(self, X, *, with_output=False):
        """Run two samples, raise an error for layers that cannot be used, and learn the shapes.

        Parameters
        ----------
        X : ndarray or torch.Tensor of shape (n, n_features)
        with_output : bool, default=False
            Whether the network's output will be needed as well.

        Raises
        ------
        MemoryError
            If a single sample does not fit into memory.
        ValueError
            If the network cannot take the samples or give the layers.
        """
        layers = self.layers
        if with_output and self.has_network:
            layers = tuple(dict.fromkeys((*layers, self.output)))
        errors = []
        for integer_input in self._input_kinds(X):
            self.integer_input = integer_input
            try:
                x, outputs = self._try_samples(self._different_samples(X), layers)
                break
            except Exception as error:
                errors.append(error)
        else:
            for error in errors:
                if isinstance(error, LayerError | MemoryError):
                    raise error
            raise ValueError(self._explain(errors)) from errors[0]
        if self.start_layer is not None:
            self.cell_shape = tuple(outputs[self.start_layer].shape[1:])
        self._max_trial_seconds = max(TRIAL_SECONDS, TRIAL_SHARE * len(X) * self._seconds_per_row)
        self.n_features_out = sum(outputs[name][0].numel() for name in self.layers)
        self._probe, self._probed = x.cpu().numpy(), self._probe_features(outputs)
        self.row_bytes = self.n_features_out * self.dtype.itemsize

    def _input_kinds(self, X):
        """Return whether to try integers and floats, in turn; each network takes what it takes."""
        if self._to_tensor(X[:1]).is_floating_point() or not self.has_network:
            return (False,)
        # Some networks take both; floats if they are the same numbers.
        largest = max(abs(int(X.max())), abs(int(X.min())))
        return (True, False) if largest > 1 / torch.finfo(self.dtype).eps else (False, True)

    def _different_samples(self, X):
        """Return the shortest and the longest of some samples, shape (2, *input_shape)."""
        x = self.to_device(X[:: max(1, len(X) // PROBED_SAMPLES)][:PROBED_SAMPLES])
        lengths = torch.linalg.vector_norm(x.cpu().double(), dim=1)
        first, second = x[lengths.argmin()], x[lengths.argmax()]
        if torch.equal(first, second):
            second = second.flip(0)
        return torch.stack([first, second]).reshape(2, *self.input_shape)

    def _try_samples(self, x, layers):
        state = random_state_of(self.device)
        self._is_exact = self._draws_random = False
        try:
            with torch.no_grad(), self._guard():
                try:
                    outputs = self._network.check(x, layers, self.start_layer)
                except Exception:
                    if self._batch_size == "auto" or self._batch_size == len(x):
                        raise
                    # The network may take batches of one size only.
                    self._is_exact = True
                    x = x.repeat(-(-self._batch_size // 2), *(1,) * (x.ndim - 1))
                    x = x[: self._batch_size]
                    outputs = self._network.check(x, layers, self.start_layer)
                else:
                    self._smallest_batch = 1 if self._runs_alone(x, layers, outputs) else 2
                if not same_random_state(state, random_state_of(self.device)):
                    # What is dropped from so few features may be the same by chance.
                    self._draws_random = True
                    more = x.repeat(1 if self._is_exact else 8, *(1,) * (x.ndim - 1))
                    self._network.check(more, layers, self.start_layer)
        except Exception as error:
            if is_out_of_memory(error):
                raise no_room_for_a_row(error) from error
            raise
        finally:
            set_random_state(state, self.device)
        self._traits = self._network.traits
        self._checksum = self._fitted_checksum = self._find_checksum()
        return x, outputs

    def _runs_alone(self, x, layers, outputs):
        """Check whether one sample alone has the features that it has beside another."""
        seconds = []
        for _ in range(2):  # the first pass of a shape may take several times as long
            start = time.perf_counter()
            try:
                alone = self._network(x[:1], layers)
            except Exception:  # a squeeze() drops the axis of the samples
                return False
            seconds.append(time.perf_counter() - start)
        self._seconds_per_row = min(seconds)
        return all(
            (values[0] - outputs[name][0]).abs().max()
            <= COMPANY_TOLERANCE * outputs[name][0].abs().max()
            or not outputs[name][0].isfinite().all()
            for name, values in alone.items()
        )

    def _explain(self, errors):
        texts = [f"{type(error).__name__}: {error}".rstrip(".") for error in errors]
        shape, said = self.input_shape, " ".join(texts)
        hints = ["input_shape sets the shape of a sample."]
        if len(shape) == 3 and shape[-1] in (1, 3, 4) and shape[0] not in (1, 3, 4):
            hints = [
                "The channels seem to stand last: torch wants them first, as in "
                "X.transpose(0, 3, 1, 2)."
            ]
        elif len(errors) == 1 and "indices" in said:
            hints = ["If the network takes token ids, pass X as an array of integers."]
        elif "dtype" in said or "type" in said:
            hints = [
                f"It runs with weights and inputs in dtype={self._dtype_name!r}; a network that "
                "casts to another type inside needs dtype='float64', or a forward that follows the "
                "type of its weights."
            ]
        if self._batch_size == "auto":
            hints += ["If it takes batches of one size only, set batch_size to that size."]
        return (
            f"The network given as {self._parameter} does not take samples of shape {shape}: "
            f"{', and as the other kind of number '.join(texts)}. {' '.join(hints)}"
        )

    def _to_tensor(self, X):
        if isinstance(X, np.ndarray):
            # torch warns of read-only arrays, which memory-mapped ones are, and refuses strides
            # below zero.
            is_plain = X.flags.writeable and X.flags.c_contiguous and min(X.strides) >= 0
            X = torch.from_numpy(X if is_plain else X.copy())
        return X

    def to_device(self, X):
        """Bring samples or cells to the map's device and dtype.

        Parameters
        ----------
        X : ndarray or torch.Tensor of shape (n, n_features)

        Returns
        -------
        torch.Tensor of shape (n, n_features)
            Integers, where the network takes them and X has them, else floats.
        """
        X = self._to_tensor(X)
        keeps_integers = self.integer_input and not X.is_floating_point()
        return X.to(device=self.device, dtype=torch.int64 if keeps_integers else self.dtype)

    def cast(self, X):
        """Bring validated samples to the type in which the estimator keeps them.

        Parameters
        ----------
        X : ndarray or torch.Tensor of shape (n, n_features)

        Returns
        -------
        ndarray or torch.Tensor of shape (n, n_features)
        """
        name = "int64" if self.integer_input else self._dtype_name
        if isinstance(X, torch.Tensor):
            return X.to(getattr(torch, name))
        return X.astype(name, copy=False)

    def learn_range(self, X):
        """Remember the range of the training samples, for :meth:`check_range`."""
        self._value_range = float(X.min()), float(X.max())

    def check_range(self, X):
        """Warn once of samples far outside the range of fit.

        Parameters
        ----------
        X : ndarray or torch.Tensor of shape (n, n_features)
        """
        if self._value_range is None:
            return
        low, high = self._value_range
        margin = RANGE_MARGIN * (high - low)
        found = float(X.min()), float(X.max())
        if margin > 0 and (found[0] < low - margin or found[1] > high + margin):
            self.warn_once(
                "range",
                f"X has values from {found[0]:g} to {found[1]:g}, far outside the range of fit, "
                f"{low:g} to {high:g}. Is it scaled as the training data are?",
            )

    def __call__(self, X, layers=None, *, check_finite=True):
        """Compute layers' features, all of them in one pass.

        Parameters
        ----------
        X : ndarray or torch.Tensor of shape (n, n_features)
        layers : sequence of str, default=None
            None takes the map's own.
        check_finite : bool, default=True
            Raise an error where the network gives NaN or infinity.

        Returns
        -------
        dict of str to torch.Tensor of shape (n, n_layer_features)

        Raises
        ------
        ValueError
            If a feature is not finite, with ``check_finite``.
        """
        return self._collect(X, layers or self.layers, check_finite=check_finite)

    @property
    def output(self):
        """The name of the network's own output."""
        return self._network.output

    def with_gradient(self, X, layers=None):
        """Give layers' features of some rows, for torch to differentiate.

        Parameters
        ----------
        X : torch.Tensor of shape (n, n_features)
            On the map's device and in its dtype.
        layers : sequence of str, default=None
            None takes the map's own.

        Returns
        -------
        dict of str to torch.Tensor of shape (n, n_layer_features)
        """
        with self._guard():
            return self._run(X.reshape(len(X), *self.input_shape), layers or self.layers)

    def embed_cells(self, X):
        """Give the output of the start layer, or the rows themselves where there is none.

        Parameters
        ----------
        X : ndarray or torch.Tensor of shape (n, n_features)

        Returns
        -------
        torch.Tensor of shape (n, n_start_features)
        """
        if self.start_layer is None:
            return self.to_device(X)
        return self._collect(X, (self.start_layer,))[self.start_layer]

    def features_of_cells(self, cells, layer):
        """Run cells from the start layer to another, as :meth:`__call__` runs rows.

        Parameters
        ----------
        cells : torch.Tensor of shape (n, n_start_features)
        layer : str

        Returns
        -------
        torch.Tensor of shape (n, n_layer_features)
        """
        return self._collect(cells, (layer,), self.start_layer)[layer]

    def outputs(self, X, *, check_finite=True):
        """Compute the network's own output.

        Parameters
        ----------
        X : ndarray or torch.Tensor of shape (n, n_features)
        check_finite : bool, default=True
            Raise an error where the network gives NaN or infinity.

        Returns
        -------
        torch.Tensor of shape (n, n_outputs)

        Raises
        ------
        ValueError
            If an output is not finite, with ``check_finite``.
        """
        return self._collect(X, (self.output,), check_finite=check_finite)[self.output]

    def predict(self, X):
        """Give the network's own labels.

        Parameters
        ----------
        X : ndarray or torch.Tensor of shape (n, n_features)

        Returns
        -------
        torch.Tensor of shape (n,), int64
            The output that is highest. A single output is the logit of the second of two classes.
        """
        return self.label(self.outputs(X))

    @staticmethod
    def label(outputs):
        """Give the labels that :meth:`predict` takes from the network's outputs."""
        return outputs.argmax(dim=1) if outputs.shape[1] > 1 else (outputs[:, 0] > 0).long()

    def check_outputs(self, X, n_classes, parameter):
        """Complain where the network's labels cannot be classes.

        Parameters
        ----------
        X : ndarray or torch.Tensor of shape (n, n_features)
        n_classes : int
        parameter : str
            What asks for the labels.

        Raises
        ------
        ValueError
            If the network has not an output for each class (or one, for two classes).
        """
        n_outputs = self.outputs(X[:1]).shape[1]
        if n_outputs != n_classes and (n_outputs, n_classes) != (1, 2):
            raise ValueError(
                f"{parameter} needs a network with an output for each class, in the order of the "
                f"sorted classes, but it has {n_outputs} outputs and y has {n_classes} classes."
            )

    def affinities(self, cells, layer, antigens, compare, *, any_order):
        """Run populations from the start layer to another, and compare what comes out.

        Parameters
        ----------
        cells : torch.Tensor of shape (n, n_cells, n_start_features)
        layer : str
        antigens : torch.Tensor of shape (n, n_layer_features)
            What each row's cells are compared with.
        compare : callable
            ``compare(antigens, features, overwrite_features=...)`` gives (r, c) numbers for the
            antigens (r, n_layer_features) of some rows and the features (r, c, n_layer_features)
            of their cells, which it may overwrite if it is told so.
        any_order : bool
            Whether features may come in another order than their own (in all rows, and in both
            arguments, the same): the one in which they are stored, which saves a copy.

        Returns
        -------
        torch.Tensor of shape (n, n_cells)
        """
        layout = self.choose_layout(layer, compare, any_order=any_order)
        with torch.no_grad(), self._guard():
            compared, fitting = halve_until_it_fits(
                lambda layout: self._compare(cells, layer, antigens, compare, any_order, layout),
                layout,
                smallest=self._smallest_batch,
            )
        if fitting is not layout:
            self._layouts[layer] = fitting
        return compared

    def _compare(self, cells, layer, antigens, compare, any_order, layout):
        @functools.cache
        def antigens_with_channels_last(shape):
            return antigens.unflatten(1, shape).movedim(1, 3).flatten(1)

        def compare_tile(tile, rows, n_columns):
            batch = tile.reshape(-1, *self.cell_shape)
            n_tile = len(batch)
            if layout.exact:
                batch = fill_up(batch, layout.batch_size)
            batch = layout.store(batch)
            outputs = self._network(batch, (layer,), self.start_layer)[layer][:n_tile]
            own = self._network.owns(outputs, batch)
            present = antigens
            if any_order and outputs.is_contiguous(memory_format=torch.channels_last):
                present = antigens_with_channels_last(outputs.shape[1:])
                outputs = outputs.movedim(1, 3)
            present = present[rows]
            features = outputs.reshape(*tile.shape[:2], -1)[: len(present), :n_columns]
            return compare(present, features, overwrite_features=own)

        compared = cells.new_empty(cells.shape[:2])
        for rows, columns, tile in iterate_tiles(cells, layout.batch_size, exact=layout.exact):
            n_columns = compared[rows, columns].shape[1]
            # In a function, whose large tensors are gone before the next one needs memory.
            compared[rows, columns] = compare_tile(tile, rows, n_columns)
        return compared

    def choose_layout(self, layer, compare, *, any_order):
        """Choose the micro-batches of cells on their way to a layer, by a short measurement.

        Parameters
        ----------
        layer : str
        compare, any_order
            As :meth:`affinities` takes them.

        Returns
        -------
        Layout
        """
        if layer not in self._layouts:
            if self._batch_size != "auto":
                self._layouts[layer] = self._fixed_layout()
            else:
                known = {} if self._module is None else _LAYOUTS.setdefault(self._module, {})
                way = layer, self.start_layer, self.cell_shape, str(self.device), self.dtype
                if way not in known:
                    known[way] = self._measure_layout(layer, compare, any_order)
                self._layouts[layer] = known[way]
        return self._layouts[layer]

    def _fixed_layout(self):
        return Layout(max(self._batch_size, self._smallest_batch), exact=self._is_exact)

    @contextlib.contextmanager
    def _guard(self):
        """Keep what is global from the passes, and the passes from what is global."""
        draws = RandomStateGuard(self.device) if self._draws_random else contextlib.nullcontext()
        has_autocast = self.device.type in ("cpu", "cuda")
        # An autocast of the caller would give queries other features than the index has.
        plain = torch.autocast(self.device.type, enabled=False) if has_autocast else draws
        with plain, draws:
            yield

    @torch.no_grad()
    def _measure_layout(self, layer, compare, any_order):
        with self._guard():
            rows = torch.zeros(2, *self.cell_shape, device=self.device, dtype=self.dtype)
            outputs = self._network(rows, (layer,), self.start_layer)[layer]
            antigen = outputs[:1].reshape(1, -1)
            return fastest_layout(
                lambda rows, layout: self._compare(
                    rows.flatten(1)[None], layer, antigen, compare, any_order, layout
                ),
                self.cell_shape,
                device=self.device,
                dtype=self.dtype,
                max_seconds=self._max_trial_seconds,
                seconds_per_row=self._seconds_per_row,
            )

    def _collect(self, X, layers, start=None, *, check_finite=True):
        shape = self.input_shape if start is None else self.cell_shape
        x = self.to_device(X).reshape(len(X), *shape)
        try:
            with torch.no_grad(), self._guard():
                features = self._run(x, layers, start)
        except (MemoryError, LayerError):
            raise
        except Exception as error:  # such as token ids beyond an embedding
            raise ValueError(
                f"The network given as {self._parameter} fails on some samples of X: "
                f"{type(error).__name__}: {error}"
            ) from error
        for name, values in features.items() if check_finite else ():
            if not torch.isfinite(values).all():
                raise ValueError(
                    f"layers={name!r}: the network gives NaN or infinity for some samples of X."
                )
        return features

    def _run(self, x, layers, start=None):
        if self._batch_size != "auto":
            layout = self._fixed_layout()
        else:
            # Token ids are as costly as images, other vectors are not.
            layout = rows_layout(self.input_shape, self.device, is_vector=not self.integer_input)

        def run(layout):
            parts = {name: [] for name in layers}
            for rows, batch in iterate_batches(x, layout):
                n_rows = rows.stop - rows.start
                for name, output in self._network(batch, layers, start).items():
                    parts[name].append(output[:n_rows].reshape(n_rows, -1))
            return {name: torch.cat(batches) for name, batches in parts.items()}

        return halve_until_it_fits(run, layout, smallest=self._smallest_batch)[0]

    def __getstate__(self):
        state = {k: v for k, v in vars(self).items() if k not in TRANSIENT}
        return state | {"_module": None if self._module is None else freeze(self._module)}

    def __setstate__(self, state):
        vars(self).update(state)
        self._module = None if self._module is None else self._module.module
        self._max_trial_seconds, self._seconds_per_row = TRIAL_SECONDS, 0.0
        self._differs = False
        try:
            device = resolve_device(self._device_name)
        except ValueError as error:
            warnings.warn(f"{error} The loaded estimator runs on the CPU.", stacklevel=2)
            device = torch.device("cpu")
        self._run_on(device)
        # None where it had changed before: to be looked at.
        is_as_fitted = self._find_checksum() == self._fitted_checksum
        self._checksum = self._fitted_checksum if is_as_fitted else None
