"""Detection of folders of exported models, without packages of the extra `export`."""

from pathlib import Path


EXPORT_MANIFEST = "export.json"


def is_exported(name: str | Path) -> bool:
    """Return whether `name` is a folder that `python -m modeling_trips.export` wrote."""
    return (Path(name) / EXPORT_MANIFEST).is_file()
