"""The project's imports, read from the source, including imports inside functions."""

import ast
from importlib.util import resolve_name
from pathlib import Path
from typing import NamedTuple

from places import ROOT


ROOTS = {
    "modeling_trips": ROOT / "modeling_trips",
    "trips_examples": ROOT / "examples",
    "trips_serving": ROOT / "serving",
}


class Module(NamedTuple):
    """A module of the project: its file, source, and the modules that it imports."""

    path: Path
    tree: ast.Module
    imports: set[str]

    @property
    def is_flat(self):
        """Whether checkpoints may carry this file."""
        return self.path.parent == ROOTS["modeling_trips"] and self.path.name != "__init__.py"


def modules():
    """Return the modules of the package, the examples and the service, by name."""
    paths = {}
    for package, root in ROOTS.items():
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            paths[".".join([package, *parts]).removesuffix(".__init__")] = path
    found = {}
    for name, path in paths.items():
        tree = ast.parse(path.read_text("utf-8"))
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        found[name] = Module(path, tree, _imports(name, package, tree, paths.keys()))
    return found


def _imports(name, package, tree, known):
    targets = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                inner = f"{source}.{alias.name}"  # `from package import module` imports the module
                targets.append(inner if inner in known else source)
    # Python imports the parent packages first.
    rooms = [target.rpartition(".")[0] for target in targets if target in known]
    return {target for target in targets if target in known} | {
        room for room in rooms if "." in room and not name.startswith(room)
    }
