"""`examples/app.py` in a process of its own, asked over HTTP. Skipped where gradio is missing."""

import io
import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import PIL.Image
import pytest
from easy_vqa import get_test_image_paths
from places import EXAMPLES
from programs import add_fake_ghostscript
from running_service import free_port

from modeling_trips import TripsConfig, TripsForRetrieval
from trips_examples.analysis.asking import Asker
from trips_examples.ask import CHECKPOINT


pytest.importorskip("gradio")
client = pytest.importorskip("gradio_client")

# What Python runs at its start: names of hosts are written to a file, and none but those of this machine are found.
WATCHED_NAMES = """
import os, socket

find = socket.getaddrinfo

def find_and_note(host, *args, **kwargs):
    name = host.decode() if isinstance(host, bytes) else host
    with open(os.environ["NAMES"], "a") as names:
        names.write(f"{name}\\n")
    if name not in (None, "", "localhost", "127.0.0.1", "::1"):
        raise socket.gaierror(socket.EAI_NONAME, "no network")
    return find(host, *args, **kwargs)

socket.getaddrinfo = find_and_note
"""


class RunningApp:
    """
    The page of a checkpoint, from entering to leaving.

    Args:
        folder (`Path`): For its log and what it uploads.
        variables: Of its environment. The ones that keep Hugging Face's and Gradio's libraries silent are removed.
    """

    def __init__(self, folder: Path, **variables: str):
        self.port, self.folder, self.log = free_port(), folder, folder / "app.log"
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "GRADIO_"))}
        self.environment = {**kept, "OMP_NUM_THREADS": "1", "GRADIO_TEMP_DIR": str(folder / "uploads"), **variables}

    def __enter__(self) -> "RunningApp":
        command = [sys.executable, str(EXAMPLES / "app.py"), "--model", str(CHECKPOINT), "--port", str(self.port)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=subprocess.STDOUT)
        for _ in range(600):
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/").close()
                break
            except OSError:
                time.sleep(0.5)
        self.client = client.Client(f"http://127.0.0.1:{self.port}/", verbose=False)
        return self

    def __exit__(self, *error):
        self.client.close()
        self.process.terminate()
        self.process.wait(60)

    def ask(self, image: Path | str, lines: str = "what color is the shape?", rate: float = 0.25) -> str:
        return self.client.predict(client.handle_file(str(image)), lines, rate, "text", api_name="/look")

    def error(self, *question, **options) -> str:
        with pytest.raises(client.exceptions.AppError) as raised:
            self.ask(*question, **options)
        return str(raised.value)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> SimpleNamespace:
    """A `gs` in the PATH and an EPS image; a module that watches names of hosts, and where it writes them."""
    folder = tmp_path_factory.mktemp("app")
    variables = {}
    eps, gs_was_started = add_fake_ghostscript(folder, variables.__setitem__)
    (folder / "sitecustomize.py").write_text(WATCHED_NAMES)
    names = folder / "names"
    variables |= {"PYTHONPATH": str(folder), "NAMES": str(names)}
    return SimpleNamespace(folder=folder, variables=variables, eps=eps, gs_was_started=gs_was_started, names=names)


@pytest.fixture(scope="module")
def app(files):
    with RunningApp(files.folder, **files.variables) as app:
        yield app


@pytest.mark.slow
def test_no_host_is_looked_up(app, files):
    """Neither at the start, nor for questions."""
    assert "what color is the shape?" in app.ask(get_test_image_paths()[0])
    assert set(files.names.read_text().split()) <= {"127.0.0.1", "localhost", "None"}


@pytest.mark.slow
def test_eps_is_refused_without_a_program_being_started(app, files):
    assert "JPEG" in app.error(files.eps)
    assert not files.gs_was_started.exists()


@pytest.mark.slow
def test_an_image_that_takes_long_to_decode_is_refused(app, tmp_path):
    """A progressive JPEG whose last scan comes 2,000 times."""
    content = io.BytesIO()
    PIL.Image.new("RGB", (4000, 4000), "teal").save(content, "JPEG", progressive=True)
    jpeg = content.getvalue()
    scan = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    (tmp_path / "scans.jpg").write_bytes(jpeg[:-2] + 2000 * scan + jpeg[-2:])
    assert "scans" in app.error(tmp_path / "scans.jpg")


@pytest.mark.slow
def test_two_questions_about_a_photo_of_12_megapixels_take_little_time(app, tmp_path):
    PIL.Image.effect_noise((4000, 3000), 20).convert("RGB").save(tmp_path / "photo.jpg", quality=80)
    lines = "what color is the shape?\nis there a circle?"
    app.ask(tmp_path / "photo.jpg", lines)
    before = seconds_of(app.process.pid)
    assert app.ask(tmp_path / "photo.jpg", lines).count("<section") == 2
    assert seconds_of(app.process.pid) - before < 3


def seconds_of(pid: int) -> float:
    """The processor's time of a process and of its children, which other programs do not lengthen."""
    psutil = pytest.importorskip("psutil")
    process = psutil.Process(pid)
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return sum(each.user + each.system for each in times)


@pytest.mark.slow
@pytest.mark.parametrize("rate", [None, 0, 7, "0.5"])
def test_a_rate_that_is_none_is_named(app, rate):
    assert app.error(get_test_image_paths()[0], rate=rate) == "Layer 2 needs a keep rate from 0.05 to 1."


@pytest.mark.slow
def test_a_line_that_is_too_long_is_named_without_words_of_python(app):
    message = app.error(get_test_image_paths()[0], 120 * "a ")
    assert re.search(r"122 tokens; at most 64", message) and "`" not in message and "truncation" not in message


@pytest.mark.slow
def test_mistakes_of_visitors_are_no_tracebacks_in_the_log(app):
    app.error(get_test_image_paths()[0], "")
    assert "Traceback" not in app.log.read_text()


def test_checkpoints_for_other_tasks_are_refused(tmp_path):
    TripsForRetrieval(TripsConfig.from_preset("tiny")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="TripsForRetrieval"):
        Asker(str(tmp_path))


def test_exported_models_are_refused_by_name(tmp_path):
    (tmp_path / "export.json").write_text("{}")
    with pytest.raises(ValueError, match="exported"):
        Asker(str(tmp_path))
