"""Files and folders are written whole or not at all."""

import signal
import subprocess
import sys

import pytest
from places import ROOT

from modeling_trips.inspection.files import whole_file, whole_folder


WRITER = """
import sys, time
from modeling_trips.inspection.files import whole_folder

with whole_folder(sys.argv[1]) as folder:
    folder.mkdir()
    (folder / "half").write_text("half of it")
    print("writing", flush=True)
    time.sleep(60)
"""


def stop_while_writing(folder, number: int) -> int:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, folder], stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": str(ROOT)}
    )
    assert process.stdout.readline() == "writing\n"
    process.send_signal(number)
    process.stdout.close()
    return process.wait(timeout=30)


def test_folder_appears_when_complete(tmp_path):
    with whole_folder(tmp_path / "deep" / "out") as folder:
        folder.mkdir()
        (folder / "file").write_text("all of it")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "file").read_text() == "all of it"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.slow
def test_stopped_run_leaves_nothing_behind(tmp_path):
    assert stop_while_writing(tmp_path / "out", signal.SIGTERM) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    assert stop_while_writing(tmp_path / "out", signal.SIGKILL) == -signal.SIGKILL
    with whole_folder(tmp_path / "out") as folder:
        folder.mkdir()
        with pytest.raises(ValueError, match="stop"), whole_folder(tmp_path / "out"):
            raise ValueError("stop")
        assert folder.is_dir()  # that of a living process stays
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_block_leaves_nothing_behind(tmp_path):
    with pytest.raises(ValueError, match="stop"), whole_folder(tmp_path / "out") as folder:
        folder.mkdir()
        raise ValueError("stop")
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_whole_or_as_before(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with whole_file(path) as partial:
        partial.write_text("first")
        assert not path.exists()
    with pytest.raises(ValueError, match="stop"), whole_file(path) as partial:
        partial.write_text("second")
        raise ValueError("stop")
    assert path.read_text() == "first" and list(path.parent.iterdir()) == [path]
