"""Links, paths, make targets and names in the docs exist."""

import re

import pytest
from documents import DOCUMENTS, Document, numbers_of
from places import ROOT


each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=str)


@each_document
def test_links_lead_somewhere(document):
    for link in document.links:
        name, _, anchor = link.partition("#")
        target = (document.path.parent / name).resolve() if name else document.path
        assert target.exists(), link
        assert not anchor or anchor in Document(target).anchors, link


@each_document
def test_paths_and_targets_exist(document):
    for span in document.code_spans:
        if re.match(r"(examples|benchmarks|modeling_trips|docs|tests)/[\w./*]*$", span):
            assert list(ROOT.glob(span.rstrip("/"))), span
    for words in document.commands:
        for word in words:
            if re.match(r"(examples|benchmarks|docs)/[\w/]+\.py$", word):
                assert (ROOT / word).is_file(), words
        if words[0] == "make" and len(words) > 1:
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words


# Pages of all rows, and of all changes.
MANY_NUMBERS = {"docs/results/README.md", "CHANGELOG.md"}


@pytest.mark.parametrize("document", [each for each in DOCUMENTS if str(each) not in MANY_NUMBERS], ids=str)
def test_paragraphs_have_at_most_three_numbers_outside_tables_and_code(document):
    too_many = {}
    for text in document.paragraphs:
        numbers = numbers_of(text)
        if len(numbers) > 3:
            too_many[text] = numbers
    assert not too_many


def test_names_that_contributors_are_sent_to_exist():
    (guide,) = [document for document in DOCUMENTS if str(document) == "CONTRIBUTING.md"]
    names = {name for span in guide.code_spans if re.fullmatch(r"[A-Z]\w+(\.\w+)*", span) for name in span.split(".")}
    folders = ("modeling_trips", "examples", "tests/helpers")
    source = "\n".join(path.read_text("utf-8") for folder in folders for path in (ROOT / folder).rglob("*.py"))
    defined = {
        *re.findall(r"^ *(?:class |def )?(\w+)\b(?= =|:|\()", source, re.MULTILINE),
        "VisionTransformer",
    }  # timm's
    assert names
    assert names <= defined
