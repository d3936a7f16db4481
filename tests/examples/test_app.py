"""`examples/app.py` in a process of its own, asked over HTTP. Skipped where gradio is missing."""

import concurrent.futures
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from types import SimpleNamespace

import pytest
from PIL import Image
from places import EXAMPLES
from programs import add_fake_ghostscript
from running_service import free_port, wait_until

from trips_examples import app as page
from trips_examples.ask import CHECKPOINT, QUESTIONS, SCENE


gradio = pytest.importorskip("gradio")
client = pytest.importorskip("gradio_client")
pytestmark = pytest.mark.slow
LINES = "\n".join(QUESTIONS)

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
    command = [sys.executable, str(EXAMPLES / "app.py"), "--port", str(port), "--max_megabytes", "1"]
    process = subprocess.Popen(command, env=variables, stdout=log.open("w"), stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}/"
    for _ in range(600):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(url).close()
            break
        except OSError:
            time.sleep(0.5)
    connected = client.Client(url, verbose=False)
    yield SimpleNamespace(client=connected, url=url, folder=folder, log=log, eps=eps, gs_was_started=gs_was_started)
    connected.close()
    process.terminate()
    process.wait(60)


def ask(app, image=SCENE, lines=LINES, threshold=0, keep_rate=0.25):
    table, figure = app.client.predict(client.handle_file(str(image)), lines, threshold, keep_rate, api_name="/look")
    assert figure is None if keep_rate == 1 else figure["plot"].startswith("data:image/")
    return table["data"]


def error_of(app, *question, **options):
    with pytest.raises(client.exceptions.AppError) as raised:
        ask(app, *question, **options)
    return str(raised.value)


def test_answers_are_right_and_no_host_is_looked_up(app):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: ask(app), range(4)))
    assert answers == [answers[0]] * 4 and [row[0] for row in answers[0]] == QUESTIONS
    assert [row[1].split()[0] for row in answers[0]] == ["dot", "ring", "purple", "no"]
    assert ask(app, keep_rate=1)[0][1] == answers[0][0][2]  # the same weights at keep rate 1.0
    ((_, unsure, _),) = ask(app, lines="色?", threshold=1)
    assert unsure.startswith("unsure") and "[UNK]" in unsure
    assert set((app.folder / "names").read_text().split()) <= {"127.0.0.1", "localhost", "None"}


def test_the_first_click_answers(app):
    """Gradio checks the values with which the page opens: image, questions and the trained keep rate."""
    table, figure = app.client.predict(api_name="/look")
    assert [row[1].split()[0] for row in table["data"]] == ["dot", "ring", "purple", "no"]
    assert figure["plot"].startswith("data:image/")
    assert app.url in app.log.read_text() and "public" not in app.log.read_text()


def test_mistakes_of_visitors_are_named(app, tmp_path):
    assert "JPEG" in error_of(app, app.eps) and not app.gs_was_started.exists()
    Image.new("1", (8000, 8000)).save(tmp_path / "wide.png")
    assert "8000 x 8000" in error_of(app, tmp_path / "wide.png")
    too_long = error_of(app, lines="is it red?\n" + 120 * "a ")
    assert "text[1]" in too_long and "122" in too_long
    assert "got 0" in error_of(app, lines=" ") and "got 7" in error_of(app, lines=7 * "a\n")
    assert "Traceback" not in app.log.read_text()
    Image.effect_noise((1500, 1500), 90).save(tmp_path / "noise.png")
    with pytest.raises(Exception, match="(?i)size|large"):  # refused by Gradio
        ask(app, tmp_path / "noise.png")


def test_another_model_opens_without_the_scene_in_a_browser(browser_page, tmp_path):
    own = shutil.copytree(CHECKPOINT, tmp_path / "mine")
    _, url, _ = page.main(["--model", str(own)], block=False)
    try:
        browser_page.goto(url)
        browser_page.wait_for_selector("text=mine")
        assert browser_page.input_value("textarea") == ""
        assert not browser_page.query_selector("button[aria-label='Clear'], .image-frame img")
        browser_page.set_input_files("input[type=file]", SCENE)
        browser_page.wait_for_selector(".image-frame img")
        browser_page.fill("textarea", QUESTIONS[0])
        browser_page.fill("input[type=number] >> nth=0", "1")
        browser_page.click("button:has-text('Look')")
        # Gradio hides and draws cells.
        browser_page.wait_for_selector("td:has-text('unsure')", state="attached", timeout=120_000)
    finally:
        gradio.close_all()


def test_uploads_are_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "DELETION", (1, 30))
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "cache"))
    _, url, _ = page.main([], block=False)
    try:
        connected = client.Client(url, verbose=False)
        upload = tmp_path / "upload.png"
        Image.new("RGB", (64, 64), "teal").save(upload)
        connected.predict(client.handle_file(str(upload)), "is there a circle?", 0, 0.25, api_name="/look")
        wait_until(lambda: not list((tmp_path / "cache").rglob("upload.png")), seconds=120)
    finally:
        gradio.close_all()
