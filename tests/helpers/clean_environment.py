"""Virtual environments with the packages of the running one, some in other versions, without this project."""

import json
import subprocess
import sys
import venv
from pathlib import Path

from filelock import FileLock


ROOT = Path(__file__).resolve().parent.parent.parent


def make_environment(folder, packages=None, exclude_project=True):
    """
    Build a virtual environment that imports the running environment's packages, or reuse an existing one.

    The running environment's site-packages come last on its path. pip finds them there, so it installs only `packages`
    and those of their dependencies that the running environment lacks or has in a version that does not fit.

    Start the returned interpreter with `-I`: it then ignores PYTHONPATH and the current folder.

    Args:
        folder (`str` or `Path`):
            Where the environment is or will be. One built there with other arguments, or not to the end, is replaced.
        packages (`list[str]`, *optional*):
            What to install, as pip takes it: `["transformers==5.24.0"]`. Needs a package index if not empty.
        exclude_project (`bool`, *optional*, defaults to `True`):
            Whether importing the project fails, even where it is installed in the running environment as editable. If
            `False`, it is imported from where the running environment imports it.

    Returns:
        `Path`: The environment's Python interpreter.

    Raises:
        `subprocess.CalledProcessError`: pip failed; it says why on stderr.
    """
    folder = Path(folder).absolute()
    python = folder / "bin" / "python"
    inherited = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    if not exclude_project:
        # Unlike a path alone, this reads the folder's .pth files. An editable install is made of nothing else.
        inherited = [f"import site; site.addsitedir({path!r})" for path in inherited]
    recipe = json.dumps({"python": sys.version, "packages": packages, "inherited": inherited}, indent=2)
    finished = folder / "recipe.json"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # another process may be building it
        if not finished.is_file() or finished.read_text() != recipe:
            _build(folder, python, inherited, packages)
            finished.write_text(recipe)
    return python


def _build(folder, python, inherited, packages):
    venv.create(folder, clear=True, symlinks=True)
    site_packages = next(folder.glob("lib/python*/site-packages"))
    (site_packages / "inherited.pth").write_text("\n".join(inherited) + "\n")
    if packages:
        subprocess.run([sys.executable, "-m", "pip", "--python", str(python), "install", *packages], check=True)
