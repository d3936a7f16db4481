"""
Setup of Transformers' test suites, which are only in its source distribution. It lacks four of their imports.
"""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path


HERE = Path(__file__).resolve().parent
OUR_SUITES = ("config_suite.py", "model_suites.py", "model_testers.py", "processor_suite.py")

# Stubs of missing imports. Generation is tested in tests/models/test_modeling_trips_generation.py.
STUBS = {
    "tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "tests/utils/test_configuration_utils.py": """config_common_kwargs = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["BertModel"],
    "id2label": {0: "label"},
    "label2id": {"label": 0},
    "problem_type": "regression",
}
""",
    "utils/fetch_hub_objects_for_ci.py": """from pathlib import Path

from PIL import Image


def url_to_local_path(url, *args, **kwargs):
    path = Path(__file__).parent / Path(url).name
    if path.suffix == ".png":
        Image.new("RGB", (40, 30), "teal").save(path)
    return str(path)
""",
    "pytest.ini": "[pytest]\n",
}


def download_source(version, cache):
    """Download the source distribution of a version of Transformers once, and return the archive in `cache`."""
    archive = cache / f"transformers-{version}.tar.gz"
    if archive.exists():
        return archive
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [sys.executable, "-m", "pip", "download", f"transformers=={version}", "--dest", folder]
        command += ["--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(
                f"pip could not download the source of transformers {version}, which holds the test suites. Connect "
                f"to the internet (and have pip and setuptools installed), or put {archive.name} into {cache}.\n"
                f"{result.stdout}{result.stderr}"
            )
        (Path(folder) / archive.name).replace(archive)
    return archive


def build_tree(archive, target):
    """Unpack the suites into `target`, with the stubs, and with this project's testers in `tests/models/trips`."""
    root = archive.name.removesuffix(".tar.gz")
    with tarfile.open(archive) as source:
        members = [member for member in source if member.name.startswith(f"{root}/tests/")]
        source.extractall(target, members, filter="data")
    (target / root / "tests").rename(target / "tests")
    for name, text in STUBS.items():
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    ours = target / "tests/models/trips"
    ours.mkdir(parents=True)
    for name in OUR_SUITES:
        shutil.copy(HERE / name, ours)
    for folder in (target / "tests", *(target / "tests").rglob("*")):
        if folder.is_dir():
            (folder / "__init__.py").touch()
