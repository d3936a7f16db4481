"""`examples/app.py` in a process of its own, asked over HTTP. Skipped where gradio is missing."""

import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from easy_vqa import get_test_image_paths
from places import EXAMPLES
from programs import add_fake_ghostscript
from running_service import free_port

from trips_examples.ask import CHECKPOINT


pytest.importorskip("gradio")
client = pytest.importorskip("gradio_client")

# Python runs this at its start: names of hosts are written to a file, and only those of this machine are found.
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


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """Serve the shipped checkpoint, with a `gs` in the PATH and a module that watches names of hosts."""
    folder = tmp_path_factory.mktemp("app")
    (folder / "sitecustomize.py").write_text(WATCHED_NAMES)
    # Without the variables that keep the libraries of Hugging Face and Gradio silent.
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "GRADIO_"))}
    variables |= {"PYTHONPATH": str(folder), "NAMES": str(folder / "names"), "OMP_NUM_THREADS": "1"}
    eps, gs_was_started = add_fake_ghostscript(folder, variables.__setitem__)
    variables |= {"GRADIO_TEMP_DIR": str(folder / "uploads")}
    port, log = free_port(), folder / "app.log"
    command = [sys.executable, str(EXAMPLES / "app.py"), "--model", str(CHECKPOINT), "--port", str(port)]
    process = subprocess.Popen(command, env=variables, stdout=log.open("w"), stderr=subprocess.STDOUT)
    for _ in range(600):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/").close()
            break
        except OSError:
            time.sleep(0.5)
    connected = client.Client(f"http://127.0.0.1:{port}/", verbose=False)
    yield SimpleNamespace(client=connected, folder=folder, log=log, eps=eps, gs_was_started=gs_was_started)
    connected.close()
    process.terminate()
    process.wait(60)


def ask(app, image: Path | str, lines: str = "what color is the shape?", rate: float = 0.25) -> str:
    return app.client.predict(client.handle_file(str(image)), lines, rate, "text", api_name="/look")


def error_of(app, *question, **options) -> str:
    with pytest.raises(client.exceptions.AppError) as raised:
        ask(app, *question, **options)
    return str(raised.value)


@pytest.mark.slow
def test_no_host_is_looked_up(app):
    """Neither at the start, nor for questions."""
    assert "what color is the shape?" in ask(app, get_test_image_paths()[0])
    assert set((app.folder / "names").read_text().split()) <= {"127.0.0.1", "localhost", "None"}


@pytest.mark.slow
def test_eps_is_refused_without_a_program_being_started(app):
    assert "JPEG" in error_of(app, app.eps)
    assert not app.gs_was_started.exists()


@pytest.mark.slow
def test_mistakes_of_visitors_are_named_without_words_of_python(app):
    image = get_test_image_paths()[0]
    message = error_of(app, image, 120 * "a ")
    assert "122 tokens; at most 64" in message and "`" not in message and "truncation" not in message
    assert error_of(app, image, rate=7) == "Layer 2 needs a keep rate from 0.05 to 1."
    error_of(app, image, "")
    assert "Traceback" not in app.log.read_text()
