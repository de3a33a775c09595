"""Every public docstring is complete numpydoc."""

import inspect

import pytest
from numpydoc.validate import validate

import sklearn_rails
import sklearn_rails.attacks
import sklearn_rails.datasets
import sklearn_rails.immune
import sklearn_rails.inspection
import sklearn_rails.metrics

# GL08 of properties aside, what is not asked for: extended summaries, "See Also" and examples of
# every method (classes and functions have them), and that a summary be one line alone.
MODULES = [
    sklearn_rails,
    sklearn_rails.attacks,
    sklearn_rails.datasets,
    sklearn_rails.immune,
    sklearn_rails.inspection,
    sklearn_rails.metrics,
]
IGNORED = {"ES01", "SA01", "EX01", "GL01", "GL02", "SA04", "RT02"}


def public_objects():
    for module in MODULES:
        for name in module.__all__:
            thing = getattr(module, name)
            if not callable(thing):
                continue
            path = f"{module.__name__}.{name}"
            yield path, None
            if inspect.isclass(thing):
                for method, _ in inspect.getmembers(thing, inspect.isfunction):
                    own = any(
                        method in vars(c) for c in thing.__mro__ if "sklearn_rails" in c.__module__
                    )
                    if own and not method.startswith("_"):
                        yield path, method


@pytest.mark.parametrize(("path", "method"), list(public_objects()))
def test_public_docstrings_are_numpydoc(path, method):
    errors = validate(path if method is None else f"{path}.{method}")["errors"]
    ignored = IGNORED | ({"PR01"} if path.endswith("ImmuneResponse") else set())  # made by respond
    assert [f"{code}: {text}" for code, text in errors if code not in ignored] == []
    if method is None and path != "sklearn_rails.immune.ImmuneResponse":
        assert "EX01" not in dict(errors), "an example is missing"
