"""A folder of images, and the suffixes of files with rows."""

import numpy as np
import PIL.Image
import pytest


@pytest.fixture
def folder(tmp_path):
    PIL.Image.new("L", (4, 3), 200).save(tmp_path / "a.png")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "b.png")
    (tmp_path / "text.png").write_text("no image")
    return tmp_path


@pytest.fixture(params=["json", "jsonl", "csv", "parquet"])
def suffix(request):
    return request.param
