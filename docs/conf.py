"""How Sphinx builds the documentation: ``sphinx-build -W -c docs . build/docs``.

The source folder is the checkout, so that links between docs/, notebooks/ and benchmarks/ are the same in an editor, on
a forge and on the site. Only what ``include_patterns`` names is read.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from swarmkit.version import __version__ as release  # noqa: E402

project = "swarmkit"
author = "The swarmkit authors"
copyright = author  # noqa: A001  (the name is given by Sphinx)
version = release
root_doc = "docs/index"
include_patterns = [
    "docs/**.md",
    "docs/generated/**.rst",
    "notebooks/*.ipynb",
    "benchmarks/README.md",
    "swarmkit/data/README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
]
exclude_patterns = ["**/.*", ".*", "build", "tests", "**/__pycache__"]
extensions = ["sphinx.ext.autodoc", "sphinx.ext.autosummary", "numpydoc", "myst_nb"]
templates_path = [str(ROOT / "docs/templates")]  # autosummary looks for a relative one from the checkout

# Tutorials are shown as they were stored: tests run them, and compare.
nb_execution_mode = "off"
nb_ipywidgets_js: dict[str, object] = {}  # nothing is fetched from elsewhere
myst_heading_anchors = 3
myst_enable_extensions = ["deflist"]
suppress_warnings = [
    "misc.highlighting_failure"  # IPython's ? and ! are no Python
]

autosummary_generate = True
autosummary_ignore_module_all = False
autodoc_typehints = "none"  # the docstrings have the types
autodoc_member_order = "bysource"
add_module_names = False
numpydoc_show_class_members = False  # the templates list them
numpydoc_class_members_toctree = False
# How docstrings are laid out: sections that numpydoc knows, in its order, once; types written as such; summaries that
# begin with a capital. Not that each keyword has an entry of its own (several share "as for AgentPool"), nor that all
# have examples and returns; fields of records are described by their class, and some methods come from ipywidgets.
checks = "GL01 GL05 GL06 GL07 GL09 GL10 SS02 SS04 PR05 PR06 PR07 RT02"
numpydoc_validation_checks = set(checks.split())

html_theme = "pydata_sphinx_theme"
html_title = f"swarmkit {release}"
html_show_sourcelink = False
html_extra_path = ["extra"]  # index.html, which leads to root_doc
html_static_path = ["static"]
html_css_files = ["site.css"]
html_sidebars = {page: [] for page in ("docs/index", "docs/get_started", "docs/moving", "CHANGELOG")}  # no pages below
html_theme_options = {
    "header_links_before_dropdown": 7,
    "navbar_align": "left",
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "footer_start": ["copyright"],
    "footer_end": [],
}
