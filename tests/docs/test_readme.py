"""The README's Python blocks run as they stand, its links lead somewhere, its commands exist."""

import re
import shlex

import pytest
import torch
from albef_reference import TINY, random_checkpoint
from places import ROOT

from modeling_trips import TripsForQuestionAnswering
from trips_examples import convert_checkpoint
from trips_examples.data.vocabulary import train_wordpiece_tokenizer


DOCUMENTS = ["README.md", "examples/README.md"]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A current directory from which the shipped checkpoint has the path that the README gives."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)


def test_python_blocks_run_as_they_stand(checkout):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 3
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert len(namespace["boxes"]) == 2 and namespace["unpruned"].config.keep_rate == 1.0
    assert namespace["retriever"].config.keep_rate == 0.7
    assert [layer.kept_indices.shape[1] for layer in namespace["kept"]] == [101, 72]  # ceil(.7 * 144), ceil(.7 * 102)


def test_the_conversion_runs_as_it_stands(tmp_path, monkeypatch):
    """Of a file with ALBEF's names and small weights; and with a tokenizer from here, as the default is on the Hub."""
    tokenizer = train_wordpiece_tokenizer(["what color is it?"])
    sizes = TINY._replace(width=64, num_heads=1, vocab=len(tokenizer))
    torch.save({"model": random_checkpoint("question-answering", sizes)}, tmp_path / "vqa.pth")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (command,) = re.findall(r"^python examples/convert_checkpoint.py (.*)$", (ROOT / "README.md").read_text(), re.M)
    monkeypatch.chdir(tmp_path)
    convert_checkpoint.main([*shlex.split(command), "--tokenizer", "tokenizer"])
    config = TripsForQuestionAnswering.from_pretrained("albef-vqa").config
    assert (config.selection_layers, config.keep_rate) == ([5, 10], 0.7)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_relative_links_exist(document):
    path = ROOT / document
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", path.read_text()) if "://" not in link]
    assert links
    for link in links:
        assert (path.parent / link).exists(), link


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_name_existing_scripts_and_targets(document):
    text = (ROOT / document).read_text()
    makefile = (ROOT / "Makefile").read_text()
    for script in set(re.findall(r"examples/\w+\.py", text)):
        assert (ROOT / script).exists(), script
    for target in set(re.findall(r"`make ([\w-]+)`|^make ([\w-]+)", text, re.MULTILINE)):
        assert re.search(rf"^{''.join(target)}:", makefile, re.MULTILINE), target
