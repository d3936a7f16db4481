"""Links, scripts, options, make targets and paths in the docs exist."""

import importlib
import importlib.util
import re
import sys
from argparse import ArgumentParser
from functools import cache
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from documents import DOCUMENTS, Document
from places import EXAMPLES, ROOT
from transformers import HfArgumentParser

import modeling_trips.serving_vllm.__main__ as serving_vllm
from modeling_trips import TripsConfig


each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=str)
# The changelog and the reports may have outdated names and commands.
each_current_document = pytest.mark.parametrize(
    "document",
    [
        document
        for document in DOCUMENTS
        if "reports" not in document.path.parts and document.path.name != "CHANGELOG.md"
    ],
    ids=str,
)
FOLDERS = (EXAMPLES, ROOT / "benchmarks", ROOT / "benchmarks" / "images", ROOT / "docs")
SCRIPTS = {
    path.stem: path for folder in FOLDERS for path in folder.glob("*.py") if "\ndef main(" in path.read_text("utf-8")
}
TRAINED_BY_DEMO = "run_vqa"


@each_document
def test_links_lead_somewhere(document):
    for link in document.links:
        name, _, anchor = link.partition("#")
        target = (document.path.parent / name).resolve() if name else document.path
        assert target.exists(), link
        assert not anchor or anchor in Document(target).anchors, link


@each_document
def test_targets_of_make_exist(document):
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|^)make ([\w-]+)", document.text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@cache
def options_of(script: str) -> set[str]:
    """Return all options of a script from its parser. The analysis passes options to another script."""
    spec = importlib.util.spec_from_file_location(f"documented_{script}", SCRIPTS[script])
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return options_of_main(module.main) | (options_of(TRAINED_BY_DEMO) if script == "analyze_errors" else set())


def options_of_main(main) -> set[str]:
    options = set()

    def note(parser, *args, **kwargs):
        options.update(option for action in parser._actions for option in action.option_strings)
        raise SystemExit

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(HfArgumentParser, "parse_args_into_dataclasses", note)
        patch.setattr(ArgumentParser, "parse_known_args", note)
        main([])
    return options


@cache
def all_options() -> set[str]:
    launcher = {option for action in launch_command_parser()._actions for option in action.option_strings}
    return launcher.union(options_of_main(serving_vllm.main), *map(options_of, SCRIPTS))


def script_of(words: list[str]) -> tuple[str, int] | None:
    """Return the script of a command and its position."""
    for place, word in enumerate(words):
        name = word.removeprefix("trips_examples.")
        if word.endswith(".py") or (words[place - 1] == "-m" and name != word):
            return Path(name).stem, place
    return None


@each_current_document
def test_commands_take_their_options(document):
    for words in document.commands:
        found = script_of(words)
        if found is None or "pytest" in words:
            continue
        script, place = found
        if words[place].endswith(".py"):
            assert (ROOT / words[place]).is_file(), words[place]
        own, _, passed_on = " ".join(words[place + 1 :]).partition(" -- ")
        options = {word.partition("=")[0] for word in own.split() if word.startswith("--")}
        assert options <= options_of(script), words
        ablated = re.search(r"--script (\w+)", own)
        further = {word for word in passed_on.split() if word.startswith("--")}
        assert further <= options_of(ablated[1] if ablated else TRAINED_BY_DEMO), words
        launcher = {word for word in words[:place] if word.startswith("--")}
        assert launcher <= {option for action in launch_command_parser()._actions for option in action.option_strings}


@each_current_document
def test_options_in_the_text_exist(document):
    for span in document.code_spans:
        if span.startswith("--"):
            options = {word for word in span.split() if word.startswith("--")}
            assert options <= all_options(), span


@each_current_document
def test_paths_in_the_text_exist(document):
    for span in document.code_spans:
        if re.match(r"(examples|benchmarks|modeling_trips|docs|tests)/[\w./*]*$", span):
            assert list(ROOT.glob(span.rstrip("/"))), span


@each_current_document
def test_names_in_the_text_can_be_imported(document):
    for span in document.code_spans:
        if match := re.match(r"((?:modeling_trips|trips_examples)(?:\.\w+)+)(?:\(.*)?$", span):
            assert can_be_imported(match[1]), span


def can_be_imported(name: str) -> bool:
    """Return whether a name is a module or an attribute of a module."""
    module, _, attribute = name.rpartition(".")
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return hasattr(importlib.import_module(module), attribute)


def test_fields_of_the_configuration_exist():
    """The fields are those in `docs/use.md`."""
    (use,) = [document for document in DOCUMENTS if str(document) == "docs/use.md"]
    fields = re.findall(r"^\| `(\w+)` \|", use.text, re.MULTILINE)
    config = TripsConfig()
    assert {"selection_layers", "keep_rate"} <= set(fields)
    parts = (config, config.vision_config, config.fusion_encoder_config)
    for field in fields:
        assert field.startswith("Trips") or any(hasattr(part, field) for part in parts), field
