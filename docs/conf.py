"""Configuration of the documentation. It builds with and without a connection."""

import re
import sys
from html import escape
from pathlib import Path

import requests
from docutils import nodes
from sphinx.util import logging
from sphinx_gallery.sorting import ExplicitOrder

from sklearn_rails import __version__

sys.path.insert(0, str(Path(__file__).parent))
from paper_tables import write_tables

logger = logging.getLogger(__name__)

project = "sklearn_rails"
author = "sklearn_rails developers"
copyright = "2026, sklearn_rails developers"
version = release = __version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.viewcode",
    "numpydoc",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
]
templates_path = ["_templates"]
# The gallery's sources; its pages are in auto_examples.
exclude_patterns = ["_build", "_templates", "examples"]

# Only this package's methods; scikit-learn documents its own.
autodoc_default_options = {
    "members": True,
    "inherited-members": "Mapping, Generic, NetworkEstimator, ClassifierMixin, OutlierMixin, "
    "TransformerMixin, ClassNamePrefixFeaturesOutMixin, BaseEstimator, _MetadataRequester, "
    "_SetOutputMixin",
    "exclude-members": "set_fit_request, set_partial_fit_request, set_score_request, "
    "set_transform_request",
}
# The docstrings have them, in words.
autodoc_typehints = "none"
# One parameter on a line where a signature is longer.
python_maximum_signature_line_length = 79
# autodoc lists them.
numpydoc_show_class_members = False
numpydoc_validation_checks = {"all", "ES01", "EX01", "SA01", "SA04", "GL08"}
# Their parameters are their attributes.
numpydoc_validation_exclude = {r"\.(ImmuneResponse|LayerScores)$"}

sphinx_gallery_conf = {
    "examples_dirs": "examples",
    "gallery_dirs": "auto_examples",
    # In the order of reading; a new example has to be listed.
    "within_subsection_order": ExplicitOrder(
        [
            f"plot_{name}.py"
            for name in (
                "mnist",
                "layers",
                "response",
                "threat_scores",
                "abstaining",
                "credibility",
                "grid_search",
                "memory",
                "adaptive_attack",
                "tabular",
            )
        ]
    ),
    # For "Examples using" on the pages of the API, see _templates/autosummary.
    "backreferences_dir": "api/backreferences",
    "doc_module": ("sklearn_rails",),
    "reference_url": {"sklearn_rails": None},
    "remove_config_comments": True,
    "show_memory": False,
    "show_signature": False,
    "write_computation_times": False,
}

# Prompts and outputs are not copied.
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_exclude = ".linenos, .gp, .go"

html_theme = "pydata_sphinx_theme"
html_title = "sklearn_rails"
html_logo = "images/logo.svg"
html_favicon = "images/logo.svg"
html_static_path = ["_static"]
html_css_files = ["narrow.css"]
html_show_sourcelink = False
# Pages without others below them have nothing to show there.
html_sidebars = {name: [] for name in ("index", "install", "reproduce", "whats_new")}
# The theme reports an error if there is no mode, as at the first visit.
html_context = {"default_mode": "auto"}
html_theme_options = {
    "logo": {"text": "sklearn_rails"},
    "header_links_before_dropdown": 6,
    "navigation_with_keys": False,
    "navbar_align": "left",
}
# Names of methods, without that of their class, in the navigation of a page.
toc_object_entries_show_parents = "hide"

# Seconds for each project, twice: here and in intersphinx.
intersphinx_timeout = 5
PROJECTS = {
    "python": "https://docs.python.org/3",
    "numpy": "https://numpy.org/doc/stable",
    "sklearn": "https://scikit-learn.org/stable",
    "torch": "https://docs.pytorch.org/docs/stable",
    "skorch": "https://skorch.readthedocs.io/en/stable",
}


def reachable_projects():
    """Return the projects to link to: none without a connection, which would be a warning."""
    mapping = {}
    for name, url in PROJECTS.items():
        try:
            # Some servers refuse the name of a library.
            requests.head(
                f"{url}/objects.inv",
                timeout=intersphinx_timeout,
                allow_redirects=True,
                headers={"User-Agent": "Mozilla/5.0 (Sphinx)"},
            ).raise_for_status()
        except requests.RequestException as error:
            logger.info("no links to %s: %s", url, error)
            if not mapping:
                break  # do not wait for each of them
        else:
            mapping[name] = (url, None)
    return mapping


intersphinx_mapping = reachable_projects()


SHAPE = r"\((n[a-z_]*,[^()`]*)\)"


def quote_shapes(app, what, name, obj, options, lines):
    """Show shapes as code, since docutils reads (n, *shape) and (n_features_in_,) as markup."""
    lines[:] = [
        line if line.strip().startswith((">>>", "...")) else re.sub(SHAPE, r"``(\1)``", line)
        for line in lines
    ]


def write_results(app):
    """Write the tables of "Reproducing the paper" into results/."""
    source = Path(app.srcdir)
    write_tables(source.parent / "benchmarks" / "results", source / "results")


def check_code_width(app, doctree):
    """Warn of code that is wider than a page shows."""
    for node in doctree.findall(lambda n: isinstance(n, nodes.literal_block | nodes.doctest_block)):
        if node.get("language") == "text":
            continue
        for line in node.astext().splitlines():
            if len(line) > 79:
                logger.warning("code is wider than 79 columns: %s", line, location=node)


def describe_page(app, pagename, templatename, context, doctree):
    """Take a page's first paragraph as its description, for search engines and previews."""
    paragraph = doctree and doctree.next_node(nodes.paragraph)
    if paragraph:
        text = " ".join(paragraph.astext().split())
        description = escape(text if len(text) < 160 else text[:157].rsplit(" ", 1)[0] + " ...")
        context["metatags"] += f'<meta name="description" content="{description}" />\n'


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
    app.connect("builder-inited", write_results)
    app.connect("doctree-read", check_code_width)
    app.connect("html-page-context", describe_page)
    # Before numpydoc, which reads the docstring at 500.
    app.connect("autodoc-process-docstring", quote_shapes, priority=400)
