"""Settings of the site, which `make docs` builds."""

import re
import sys
from importlib.metadata import version as version_of
from pathlib import Path

from docutils import nodes

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "vmm_fast"
author = "the vmm_fast authors"
project_copyright = author
version = release = version_of("vmm-fast")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "command_reference",
    "mathml",
]
exclude_patterns = ["_build"]
myst_enable_extensions = ["amsmath", "attrs_inline", "deflist", "dollarmath"]
myst_heading_anchors = 3

# Every link within the site is checked. Names of other packages' classes, and prose such as
# "Tensor [B, D]" where docstrings have types, are no links.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(?!vmm_fast\.).*"),
    ("py:mod", r"vmm_fast\.(backends|operations)"),  # internal
]

autodoc_typehints = "none"
autodoc_member_order = "bysource"
toc_object_entries_show_parents = "hide"  # names of methods fit beside the page without the class'
napoleon_google_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "pydata_sphinx_theme"
html_title = "vmm_fast"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "navbar_align": "left",
    "navbar_end": ["theme-switcher"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "show_prev_next": True,
    "show_toc_level": 2,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
html_sidebars = {"index": [], "questions": []}


# Text in backticks; else bars of a formula, asterisks in a shape, the full stop of a lone symbol.
NO_MARKUP = re.compile(r"(`[^`]+`)|\||(?<=\[)\*(?=\w)|(?<=, )\*(?=\w)|(?<=^ {4}[A-Z])\.$")


def show_formulas(app, what, name, obj, options, lines):
    """Show indented paragraphs before a docstring's sections as they are: they hold formulas.

    Elsewhere ``*`` in shapes and ``|`` in formulas are no markup.
    """
    shown, before, in_sections = [], "", False
    for number, line in enumerate(lines):
        in_sections = in_sections or bool(re.fullmatch(r"-{3,}", line))
        indented = line.startswith("    ") and not in_sections
        if indented and not lines[number - 1].strip() and not before.startswith((" ", "-")):
            shown += [] if before.endswith("::") else ["::", ""]
        if not indented:
            line = NO_MARKUP.sub(lambda found: found[1] or f"\\{found[0]}", line)
        shown.append(line)
        before = line if line.strip() else before
    lines[:] = shown


def keep_spreads_together(app, doctree):
    """Break no line between a mean and its spread: most columns of the results are narrow."""
    for text in list(doctree.findall(nodes.Text)):
        if " ± " in text:
            text.parent.replace(
                text, nodes.Text(text.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}"))
            )


def setup(app):
    """Read docstrings before napoleon does, and pages before they are written."""
    app.connect("autodoc-process-docstring", show_formulas, priority=400)
    app.connect("doctree-read", keep_spreads_together)
