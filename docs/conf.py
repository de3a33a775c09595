"""Configuration of the documentation. It builds without a connection."""

import csv
import re
from pathlib import Path

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
# The gallery's sources; its pages are in auto_examples.
exclude_patterns = ["_build", "_templates", "examples"]

# Only this package's methods; scikit-learn documents its own.
autodoc_default_options = {
    "members": True,
    "inherited-members": "NetworkEstimator, ClassifierMixin, OutlierMixin, TransformerMixin, "
    "ClassNamePrefixFeaturesOutMixin, BaseEstimator, _MetadataRequester, _SetOutputMixin",
    "exclude-members": "set_fit_request, set_partial_fit_request, set_score_request, "
    "set_transform_request",
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
    """Show shapes as code, since docutils reads (n, *shape) and (n_features_in_,) as markup."""
    lines[:] = [re.sub(r"\((n[a-z_]*,[^()`]*)\)", r"``(\1)``", line) for line in lines]


def shorten_results(app):
    """Copy the tables of benchmarks/results without the columns that do not fit on a page."""
    for path in (Path(app.srcdir).parent / "benchmarks" / "results").glob("*.csv"):
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        columns = [name for name in rows[0] if name not in ("seed", "versions")]
        shortened = Path(app.srcdir) / "results" / path.name
        shortened.parent.mkdir(exist_ok=True)
        with shortened.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)


def include_changelog(app, docname, source):
    """Append CHANGELOG.md to the page "What's new", as reStructuredText.

    Only what the changelog uses is converted: headings, lists, code and links.
    """
    if docname != "whats_new":
        return
    path = Path(app.srcdir).parent / "CHANGELOG.md"
    app.env.note_dependency(path)
    # The page has a title of its own.
    text = path.read_text(encoding="utf-8").removeprefix("# Changelog\n")
    text = re.sub(r"`([^`]+)`", r"``\1``", text)
    text = re.sub(r"\[([^]]+)\]\(([^)]+)\)", r"`\1 <\2>`__", text)
    for marks, line in (("##", "-"), ("###", "~")):
        text = re.sub(
            rf"^{marks} (.+)$", lambda m, line=line: f"{m[1]}\n{line * len(m[1])}", text, flags=re.M
        )
    source[0] += text


def setup(app):
    app.connect("source-read", include_changelog)
    app.connect("builder-inited", shorten_results)
    # Before numpydoc, which reads the docstring at 500.
    app.connect("autodoc-process-docstring", quote_shapes, priority=400)
