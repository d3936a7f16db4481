"""The structure of packages and the direction of imports."""

import ast
import sys
from graphlib import TopologicalSorter

import pytest
from import_graph import modules
from places import ROOT


MODULES = modules()
FLAT = {name.removeprefix("modeling_trips.") for name in MODULES if name.count(".") == 1 and MODULES[name].is_flat}
SCRIPTS = {name for name, module in MODULES.items() if module.path.parent == ROOT / "examples" and "." in name}
PACKAGES_OF_EXAMPLES = {name for name in MODULES if name.startswith("trips_examples.")} - SCRIPTS

# Allowed imports of the files that a checkpoint may carry.
ARROWS = {
    "image_decoding_trips": set(),
    "patch_selection": set(),
    "configuration_trips": set(),
    "processing_trips": {"configuration_trips", "image_decoding_trips"},
    "pipeline_trips": {"processing_trips"},
    "pipeline_trips_retrieval": {"processing_trips"},
    "modeling_trips_text": {"configuration_trips", "modeling_trips_vision", "patch_selection"},
    "modeling_trips_vision": {"configuration_trips", "patch_selection"},
    "modeling_trips": {
        "configuration_trips",
        "modeling_trips_text",
        "modeling_trips_vision",
        "patch_selection",
        "pipeline_trips",
    },
    "modeling_trips_classification": {
        "configuration_trips",
        "modeling_trips",
        "modeling_trips_text",
        "modeling_trips_vision",
    },
    "modeling_trips_grounding": {
        "configuration_trips",
        "modeling_trips",
        "modeling_trips_text",
        "modeling_trips_vision",
        "patch_selection",
    },
    "modeling_trips_pretraining": {
        "configuration_trips",
        "modeling_trips",
        "modeling_trips_text",
        "modeling_trips_vision",
        "pipeline_trips_retrieval",
    },
}


def imports_of(names) -> set[tuple[str, str]]:
    return {(name, target) for name in names for target in MODULES[name].imports}


def test_no_module_imports_itself_in_the_end():
    tuple(TopologicalSorter({name: module.imports for name, module in MODULES.items()}).static_order())


@pytest.mark.parametrize("name", ARROWS)
def test_arrows_go_down(name):
    targets = {target.removeprefix("modeling_trips.") for target in MODULES[f"modeling_trips.{name}"].imports}
    assert targets <= ARROWS[name]


def test_the_models_import_what_an_installation_without_extras_has():
    installed = {"PIL", "huggingface_hub", "numpy", "packaging", "safetensors", "torch", "transformers"}
    for name in FLAT:
        nodes = [node for node in MODULES[f"modeling_trips.{name}"].tree.body if isinstance(node, ast.Import)]
        names = [alias.name for node in nodes for alias in node.names]
        tree = MODULES[f"modeling_trips.{name}"].tree
        names += [node.module for node in tree.body if isinstance(node, ast.ImportFrom) and not node.level]
        assert {name.partition(".")[0] for name in names} <= installed | sys.stdlib_module_names, name


def test_a_checkpoint_carries_whole_what_it_imports():
    """Transformers only copies files that are imported as `from .sibling import name`."""
    for name in FLAT:
        for node in ast.walk(MODULES[f"modeling_trips.{name}"].tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module in FLAT, f"{name}.py, line {node.lineno}"
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                sources = [getattr(node, "module", None) or alias.name for alias in node.names]
                roots = {source.partition(".")[0] for source in sources}
                assert not roots & {"modeling_trips", "trips_examples"}, f"{name}.py, line {node.lineno}"


def test_the_list_of_all_classes_is_imported_at_the_top_alone():
    assert [name for name, target in imports_of(MODULES) if target.endswith(".registration_trips")] == [
        "modeling_trips"
    ]


def test_the_package_knows_no_example_and_the_packages_of_examples_know_no_script():
    assert SCRIPTS and PACKAGES_OF_EXAMPLES
    package = {name for name in MODULES if name.partition(".")[0] == "modeling_trips"}
    assert {target for _, target in imports_of(package)} <= package
    assert {target for _, target in imports_of(PACKAGES_OF_EXAMPLES)} <= package | PACKAGES_OF_EXAMPLES
    service = {name for name in MODULES if name.partition(".")[0] == "trips_serving"}
    assert {target for _, target in imports_of(service)} <= package | service
    benchmarks = set(MODULES) - package - SCRIPTS - PACKAGES_OF_EXAMPLES - {"trips_examples"} - service
    assert {target for _, target in imports_of(benchmarks)} <= package | PACKAGES_OF_EXAMPLES | benchmarks
