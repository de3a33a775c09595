"""Threads and processes that use one estimator, and signals that end them."""

import contextlib
import itertools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from joblib import Parallel, delayed, parallel_config
from joblib.externals.loky.process_executor import TerminatedWorkerError
from numpy.testing import assert_array_equal
from sklearn.model_selection import cross_val_score
from torch import nn

import sklearn_rails
from sklearn_rails import DkNNClassifier, RAILSClassifier, ThreatScorer
from sklearn_rails.immune import Triage

ROOT = Path(sklearn_rails.__file__).parent
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="signals and /proc as on Linux")

RNG = np.random.default_rng(0)
X = RNG.random((40, 6), dtype=np.float32)
# Tasks with other classes, so that half of one fit and half of the other is no answer of either.
TASKS = [
    (X[:24], np.array(list("ab"))[np.arange(24) % 2]),
    (X, np.array([7, 8, 9])[np.arange(40) % 3]),
]
NEW = RNG.random((20, 6), dtype=np.float32)


def make_network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


NETWORK = make_network()
FEW = {"layers": "1", "n_neighbors": 3, "random_state": 0, "batch_size": 8}
CELLS = {**FEW, "population_size": 12, "generations": 2}
SCORER = ThreatScorer(method=["distance", "mahalanobis"], alpha=0.3)
ESTIMATORS = {
    "rails": RAILSClassifier(NETWORK, threat_scorer=SCORER, **CELLS),
    "triage": RAILSClassifier(NETWORK, threat_scorer=SCORER, gate=Triage(), **CELLS),
    "dknn": DkNNClassifier(NETWORK, **FEW),
    "scorer": ThreatScorer(NETWORK, method=["distance", "mahalanobis"], alpha=0.3, **FEW),
}
METHODS = {
    "rails": ["predict", "predict_proba", "predict_with_alarm", "respond", "kneighbors"],
    "triage": ["predict", "predict_with_alarm", "respond"],
    "dknn": ["predict", "predict_proba", "p_values"],
    "scorer": ["predict", "transform", "decision_function"],
}
ASKS = [(name, method) for name, methods in METHODS.items() for method in methods]


def fresh(name):
    return pickle.loads(pickle.dumps(ESTIMATORS[name]))


def ask(estimator, method, rows=NEW):
    """Return the arrays of an answer."""
    return list(arrays_of(getattr(estimator, method)(rows)))


def arrays_of(value):
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, dict | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from arrays_of(part)
    else:
        for part in getattr(value, "__dict__", {}).values():
            yield from arrays_of(part)


def is_one_of(found, answers):
    return any(
        len(found) == len(answer) and all(map(same_array, found, answer)) for answer in answers
    )


def same_array(found, expected):
    has_nan = found.dtype.kind == expected.dtype.kind == "f"
    return np.array_equal(found, expected, equal_nan=has_nan)


def at_call(number, modules, act, run):
    """Act at one of the calls within some modules, and return how many there are."""
    seen = 0

    def watch(frame, event, arg):
        nonlocal seen
        if Path(frame.f_code.co_filename) in modules:
            seen += 1
            if number in (seen - 1, None):
                act()

    sys.setprofile(watch)
    try:
        found = run()
    finally:
        sys.setprofile(None)
    return found, seen


OWN = [ROOT / f"{name}.py" for name in ("_rails", "_dknn", "_threat", "_base", "_validation")]


def some_of(n_calls, every):
    """Return the numbers of all calls, or of a few that the seed draws."""
    numbers = np.arange(n_calls)
    return numbers if every else np.sort(np.random.default_rng(n_calls).permutation(numbers)[:5])


# A few moments, or each of them.
MOMENTS = [False, pytest.param(True, marks=pytest.mark.slow)]


@pytest.mark.parametrize("every", MOMENTS)
@pytest.mark.parametrize(("name", "method"), ASKS)
def test_a_prediction_during_which_a_fit_ends_is_of_the_old_or_the_new_state(
    name, method, every, report
):
    answers = [ask(fresh(name).fit(*task), method) for task in TASKS]
    assert not is_one_of(answers[0], answers[1:])
    estimator = fresh(name).fit(*TASKS[0])
    _, n_calls = at_call(-1, OWN, None, lambda: ask(estimator, method))
    assert n_calls > 10
    numbers = some_of(n_calls, every)
    with ThreadPoolExecutor(1) as pool:
        for turn, number in enumerate(numbers):
            act = lambda: pool.submit(estimator.fit, *TASKS[(turn + 1) % 2]).result()  # noqa: B023, E731
            found, _ = at_call(number, OWN, act, lambda: ask(estimator, method))
            assert is_one_of(found, answers), number
    if every:
        report("threads: fits that end during a prediction", len(numbers))


# What changes a fitted estimator, given the memories of a response.
CHANGES = {
    "fit": lambda estimator, _: estimator.fit(*TASKS[1]),
    "partial_fit": lambda estimator, _: estimator.partial_fit(NEW, list(20 * "c")),
    "remember": lambda estimator, response: estimator.remember(response, confidence=0),
    "forget": lambda estimator, _: estimator.forget(),
}


@pytest.mark.parametrize("every", MOMENTS)
@pytest.mark.parametrize(
    ("name", "change"),
    [*((name, "fit") for name in ESTIMATORS), *(("rails", c) for c in CHANGES if c != "fit")],
)
def test_predictions_during_a_change_are_of_the_old_or_the_new_state(name, change, every, report):
    def start():
        estimator = fresh(name).fit(*TASKS[0])
        if not hasattr(estimator, "respond"):
            return estimator, None
        # The middle between two samples, which is bred.
        response = estimator.respond((NEW + NEW[::-1]) / 2)
        if change == "forget":
            estimator.remember(response, confidence=0)
        return estimator, response

    def change_and_ask(number):
        """Return an answer before, at a call, and after."""
        estimator, response = start()
        found = [ask(estimator, method)]
        with ThreadPoolExecutor(1) as pool:
            act = lambda: found.append(pool.submit(ask, estimator, method).result())  # noqa: E731
            run = lambda: CHANGES[change](estimator, response)  # noqa: E731
            _, n_calls = at_call(number, OWN, act, run)
        return [*found, ask(estimator, method)], n_calls

    method = METHODS[name][1]
    answers, n_calls = change_and_ask(-1)
    assert not is_one_of(answers[0], answers[1:])
    numbers = some_of(n_calls, every)
    for number in numbers:
        before, meanwhile, after = change_and_ask(number)[0]
        assert is_one_of(before, answers[:1])
        assert is_one_of(meanwhile, answers), number
        assert is_one_of(after, answers[1:])
    if every:
        report(f"threads: predictions compared during {change}", len(numbers))


def remembered(estimator):
    return {cell.tobytes() for bank in estimator.memory_.values() for cell in bank.cells}


def test_what_threads_remember_at_the_same_time_is_not_lost():
    estimator = RAILSClassifier(NETWORK, early_stopping=False, **CELLS).fit(*TASKS[1])
    responses = [estimator.respond(NEW[i : i + 1]) for i in range(8)]
    together = threading.Barrier(8)
    expected = set()
    for response in responses:
        alone = pickle.loads(pickle.dumps(estimator)).remember(response, confidence=0)
        expected |= remembered(alone)

    def remember(response):
        together.wait()
        estimator.remember(response, confidence=0)

    for _ in range(5):
        estimator.forget()
        run_in_threads(remember, responses)
        assert remembered(estimator) == expected


def run_in_threads(act, items, n_threads=8):
    """Run in threads that take turns as often as Python can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(n_threads) as pool:
            return list(pool.map(act, items))
    finally:
        sys.setswitchinterval(interval)


class Counts(nn.Module):
    """Changes a buffer and an attribute in each pass, and draws numbers."""

    def __init__(self):
        super().__init__()
        self.inner = make_network()
        self.register_buffer("n_passes", torch.zeros(1))
        self.last = None

    def forward(self, x):
        self.n_passes += 1
        self.last = x
        return self.inner(x) + 0 * torch.rand(1) + 0 * (self.n_passes - 1)


@pytest.mark.parametrize("network", [NETWORK, Counts()], ids=["plain", "counts"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_eight_threads_give_the_answers_of_one(name, network, report):
    layers = "1" if network is NETWORK else "inner.1"
    estimator = fresh(name).set_params(feature_extractor=network, layers=layers).fit(*TASKS[1])
    methods = [*METHODS[name], *(["score_samples"] if name == "scorer" else [])]
    items = [(method, slice(i, 20 - i)) for method in methods for i in range(8)]
    expected = [ask(estimator, method, NEW[rows]) for method, rows in items]
    # What a loaded estimator computes when it is first needed is computed by all threads at once.
    for asked in (estimator, pickle.loads(pickle.dumps(estimator))):
        found = run_in_threads(lambda item: ask(asked, item[0], NEW[item[1]]), items)  # noqa: B023
        for answer, alone in zip(found, expected, strict=True):
            assert is_one_of(answer, [alone])
    report("threads: predictions compared", 2 * len(items))


@pytest.mark.slow
@pytest.mark.parametrize("change", ["fit", "remember and forget"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_seven_threads_predict_while_one_changes_the_estimator(name, change, report):
    estimator = fresh(name).fit(*TASKS[0])
    if change == "fit":
        steps = [lambda task=task: estimator.fit(*task) for task in TASKS[::-1]]
    elif name in ("rails", "triage"):
        response = estimator.respond((NEW + NEW[::-1]) / 2)
        steps = [lambda: estimator.remember(response, confidence=0), estimator.forget]
    else:
        pytest.skip("only RAILS remembers")
    answers = {method: [] for method in METHODS[name]}
    for step in steps:
        step()
        for method, known in answers.items():
            known.append(ask(estimator, method))
    stop, n_changes = time.monotonic() + 8, 0

    def run(number):
        nonlocal n_changes
        for n_done in itertools.count():
            if time.monotonic() > stop:
                return n_done
            if number == 0:
                steps[n_done % 2]()
                n_changes += 1
            else:
                method = METHODS[name][(number + n_done) % len(METHODS[name])]
                assert is_one_of(ask(estimator, method), answers[method]), method

    n_predictions = sum(run_in_threads(run, range(8))[1:])
    assert n_changes > 5
    assert n_predictions > 50
    report("threads: predictions compared", n_predictions)


def send_answer(estimator, method, pipe):
    pipe.send(ask(estimator, method))


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.slow if kind == "forkserver" else [])
        for kind in multiprocessing.get_all_start_methods()
    ],
)
def test_child_processes_predict_as_their_parent(kind):
    context = multiprocessing.get_context(kind)
    for name, methods in METHODS.items():
        if kind != "fork" and name != "rails":  # a start takes seconds
            continue
        estimator = fresh(name).fit(*TASKS[1])
        here, there = context.Pipe(duplex=False)
        child = context.Process(target=send_answer, args=(estimator, methods[0], there))
        child.start()
        assert here.poll(60)
        assert is_one_of(here.recv(), [ask(estimator, methods[0])])
        child.join(60)
        assert child.exitcode == 0


def ask_in_parallel(estimator, method):
    return Parallel(n_jobs=2)(delayed(ask)(estimator, method, NEW[i:]) for i in range(3))


@pytest.mark.slow
@pytest.mark.parametrize("inner", ["loky", "threading"])
def test_parallel_calls_within_parallel_calls(inner):
    # One by one, since the place in a batch may move the last bit.
    estimator = RAILSClassifier(NETWORK, n_jobs=2, **CELLS | {"batch_size": 1}).fit(*TASKS[1])
    expected = [ask(estimator, "predict_proba", NEW[i:]) for i in range(3)]
    with parallel_config(backend="loky", inner_max_num_threads=1):
        found = Parallel(n_jobs=2)(
            delayed(ask_within)(estimator, "predict_proba", inner) for _ in range(2)
        )
    for answers in found:
        for answer, alone in zip(answers, expected, strict=True):
            assert is_one_of(answer, [alone])


def ask_within(estimator, method, backend):
    with parallel_config(backend=backend):
        return ask_in_parallel(estimator, method)


class KillsWorkers(nn.Linear):
    """Kills the process that it runs in, unless it was made there."""

    def __init__(self):
        super().__init__(6, 3)
        self.home = os.getpid()

    def forward(self, x):
        if os.getpid() != self.home:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


@on_linux
@pytest.mark.slow
def test_a_killed_worker_raises_as_in_scikit_learn():
    X, y = TASKS[1]
    dknn = DkNNClassifier(KillsWorkers(), layers="output", n_neighbors=3, random_state=0)
    with pytest.raises(TerminatedWorkerError), parallel_config(backend="loky"):
        cross_val_score(dknn, X, y, cv=2, n_jobs=2)
    dknn.set_params(feature_extractor=NETWORK)
    with parallel_config(backend="loky"):
        found = cross_val_score(dknn, X, y, cv=2, n_jobs=2)
    assert_array_equal(found, cross_val_score(dknn, X, y, cv=2))


INTERRUPTED = """
import os, sys, time, warnings
import numpy as np, torch
from sklearn.model_selection import GridSearchCV
from torch import nn
from sklearn_rails import DkNNClassifier, RAILSClassifier
from sklearn_rails.neighbors import ExactNeighbors

class Slow(nn.Linear):
    says = False
    def forward(self, x):
        if self.says:
            os.write(1, b"now\\n")  # at once: a worker does not write into another's line
            time.sleep(0.05)
        return super().forward(x)

what, folder = sys.argv[1:]
rng = np.random.default_rng(0)
X, y = rng.random((120, 6), dtype=np.float32), np.arange(120) % 3
torch.manual_seed(0)
settings = {"layers": "output", "n_neighbors": 3, "random_state": 0, "batch_size": 8}
if what == "search":
    settings |= {"algorithm": ExactNeighbors(folder)}
cells = {"population_size": 12, "generations": 2, "n_jobs": 2, "early_stopping": False}
rails = RAILSClassifier(Slow(6, 3), **settings, **cells).fit(X, y)
expected = rails.predict_proba(X[:30])
state = torch.get_rng_state(), np.random.get_state()[1].tolist()
search = GridSearchCV(rails, {"rho": [0.1, 0.2, 0.3]}, cv=3, n_jobs=2)
Slow.says = rails.feature_extractor.says = True
try:
    if what == "search":
        search.fit(X, y)
    else:
        rails.fit(X, y) if what == "fit" else rails.predict(X)
except KeyboardInterrupt:
    Slow.says = rails.feature_extractor.says = False
    assert (rails.predict_proba(X[:30]) == expected).all()
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.random.get_state()[1].tolist() == state[1]
    assert (rails.fit(X, y).predict_proba(X[:30]) == expected).all()
    print("usable", flush=True)
"""


def processes_of(session):
    """Return the processes of a session, zombies left out."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, sid = path.read_text().rpartition(")")[2].split()[:4]
            if int(sid) == session and state != "Z":
                found.append((path.parent / "cmdline").read_bytes().replace(b"\0", b" ")[:200])
    return found


@on_linux
@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("what", ["fit", "predict", "search"])
def test_a_signal_leaves_a_usable_object_no_process_and_no_file(what, end, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", INTERRUPTED, what, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(tmp_path), "JOBLIB_TEMP_FOLDER": str(tmp_path)},
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout.readline() == "now\n", process.stderr.read()
        os.killpg(process.pid, end)  # as a terminal does
        said, errors = process.communicate(timeout=60)
        if end == signal.SIGINT:
            assert said.endswith("usable\n"), errors
            assert process.returncode == 0
        else:
            assert process.returncode == -end
        deadline = time.monotonic() + 20
        while (left := processes_of(process.pid)) or list(tmp_path.iterdir()):
            assert time.monotonic() < deadline, (left, list(tmp_path.iterdir()))
            time.sleep(0.1)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
