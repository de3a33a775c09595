"""Strange data, strange parameters, and a trial that says what a call does wrong with them."""

import collections
import contextlib
import datetime
import decimal
import enum
import fractions
import itertools
import random
import re
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import scipy.sparse as sp
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

# Seconds after which a case counts as one that does not end.
LONGEST = 20


class UsersError(Exception):
    """What a callable of the user raises: it may pass through unchanged."""


class Unsound(Exception):
    """A call has worked, but what it returned is not valid."""


@dataclass
class Case:
    """One call with one strange thing.

    Attributes
    ----------
    target : str
        What is called.
    maker : str
        The strange thing.
    use : callable
        Makes the call with it, and raises Unsound where the result is not valid.
    names : tuple of str
        One of them must be in the message of an error.
    make : callable
        Makes the strange thing.
    guarded : object
        A fitted estimator that must be as before if the call raises.
    draws : str
        The global generator that the call may draw from: numpy's, as ``random_state=None`` does.
    """

    target: str
    maker: str
    use: Callable
    names: tuple = ()
    make: Callable = lambda: None
    guarded: Any = None
    draws: str = ""
    errors: tuple = (ValueError, TypeError, MemoryError)


def require(condition, what):
    if not condition:
        raise Unsound(what)


# ---- What must not change ----


def snapshot(value):
    """A value's content, to see whether a call has changed it."""
    if isinstance(value, torch.Tensor):
        meta = value.dtype, value.requires_grad, value.layout, value.device.type
        is_plain = type(value) in (torch.Tensor, torch.nn.Parameter) and value.device.type == "cpu"
        if not is_plain or value.is_nested or value.layout != torch.strided or value.is_quantized:
            return meta
        return *meta, repr(value.detach().tolist())
    if isinstance(value, np.ndarray):
        content = repr(value.tolist()) if value.dtype.hasobject else value.tobytes()
        return value.shape, value.strides, value.dtype, value.flags.writeable, content
    if isinstance(value, pd.DataFrame | pd.Series):
        return snapshot(value.to_numpy(object)), str(value.dtypes), value.index
    if sp.issparse(value):
        return value.toarray().tobytes()
    if isinstance(value, dict):
        return [(k, snapshot(v)) for k, v in value.items()]
    if isinstance(value, list | tuple):
        return [snapshot(v) for v in value]
    if isinstance(value, TensorDataset):
        return snapshot(value.tensors)
    return None


def same(before, after):
    if isinstance(before, list | tuple):
        pairs = itertools.zip_longest(before, after)
        return len(before) == len(after) and all(same(a, b) for a, b in pairs)
    return before is after or bool(np.all(before == after))


def random_states():
    _, keys, *rest = np.random.get_state()
    return random.getstate(), torch.get_rng_state().numpy().tobytes(), (keys.tobytes(), *rest)


def shallow(estimator):
    """A twin that shares all attributes, for calls that may change them."""
    twin = object.__new__(type(estimator))
    vars(twin).update(vars(estimator))
    return twin


# ---- The trial ----


def fault_of(case):
    """What a case does wrong, or None; numbers are left out, so that like faults are counted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = case.make()
        before, states = snapshot(value), random_states()
        kept = dict(vars(case.guarded)) if case.guarded is not None else {}
        fault, has_raised = _call(case, value)
        after = random_states()
        if states != after:
            pairs = zip(("random", "torch", "numpy"), states, after, strict=True)
            moved = [name for name, one, other in pairs if one != other]
            # What a callable of the user's draws is its own affair.
            may_draw = case.maker in DRAWING or moved == [case.draws]
            if not may_draw:
                fault = fault or f"moves the random state of {moved}"
        if not same(before, snapshot(value)):
            fault = fault or "changes its input"
        if fault is None and case.guarded is not None and has_raised:
            now = vars(case.guarded)
            changed = {k for k in {*kept, *now} if kept.get(k) is not now.get(k)}
            # An index may be moved to the disk meanwhile.
            if changed - {"engine_"}:
                fault = f"leaves {sorted(changed)} changed after an error"
    return fault


def _call(case, value):
    """Return the fault of the call itself, or None, and whether it has raised."""
    try:
        with limited_time(LONGEST):
            case.use(value)
    except Unsound as error:
        return f"unsound: {_general(error)}", False
    except UsersError:
        return None, True
    except case.errors as error:
        message = str(error)
        is_of_a_file = getattr(error, "filename", None) is not None
        if _is_of_the_user(error) or is_of_a_file or _names_one(message, case.names):
            return None, True
        kind = type(error).__name__
        return f"names none of {'/'.join(case.names)}: {kind}: {_general(error)}", True
    except Exception as error:
        if _is_of_the_user(error):
            return None, True
        return f"leaks {type(error).__name__}: {_general(error)}", True
    return None, False


def _is_of_the_user(error):
    """Whether a callable of the user's, which are those of this file, has raised it."""
    while error is not None:
        frame = error.__traceback__
        while frame is not None and frame.tb_next is not None:
            frame = frame.tb_next
        if frame is not None and frame.tb_frame.f_code.co_filename == __file__:
            return True
        error = error.__cause__ or error.__context__
    return False


def _names_one(message, names):
    return any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", message) for name in names)


def _general(error):
    text = re.sub(r"'[\w.]+' object", "object", " ".join(str(error).split()))
    text = re.sub(r"type object '\w+'", "object", text)
    return re.sub(r"\d+(\.\d+)?(e[+-]?\d+)?", "#", text)[:110]


def group(faults):
    """Faults, most frequent first: how often, of which targets, by which makers."""
    kinds = collections.defaultdict(list)
    for case, fault in faults:
        kinds[fault].append(case)
    lines = []
    for fault, cases in sorted(kinds.items(), key=lambda kind: -len(kind[1])):
        lines.append(f"{len(cases):5} {fault}")
        for part in ("target", "maker"):
            found = collections.Counter(getattr(case, part) for case in cases)
            more = f" and {len(found) - 4} others" if len(found) > 4 else ""
            lines.append(f"      {part}: {'; '.join(k for k, _ in found.most_common(4))}{more}")
    return "\n".join(lines)


# ---- Samples ----


class Rows(Dataset):
    """A data set of whatever it is given."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


class AsArray:
    """Has nothing but ``__array__``."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        if isinstance(self.array, Exception):
            raise self.array
        return np.array(self.array, dtype=dtype)


class Hostile:
    """Raises whatever is asked of it."""

    def _raise(self, *_):
        raise UsersError("this is of the user")

    __eq__ = __ne__ = __bool__ = __len__ = __lt__ = __gt__ = __le__ = __ge__ = __hash__ = _raise
    __iter__ = __float__ = __int__ = __index__ = __array__ = __contains__ = _raise


class Subclass(np.ndarray):
    pass


def with_value(X, value, dtype=None):
    X = X.astype(dtype or X.dtype).copy()
    X.flat[5] = value
    return X


def memory_map(X, mode):
    with tempfile.TemporaryFile() as file:
        file.write(X.tobytes())
        file.flush()
        return np.memmap(file, X.dtype, mode, shape=X.shape)


def structured(X):
    return np.rec.fromarrays(list(X.T))


def frame(X, **kwargs):
    return pd.DataFrame(X, columns=[f"c{i}" for i in range(X.shape[1])], **kwargs)


def jagged(X):
    return torch.nested.nested_tensor([torch.tensor(x) for x in X], layout=torch.jagged)


def inference(X):
    with torch.inference_mode():
        return torch.tensor(X)


def objects(X, value):
    X = X.astype(object)
    X.flat[5] = value
    return X


T = torch.tensor

# The same samples in another form: where they are taken, the result is that of the plain array.
SAME_SAMPLES = {
    "float64": lambda X: X.astype(np.float64),
    "float16": lambda X: X.astype(np.float16),
    "longdouble": lambda X: X.astype(np.longdouble),
    "big-endian": lambda X: X.astype(">f4"),
    "big-endian float64": lambda X: X.astype(">f8"),
    "Fortran order": lambda X: np.asfortranarray(X),
    "negative strides": lambda X: X[::-1, ::-1].copy()[::-1, ::-1],
    "every other row": lambda X: np.repeat(X, 2, axis=0)[::2],
    "read-only": lambda X: np.frombuffer(X.tobytes(), X.dtype).reshape(X.shape),
    "read-only memory map": lambda X: memory_map(X, "r"),
    "memory map": lambda X: memory_map(X, "r+"),
    "unaligned": lambda X: np.frombuffer(b"x" + X.tobytes(), X.dtype, offset=1).reshape(X.shape),
    "subclass of ndarray": lambda X: X.view(Subclass),
    "numpy matrix": lambda X: np.matrix(X),
    "lists": lambda X: X.tolist(),
    "tuples": lambda X: tuple(map(tuple, X.tolist())),
    "list of arrays": lambda X: list(X),
    "list of tensors": lambda X: [T(x) for x in X],
    "list of lists of tensors": lambda X: [[T(v) for v in x] for x in X],
    "deque": lambda X: collections.deque(X.tolist()),
    "objects": lambda X: X.astype(object),
    "strings of numbers": lambda X: X.astype(str),
    "bytes of numbers": lambda X: X.astype("S"),
    "decimals": lambda X: np.vectorize(decimal.Decimal, otypes=[object])(X.astype(float)),
    "fractions": lambda X: np.vectorize(fractions.Fraction, otypes=[object])(X.astype(float)),
    "masked array without masked": lambda X: np.ma.array(X),
    "__array__": AsArray,
    "memoryview": lambda X: memoryview(np.ascontiguousarray(X)),
    "frame": frame,
    "frame of objects": lambda X: frame(X, dtype=object),
    "nullable frame": lambda X: frame(X).astype("Float64"),
    "categorical frame": lambda X: frame(X).astype("category"),
    "sparse frame": lambda X: frame(X).astype(pd.SparseDtype(float, 0.0)),
    "frame of strings": lambda X: frame(X).astype(str),
    "frame with the same index everywhere": lambda X: frame(X, index=[0] * len(X)),
    "frame with the same name everywhere": lambda X: frame(X).set_axis(["a"] * X.shape[1], axis=1),
    "frame without names": lambda X: pd.DataFrame(X),
    "frame with mixed names": lambda X: frame(X).rename(columns={"c0": 0}),
    "frame with two levels": lambda X: pd.concat({"a": frame(X)}, axis=1),
    "polars": lambda X: pl.DataFrame(X),
    "tensor": T,
    "tensor float64": lambda X: T(X).double(),
    "tensor float16": lambda X: T(X).half(),
    "tensor bfloat16": lambda X: T(X).bfloat16(),
    "tensor with a gradient": lambda X: T(X, requires_grad=True),
    "tensor with a graph": lambda X: T(X, requires_grad=True) * 1,
    "parameter": lambda X: torch.nn.Parameter(T(X)),
    "inference tensor": inference,
    "transposed tensor": lambda X: T(X.T.copy()).T,
    "negative view": lambda X: torch.complex(torch.zeros(X.shape), -T(X)).conj().imag,
    "real view": lambda X: torch.complex(T(X), T(X)).real,
    "data set": lambda X: TensorDataset(T(X)),
    "data set of arrays": lambda X: Rows(X.copy()),
    "loader": lambda X: DataLoader(TensorDataset(T(X)), batch_size=5),
    "images": lambda X: X.reshape(-1, 1, 4, 4),
    "tensor of images": lambda X: T(X).reshape(-1, 1, 4, 4),
    "channels-last tensor": lambda X: (
        T(X).reshape(-1, 1, 4, 4).to(memory_format=torch.channels_last)
    ),
    "lists of images": lambda X: X.reshape(-1, 1, 4, 4).tolist(),
    "objects of images": lambda X: X.reshape(-1, 1, 4, 4).astype(object),
    "Fortran images": lambda X: np.asfortranarray(X.reshape(-1, 1, 4, 4)),
    "big-endian images": lambda X: X.reshape(-1, 1, 4, 4).astype(">f4"),
}

SAMPLES = {
    "NaN": lambda X: with_value(X, np.nan),
    "infinity": lambda X: with_value(X, np.inf),
    "minus infinity": lambda X: with_value(X, -np.inf),
    "NaN everywhere": lambda X: X * np.nan,
    "NaN float64": lambda X: with_value(X, np.nan, float),
    "NaN in a tensor": lambda X: T(with_value(X, np.nan)),
    "infinity in a float16 tensor": lambda X: T(with_value(X, np.inf)).half(),
    "subnormal": lambda X: X * np.float32(1e-40),
    "subnormal float64": lambda X: X * 5e-324,
    "one subnormal": lambda X: with_value(X, 1e-45),
    "1e30": lambda X: X * np.float32(1e30),
    "-1e30": lambda X: X * np.float32(-1e30),
    "one 1e30": lambda X: with_value(X, 1e30),
    "1e30 in a tensor": lambda X: T(X) * 1e30,
    "1e19": lambda X: X * np.float32(1e19),
    "1e-30": lambda X: X * np.float32(1e-30),
    "1e-20": lambda X: X * np.float32(1e-20),
    "the largest float32": lambda X: X * np.finfo(np.float32).max,
    "beyond float32": lambda X: X.astype(float) * 1e300,
    "one beyond float32": lambda X: with_value(X, 1e300, float),
    "beyond float32 in a tensor": lambda X: T(X).double() * 1e300,
    "beyond float64": lambda X: X.astype(np.longdouble) * np.longdouble("1e4000"),
    "far from zero": lambda X: X + np.float32(1e7),
    "zeros": lambda X: np.zeros_like(X),
    "minus zeros": lambda X: -np.zeros_like(X),
    "constant": lambda X: np.full_like(X, 0.5),
    "a constant feature": lambda X: np.where(np.arange(X.shape[1]) == 3, 1, X).astype(X.dtype),
    "duplicates": lambda X: np.repeat(X[:2], len(X) // 2, axis=0),
    "broadcast": lambda X: np.broadcast_to(X[:1], X.shape),
    "expanded tensor": lambda X: T(X[:1]).expand(X.shape),
    "no rows": lambda X: X[:0],
    "no rows in a tensor": lambda X: T(X[:0]),
    "no rows in a frame": lambda X: frame(X[:0]),
    "no features": lambda X: X[:, :0],
    "no features in a tensor": lambda X: T(X[:, :0]),
    "no rows of images": lambda X: X[:0].reshape(-1, 1, 4, 4),
    "images without pixels": lambda X: X[:, :0].reshape(len(X), 1, 4, 0),
    "one row": lambda X: X[:1],
    "two rows": lambda X: X[:2],
    "a single sample": lambda X: X[0],
    "a single sample in a tensor": lambda X: T(X[0]),
    "a row too few": lambda X: X[:-1],
    "a row too many": lambda X: np.concatenate([X, X[:1]]),
    "a column too few": lambda X: X[:, :-1],
    "a column too many": lambda X: np.hstack([X, X[:, :1]]),
    "a column too few in a tensor": lambda X: T(X[:, :-1]),
    "transposed": lambda X: X.T,
    "0-d array": lambda X: np.array(0.5),
    "0-d tensor": lambda X: T(0.5),
    "3-d": lambda X: X[None],
    "3-d tensor": lambda X: T(X)[None],
    "3-d lists": lambda X: [X.tolist()],
    "3-d of blocks": lambda X: X.reshape(len(X), 4, 4),
    "5-d": lambda X: X.reshape(-1, 1, 1, 4, 4),
    "other images": lambda X: X.reshape(-1, 4, 2, 2),
    "channels last": lambda X: X.reshape(-1, 4, 4, 1),
    "a number": lambda X: 0.5,
    "None": lambda X: None,
    "a string": lambda X: "X",
    "bytes": lambda X: X.tobytes(),
    "a path": lambda X: Path("X.npy"),
    "a class": lambda X: np.ndarray,
    "a function": lambda X: np.zeros,
    "an object": lambda X: object(),
    "a module": lambda X: torch.nn.Linear(2, 2),
    "Ellipsis": lambda X: ...,
    "set": lambda X: set(X.ravel().tolist()),
    "dict": lambda X: {"a": X.tolist()},
    "dict of rows": lambda X: dict(enumerate(X.tolist())),
    "generator": lambda X: (x for x in X),
    "map": lambda X: map(list, X),
    "range": lambda X: range(len(X)),
    "empty list": lambda X: [],
    "list of empty lists": lambda X: [[]] * len(X),
    "list of None": lambda X: [None] * len(X),
    "list of strings": lambda X: ["a"] * len(X),
    "list of dicts": lambda X: [{"a": 1.0}] * len(X),
    "ragged": lambda X: [x[: 1 + i % 3].tolist() for i, x in enumerate(X)],
    "ragged tensors": lambda X: [T(x[: 1 + i % 3]) for i, x in enumerate(X)],
    "ragged objects": lambda X: np.array([*(x[: 1 + i % 3] for i, x in enumerate(X)), 0], object),
    "ragged images": lambda X: [np.zeros((1, 4, 3 + i % 2)) for i in range(len(X))],
    "object None": lambda X: objects(X, None),
    "object NaN": lambda X: objects(X, np.nan),
    "object string": lambda X: objects(X, "a"),
    "object dict": lambda X: objects(X, {}),
    "object list": lambda X: objects(X, [1]),
    "object complex": lambda X: objects(X, 1j),
    "object huge": lambda X: objects(X, 10**400),
    "object hostile": lambda X: objects(X, Hostile()),
    "object pd.NA": lambda X: objects(X, pd.NA),
    "strings": lambda X: np.full(X.shape, "a"),
    "unicode": lambda X: np.full(X.shape, "ü√"),
    "byte strings": lambda X: np.full(X.shape, b"a"),
    "raw bytes": lambda X: np.full(X.shape, b"\xff"),
    "StringDType": lambda X: np.full(X.shape, "0.5", np.dtypes.StringDType()),
    "complex": lambda X: X + 1j,
    "complex without imaginary part": lambda X: X.astype(complex),
    "complex tensor": lambda X: T(X) + 1j,
    "conjugate tensor": lambda X: (T(X) + 1j).conj(),
    "bool": lambda X: X > 0.5,
    "bool tensor": lambda X: T(X) > 0.5,
    "uint8": lambda X: (X * 16).astype(np.uint8),
    "int8 tensor": lambda X: (T(X) * 16).to(torch.int8),
    "uint16 tensor": lambda X: (T(X) * 16).to(torch.uint16),
    "uint64 tensor": lambda X: (T(X) * 16).to(torch.uint64),
    "float8 tensor": lambda X: T(X).to(torch.float8_e4m3fn),
    "int64": lambda X: (X * 16).astype(np.int64),
    "huge int64": lambda X: (X > 0.5) * np.int64(2**62),
    "uint64": lambda X: (X > 0.5) * np.uint64(2**64 - 1),
    "Python ints": lambda X: objects((X * 16).astype(int), 10**30),
    "datetime64": lambda X: (X * 16).astype("M8[s]"),
    "timedelta64": lambda X: (X * 16).astype("m8[s]"),
    "datetimes": lambda X: objects(X, datetime.datetime(2000, 1, 1)),
    "structured": structured,
    "void": lambda X: X.view("V4"),
    "masked": lambda X: np.ma.array(X, mask=X > 0.9),
    "masked everywhere": lambda X: np.ma.array(X, mask=True),
    "csr_matrix": sp.csr_matrix,
    "coo_matrix": sp.coo_matrix,
    "csr_array": sp.csr_array,
    "lil_matrix": sp.lil_matrix,
    "dia_array": sp.dia_array,
    "sparse tensor": lambda X: T(X).to_sparse(),
    "sparse CSR tensor": lambda X: T(X).to_sparse_csr(),
    "meta tensor": lambda X: T(X).to("meta"),
    "nested tensor": lambda X: torch.nested.nested_tensor([T(x) for x in X]),
    "jagged tensor": jagged,
    "quantized tensor": lambda X: torch.quantize_per_tensor(T(X), 0.1, 0, torch.quint8),
    "fake tensor": lambda X: torch._subclasses.FakeTensorMode().from_tensor(T(X)),
    "list of meta tensors": lambda X: [T(x).to("meta") for x in X],
    "list of complex tensors": lambda X: [T(x) + 1j for x in X],
    "frame with NaN": lambda X: frame(with_value(X, np.nan)),
    "frame with pd.NA": lambda X: frame(X).astype("Float64").mask(frame(X) > 0.9),
    "categories of strings": lambda X: frame(X > 0.5).astype(str).astype("category"),
    "frame with a string": lambda X: frame(X).astype(object).assign(c0="a"),
    "frame of dates": lambda X: frame(X).assign(c0=pd.Timestamp("2000-01-01")),
    "frame of time zones": lambda X: frame(X).assign(c0=pd.Timestamp("2000-01-01", tz="UTC")),
    "frame of periods": lambda X: frame(X).assign(c0=pd.Period("2000-01")),
    "frame of complex": lambda X: frame(X.astype(complex)),
    "nullable integers": lambda X: frame((X * 16).astype(int)).astype("Int64"),
    "nullable booleans": lambda X: frame(X > 0.5).astype("boolean"),
    "frame of lists": lambda X: pd.DataFrame({"a": [[1.0]] * len(X)}),
    "series": lambda X: pd.Series(X[:, 0]),
    "series of arrays": lambda X: pd.Series(list(X)),
    "polars with null": lambda X: pl.DataFrame(X).with_columns(column_0=None),
    "polars of strings": lambda X: pl.DataFrame(X).with_columns(pl.lit("a").alias("column_0")),
    "polars lazy": lambda X: pl.DataFrame(X).lazy(),
    "polars series": lambda X: pl.Series(X[:, 0]),
    "data set of nothing": lambda X: Rows([]),
    "data set of strings": lambda X: Rows(["a"] * len(X)),
    "data set of None": lambda X: Rows([None] * len(X)),
    "data set of dicts": lambda X: Rows([{"x": x} for x in X]),
    "data set of shapes": lambda X: Rows([T(x[: 1 + i % 3]) for i, x in enumerate(X)]),
    "data set of triples": lambda X: TensorDataset(T(X), T(X), T(X)),
    "data set without length": lambda X: Dataset(),
    "shuffling loader": lambda X: DataLoader(TensorDataset(T(X)), shuffle=True),
    "hostile": lambda X: Hostile(),
    "hostile __array__": lambda X: AsArray(UsersError("of the user")),
    "__array__ of objects": lambda X: AsArray(objects(X, "a")),
    "__array__ 3-d": lambda X: AsArray(X.reshape(len(X), 4, 4)),
}
ALL_SAMPLES = SAME_SAMPLES | SAMPLES


# ---- Labels ----


class Color(enum.Enum):
    RED, GREEN, BLUE = 0, 1, 2


def as_objects(values):
    array = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        array[i] = value
    return array


def mapped(*names):
    return lambda y: np.array(names)[y]


def objects_of(*values):
    return lambda y: as_objects([values[i] for i in y])


# Labels that mean what 0, 1 and 2 mean, in another form.
SAME_LABELS = {
    "int32": lambda y: y.astype(np.int32),
    "uint8": lambda y: y.astype(np.uint8),
    "uint64": lambda y: y.astype(np.uint64),
    "big-endian": lambda y: y.astype(">i8"),
    "floats": lambda y: y.astype(float),
    "float16": lambda y: y.astype(np.float16),
    "longdouble": lambda y: y.astype(np.longdouble),
    "list": lambda y: y.tolist(),
    "tuple": lambda y: tuple(y.tolist()),
    "deque": lambda y: collections.deque(y.tolist()),
    "list of numpy ints": lambda y: list(y),
    "list of tensors": lambda y: [T(v) for v in y],
    "objects": lambda y: y.astype(object),
    "objects of numpy ints": lambda y: as_objects(list(y)),
    "read-only memory map": lambda y: memory_map(y, "r"),
    "negative strides": lambda y: y[::-1].copy()[::-1],
    "column": lambda y: y[:, None],
    "masked array without masked": lambda y: np.ma.array(y),
    "__array__": AsArray,
    "series": lambda y: pd.Series(y),
    "series with another index": lambda y: pd.Series(y, index=np.arange(len(y))[::-1]),
    "nullable series": lambda y: pd.Series(y, dtype="Int64"),
    "categorical series": lambda y: pd.Series(y).astype("category"),
    "frame": lambda y: pd.DataFrame({"y": y}),
    "polars": lambda y: pl.Series(y),
    "tensor": T,
    "tensor int8": lambda y: T(y).to(torch.int8),
    "tensor float": lambda y: T(y).float(),
    "tensor bfloat16": lambda y: T(y).bfloat16(),
    "tensor with a gradient": lambda y: T(y).float().requires_grad_(),
    "column tensor": lambda y: T(y)[:, None],
    "inference tensor": inference,
}
LABELS = {
    "strings": mapped("a", "b", "c"),
    "unicode": mapped("ü", "√2", "\u200b"),
    "empty string": mapped("", " ", "a"),
    "long strings": mapped("a" * 1000, "a" * 1000 + "b", "c"),
    "strings of numbers": mapped("0", "1", "10"),
    "object strings": objects_of("a", "b", "c"),
    "StringDType": lambda y: np.array(["a", "b", "c"], np.dtypes.StringDType())[y],
    "bytes": mapped(b"a", b"b", b"c"),
    "object bytes": objects_of(b"a", b"b", b"c"),
    "string series": lambda y: pd.Series(mapped("a", "b", "c")(y)),
    "nullable string series": lambda y: pd.Series(mapped("a", "b", "c")(y), dtype="string"),
    "categories of strings": lambda y: pd.Series(mapped("c", "b", "a")(y)).astype("category"),
    "polars strings": lambda y: pl.Series(mapped("a", "b", "c")(y)),
    "polars categories": lambda y: pl.Series(mapped("a", "b", "c")(y)).cast(pl.Categorical),
    "list of strings": lambda y: mapped("a", "b", "c")(y).tolist(),
    "None": lambda y: None,
    "None labels": objects_of(None, 1, 2),
    "None among strings": objects_of(None, "a", "b"),
    "None everywhere": lambda y: [None] * len(y),
    "NaN labels": lambda y: np.array([np.nan, 1, 2])[y],
    "NaN among strings": objects_of(np.nan, "a", "b"),
    "NaN tensor": lambda y: T(np.array([np.nan, 1, 2])[y]),
    "NaN everywhere": lambda y: np.full(len(y), np.nan),
    "pd.NA": lambda y: pd.Series(y, dtype="Int64").mask(y == 0),
    "pd.NA strings": lambda y: pd.Series(mapped("a", "b", "c")(y), dtype="string").mask(y == 0),
    "missing category": lambda y: pd.Series(y).mask(y == 0).astype("category"),
    "polars null": lambda y: pl.Series([None, *y.tolist()[1:]]),
    "infinity": lambda y: np.array([np.inf, 1, 2])[y],
    "continuous": lambda y: y + 0.5,
    "continuous tensor": lambda y: T(y) + 0.5,
    "tiny": lambda y: y * 1e-300,
    "subnormal": lambda y: y * 5e-324,
    "huge floats": lambda y: y * 1e300,
    "huge ints": lambda y: y + 2**62,
    "neighbouring huge ints": lambda y: y + 2**53,
    "uint64 beyond int64": lambda y: y.astype(np.uint64) + np.uint64(2**63),
    "Python ints": objects_of(10**30, 1, 2),
    "negative": lambda y: -1 - y,
    "bool": lambda y: y > 0,
    "bool tensor": lambda y: T(y) > 0,
    "object bools": objects_of(True, False, True),
    "bools and ints": objects_of(True, 2, 0),
    "minus zero": lambda y: np.array([-0.0, 0.0, 1.0])[y],
    "complex": lambda y: y + 1j,
    "complex tensor": lambda y: T(y) + 1j,
    "datetime64": lambda y: y.astype("M8[D]"),
    "timedelta64": lambda y: y.astype("m8[D]"),
    "dates": objects_of(*(datetime.date(2000, 1, i) for i in (1, 2, 3))),
    "date series": lambda y: pd.Series(y.astype("M8[ns]")),
    "enums": objects_of(*Color),
    "decimals": objects_of(*map(decimal.Decimal, range(3))),
    "tuples": objects_of((0,), (1,), (2,)),
    "lists": lambda y: as_objects([[v] for v in y.tolist()]),
    "dicts": objects_of({}, {"a": 1}, {}),
    "objects without order": objects_of(*(object() for _ in range(3))),
    "hostile labels": lambda y: as_objects([Hostile() for _ in y]),
    "types": objects_of(int, str, float),
    "mixed types": objects_of(0, "a", 2),
    "mixed list": lambda y: [[0, "a", 2][v] for v in y],
    "ints and floats": objects_of(0, 1.5, 2),
    "strings and bytes": objects_of("a", b"b", "c"),
    "structured": lambda y: np.array([(int(v),) for v in y], [("a", int)]),
    "void": lambda y: y.view("V8"),
    "masked": lambda y: np.ma.array(y, mask=y == 0),
    "ragged": lambda y: [[int(v)] * (1 + int(v)) for v in y],
    "one class": lambda y: np.zeros_like(y),
    "a class for each": lambda y: np.arange(len(y)),
    "1,000 classes": lambda y: np.arange(len(y)) * (1000 // len(y)),
    "a class of one": lambda y: np.where(np.arange(len(y)) == 0, 7, y),
    "unknown classes": lambda y: y + 100,
    "no labels": lambda y: y[:0],
    "empty list": lambda y: [],
    "a label too few": lambda y: y[:-1],
    "a label too many": lambda y: np.append(y, 0),
    "a label too few in a tensor": lambda y: T(y[:-1]),
    "one label": lambda y: y[:1],
    "one-hot": lambda y: np.eye(3, dtype=int)[y],
    "one-hot tensor": lambda y: torch.eye(3)[y],
    "two columns": lambda y: np.stack([y, y], axis=1),
    "row": lambda y: y[None],
    "3-d": lambda y: y[:, None, None],
    "0-d": lambda y: np.array(1),
    "0-d tensor": lambda y: T(1),
    "a number": lambda y: 1,
    "a string": lambda y: "a",
    "range": lambda y: range(len(y)),
    "generator": lambda y: (v for v in y),
    "set": lambda y: {0, 1, 2},
    "dict": lambda y: {"y": y.tolist()},
    "a function": lambda y: len,
    "a class": lambda y: int,
    "an object": lambda y: object(),
    "hostile": lambda y: Hostile(),
    "hostile __array__": lambda y: AsArray(UsersError("of the user")),
    "sparse": lambda y: sp.csr_matrix(y),
    "sparse column": lambda y: sp.csr_array(y[:, None]),
    "sparse tensor": lambda y: T(y).to_sparse(),
    "meta tensor": lambda y: T(y).to("meta"),
    "nested tensor": lambda y: torch.nested.nested_tensor([T(y), T(y)]),
    "quantized tensor": lambda y: torch.quantize_per_tensor(T(y).float(), 1, 0, torch.quint8),
    "float8 tensor": lambda y: T(y).float().to(torch.float8_e4m3fn),
    "uint16 tensor": lambda y: T(y).to(torch.uint16),
    "list of meta tensors": lambda y: [T(v).to("meta") for v in y],
    "frame of two": lambda y: pd.DataFrame({"a": y, "b": y}),
    "multi-label": lambda y: [[int(v), 1] for v in y],
    "matrix": lambda y: np.matrix(y),
    "1e30": lambda y: y * 1e30,
    "negative infinity": lambda y: np.where(y == 0, -np.inf, y),
}
ALL_LABELS = SAME_LABELS | LABELS


# ---- What callables return ----


def raising(error):
    def fault(result, *_):
        raise type(error)(*error.args)  # anew, since its traceback would hold all frames

    return fault


def overwriting(result, *given):
    for part in given:
        part[...] = 0
    return result


def drawing(draw):
    def fault(result, *_):
        draw()
        return result

    return fault


def with_first(result, value):
    result = result.clone() if isinstance(result, torch.Tensor) else np.array(result, float)
    result[:1] = value
    return result


DRAWING = ("random", *(f"moves {name}'s random state" for name in ("torch", "numpy", "Python")))


def array_of(r):
    return r.detach().numpy() if isinstance(r, torch.Tensor) else r


# From a valid result, and what the callable was given, to another: of tensors and of arrays.
RETURNS = {
    "None": lambda r, *_: None,
    "NotImplemented": lambda r, *_: NotImplemented,
    "a string": lambda r, *_: "result",
    "a number": lambda r, *_: 0.5,
    "a list": lambda r, *_: r.tolist(),
    "a tuple": lambda r, *_: (r, r),
    "a dict": lambda r, *_: {"a": r},
    "an empty dict": lambda r, *_: {},
    "an object": lambda r, *_: object(),
    "itself hostile": lambda r, *_: Hostile(),
    "a generator": lambda r, *_: (v for v in r),
    "an array": lambda r, *_: array_of(r) if isinstance(r, torch.Tensor) else T(r),
    "what it was given": lambda r, *given: given[0] if given else r,
    "no rows": lambda r, *_: r[:0],
    "one row": lambda r, *_: r[:1],
    "a row too few": lambda r, *_: r[:-1],
    "twice the rows": lambda r, *_: torch.cat([r, r]) if isinstance(r, torch.Tensor) else [*r, *r],
    "the first axis alone": lambda r, *_: r.reshape(len(r), -1)[:, :1].reshape(-1)[: len(r)],
    "transposed": lambda r, *_: r.T if r.ndim < 3 else r.transpose(0, -1),
    "one dimension more": lambda r, *_: r[..., None],
    "one dimension more in front": lambda r, *_: r[None],
    "no columns": lambda r, *_: r.reshape(len(r), -1)[:, :0],
    "a column too few": lambda r, *_: r[..., :-1],
    "0-d": lambda r, *_: r.sum(),
    "NaN": lambda r, *_: r * np.nan,
    "a NaN": lambda r, *_: with_first(r, np.nan),
    "infinity": lambda r, *_: with_first(r, np.inf),
    "minus infinity": lambda r, *_: with_first(r, -np.inf),
    "infinity everywhere": lambda r, *_: r * 0 + np.inf,
    "zeros": lambda r, *_: r * 0,
    "1e30": lambda r, *_: r * 1e30,
    "1e38": lambda r, *_: r * 0 + 3e38,
    "1e-30": lambda r, *_: r * 1e-30,
    "subnormal": lambda r, *_: r * 1e-42,
    "other signs": lambda r, *_: r * -1,
    "complex": lambda r, *_: r + 1j,
    "bool": lambda r, *_: r > 0,
    "int": lambda r, *_: (r * 4).long() if isinstance(r, torch.Tensor) else r.astype(int),
    "huge ints": lambda r, *_: (r * 0).long() + 2**62 if isinstance(r, torch.Tensor) else 2**62,
    "float16": lambda r, *_: r.half() if isinstance(r, torch.Tensor) else r.astype(np.float16),
    "float64": lambda r, *_: r.double() if isinstance(r, torch.Tensor) else r.astype(float),
    "bfloat16": lambda r, *_: torch.as_tensor(r).bfloat16(),
    "float8": lambda r, *_: torch.as_tensor(r).to(torch.float8_e4m3fn),
    "strings": lambda r, *_: array_of(r).astype(str),
    "objects": lambda r, *_: array_of(r).astype(object),
    "masked": lambda r, *_: np.ma.masked_all(tuple(r.shape)),
    "meta": lambda r, *_: torch.as_tensor(r).to("meta"),
    "sparse": lambda r, *_: torch.as_tensor(r).to_sparse(),
    "scipy's sparse": lambda r, *_: sp.csr_matrix(np.ones((len(r), 3))),
    "nested": lambda r, *_: torch.nested.nested_tensor(list(torch.as_tensor(r))),
    "conjugate": lambda r, *_: (torch.as_tensor(r) + 1j).conj(),
    "negative view": lambda r, *_: (torch.as_tensor(r).float() * -1j).conj().imag,
    "with a gradient": lambda r, *_: torch.as_tensor(r).detach().float().requires_grad_(),
    "detached": lambda r, *_: torch.as_tensor(r).detach(),
    "expanded": lambda r, *_: torch.as_tensor(r)[:1].expand(tuple(r.shape)),
    "a frame": lambda r, *_: pd.DataFrame({"a": np.zeros(len(r))}),
    "random": lambda r, *_: (
        torch.rand(r.shape) if isinstance(r, torch.Tensor) else np.random.random(r.shape)
    ),
    "batch statistics": lambda r, *_: r - r.max(),
    "overwrites what it was given": overwriting,
    "moves torch's random state": drawing(lambda: torch.rand(3)),
    "moves numpy's random state": drawing(lambda: np.random.random(3)),
    "moves Python's random state": drawing(lambda: random.random()),
    "raises an error of the user's": raising(UsersError("of the user")),
    "raises RuntimeError": raising(RuntimeError("raised by code of the user")),
    "raises IndexError": raising(IndexError("raised by code of the user")),
    "raises KeyError": raising(KeyError("raised by code of the user")),
    "raises AttributeError": raising(AttributeError("raised by code of the user")),
    "raises StopIteration": raising(StopIteration("raised by code of the user")),
    "raises MemoryError": raising(MemoryError("raised by code of the user")),
    "raises NotImplementedError": raising(NotImplementedError("raised by code of the user")),
    "fails inside torch": lambda r, *_: torch.zeros(2, 3) @ torch.zeros(4, 5),
    "fails inside numpy": lambda r, *_: np.zeros((2, 3)) @ np.zeros((4, 5)),
}


# ---- Parameters ----


class Meddling:
    """Compares and orders as nothing does."""

    __hash__ = object.__hash__

    def __eq__(self, other):
        raise UsersError("of the user")


def one_argument(x, *others):
    if others:
        raise UsersError("takes one argument")
    return len(x)


class Refusing:
    def __init__(self, *_):
        raise UsersError("of the user")


class OneArgument(torch.nn.Linear):
    def forward(self, x, *others):
        if others:
            raise UsersError("takes one argument")
        return super().forward(x)


# Values of every type, for any parameter, made anew for each case.
PARAMETERS = {
    "None": lambda: None,
    "True": lambda: True,
    "False": lambda: False,
    "np.True_": lambda: np.True_,
    "0": lambda: 0,
    "-0.0": lambda: -0.0,
    "1": lambda: 1,
    "-1": lambda: -1,
    "2": lambda: 2,
    "3": lambda: 3,
    "0.5": lambda: 0.5,
    "1.0": lambda: 1.0,
    "1.5": lambda: 1.5,
    "-0.5": lambda: -0.5,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "-inf": lambda: float("-inf"),
    "1e300": lambda: 1e300,
    "1e-300": lambda: 1e-300,
    "5e-324": lambda: 5e-324,
    "1e30": lambda: 1e30,
    "2**31": lambda: 2**31,
    "2**63": lambda: 2**63,
    "-2**63": lambda: -(2**63),
    "10**400": lambda: 10**400,
    "np.int64(2)": lambda: np.int64(2),
    "np.uint8(2)": lambda: np.uint8(2),
    "np.float32(0.5)": lambda: np.float32(0.5),
    "np.float16(inf)": lambda: np.float16(np.inf),
    "np.float64(nan)": lambda: np.float64(np.nan),
    "np.longdouble(0.5)": lambda: np.longdouble(0.5),
    "0-d array": lambda: np.array(2),
    "array of one": lambda: np.array([2]),
    "array of two": lambda: np.array([0.0, 1.0]),
    "empty array": lambda: np.array([]),
    "array of NaN": lambda: np.array([np.nan, 1.0]),
    "array of strings": lambda: np.array(["a", "b"]),
    "0-d tensor": lambda: torch.tensor(2),
    "tensor": lambda: torch.tensor([0.0, 1.0]),
    "meta tensor": lambda: torch.zeros(2, device="meta"),
    "complex": lambda: 1j,
    "decimal": lambda: decimal.Decimal("0.5"),
    "fraction": lambda: fractions.Fraction(1, 2),
    "date": lambda: datetime.date(2000, 1, 1),
    "np.datetime64": lambda: np.datetime64("2000-01-01"),
    "empty string": lambda: "",
    "'1'": lambda: "1",
    "'auto'": lambda: "auto",
    "'input'": lambda: "input",
    "'output'": lambda: "output",
    "'cpu'": lambda: "cpu",
    "'cuda'": lambda: "cuda",
    "'meta'": lambda: "meta",
    "'float16'": lambda: "float16",
    "'float64'": lambda: "float64",
    "np.str_": lambda: np.str_("auto"),
    "unicode": lambda: "ü\x00",
    "bytes": lambda: b"auto",
    "path": lambda: Path("no such place"),
    "empty list": lambda: [],
    "empty tuple": lambda: (),
    "[1]": lambda: [1],
    "(0, 1)": lambda: (0, 1),
    "(1, 0)": lambda: (1, 0),
    "(0.0, 2.0)": lambda: (0.0, 2.0),
    "(nan, 1)": lambda: (float("nan"), 1),
    "(0, inf)": lambda: (0, float("inf")),
    "('a', 'b')": lambda: ("a", "b"),
    "[None]": lambda: [None],
    "ragged": lambda: [[1], [1, 2]],
    "(1, 4, 4)": lambda: (1, 4, 4),
    "(16,)": lambda: (16,),
    "dict": lambda: {"a": 1},
    "empty dict": lambda: {},
    "set": lambda: {1, 2},
    "range": lambda: range(2),
    "generator": lambda: (i for i in range(2)),
    "type": lambda: Refusing,
    "function": lambda: one_argument,
    "lambda": lambda: lambda *_: None,
    "object": lambda: object(),
    "module": lambda: OneArgument(16, 3),
    "meddling": lambda: Meddling(),
    "hostile": lambda: Hostile(),
    "frame": lambda: pd.DataFrame({"a": [0.0, 1.0]}),
    "NotImplemented": lambda: NotImplemented,
    "Ellipsis": lambda: ...,
    "RandomState": lambda: np.random.RandomState(0),
    "Generator": lambda: np.random.default_rng(0),
    "torch.device": lambda: torch.device("cpu"),
    "torch.dtype": lambda: torch.float32,
}


def bounds_of(constraint):
    """Values at and past the bounds of an interval of scikit-learn."""
    values = []
    for end in (getattr(constraint, "left", None), getattr(constraint, "right", None)):
        if end is not None:
            values += [end, end - 1, end + 1, np.nextafter(end, -np.inf), np.nextafter(end, np.inf)]
    return {f"bound {value!r}": value for value in values}


@contextlib.contextmanager
def limited_memory(n_bytes):
    """Make allocations beyond what is used already and ``n_bytes`` fail, where Linux can."""
    if not sys.platform.startswith("linux"):
        yield
        return
    import resource

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextlib.contextmanager
def limited_time(seconds):
    """Raise Unsound after some time, where the platform has timers."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_):
        raise Unsound(f"takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
