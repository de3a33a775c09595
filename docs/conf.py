"""Configuration of the documentation. It builds without a network."""

import re

from sklearn_rails import __version__

project = "sklearn_rails"
author = "sklearn_rails developers"
copyright = "2026, sklearn_rails developers"
version = release = __version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "numpydoc",
    "sphinx_gallery.gen_gallery",
]
templates_path = ["_templates"]
# The gallery's sources: what it makes of them stands in auto_examples.
exclude_patterns = ["_build", "_templates", "examples"]

# Methods that the class has of its own; those of scikit-learn are in scikit-learn's guide.
autodoc_default_options = {
    "members": True,
    "exclude-members": "set_fit_request, set_score_request, set_transform_request",
}
# autodoc lists them.
numpydoc_show_class_members = False
numpydoc_validation_checks = {"all", "ES01", "EX01", "SA01", "SA04", "GL08"}
# Its parameters are its attributes.
numpydoc_validation_exclude = {r"\.ImmuneResponse$"}

sphinx_gallery_conf = {
    "examples_dirs": "examples",
    "gallery_dirs": "auto_examples",
    "show_memory": False,
    "show_signature": False,
    "write_computation_times": False,
}

html_theme = "pydata_sphinx_theme"
html_title = "sklearn_rails"
html_show_sourcelink = False


def quote_shapes(app, what, name, obj, options, lines):
    """Show shapes as code: in (n, *shape) and (n_features_in_,) docutils sees markup."""
    lines[:] = [re.sub(r"\((n[a-z_]*,[^()`]*)\)", r"``(\1)``", line) for line in lines]


def setup(app):
    # Before numpydoc, which reads the docstring at 500.
    app.connect("autodoc-process-docstring", quote_shapes, priority=400)
