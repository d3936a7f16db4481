"""Parsing of the docs: links, anchors, code blocks, commands and code spans."""

import re
import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from markdown_it import MarkdownIt
from mdit_py_plugins.anchors import anchors_plugin
from places import ROOT


# Python blocks that begin with this are only compiled, and their imports of this project are run.
NOT_RUN = "# Not run by the tests: "
NUMBER = re.compile(r"(?<![\w.,/-])[+-]?\d[\d,]*(?:\.\d+)?(?![\w/])")


def numbers_of(text):
    """Return the numbers of a text without their signs, but not those of names and dates."""
    return [number.strip("+-,") for number in NUMBER.findall(text)]


@dataclass(frozen=True)
class Document:
    path: Path

    def __str__(self):
        return str(self.path.relative_to(ROOT))

    @cached_property
    def text(self):
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tokens(self):
        markdown = MarkdownIt("commonmark").enable("table").use(anchors_plugin, max_level=6)  # GitHub's anchors
        return [part for token in markdown.parse(self.text) for part in (token, *(token.children or ()))]

    @property
    def paragraphs(self):
        """Return the texts of paragraphs and items of lists, without tables, code and targets of links."""
        paragraphs = []
        depth = 0  # in a table
        for token in self.tokens:
            depth += {"table_open": 1, "table_close": -1}.get(token.type, 0)
            if token.type == "inline" and depth == 0:
                paragraphs.append(" ".join(part.content for part in token.children if part.type == "text"))
        return paragraphs

    def sections(self, in_tables):
        """Return the texts of tables, or outside of them, by the anchor of their heading; "" is before the first."""
        sections = {}
        anchor = ""
        depth = 0
        for token in self.tokens:
            if token.type == "heading_open":
                anchor = token.attrs["id"]
            depth += {"table_open": 1, "table_close": -1}.get(token.type, 0)
            if token.type == "text" and in_tables == (depth > 0):
                sections[anchor] = f"{sections.get(anchor, '')} {token.content}"
        return sections

    @property
    def anchors(self):
        return {token.attrs["id"] for token in self.tokens if token.type == "heading_open"}

    @property
    def links(self):
        """Return the targets of local links and images."""
        links = [token.attrGet("href") or token.attrGet("src") for token in self.tokens]
        return [link for link in links if link and not link.startswith(("http://", "https://"))]

    @property
    def code_spans(self):
        return [token.content for token in self.tokens if token.type == "code_inline"]

    def blocks(self, language):
        return [token.content for token in self.tokens if token.type == "fence" and token.info == language]

    @property
    def commands(self):
        """Return the commands: lines of code blocks, and code spans that begin like a command; without comments."""
        spans = [span for span in self.code_spans if re.match(r"(python|make|accelerate launch|pip install) ", span)]
        lines = "\n".join(self.blocks("bash")).replace("\\\n", " ").splitlines()
        return [words for line in [*lines, *spans] if (words := shlex.split(line, comments=True))]


README = Document(ROOT / "README.md")
PAGES = [Document(path) for path in sorted((ROOT / "docs").rglob("*.md"))]
DOCUMENTS = [
    README,
    *(Document(ROOT / name) for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "examples/README.md")),
    *PAGES,
]
