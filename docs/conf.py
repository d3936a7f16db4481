"""Configuration of the site: Sphinx with MyST for the pages and autodoc for the API, offline."""

import re
import sys
import textwrap
from pathlib import Path


DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

import tables  # noqa: E402

import modeling_trips  # noqa: E402


project = "TRIPS for Transformers"
author = "The TRIPS for Transformers authors"
project_copyright = f"2026 {author}"
version = release = modeling_trips.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
nb_execution_mode = "off"  # the tour stands with its outputs; tests/docs/test_tour.py runs it
myst_enable_extensions = ["attrs_inline"]
myst_heading_anchors = 4  # as GitHub's, so links work in both
myst_links_external_new_tab = False

html_theme = "furo"
html_title = f"{project} {version}"
html_static_path = ["_static"]
html_css_files = ["wide_tables.css"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings have shapes and defaults
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
default_role = "code"

FENCE = re.compile(r"^( *)```\w*\n(.*?)\n *```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[([^\]`\n]+)\]\((http[^)\s]+)\)")
SECTION = re.compile(r"(?<=\S)\n( *(?:Parameters|Returns):\n)")  # without an empty line before it
REFERENCE = re.compile(r"\[(`[^`\n]+`)\]")


def docstring_as_rst(app, what, name, obj, options, lines: list[str]):
    """Make code blocks, links and references of Markdown those of reStructuredText, in place."""

    def block(code: re.Match) -> str:
        indented = textwrap.indent(code[2], "    ")
        return f"{code[1]}::\n\n{indented}\n"

    text = FENCE.sub(block, "\n".join(lines))
    text = LINK.sub(r"`\1 <\2>`__", text)
    text = REFERENCE.sub(r"\1", text)
    text = SECTION.sub(r"\n\n\1", text)
    lines[:] = text.splitlines()


def setup(app):
    app.connect("autodoc-process-docstring", docstring_as_rst, priority=400)  # before napoleon
    for page in tables.PAGES:
        text = page.read_text(encoding="utf-8")
        if tables.rewrite(text) != text:
            raise ValueError(f"The tables of {page} are out of date: run `python docs/tables.py`.")
