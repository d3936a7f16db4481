"""
Damaged image files and pickles from strangers are read or named in an error of this project.

Each run uses the same few examples; FUZZ_EXAMPLES=100000 sets their number and draws other ones in each run.
"""

import io
import json
import os
import pickle
from pathlib import Path

import PIL.Image
import pytest
from bad_rows import PATCH_SIZE, write_images
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from places import EXAMPLES

from trips_examples.data.faults import BadRowError, BadRows
from trips_examples.data.images import inspect_image
from trips_examples.data.loading import load_task_dataset
from trips_examples.data.source import DataSource


REFS = [{"ref_id": 1, "ann_id": 4, "image_id": 1, "split": "train", "sentences": [{"sent": "dog", "sent_id": 5}]}]
INSTANCES = {
    "images": [{"id": 1, "file_name": "good.png", "coco_url": "http://x/val2014/good.png"}],
    "annotations": [{"id": 4, "bbox": [1, 1, 9, 9], "image_id": 1}],
}
EXAMPLES_OF_EACH = int(os.environ.get("FUZZ_EXAMPLES", 15))
fuzz = settings(
    max_examples=EXAMPLES_OF_EACH,
    deadline=None,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    write_images(folder)
    return folder


def is_ours(error: Exception) -> bool:
    """Return whether this project raised the error, and not a library."""
    place = error.__traceback__
    while place.tb_next is not None:
        place = place.tb_next
    return isinstance(error, (ValueError, FileNotFoundError)) and Path(
        place.tb_frame.f_code.co_filename
    ).resolve().is_relative_to(EXAMPLES)


def read(file: Path, folder: Path) -> dict:
    """Return the rows of a file of referring expressions, or none if it is refused."""
    bad_rows = BadRows(image_check="decode", patch_size=PATCH_SIZE, collected=[])
    source = DataSource(train_file=str(file), image_root=str(folder), cache_dir=str(folder / "cache"))
    try:
        return load_task_dataset("grounding", source, bad_rows)
    except Exception as error:
        if not is_ours(error):
            raise
        return {}


def mutated(content: bytes) -> st.SearchStrategy[bytes]:
    """Return the content with a few pieces replaced, removed or repeated."""
    place = st.integers(0, len(content))
    piece = st.one_of(st.binary(max_size=8), st.sampled_from([b'"', b"\n", b"\\", b"\xff", b"[" * 5000, b"\0" * 9]))

    def change(changes) -> bytes:
        changed = content
        for start, end, new in changes:
            changed = changed[:start] + new + changed[end:]
        return changed

    return st.lists(st.tuples(place, place, piece), max_size=3).map(change)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "tiff", "webp"])
def test_images_are_decoded_or_named(suffix, folder):
    pixels = PIL.Image.open(folder / "good.png")
    buffer = io.BytesIO()
    pixels.save(buffer, {"jpg": "JPEG"}.get(suffix, suffix))

    @fuzz
    @given(mutated(buffer.getvalue()))
    def check(content):
        (folder / "mutated").write_bytes(content)
        for how in ("header", "verify", "decode"):
            for image in (content, str(folder / "mutated")):
                found = inspect_image(image, how, PATCH_SIZE)
                assert isinstance(found, BadRowError) or min(found) >= PATCH_SIZE

    check()


def test_pickles_are_read_or_named(folder):
    (folder / "instances.json").write_text(json.dumps(INSTANCES))

    @fuzz
    @given(mutated(pickle.dumps(REFS)))
    def check(content):
        (folder / "mutated.p").write_bytes(content)
        read(folder / "mutated.p", folder)

    check()
