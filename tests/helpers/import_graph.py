"""The project's imports, read from the source, including imports inside functions."""

import ast
from pathlib import Path
from typing import NamedTuple

from places import ROOT


ROOTS = {
    "modeling_trips": ROOT / "modeling_trips",
    "trips_examples": ROOT / "examples",
    "trips_serving": ROOT / "serving",
}


class Module(NamedTuple):
    """A module of the project: its name, file, source, and imported names by module."""

    name: str
    path: Path
    tree: ast.Module
    imports: dict[str, set[str]]

    @property
    def is_flat(self) -> bool:
        """Whether checkpoints may carry this file."""
        return self.path.parent == ROOTS["modeling_trips"] and self.path.name != "__init__.py"


def modules() -> dict[str, Module]:
    """Return the modules of the package, the examples and the service, by name."""
    paths = {}
    for package, root in ROOTS.items():
        for path in sorted(root.rglob("*.py")):
            paths[_name(package, path)] = path
    trees = {name: ast.parse(path.read_text("utf-8")) for name, path in paths.items()}
    return {name: Module(name, path, trees[name], _imports(name, path, trees)) for name, path in paths.items()}


def _name(package: str, path: Path) -> str:
    parts = path.relative_to(ROOTS[package]).with_suffix("").parts
    return ".".join([package, *parts]).removesuffix(".__init__")


def _imports(name: str, path: Path, trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    package = name.split(".")
    if path.name != "__init__.py":
        package.pop()
    found: dict[str, set[str]] = {}
    for node in ast.walk(trees[name]):
        for module, imported in _imported(node, package):
            inner = f"{module}.{imported}"  # `from package import module` imports the module
            target = inner if inner in trees else module
            if target in trees:
                found.setdefault(target, set()).add(imported)
                room = target.rpartition(".")[0]  # Python imports the parent packages first
                if "." in room and not name.startswith(room):
                    found.setdefault(room, set())
    return found


def _imported(node: ast.AST, package: list[str]) -> list[tuple[str, str]]:
    """Return the (module, name) pairs that a statement imports."""
    if isinstance(node, ast.Import):
        return [(alias.name, "") for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    parts = package[: len(package) - node.level + 1] if node.level else []
    if node.module is not None:
        parts = [*parts, node.module]
    return [(".".join(parts), alias.name) for alias in node.names]
