"""Too little memory, a full disk, damaged files, and many small requests."""

import errno
import io
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
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
from sklearn_rails.neighbors import ExactNeighbors, allocation

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="limits and /proc as on Linux")

RNG = np.random.default_rng(0)
X, Y = RNG.random((60, 12), dtype=np.float32), np.arange(60) % 3
NEW = RNG.random((40, 12), dtype=np.float32)


def make_network(width=50):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, width), nn.Tanh(), nn.Linear(width, 3))


def make(name, **settings):
    # One by one, since the size of a batch may move the last bit.
    few = {"layers": "1", "n_neighbors": 3, "batch_size": 1, "random_state": 0} | settings
    network = make_network()
    if name == "rails":
        return RAILSClassifier(network, population_size=12, generations=1, **few)
    if name == "dknn":
        return DkNNClassifier(network, **few)
    if name == "scorer":
        return ThreatScorer(network, method=["distance", "disagreement"], alpha=0.3, **few)
    return TorchFeatureExtractor(network, layers="1", batch_size=1)


NAMES = ["rails", "dknn", "scorer", "extractor"]


def ask(estimator):
    return getattr(
        estimator, "predict_proba" if hasattr(estimator, "predict_proba") else "transform"
    )(NEW)


class SmallMemory(TorchDispatchMode):
    """Has room for tensors of so many bytes, and fails as torch's allocator for a CPU does."""

    def __init__(self, n_bytes):
        super().__init__()
        self.n_bytes, self.n_refused = n_bytes, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        allocates = any(returned.alias_info is None for returned in func._schema.returns)
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if allocates and isinstance(tensor, torch.Tensor) and tensor.nbytes > self.n_bytes:
                self.n_refused += 1
                raise RuntimeError(
                    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't "
                    f"allocate memory: you tried to allocate {tensor.nbytes} bytes."
                )
        return result


@pytest.mark.parametrize("name", NAMES)
def test_too_little_memory_on_a_cpu_is_retried_in_smaller_blocks_or_explained(name, report):
    expected = ask(make(name).fit(X, Y))
    outcomes, n_refused = [], 0
    for action in ("fit", "predict"):
        for n_bytes in 2 ** np.arange(6, 19, 2):
            estimator = make(name)
            if action == "predict":
                estimator.fit(X, Y)
            memory, message = SmallMemory(n_bytes), ""
            try:
                with memory:
                    found = ask(estimator if action == "predict" else estimator.fit(X, Y))
            except MemoryError as error:
                message = str(error)
                assert message.startswith("Memory is too small"), message
                assert "can't allocate memory" in message
                # It is usable as soon as there is memory.
                found = ask(estimator.fit(X, Y) if action == "fit" else estimator)
            assert_array_equal(found, expected)
            n_refused += memory.n_refused
            if memory.n_refused:
                outcomes.append((action, "explained" if message else "retried"))
    assert ("fit", "explained") in outcomes
    assert ("predict", "explained") in outcomes
    assert name == "extractor" or ("predict", "retried") in outcomes
    report("resources: allocations refused", n_refused)


LIMITED = """
import resource
import numpy as np, torch
from torch import nn
from sklearn_rails import DkNNClassifier, ThreatScorer, TorchFeatureExtractor

torch.manual_seed(0)
network = nn.Sequential(nn.Linear(64, 20_000), nn.ReLU())  # 80 KB for each sample
rng = np.random.default_rng(0)
X, y = rng.random((600, 64), dtype=np.float32), np.arange(600) % 3
few = {"layers": "1", "n_neighbors": 5, "random_state": 0, "batch_size": 4}
dknn = DkNNClassifier(network, **few).fit(X[:40], y[:40])
scorer = ThreatScorer(network, method="distance", **few).fit(X[:40], y[:40])
extractor = TorchFeatureExtractor(network, layers="1", batch_size=4).fit(X)
expected = dknn.predict_proba(X), scorer.transform(X)
extractor.transform(X[:1])
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 20 * 2**20, resource.RLIM_INFINITY))
assert (dknn.predict_proba(X) == expected[0]).all()
assert (scorer.transform(X) == expected[1]).all()
for call in (lambda: dknn.fit(X, y), lambda: scorer.fit(X, y), lambda: extractor.transform(X)):
    try:
        call()
    except MemoryError as error:
        print(str(error)[:140])
assert (dknn.predict_proba(X) == expected[0]).all()
"""


def run(code, *arguments):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )


@on_linux
@pytest.mark.slow
def test_a_process_whose_memory_is_limited_answers_as_before_or_explains():
    done = run(LIMITED)
    assert done.returncode == 0, done.stderr
    fitted, scorer, features = done.stdout.splitlines()
    assert "Memory is too small to fit this DkNNClassifier" in fitted
    assert "storage='float16'" in fitted
    # What does not fit first, its index or the neighbours of one sample, depends on the allocator.
    assert re.match(r"Memory is too small (to fit this ThreatScorer|for a single sample)", scorer)
    assert features.startswith("Memory is too small for the features of 600 samples")


def no_space(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FullFile(io.FileIO):
    """A temporary file without a name on a full disk."""

    def __init__(self, dir, prefix):
        descriptor, path = tempfile.mkstemp(dir=dir, prefix=prefix)
        os.unlink(path)
        super().__init__(descriptor, "r+")

    write = no_space


@pytest.mark.parametrize("fails", ["posix_fallocate", "write"])
@pytest.mark.parametrize("name", ["rails", "dknn"])
def test_a_full_disk_leaves_the_old_fit_and_no_file(name, fails, monkeypatch, tmp_path):
    estimator = make(name, algorithm=ExactNeighbors(tmp_path)).fit(X, Y)
    expected = ask(estimator)
    if fails == "write":  # of a file system that cannot reserve space
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
        monkeypatch.setattr(allocation.tempfile, "TemporaryFile", FullFile)
    else:
        monkeypatch.setattr(os, "posix_fallocate", no_space)
    with pytest.raises(OSError, match=r"storage=.* cannot take .* MiB of features: No space left"):
        estimator.fit(X[:50], Y[:50])
    assert_array_equal(ask(estimator), expected)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["rails", "dknn"])
def test_a_removed_folder_is_needed_by_the_next_fit_only(name, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    estimator = make(name, algorithm=ExactNeighbors(folder)).fit(X, Y)
    expected = ask(estimator)
    folder.rmdir()
    assert_array_equal(ask(estimator), expected)
    with pytest.raises(ValueError, match=r"storage='.*folder' must be .* a folder that exists"):
        estimator.fit(X, Y)
    assert_array_equal(ask(estimator), expected)


def test_a_folder_that_is_removed_during_fit_is_named(monkeypatch, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()

    class Removes(nn.Linear):
        def forward(self, x):
            if folder.exists():
                folder.rmdir()
            return super().forward(x)

    dknn = DkNNClassifier(Removes(12, 3), layers="output", algorithm=ExactNeighbors(folder))
    original = ExactNeighbors.make_store

    def make_store(self, affinity):
        folder.mkdir()
        return original(self, affinity)

    monkeypatch.setattr(ExactNeighbors, "make_store", make_store)
    with pytest.raises(OSError, match=r"storage='.*folder' cannot take .* No such file"):
        dknn.fit(X, Y)


TRUNCATED = """
import sys
from pathlib import Path
import numpy as np
from sklearn_rails import load

path, cut = Path(sys.argv[1]), Path(sys.argv[1] + ".cut")
content, refused = path.read_bytes(), 0
for length in np.linspace(0, len(content) - 1, 200).astype(int):
    cut.write_bytes(content[:length])
    try:
        load(cut, mmap_mode="r")
    except ValueError as error:
        assert "damaged" in str(error), error
        refused += 1
print(refused)
"""


@on_linux
@pytest.mark.slow
def test_truncated_files_are_refused_before_they_are_mapped(tmp_path, report):
    path = tmp_path / "dknn.rails"
    save(DkNNClassifier(random_state=0).fit(X, Y), path)
    done = run(TRUNCATED, path)
    assert done.returncode == 0, done.stderr  # not that of SIGBUS
    assert int(done.stdout) == 200
    report("resources: truncated files", 200)


def test_a_file_that_is_saved_again_does_not_change_what_is_mapped(tmp_path):
    path = tmp_path / "dknn.rails"
    dknn = DkNNClassifier(random_state=0).fit(X, Y)
    save(dknn, path)
    mapped, expected = load(path, mmap_mode="r"), dknn.predict_proba(NEW)
    save(DkNNClassifier(random_state=0).fit(X[:9], Y[:9]), path)
    assert_array_equal(mapped.predict_proba(NEW), expected)
    path.unlink()
    assert_array_equal(mapped.predict_proba(NEW), expected)


def used():
    """Return resident bytes, and the numbers of open files and of threads."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    n_files = len(list(Path("/proc/self/fd").iterdir()))
    return pages * os.sysconf("SC_PAGE_SIZE"), n_files, threading.active_count()


@on_linux
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"), [*((name, {}) for name in NAMES), ("rails", {"n_jobs": 2})]
)
def test_many_small_requests_take_no_more_memory_files_or_threads(name, settings, report):
    estimator, n_requests = make(name, **settings).fit(X, Y), 2000
    method = estimator.predict if hasattr(estimator, "predict") else estimator.transform

    def request(number):
        method(NEW[number % 40 : number % 40 + 1 + number % 3])

    for number in range(200):
        request(number)
    before = used()
    for number in range(n_requests):
        request(number)
    deadline = time.monotonic() + 10
    while used()[2] > before[2] and time.monotonic() < deadline:
        time.sleep(0.1)  # a thread that has nothing to do takes a moment to end
    after = used()
    assert after[0] - before[0] < 4 * 2**20
    assert after[1] <= before[1]
    assert after[2] <= before[2]
    report("resources: small predicts", n_requests)
