"""Import paths, number of threads (tiny models are slower with two), and seed of all tests."""

import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path


# Before libraries that read them are imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
CACHE = tempfile.TemporaryDirectory()  # removed at the end
os.environ["HF_DATASETS_CACHE"] = CACHE.name

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers"), str(ROOT / "benchmarks"), str(ROOT / "docs")]
sys.path.append(str(ROOT / "benchmarks" / "images"))

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from clean_environment import make_environment  # noqa: E402
from packaging.version import Version  # noqa: E402

from modeling_trips import TripsConfig  # noqa: E402
from modeling_trips.registration_trips import MODELS  # noqa: E402
from trips_examples.data.vocabulary import train_tokenizer  # noqa: E402
from trips_examples.training import recipe  # noqa: E402
from trips_examples.training.models import make_processor  # noqa: E402


recipe.PLACES = recipe.PLACES[:1]  # not the towers of the checkout

torch.set_num_threads(1)
# The exporters are new in 5.24, and the docs use them.
collect_ignore = ["docs", "export"]
if Version(transformers.__version__) >= Version("5.24"):
    collect_ignore = []


@pytest.fixture(autouse=True, scope="session")
def folder_of_their_own(tmp_path_factory):
    """Run the tests in a folder that has the project's, and nothing that a user made in the checkout, as `towers`."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("benchmarks", "docs", "examples", "serving", "tests"):
        (folder / name).symlink_to(ROOT / name)
    with contextlib.chdir(folder):
        yield


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def clean_python(tmp_path_factory):
    """Return a Python with the project's dependencies, without the project. The workers of pytest-xdist share it."""
    folder = tmp_path_factory.getbasetemp()
    return make_environment((folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "clean")


@pytest.fixture
def browser_page():
    playwright = pytest.importorskip("playwright.sync_api")
    programs = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    chromium = next(filter(None, programs), None)
    if chromium is None:
        pytest.skip("no chromium is installed")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield browser.new_page()
        browser.close()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Return the folders of untrained checkpoints of all heads with their processors, by class name."""
    tokenizer = train_tokenizer(["what color is it?", "is it a circle?", "a picture of red blue yes no"])
    config = TripsConfig.from_preset("tiny", text_config={"vocab_size": len(tokenizer)})
    heads = {model for models in MODELS.values() for model in models if model.config_class is TripsConfig}
    folder, folders = tmp_path_factory.mktemp("checkpoints"), {}
    for head in sorted(heads, key=lambda head: head.__name__):
        torch.manual_seed(0)
        folders[head.__name__] = folder / head.__name__
        head(config).save_pretrained(folders[head.__name__])
        text_cleaning = "albef_question" if head.__name__ == "TripsForQuestionAnswering" else None
        make_processor(tokenizer, config, text_cleaning).save_pretrained(folders[head.__name__])
    return folders
