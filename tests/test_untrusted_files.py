"""Files as an attacker or a broken disk leaves them: refused by name, or as they were.

Another process reads them, whose memory is limited, so that a crash is seen. By hand,
``python tests/test_untrusted_files.py 1000 500 7`` reads 1,000 saved files and 500 data sets, made
by the seed 7.
"""

import collections
import contextlib
import copy
import hashlib
import io
import json
import os
import pickle
import random
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from sklearn_rails.datasets import fetch_image_benchmark
from sklearn_rails.persistence import load, save

if sys.platform == "linux":
    import resource

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# Of one file: seconds to load it, and bytes beyond those of the undamaged files.
MAX_SECONDS, MAX_BYTES = 5, 2**30

# Audit events that are not raised while a file is read: code, imports, processes, changed files.
FORBIDDEN = ("exec", "import", "subprocess.", "pickle.", "marshal.", "socket.", "ctypes.", "code.")
FORBIDDEN += ("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.remove")
FORBIDDEN += ("os.rename", "os.link", "os.symlink", "os.putenv", "shutil.", "tempfile.")

TEXTS = ["", "../../etc/passwd", "/etc/passwd", "a\0b", "é" * 50, "load", "__class__", "cuda:99"]
NUMBERS = [-1, 0, 1, 7, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, float("nan"), 1e-320]
NAMES = [*TEXTS, "arrays/", "arrays//0.npy", "arrays/../arrays/0.npy", "C:\\x", "x" * 2**15]
HEADERS = [
    "{'descr': '<f4', 'fortran_order': False, 'shape': (4000000000,)}",
    "{'descr': '|O', 'fortran_order': False, 'shape': (3,)}",
    "{'descr': [('a', '<f4')] * 9, 'fortran_order': False, 'shape': (3,)}",
    "{'descr': '<f4', 'fortran_order': True, 'shape': (-3,)}",
    "{'descr': '<U900000000', 'fortran_order': False, 'shape': (3,)}",
    "__import__('os').system('touch ran')",
    "(" * 300,
    "",
]


# What a broken disk, a broken connection or a careless program does.


def flip(rnd, content):
    content = bytearray(content)
    for _ in range(rnd.choice([1, 1, 2, 20])):
        # Half of them at the end, where a zip archive has its directory.
        start = rnd.choice([0, max(0, len(content) - 2000)])
        content[rnd.randrange(start, len(content))] ^= 1 << rnd.randrange(8)
    return bytes(content)


def cut(rnd, content):
    return content[: rnd.randrange(len(content))]


def move(rnd, content):
    """Copy a piece of the file over another place, insert it, or leave it out."""
    start, stop = sorted(rnd.choices(range(len(content)), k=2))
    place = rnd.randrange(len(content))
    piece = rnd.choice([content[start:stop], b"", bytes(stop - start), content[start:stop][:99]])
    return content[:place] + piece + content[place + rnd.choice([0, len(piece)]) :]


def splice(rnd, content, other):
    return content[: rnd.randrange(len(content))] + other[rnd.randrange(len(other)) :]


# What an attacker does, who writes a whole file.


def unzip(content):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def zipped(members, rnd=None):
    """Zip members, one of them in a strange way if ``rnd`` is given, with the manifest's digest."""
    file, strange = io.BytesIO(), rnd and rnd.randrange(len(members))
    with zipfile.ZipFile(file, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of duplicate names
        for i, (name, content) in enumerate(members):
            info = zipfile.ZipInfo(name)
            if i == strange:
                how = rnd.choice(["link", "folder", "deflated", "bomb", "bzip", "lzma"])
                info.external_attr = {"link": 0o120777 << 16, "folder": 0o40777 << 16}.get(how, 0)
                method = {"bzip": zipfile.ZIP_BZIP2, "lzma": zipfile.ZIP_LZMA}.get(how, 8)
                info.compress_type = 0 if info.external_attr else method
                content = bytes(2**26) if how == "bomb" else content
            archive.writestr(info, content)
        manifest = dict(members).get("manifest.json", b"")
        archive.comment = hashlib.sha256(manifest).hexdigest().encode()
    return file.getvalue()


def change_members(rnd, content, other):
    members = unzip(content)
    i, j = rnd.choices(range(len(members)), k=2)
    name, inside = members[i]
    how = rnd.choice(["lacks", "twice", "swapped", "renamed", "added", "another's", "strange"])
    if how == "lacks":
        members.pop(i)
    elif how == "twice":
        members.insert(j, (name, rnd.choice([inside, members[j][1]])))
    elif how == "swapped":
        members[i], members[j] = (name, members[j][1]), (members[j][0], inside)
    elif how == "renamed":
        members[i] = rnd.choice(NAMES), inside
    elif how == "added":
        members.insert(j, (rnd.choice(NAMES), inside))
    elif how == "another's":
        members[i] = name, rnd.choice(unzip(other))[1]
    return zipped(members, rnd if how == "strange" else None)


def places(value):
    """List the containers and keys of all values in a value that JSON holds."""
    keys = value if isinstance(value, dict) else range(len(value))
    found = [(value, key) for key in keys]
    for key in keys:
        if isinstance(value[key], dict | list):
            found += places(value[key])
    return found


def hostile(rnd, value, values):
    """Return something in the place of a value: near it, or of another kind."""
    if rnd.random() < 0.5 and type(value) in (int, float):
        return rnd.choice([value + 1, -value, value * 10**6, float(value), str(value)])
    nested = [rnd.choice([{}, {"tuple": []}, {"list": 0}])]
    for _ in range(rnd.choice([3, 300])):
        nested = [nested]
    kind = rnd.choice(["object", "array", "tensor", "network", "frozen", "float", "size", "dtype"])
    kind = rnd.choice([kind, "scalar", "items", "device", "dict", "slice", "random_state", "set"])
    reference = {kind: rnd.choice([*NUMBERS, *TEXTS, nested]), "value": 3, "shape": [10**9]}
    other = rnd.choice(values)
    return rnd.choice([rnd.choice(TEXTS), rnd.choice(NUMBERS), nested, None, reference, other])


def change_manifest(rnd, content, other):
    members = dict(unzip(content))
    manifest = json.loads(members["manifest.json"])
    # Any value, or one of a single object or array, most of which have few.
    part = rnd.choice(
        [manifest, *rnd.sample(manifest["objects"], 2), rnd.choice([*manifest["arrays"], {}])]
    )
    found = places(part) or places(manifest)
    for _ in range(rnd.choice([1, 1, 1, 3])):
        container, key = rnd.choice(found)
        source, name = rnd.choice(found)
        with contextlib.suppress(KeyError, IndexError):  # it is gone by now
            if rnd.random() < 0.1:
                del container[key]
            else:
                container[key] = copy.deepcopy(hostile(rnd, container[key], [source[name]]))
    members["manifest.json"] = json.dumps(manifest).encode()
    return zipped(list(members.items()))


def change_array(rnd, content):
    """Change the values or the header of an array, or make a pickle of it."""
    how = rnd.choice(["values", "values", "value", "header", "pickle", "noise"])
    if how == "pickle":
        return pickle.dumps(np.zeros(3)) if rnd.random() < 0.5 else as_npy(np.array([{}, print]))
    if how == "noise" or content[:6] != b"\x93NUMPY":
        return rnd.choice([flip(rnd, content), cut(rnd, content), move(rnd, content)])
    if how == "header":
        header = rnd.choice(HEADERS).encode() + b"\n"
        version = rnd.choice([b"\1\0", b"\1\0", b"\2\0", b"\3\0", b"\xff\xff"])
        return b"\x93NUMPY" + version + len(header).to_bytes(2, "little") + header + content[128:]
    try:
        array = np.load(io.BytesIO(content)).copy()
    except ValueError:
        return content
    if array.dtype.kind in "iuf" and array.size:
        info = (np.finfo if array.dtype.kind == "f" else np.iinfo)(array.dtype)
        extremes = [info.min, info.max, 0, 1, *([np.nan, np.inf] if info.dtype.kind == "f" else [])]
        places = slice(None) if how == "values" else rnd.randrange(array.size)
        array.reshape(-1)[places] = rnd.choice(extremes)
        shuffled = np.random.RandomState(rnd.randrange(99)).permutation(array.reshape(-1))
        array = rnd.choice([array, array, shuffled.reshape(array.shape)])
    shapes = [array.shape, array.shape[::-1], (-1,), (1, *array.shape), (*array.shape, 1)]
    dtypes = [array.dtype, array.dtype, array.dtype.newbyteorder(), "<U9"]
    dtypes += ["<f8", "<i8", "|b1"] if array.dtype.kind != "U" else []
    return as_npy(array.reshape(rnd.choice(shapes)).astype(rnd.choice(dtypes)))


def as_npy(array):
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.save(file, array)
    return file.getvalue()


def change_content(rnd, content, other):
    """Change arrays or weights, and what the manifest says of them, if there is one."""
    members = dict(unzip(content))
    manifest = json.loads(members.get("manifest.json", "{}"))
    for name in rnd.sample([n for n in members if n != "manifest.json"], rnd.choice([1, 1, 2])):
        members[name] = inside = change_array(rnd, members[name])
        for said in (*manifest.get("arrays", ()), *manifest.get("networks", ())):
            if said["name"] == name:
                said["bytes"], said["sha256"] = len(inside), hashlib.sha256(inside).hexdigest()
                with contextlib.suppress(Exception):
                    head = np.load(io.BytesIO(inside))
                    said["dtype"], said["shape"] = head.dtype.str, list(head.shape)
    if manifest:
        members["manifest.json"] = json.dumps(manifest).encode()
    return zipped(list(members.items()))


DAMAGES, FORGERIES = [flip, cut, move, splice], [change_members, change_content]


def mutate(rnd, contents, forgeries):
    """Return a mutated file, that it was made from, and whether an attacker has made it."""
    name, other = rnd.choice(list(contents)), rnd.choice(list(contents.values()))
    change = rnd.choice([*DAMAGES, *forgeries, *forgeries])
    args = (contents[name],) if change in (flip, cut, move) else (contents[name], other)
    return name, change(rnd, *args), change


# The process that reads.

events, watched = [], False


def audit(event, args):
    if watched and event.startswith(FORBIDDEN):
        events.append(f"{event} {args!r:.99}")


@contextlib.contextmanager
def watch():
    """Record what happens meanwhile, and the time that it takes."""
    global watched
    start, watched = time.process_time(), True
    try:
        yield
    finally:
        watched = False
        if (seconds := time.process_time() - start) > MAX_SECONDS:
            events.append(f"it took {seconds:.1f} s")


class Saved:
    """Files of save: what is loaded predicts, and as before unless an attacker decides it."""

    forgeries = [*FORGERIES, change_manifest]

    def __init__(self, folder):
        import test_persistence as saving

        self.path, self.saving, self.contents = folder / "model", saving, {}
        for name, estimator in saving.ESTIMATORS.items():
            save(clone(estimator).fit(saving.X, saving.Y), self.path)
            self.contents[name] = self.path.read_bytes()
        self.expected = {name: self.ask(self.load(name, c)) for name, c in self.contents.items()}

    def load(self, name, content, mmap_mode=None):
        self.path.write_bytes(content)
        with watch():
            return load(self.path, self.saving.networks_of(name), mmap_mode=mmap_mode)

    def ask(self, estimator):
        if hasattr(estimator, "engine_"):
            estimator.engine_ = estimator.engine_.without_compiling()
        methods = ("predict", "predict_with_alarm", *self.saving.ASK)
        methods = [method for method in methods if hasattr(estimator, method)]
        answers = (getattr(estimator, method)(self.saving.NEW) for method in methods)
        return [array for answer in answers for array in self.saving._flat(answer)]

    def check(self, name, content, change, rnd):
        if rnd.random() < 0.5:
            mapped = self.load(name, content, "r")
            with contextlib.suppress(Exception):  # arrays are not compared, and nothing tried out
                self.ask(mapped)
            return
        loaded = self.load(name, content)
        try:
            answers = self.ask(loaded)
        except NotFittedError:  # which can be saved too
            assert change not in DAMAGES
            return
        except MemoryError:
            raise
        except Exception as error:
            raise AssertionError(f"loaded, but cannot be used: {error!r}") from error
        if change in DAMAGES:
            for found, expected in zip(answers, self.expected[name], strict=True):
                np.testing.assert_array_equal(found, expected)


class DataSets:
    """Files of fetch_image_benchmark: what is loaded is images, and the same if damaged."""

    forgeries = FORGERIES

    def __init__(self, folder):
        import test_datasets as images

        self.path, self.contents, self.expected = folder, {}, {}
        grey, color = (images.gradient_images(16, s) for s in ((28, 28, 1), (32, 32, 3)))
        y = np.arange(16) % 10
        for name, file, array in [("mnist", "mnist", grey[..., 0]), ("svhn", "svhn_subset", color)]:
            arrays = {"x_train": array[:12], "y_train": y[:12]}
            arrays |= {"x_test": array[12:], "y_test": y[12:]}
            for saver in (np.savez, np.savez_compressed):
                saver(folder / f"{file}.npz", **arrays)
                content = (folder / f"{file}.npz").read_bytes()
                self.contents[name, file, saver.__name__] = content
        arrays = {"y_train": y[:5], "y_test": y[5:7]}
        for part, rows in {"train": color[:5], "test": color[5:7]}.items():
            arrays[f"{part}_bytes"], arrays[f"{part}_offsets"] = images.encode(rows)
        np.savez(folder / "cifar10_jpeg.npz", **arrays)
        key = ("cifar10", "cifar10_jpeg", "savez")
        self.contents[key] = (folder / "cifar10_jpeg.npz").read_bytes()
        self.expected = {key: self.read(key, c) for key, c in self.contents.items()}

    def read(self, key, content):
        name, file, _ = key
        (self.path / f"{file}.npz").write_bytes(content)
        with watch():
            return fetch_image_benchmark(name, self.path)

    def check(self, key, content, change, rnd):
        data, expected = self.read(key, content), self.expected[key]
        for part in ("train", "test"):
            X, y = data[f"X_{part}"], data[f"y_{part}"]
            assert (X.dtype, y.dtype) == (np.float32, np.int64)
            assert X.shape == (len(y), *expected.X_test.shape[1:])
            assert X.min() >= 0
            assert X.max() <= 1
            assert set(y) <= set(range(10))
            if change in DAMAGES:
                np.testing.assert_array_equal(X, expected[f"X_{part}"])
                np.testing.assert_array_equal(y, expected[f"y_{part}"])


def memory(field):
    """Return a figure of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def read_mutated(n_files, seed):
    """Read mutated files of each kind; return the outcomes, and what should not have happened."""
    outcomes, faults = collections.Counter(), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        readers = {"saved files": Saved(folder), "data sets": DataSets(folder)}
        # What is imported when it is first needed, such as by the message of an error.
        repr(torch.zeros(1))
        for kind, reader in readers.items():
            for number in range(10):
                read_one(reader, random.Random(number), folder, kind, lambda message: None)
        files = set(folder.iterdir())
        os.chdir(folder)
        sys.addaudithook(audit)
        events.clear()
        before, limit = memory("VmRSS"), memory("VmSize") + MAX_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for kind, n in n_files.items():
            for number in range(n):
                rnd = random.Random(f"{kind} {seed} {number}")
                outcome = read_one(
                    readers[kind], rnd, folder, f"{kind} {seed} {number}", faults.append
                )
                outcomes[f"{kind} {outcome}"] += 1
        if (grown := memory("VmHWM") - before) > MAX_BYTES:
            faults.append(f"memory grew by {grown:,} bytes")
        if set(folder.iterdir()) != files:
            faults.append(f"files were written: {set(folder.iterdir()) - files}")
    return outcomes, faults


def read_one(reader, rnd, folder, label, complain):
    name, content, change = mutate(rnd, reader.contents, reader.forgeries)
    label = f"{label}, {name} by {change.__name__}"
    try:
        reader.check(name, content, change, rnd)
        outcome = "loaded"
    except ValueError as error:
        outcome = "refused"
        if str(folder) not in str(error):
            complain(f"{label}: the error does not name the file: {error!r:.500}")
    except Exception as error:
        # An attacker decides how many cells and classes there are, and so what a prediction takes.
        is_too_large = change not in DAMAGES and isinstance(error, MemoryError)
        outcome = "refused" if is_too_large else "failed"
        if not is_too_large:
            complain(f"{label}: {error!r:.500}")
    if events:
        complain(f"{label}: {events[:5]}")
        events.clear()
    return outcome


def run_apart(tmp_path, n_saved, n_datasets, seed=0):
    """Read mutated files in another process, and return how many were read and loaded."""
    command = [sys.executable, __file__, *map(str, (n_saved, n_datasets, seed))]
    # dask sets thresholds of malloc for child processes, and the package then calls mallopt.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    environment["TMPDIR"] = str(tmp_path)
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    outcomes, faults = json.loads(run.stdout)
    assert faults == []
    for kind, n in {"saved files": n_saved, "data sets": n_datasets}.items():
        assert outcomes[f"{kind} refused"] + outcomes[f"{kind} loaded"] == n
        # Both are tried: what is refused, and what passes.
        assert n / 4 < outcomes[f"{kind} refused"] < n


@on_linux
def test_mutated_files_are_refused_or_equal(tmp_path):
    run_apart(tmp_path, 100, 50)


@on_linux
@pytest.mark.slow
def test_thousands_of_mutated_files_are_refused_or_equal(tmp_path, report):
    n_saved, n_datasets = 4000, 2000
    run_apart(tmp_path, n_saved, n_datasets, seed=1)
    report("files: mutated saved files", n_saved)
    report("files: mutated data sets", n_datasets)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    n_saved, n_datasets, seed = map(int, sys.argv[1:])
    print(json.dumps(read_mutated({"saved files": n_saved, "data sets": n_datasets}, seed)))
