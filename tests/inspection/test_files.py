"""Files and folders are written whole or not at all."""

import pytest
from filelock import FileLock

from modeling_trips.inspection.files import whole_file, whole_folder


def test_a_folder_is_whole_or_absent(tmp_path):
    with pytest.raises(ValueError), whole_folder(tmp_path / "deep" / "out") as folder:
        folder.mkdir()
        raise ValueError("stop")
    assert list((tmp_path / "deep").iterdir()) == []
    with whole_folder(tmp_path / "deep" / "out") as folder:
        folder.mkdir()
        (folder / "file").write_text("all of it")
        assert not (tmp_path / "deep" / "out").exists()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    assert (tmp_path / "deep" / "out" / "file").read_text() == "all of it"


def test_what_a_killed_process_left_is_removed(tmp_path):
    """But not what another process writes, which holds the lock."""
    for name in (".out-writing-dead", ".out-writing-alive", ".other-writing-dead"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
    with FileLock(tmp_path / ".out-writing-alive" / "lock"), whole_folder(tmp_path / "out") as folder:
        folder.mkdir()
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".out-writing-alive", ".other-writing-dead"}


def test_a_file_is_whole_or_as_before(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with whole_file(path) as partial:
        partial.write_text("first")
        assert not path.exists()
    with pytest.raises(ValueError), whole_file(path) as partial:
        partial.write_text("second")
        raise ValueError("stop")
    assert path.read_text() == "first" and list(path.parent.iterdir()) == [path]
