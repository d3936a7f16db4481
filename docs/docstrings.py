"""Convert docstrings, which are Markdown with Google's sections, to reStructuredText for Sphinx."""

import re
import textwrap

import modeling_trips


# Text that Transformers repeats in every class and `forward`, and links into its own site.
BOILERPLATE = re.compile(
    r"^ *(?:<Tip.*?</Tip>|This model inherits from \[.*?load the model weights\."
    r"|\[What are [^\n]*\]\(\.\./glossary#.*?\))\n",
    re.DOTALL | re.MULTILINE,
)
CODE = re.compile(r"^( *)```(\w*)\n(.*?)\n *```$", re.DOTALL | re.MULTILINE)
SECTION = re.compile(r"(?<=\S\n)(?=( *)(?:Args|Parameters|Returns|Raises):\n\1 +\S)")
RAISES = re.compile(r"^( *)Raises:\n((?:\1 +.*\n?|\n)*)", re.MULTILINE)
CONTINUATION = re.compile(r"^(?= )(?! *`?\w+(?:Error|Exception)`?: )", re.MULTILINE)
INLINE = re.compile(
    r"\[`(?P<reference>[^`]+)`\]"  # [`TripsConfig`], [`~cache_utils.Cache`]
    r"|`(?P<literal>[^`\n]+)`(?![_`])"
    r"|\[(?P<text>[^\]\n]+)\]\((?P<address>[^)\s]+)\)"
)


def as_rst(docstring: str) -> str:
    """Return a docstring as reStructuredText; the sections (`Args:`, `Returns:`, ...) stay."""
    docstring = SECTION.sub("\n", BOILERPLATE.sub("", docstring))
    # An error may continue in the next line; napoleon reads each line of the same depth as another error.
    docstring = RAISES.sub(lambda match: f"{match[1]}Raises:\n{CONTINUATION.sub('    ', match[2])}", docstring)
    parts, end = [], 0
    for code in CODE.finditer(docstring):
        parts += [INLINE.sub(_inline, docstring[end : code.start()]), _code_block(*code.groups())]
        end = code.end()
    return "".join([*parts, INLINE.sub(_inline, docstring[end:])])


def _code_block(indent: str, language: str, code: str) -> str:
    language = "pycon" if code.lstrip().startswith(">>>") else language or "text"
    block = f".. code-block:: {language}\n\n{textwrap.indent(textwrap.dedent(code), '    ')}\n"
    return textwrap.indent(block, indent)


def _inline(match: re.Match) -> str:
    if match["text"] is not None:
        is_address = match["address"].startswith("http")
        return f"`{match['text']} <{match['address']}>`__" if is_address else match["text"]
    reference = (match["reference"] or match["literal"]).lstrip("~")
    name = re.sub(r"^(?:modeling_trips\w*\.)+", "", reference)
    if match["reference"] is not None and name.split(".")[0] in modeling_trips.__all__:
        return f":py:obj:`~modeling_trips.{name}`"
    return f"``{reference}``"


def docstring_as_rst(app, what, name, obj, options, lines: list[str]):
    """Sphinx's event `autodoc-process-docstring`: changes `lines` in place."""
    lines[:] = as_rst("\n".join(lines)).splitlines()
