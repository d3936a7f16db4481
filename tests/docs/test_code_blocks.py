"""The Python blocks of the docs run unchanged, page by page, and so does the conversion on the page about weights."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from albef_reference import TINY, random_checkpoint
from documents import DOCUMENTS, NOT_RUN, PAGES
from places import EXAMPLES
from random_checkpoint import save_random_checkpoint

from modeling_trips import UNPRUNED, TripsForQuestionAnswering
from modeling_trips.hosts.apply import HOSTS
from trips_examples import convert_checkpoint
from trips_examples.data.tasks import TASKS
from trips_examples.data.vocabulary import train_tokenizer


SLOW = {"docs/deploy.md": pytest.mark.slow}  # it exports a model
WITH_PYTHON = [
    pytest.param(document, marks=SLOW.get(str(document), ())) for document in DOCUMENTS if document.blocks("python")
]


@pytest.fixture
def demo_model(tmp_path, monkeypatch):
    """Put the examples and an untrained model in the folder of `make demo` into the current directory."""
    (tmp_path / "examples").symlink_to(EXAMPLES)
    texts = ["what color is the shape?", "is there a circle?", "red teal yes no"]
    save_random_checkpoint(tmp_path / "demo/model", TripsForQuestionAnswering, texts)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def registries():
    """Restore the registries after a test."""
    before = [(registry, dict(registry)) for registry in (TASKS, HOSTS)]
    yield
    for registry, entries in before:
        registry.clear()
        registry.update(entries)


def page_named(name):
    return next(page for page in PAGES if str(page) == name)


@pytest.mark.parametrize("document", WITH_PYTHON, ids=str)
def test_python_blocks_run_as_they_stand_and_what_they_say_is_so(document, demo_model):
    """Blocks that are marked as not run only run their imports of this project."""
    names = {"__name__": "__main__"}
    for block in document.blocks("python"):
        code = compile(block, str(document), "exec")
        if block.startswith(NOT_RUN):
            imports = re.findall(r"^from (?:modeling_trips|trips_examples).*$", block, re.MULTILINE)
            code = compile("\n".join(imports), str(document), "exec")
        exec(code, names)
    if str(document) == "docs/use.md":
        assert len(names["boxes"]) == 2 and Path("kept.png").stat().st_size > 1000
        assert names["keeps_all"].config.schedule == UNPRUNED
        assert str(names["faster"].config.schedule) == "1:image:0.5,3:text:0.7"
        assert names["vilt"].config.fusion_encoder_config.fusion_type == "single_stream"
    elif str(document) == "docs/weights.md":
        assert str(names["retriever"].config.schedule) == "5:image:0.7,10:image:0.7,12:text:0.3"
    elif str(document) == "docs/vlm.md":  # ceil(.7 * 144), ceil(.7 * 102)
        assert [layer.kept_indices.shape[1] for layer in names["kept"]] == [101, 72]


def test_the_conversion_runs_as_it_stands(tmp_path, monkeypatch):
    """The file has ALBEF's names and small weights. The tokenizer is local, because the default is on the Hub."""
    tokenizer = train_tokenizer(["what color is it?"])
    sizes = TINY._replace(width=64, num_heads=1, vocab=len(tokenizer))
    torch.save({"model": random_checkpoint("question-answering", sizes)}, tmp_path / "vqa.pth")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    text = page_named("docs/weights.md").text
    (command,) = re.findall(r"^python examples/convert_checkpoint.py (.*vqa\.pth.*)$", text, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    convert_checkpoint.main([*shlex.split(command), "--tokenizer", "tokenizer"])
    config = TripsForQuestionAnswering.from_pretrained("albef-vqa").config
    assert str(config.vision_config.schedule) == "5:text:0.7,10:text:0.7"
