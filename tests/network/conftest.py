"""Tests of published files, which download gigabytes. Only `pytest -m network` runs them."""

import urllib.request
from pathlib import Path

import huggingface_hub
import PIL.Image
import pytest
import torch


HUB = "https://huggingface.co"
TWO_CATS = "http://images.cocodataset.org/val2017/000000039769.jpg"  # the example of BLIP's and ViLT's model cards


@pytest.fixture(scope="session", autouse=True)
def online():
    try:
        urllib.request.urlopen(urllib.request.Request(HUB, method="HEAD"), timeout=10).close()
    except OSError as error:
        pytest.skip(f"{HUB} cannot be reached: {error}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield


@pytest.fixture(scope="session")
def download(online):
    """Return a function that downloads a URL once and returns its path in PyTorch's cache."""

    def fetch(url: str) -> Path:
        path = Path(torch.hub.get_dir()) / "trips_network_tests" / url.rsplit("/", 1)[-1]
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), progress=False)
        return path

    return fetch


@pytest.fixture(scope="session")
def two_cats(download) -> PIL.Image.Image:
    return PIL.Image.open(download(TWO_CATS)).convert("RGB")
