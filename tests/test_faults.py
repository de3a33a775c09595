"""A call that fails at any pass of the network, or for lack of any memory, leaves all as it was."""

import itertools
import random
import sys
import threading
from collections import Counter
from contextlib import ExitStack, contextmanager
from unittest import mock

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from sklearn.base import clone
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sklearn_rails import (
    DkNNClassifier,
    RAILSClassifier,
    ThreatScorer,
    TorchFeatureExtractor,
    load,
    save,
)
from sklearn_rails.immune import Arbitration

# Of numpy's functions those that may allocate: not its types, and not what prints.
ALLOCATORS = [
    name
    for name in np.__all__
    if callable(getattr(np, name))
    and not isinstance(getattr(np, name), type | np.ufunc)
    and "print" not in name
]


class Fault(Exception):
    """Fails as nothing else does."""


class Places(TorchDispatchMode):
    """Count the places where something may fail, and fail at one of them.

    A place is a pass of the network, an operation of torch that allocates, or a function of numpy
    or method of an array.
    """

    now = None

    def __init__(self, place=None, error=Fault):
        super().__init__()
        self.place, self.error, self.counts = place, error, Counter()

    def visit(self, kind):
        number = self.counts[kind]
        self.counts[kind] += 1
        if (kind, number) == self.place:
            raise self.error("injected")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(result.alias_info is None for result in func._schema.returns):
            self.visit("tensor")
        return func(*args, **(kwargs or {}))

    def _watch(self, frame, event, called):
        if event == "c_call" and isinstance(getattr(called, "__self__", None), np.ndarray):
            self.visit("array")

    def _counted(self, function):
        def counted(*args, **kwargs):
            self.visit("array")
            return function(*args, **kwargs)

        return counted

    @contextmanager
    def watched(self):
        with ExitStack() as stack:
            for name in ALLOCATORS:
                function = getattr(np, name)
                stack.enter_context(mock.patch.object(np, name, self._counted(function)))
            stack.enter_context(mock.patch.object(Places, "now", self))
            stack.enter_context(self)
            sys.setprofile(self._watch)
            try:
                yield
            finally:
                sys.setprofile(None)

    def all(self):
        return [(kind, n) for kind, count in sorted(self.counts.items()) for n in range(count)]


class Network(nn.Module):
    """In training mode; draws numbers, and changes a buffer and an attribute in each pass."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 3)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("n_passes", torch.zeros(1))
        self.seen = []

    def forward(self, x):
        if Places.now is not None:
            Places.now.visit("pass")
        self.n_passes += 1
        self.seen.append(len(x))
        return self.last(self.dropout(torch.tanh(self.first(x)) + 0 * torch.rand(1)))


def make_network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Network()
    network.first.register_forward_hook(lambda *_: None)
    return network


def snapshot(value, seen=None):
    """Return everything that an object holds, in a form that can be compared."""
    seen = {} if seen is None else seen
    if isinstance(value, torch.Tensor):
        return "tensor", str(value.dtype), snapshot(value.detach().numpy())
    if isinstance(value, np.ndarray) and value.dtype != object:
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, np.random.RandomState):
        return snapshot(value.get_state(legacy=False))
    if value is None or isinstance(value, str | bytes | int | float | np.generic):
        return repr(value)
    if id(value) in seen:
        return "again", seen[id(value)][0]
    seen[id(value)] = len(seen), value  # which keeps its id
    if isinstance(value, dict):
        return [(repr(key), snapshot(item, seen)) for key, item in value.items()]
    if isinstance(value, list | tuple | np.ndarray | set | frozenset):
        return [type(value).__name__, *(snapshot(item, seen) for item in value)]
    if isinstance(value, threading.local):
        return "local"
    return type(value).__name__, snapshot(getattr(value, "__dict__", {}), seen)


def global_state():
    return (
        torch.get_rng_state().tolist(),
        snapshot(np.random.get_state()),
        random.getstate(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_num_threads(),
    )


RNG = np.random.default_rng(0)
X, Y = RNG.random((18, 6), dtype=np.float32), np.arange(18) % 3
NEW = RNG.random((5, 6), dtype=np.float32)
FEW = {"layers": "first", "n_neighbors": 3, "batch_size": 8, "random_state": 0}
SCORER = ThreatScorer(method=["distance", "mahalanobis"], alpha=0.3)
CELLS = FEW | {"population_size": 9, "generations": 1, "early_stopping": False}
ESTIMATORS = {
    "rails": RAILSClassifier(threat_scorer=SCORER, gate=Arbitration(0.3), **CELLS),
    "dknn": DkNNClassifier(**FEW),
    "scorer": ThreatScorer(method=["credibility", "feature_squeezing"], alpha=0.3, **FEW),
    "extractor": TorchFeatureExtractor(layers="first", batch_size=8),
}


def make(name, network):
    estimator = clone(ESTIMATORS[name])
    return estimator.set_params(**{estimator.network_parameter: network})


def ask(estimator):
    return getattr(estimator, "predict" if hasattr(estimator, "predict") else "transform")(NEW)


class Case:
    """Something that may fail, and what it must leave as it was."""

    def __init__(self, name, action, folder):
        self.network, self.action, self.file = make_network(), action, folder / "saved"
        self.estimator = make(name, self.network)
        if action == "fit":
            return
        self.estimator.fit(X, Y)
        if action in ("remember", "forget"):
            self.response = self.estimator.respond(NEW)
        if action == "forget":
            self.estimator.remember(self.response, confidence=0)
        if name == "rails" and action in ("refit", "partial_fit"):
            # Where a fit moves the old index, before it builds another.
            self.estimator.engine_ = self.estimator.engine_.on_disk()
        if action in ("save", "load"):
            save(self.estimator, self.file)
        ask(self.estimator)  # what is computed when it is first needed

    def __call__(self):
        estimator = self.estimator
        if self.action == "fit" or self.action == "refit":
            return estimator.fit(X[::-1], Y)
        if self.action == "partial_fit":
            return estimator.partial_fit(NEW, [0, 1, 2, 1, 0])
        if self.action == "remember":
            return estimator.remember(self.response, confidence=0)
        if self.action == "forget":
            return estimator.forget()
        if self.action == "save":
            return save(estimator, self.file)
        if self.action == "load":
            return load(self.file, self.network)
        return getattr(estimator, self.action)(NEW)

    def state(self):
        files = {path.name: path.read_bytes() for path in self.file.parent.iterdir()}
        return snapshot(vars(self.estimator)), snapshot(self.network), global_state(), files

    def answer(self):
        """Return what is predicted after a success."""
        return ask(load(self.file, self.network) if self.action == "load" else self.estimator)


def injected(error, kind):
    """Check whether an exception is of a kind, or was raised because of one."""
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__
    return error is not None


ACTIONS = {
    "rails": [
        *("fit", "refit", "partial_fit", "remember", "forget", "save", "load"),
        *("predict_proba", "predict_with_alarm", "respond"),
    ],
    "dknn": ["fit", "refit", "save", "load", "p_values"],
    "scorer": ["fit", "refit", "save", "load", "transform"],
    "extractor": ["fit", "refit", "load", "transform"],
}


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "action"), [(name, action) for name, actions in ACTIONS.items() for action in actions]
)
@pytest.mark.filterwarnings("ignore")
def test_what_fails_anywhere_leaves_all_as_it_was(name, action, every, tmp_path, report):
    case, places = Case(name, action, tmp_path), Places()
    with places.watched():
        case()
    expected, errors = case.answer(), itertools.cycle([KeyboardInterrupt, MemoryError, Fault])
    chosen = places.all()
    if not every:
        drawn = np.random.default_rng(len(chosen)).permutation(len(chosen))
        chosen = [chosen[number] for number in drawn[:6]]
    elif len(chosen) < 400:
        chosen = [place for place in chosen for _ in range(3)]
    case = None
    for place, error in zip(chosen, errors, strict=False):
        if case is None:
            case = Case(name, action, tmp_path)
            before = case.state()
            answer = None if action == "fit" else ask(case.estimator)
        if fail(case, place, error):
            assert case.state() == before, place
            if action == "fit":
                assert vars(case.estimator).keys() == case.estimator.get_params(deep=False).keys()
            else:
                assert_array_equal(ask(case.estimator), answer)
        else:
            # Memory that was short once is not, for smaller blocks.
            assert_array_equal(np.round(case.answer(), 4), np.round(expected, 4), str(place))
            case = None
    if every:
        report(f"faults: injected in {action}", len(chosen))


def fail(case, place, error):
    """Return whether a case fails where one place of it does."""
    places, raised = Places(place, error), None
    try:
        with places.watched():
            case()
    except BaseException as found:
        raised = found
    assert places.counts[place[0]] > place[1]
    # Only what a network raises itself may be explained by another kind of error.
    assert raised is None or injected(raised, error), (place, raised)
    assert isinstance(raised, error) or error is not KeyboardInterrupt, (place, raised)
    assert raised is None or isinstance(raised, error) or error is Fault, (place, raised)
    return raised is not None
