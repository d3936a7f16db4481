"""Pickles of annotations: plain data is read, and no code is executed."""

import contextlib
import pickle
from resource import RUSAGE_SELF, getrusage

import numpy as np
import pytest
from loading import load

from trips_examples.data.annotations import AnnotationFile, read_plain_pickle


class Hostile:
    """Object that makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        import os

        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_hostile_pickle_runs_nothing(tmp_path, protocol):
    file = tmp_path / "refs(unc).p"
    content = pickle.dumps([{"ref_id": 1, "sentences": Hostile(tmp_path / "made")}], protocol)
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"refs.unc..p.*\w+.mkdir"):
        load("grounding", train_file=file)
    assert not (tmp_path / "made").exists()
    pickle.loads(content)  # the same file, read as anyone would
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "value",
    [np.float64(1.5), np.zeros(2), {1, Ellipsis}, complex(1, 2), Hostile, len, AnnotationFile, range(3)],
    ids=repr,
)
def test_no_class_or_function_is_unpickled(tmp_path, value):
    (tmp_path / "file.p").write_bytes(pickle.dumps([value], 2))
    with pytest.raises(ValueError, match="it refers to"):
        read_plain_pickle(tmp_path / "file.p")


def test_pickle_of_plain_data_is_read(tmp_path):
    value = [{"a": [1, 2.5, "é", None, True]}, ("b",), 2**70, b"c"]
    for protocol in (3, 4, 5):
        (tmp_path / "file.p").write_bytes(pickle.dumps(value, protocol))
        assert read_plain_pickle(tmp_path / "file.p") == value
    (tmp_path / "file.p").write_bytes(b"(lp0\nS'caf\\xc3\\xa9'\np1\na.")  # as written by Python 2
    assert read_plain_pickle(tmp_path / "file.p") == ["café"]


@pytest.mark.parametrize(
    "content",
    [
        b"]r\xff\xff\xff\x0f.",
        b"]p4000000000\n.",
        b"\x80\x05B\xff\xff\xff\x0fabc.",
        b"\x80\x05\x95" + b"\xff" * 7 + b"\x0f].",
    ],
    ids=["LONG_BINPUT", "PUT", "BINBYTES", "FRAME"],
)
def test_a_small_pickle_takes_little_memory(tmp_path, content):
    """The pickles claim a large memo index or length."""
    file = tmp_path / "file.p"
    file.write_bytes(content)
    peak = getrusage(RUSAGE_SELF).ru_maxrss  # KiB
    with contextlib.suppress(ValueError):
        read_plain_pickle(file)
    assert getrusage(RUSAGE_SELF).ru_maxrss - peak < 2**16


def test_broken_and_other_pickles_are_named(tmp_path):
    file = tmp_path / "refs.p"
    for content, message in (
        (b"no pickle", "refs.p"),
        (pickle.dumps([1]), "refs.p is a pickle, and not of"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load("grounding", train_file=file)
