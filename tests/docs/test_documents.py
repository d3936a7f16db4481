"""Links, paths, make targets and names in the docs exist, and the tables of evidence are those of the rows."""

import importlib
import re
from functools import cache

import pytest
import tables
from documents import DOCUMENTS, Document
from places import ROOT


each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=str)
PACKAGES = {"modeling_trips": "modeling_trips.", "examples": "trips_examples.", "tests/helpers": ""}
OF_OTHERS = {"VisionTransformer"}  # timm's


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


@cache
def modules_with(name: str) -> list[str]:
    """Return the modules that define a class, a function or a constant."""
    defined, modules = re.compile(rf"^(?:class |def )?{name}\b(?!\.)", re.MULTILINE), []
    for folder, prefix in PACKAGES.items():
        for path in (ROOT / folder).rglob("*.py"):
            if defined.search(path.read_text(encoding="utf-8")):
                parts = path.relative_to(ROOT / folder).with_suffix("").parts
                modules.append(f"{prefix}{'.'.join(parts)}".removesuffix(".__init__"))
    return modules


def resolves(name: str) -> bool:
    """Return whether a name such as `Host.guidances` is that of an object, or of a field that a class declares."""
    first, *attributes = name.split(".")
    for module in modules_with(first):
        found = getattr(importlib.import_module(module), first, None)
        for attribute in attributes:
            declared = getattr(found, "__annotations__", {})
            found = getattr(found, attribute, declared.get(attribute))
        if found is not None:
            return True
    return False


def test_names_that_contributors_are_sent_to_exist():
    (guide,) = [document for document in DOCUMENTS if str(document) == "CONTRIBUTING.md"]
    names = {span for span in guide.code_spans if re.fullmatch(r"[A-Z]\w+(\.\w+)*", span)}
    assert [name for name in sorted(names - OF_OTHERS) if not resolves(name)] == []
    assert not resolves("TripsVisionLayer.select_and_transform") and not resolves("NoSuchClass")


def test_the_tables_of_the_evidence_are_those_of_the_rows():
    page = tables.PAGE.read_text(encoding="utf-8")
    assert set(re.findall(r"<!-- table: (\w+) -->", page)) == tables.TABLES.keys()
    assert tables.rewrite(page) == page
    assert tables.rewrite(re.sub(r"\d+\.\d ± ", "0.0 ± ", page, count=1)) == page
