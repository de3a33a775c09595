"""The house: who may import whom, and one sample's way through ``predict``."""

import ast
import sys
from graphlib import TopologicalSorter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import sklearn_rails
from sklearn_rails import RAILSClassifier

ROOT = Path(sklearn_rails.__file__).parent

# Top to bottom: a module imports only from its own line or those below.
STOREYS = [
    ["demo"],
    ["__init__"],
    ["attacks", "inspection"],
    ["metrics", "datasets"],
    ["persistence", "distributed"],
    ["_archive"],
    ["_encoding"],
    ["_rails", "_dknn", "_threat", "_extractor"],
    ["_base", "_documentation"],
    ["immune"],
    ["sensing"],
    ["neighbors", "_blocks"],
    ["features"],
    ["_conformal"],
    ["_validation"],
    ["_compat", "_version"],
]
STOREY = {name: number for number, storey in enumerate(STOREYS) for name in storey}

MODULES = sorted(ROOT.rglob("*.py"))


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports_of(path):
    """Return the modules of the package that a module imports."""
    package = path.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        base = package[: len(package) - node.level + 1]
        parts = (*base, *(node.module or "").split(".")) if node.module else base
        target = ROOT.joinpath(*parts)
        for alias in node.names:
            inner = target / f"{alias.name}.py"
            if inner.exists():
                found.add(inner)
            elif target.with_suffix(".py").exists():
                found.add(target.with_suffix(".py"))
            else:
                found.add(target / "__init__.py")
    return found


def storey_of(path):
    return STOREY[name_of(path).split(".")[0]]


def test_no_module_imports_one_that_stands_above_it():
    for path in MODULES:
        for imported in imports_of(path):
            assert storey_of(imported) >= storey_of(path), (name_of(path), name_of(imported))


def test_imports_have_no_cycles():
    graph = {
        path: {i for i in imports_of(path) if i.name != "__init__.py"}
        for path in MODULES
        if path.name != "__init__.py"
    }
    assert len(list(TopologicalSorter(graph).static_order())) == len(graph)


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def private_names_of(path):
    """Return the private names that a module defines or assigns."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return {name for name in found if is_private(name)}


PRIVATE_NAMES = {path: private_names_of(path) for path in MODULES}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_module_reads_private_names_of_another(path):
    tree = ast.parse(path.read_text())
    others = set().union(*PRIVATE_NAMES.values()) - PRIVATE_NAMES[path]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in others:
            is_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            assert is_self, f"line {node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.ImportFrom) and node.level and path.name != "__init__.py":
            modules = {i.stem for i in imports_of(path)}
            for alias in node.names:
                assert not is_private(alias.name) or alias.name in modules, alias.name


class Walk:
    """Follow the calls of the package.

    What happens inside of ``features``, ``neighbors`` and the checks of input is theirs: only the
    call that enters them counts. The helper that works in blocks calls what it is given, as joblib
    does, and does not count.
    """

    CLOSED = ("features", "neighbors", "_base", "_validation")

    def __init__(self):
        self.calls = []  # (caller, callee), as (file, function)
        self.spine = None
        self._stack = []

    def __call__(self, frame, event, arg):
        code = frame.f_code
        if not code.co_filename.startswith(str(ROOT)) or event not in ("call", "return"):
            return
        place = name_of(Path(code.co_filename)), code.co_qualname
        if event == "return":
            if self._stack and self._stack[-1][0] is frame:
                self._stack.pop()
            return
        if place[0] == "_blocks":
            return
        inside = self._stack[-1][1][0].split(".")[0] if self._stack else ""
        if inside in self.CLOSED:
            # The frame that entered stays on top until it returns.
            return
        self.calls.append((self._stack[-1][1] if self._stack else None, place))
        self._stack.append((frame, place))
        if place[1].endswith("FeatureMap.affinities"):
            self.spine = [name for _, (_, name) in self._stack]


@pytest.fixture
def walk():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    X = np.random.default_rng(0).random((60, 8)).astype(np.float32)
    rails = RAILSClassifier(
        network,
        layers="1",
        generations=1,
        population_size=20,
        early_stopping=False,
        random_state=0,
    ).fit(X, np.arange(60) % 3)
    rails.predict(X[:1])
    walk = Walk()
    sys.setprofile(walk)
    try:
        rails.predict(X[:1])
    finally:
        sys.setprofile(None)
    return walk


def test_a_sample_goes_down_through_at_most_eight_hops(walk):
    hops = [name for name in walk.spine if "<" not in name]
    assert hops == [
        "RAILSClassifier.predict",
        "RAILSClassifier._scores",
        "ImmuneEngine.scores",
        "ImmuneEngine._vote",
        "ResponseLayer.respond",
        "ResponseLayer._breed",
        "mature",
        "FeatureMap.affinities",
    ]


def test_a_sample_changes_the_file_at_most_twenty_times(walk):
    files = [callee[0] for _, callee in walk.calls]
    rooms = [file.split(".")[0] if file.split(".")[0] in Walk.CLOSED else file for file in files]
    changes = sum(a != b for a, b in pairwise(rooms))
    assert changes <= 20, rooms


def test_nothing_calls_back_up(walk):
    order = ["engine", "gates", "layer", "memory", "maturation", "operators", "consensus", "random"]
    rank = {f"immune.{name}": 0.1 * number for number, name in enumerate(order)}
    for caller, callee in walk.calls:
        if caller is None:
            continue
        above, below = (
            STOREY[file.split(".")[0]] + rank.get(file, 0.0) for file in (caller[0], callee[0])
        )
        assert above <= below, (caller, callee)
