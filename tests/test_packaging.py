"""What the sdist and the wheel contain, and what importing the package loads."""

import pkgutil
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import sklearn_rails
from sklearn_rails import __version__

ROOT = Path(__file__).parents[1]
NAME = f"sklearn_rails-{__version__}"

# In the repository and of no use without it.
ONLY_IN_REPOSITORY = (".ci/", ".github/", ".gitignore", ".pre-commit-config.yaml")

# Packages that the extras bring; without them everything but what is named after them works.
OPTIONAL = [
    "art",
    "dask",
    "distributed",
    "matplotlib",
    "mlxtend",
    "pandas",
    "polars",
    "pyod",
    "skops",
]

# Packages and modules that take a tenth of a second or more to import, and that few users need.
HEAVY = [*OPTIONAL, "IPython", "safetensors", "scipy.stats", "skorch", "torch._dynamo"]

MODULES = [
    module.name
    for module in pkgutil.walk_packages(sklearn_rails.__path__, prefix="sklearn_rails.")
    if not any(part.startswith("_") for part in module.name.split("."))
]


def run(*command, cwd=None):
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def test_import_loads_no_heavy_modules():
    # Other modules than these may be loaded by scikit-learn and torch: scikit-learn 1.6 and newer
    # loads scipy.stats, and pandas if it is installed.
    code = """
import sys
import sklearn.base, sklearn.utils.validation, torch
before = set(sys.modules)
import sklearn_rails
print(*set(sys.modules) - before, sep="\\n")
"""
    loaded = set(run(sys.executable, "-c", code).split())
    assert "sklearn_rails" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_package_works_without_the_packages_of_the_extras():
    code = f"""
import importlib, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OPTIONAL}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())

for name in {MODULES}:
    importlib.import_module(name)

import torch
from sklearn.datasets import load_digits
from sklearn_rails import DkNNClassifier, RAILSClassifier, ThreatScorer

X, y = load_digits(return_X_y=True)
X = X.astype("float32") / 16
net = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10))
for estimator in [
    RAILSClassifier(net, layers="1", random_state=0),
    DkNNClassifier(net, layers="1"),
    ThreatScorer(net, layers="1"),
]:
    estimator.fit(X[:300], y[:300])
    print(*estimator.predict(X[300:303]))
"""
    assert len(run(sys.executable, "-c", code).splitlines()) == 3


def tracked_files():
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs a checkout of the repository, and git")
    names = run("git", "ls-files", "-z", cwd=ROOT).split("\0")
    return {name for name in names if name and not name.startswith(ONLY_IN_REPOSITORY)}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Return the sdist, and the wheel that is built from it."""
    pytest.importorskip("build", reason="needs build, of the extra test")
    folder = tmp_path_factory.mktemp("packaging")
    # From a copy, since building writes into the source folder.
    for name in tracked_files():
        copy = folder / "source" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist"]
    run(*command, folder / "source", cwd=folder)
    return folder / "dist" / f"{NAME}.tar.gz", folder / "dist" / f"{NAME}-py3-none-any.whl"


@pytest.mark.slow
def test_sdist_contains_the_whole_project(built):
    with tarfile.open(built[0]) as archive:
        names = {member.name for member in archive if member.isfile()}
    names = {name.removeprefix(f"{NAME}/") for name in names}
    made = {name for name in names if name.startswith("sklearn_rails.egg-info/")} | {"PKG-INFO"}
    assert names - made == tracked_files()


@pytest.mark.slow
def test_wheel_contains_the_package_alone(built):
    with zipfile.ZipFile(built[1]) as archive:
        names = set(archive.namelist())
    package = {name for name in tracked_files() if name.startswith("sklearn_rails/")}
    metadata = {name for name in names if name.startswith(f"{NAME}.dist-info/")}
    assert names - metadata == package
    assert "sklearn_rails/py.typed" in package
    assert f"{NAME}.dist-info/licenses/LICENSE" in metadata


@pytest.mark.slow
def test_index_accepts_the_files(built):
    pytest.importorskip("twine", reason="needs twine, of the extra test")
    run(sys.executable, "-m", "twine", "check", "--strict", *built)


@pytest.mark.slow
def test_tests_of_the_unpacked_sdist_run(built, tmp_path):
    with tarfile.open(built[0]) as archive:
        archive.extractall(tmp_path, filter="data")
    pytest_here = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    run(*pytest_here, "--collect-only", cwd=tmp_path / NAME)
    quick = ["tests/test_structure.py", "tests/test_conformal.py", "tests/neighbors/test_votes.py"]
    code = "import sklearn_rails; print(sklearn_rails.__file__)"
    assert str(tmp_path) in run(sys.executable, "-c", code, cwd=tmp_path / NAME)
    run(*pytest_here, *quick, cwd=tmp_path / NAME)
