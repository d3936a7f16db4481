"""The direction of imports."""

import ast
import sys
from graphlib import TopologicalSorter

from import_graph import modules
from places import ROOT


MODULES = modules()
FLAT = {name.removeprefix("modeling_trips.") for name in MODULES if name.count(".") == 1 and MODULES[name].is_flat}
PACKAGE = {name for name in MODULES if name.partition(".")[0] == "modeling_trips"}
SERVICE = {name for name in MODULES if name.partition(".")[0] == "trips_serving"}
SCRIPTS = {name for name, module in MODULES.items() if module.path.parent == ROOT / "examples" and "." in name}
SHARED = {name for name in MODULES if name.startswith("trips_examples.")} - SCRIPTS  # what the scripts share


def test_imports_point_down():
    def imports_of(names):
        return {target for name in names for target in MODULES[name].imports}

    sorter = TopologicalSorter({name: module.imports for name, module in MODULES.items()})
    sorter.prepare()  # raises if modules import each other in a circle
    assert imports_of(["modeling_trips.patch_selection", "modeling_trips.schedule_trips"]) == set()
    assert imports_of(["modeling_trips.configuration_trips"]) == {"modeling_trips.schedule_trips"}
    flat = {f"modeling_trips.{name}" for name in FLAT}
    assert imports_of(flat) <= flat
    assert SCRIPTS and SHARED
    assert imports_of(PACKAGE) <= PACKAGE
    assert imports_of(SHARED) <= PACKAGE | SHARED
    assert imports_of(SERVICE) <= PACKAGE | SERVICE


def test_a_checkpoint_carries_what_its_files_import():
    """Transformers copies siblings that are imported as `from .sibling import name`, and follows nothing else."""
    installed = {"PIL", "huggingface_hub", "numpy", "packaging", "safetensors", "torch", "transformers"}
    for name in FLAT:
        for node in ast.walk(MODULES[f"modeling_trips.{name}"].tree):
            if not isinstance(node, (ast.Import, ast.ImportFrom)):
                continue
            place = f"{name}.py, line {node.lineno}"
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1, place
                assert node.module in FLAT, place
                continue
            sources = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            roots = {source.partition(".")[0] for source in sources}
            assert not roots & {"modeling_trips", "trips_examples"}, place
            if node.col_offset == 0:
                assert roots <= installed | sys.stdlib_module_names, place
