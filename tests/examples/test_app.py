"""`examples/app.py` in a real browser, chromium. Skipped where gradio, playwright or the browser is missing."""

import concurrent.futures
import os
import re
import shutil
import struct
import subprocess
import sys
import time
import urllib.request
import zlib
from pathlib import Path

import PIL.Image
import pytest
from places import EXAMPLES

from trips_examples.analysis import SAME_WEIGHTS
from trips_examples.ask import SCENE


pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")]

PORT = 7893
PATIENCE = 120_000  # ms: machines that are busy answer late


@pytest.fixture(scope="module")
def address():
    """A page that serves the shipped checkpoint, in a process of its own."""
    words = [sys.executable, str(EXAMPLES / "app.py"), "--port", str(PORT), "--max_megabytes", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{PORT}/"
    for _ in range(300):
        assert server.poll() is None, "the page ended"
        try:
            urllib.request.urlopen(address).close()
            break
        except OSError:
            time.sleep(1)
    yield address
    server.terminate()
    server.wait(30)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    page.get_by_role("button", name="Look", exact=True).wait_for()
    yield page
    page.close()


def upload(page, path: Path):
    page.locator("input[type=file]").first.set_input_files(str(path))


def ask(page, *lines: str):
    """Asks, and waits until the answers are there."""
    page.get_by_label("Questions, one per line").fill("\n".join(lines))
    page.get_by_role("button", name="Look", exact=True).click()
    for line in lines:
        page.locator("#result h3", has_text=line).wait_for()
    return page.locator("#result")


def pictures(page) -> list[str]:
    return page.locator("#result img").evaluate_all("images => images.map(image => image.src)")


def shot(page, name: str):
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=str(Path(folder, name)), full_page=True)


def test_upload_ask_twice_and_see_the_patches_change(page):
    upload(page, SCENE)
    page.get_by_role("img").first.wait_for()
    result = ask(page, "what color is the circle?", "what shape is the red shape?")
    text = result.inner_text()
    assert (
        re.search(r"65 → \d+ → \d+ → \d+ image tokens", text)
        and f"{SAME_WEIGHTS}:" in text
        and re.search(r"\d% ?\)", text)
    )
    first = pictures(page)
    assert len(first) == 4  # of two questions: what is kept, and the scores
    assert page.locator("#result img[alt*='keeps']").count() == 2
    shot(page, "questions.png")

    other = ask(page, "is there a yellow triangle?")
    assert other.locator("h3").all_inner_texts() == ["is there a yellow triangle?"]
    assert pictures(page)[0] not in first


def test_a_lower_keep_rate_keeps_less(page):
    # Opened first: Gradio creates the sliders then, and a number typed within milliseconds is set back.
    page.get_by_role("button", name="Selection schedule by layer").click()
    upload(page, SCENE)
    ask(page, "what color is the shape?")
    page.locator("#result", has_text="layer 2 keeps 16 patches").wait_for()
    rate = page.get_by_label("number input for Layer 2 keeps")
    rate.fill("0.1")
    rate.press("Enter")
    page.locator("#result", has_text="layer 2 keeps 7 patches").wait_for()

    slider = page.locator("input[type=range]").first
    slider.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.locator("#result", has_text="layer 2 keeps 13 patches").wait_for()  # 0.2 of 64

    rate.fill("")
    page.locator("#result", has_text="Layer 2 needs a keep rate from 0.05 to 1.").wait_for()
    rate.fill("0.1")
    rate.press("Tab")
    page.locator("#result", has_text="layer 2 keeps 7 patches").wait_for()

    page.locator("button[aria-label*='eset']").first.click()
    page.locator("#result", has_text="layer 2 keeps 16 patches").wait_for()
    first = pictures(page)[0]
    page.get_by_label("random").first.click()
    page.wait_for_function("first => document.querySelector('#result img').src != first", arg=first)


def test_the_page_names_its_model_and_what_that_knows(page):
    text = page.locator("body").inner_text()
    assert "examples/trips-tiny-scenes" in text and "composed scenes alone" in text
    assert "An unpruned baseline needs its own training." in text


def test_a_tall_image_makes_no_tall_page(page, tmp_path):
    PIL.Image.new("RGB", (60, 3000), "teal").save(tmp_path / "tall.png")
    upload(page, tmp_path / "tall.png")
    page.wait_for_timeout(2000)
    ask(page, "what color is the shape?")
    shot(page, "tall.png")
    heights = page.locator("#result img").evaluate_all("images => images.map(image => image.clientHeight)")
    assert len(heights) == 2 and max(heights) < 500
    assert page.evaluate("document.documentElement.scrollHeight") < 3000


def test_the_keyboard_is_enough(page):
    upload(page, SCENE)
    page.get_by_label("Questions, one per line").focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("is there a triangle?")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.locator("#result h3", has_text="is there a triangle?").wait_for()


def test_an_example_is_asked_at_a_click(page):
    page.get_by_text("is there a blue rectangle?").first.click()
    page.locator("#result h3", has_text="is there a blue rectangle?").wait_for()


def shows(page, words: str):
    page.get_by_role("button", name="Look", exact=True).click()
    page.get_by_text(words).first.wait_for()


def test_what_is_wrong_is_said_in_words(page, tmp_path):
    shows(page, "There is no image yet. Upload one, or click an example.")
    (tmp_path / "broken.png").write_bytes(SCENE.read_bytes()[:60])
    upload(page, tmp_path / "broken.png")
    page.wait_for_timeout(2000)
    shows(page, "The image file is broken or cut off")
    shot(page, "broken.png")


def blank_png(path: Path, side: int):
    """A picture of `side` x `side` black pixels in a small file: one bit each, all the same."""
    row = b"\0" + bytes((side + 7) // 8)
    compressor, packed = zlib.compressobj(9), b""
    for _ in range(side):
        packed += compressor.compress(row)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)),
        (b"IDAT", packed + compressor.flush()),
        (b"IEND", b""),
    ]
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in chunks:
        content += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    path.write_bytes(content)


def test_a_huge_picture_and_a_huge_file_are_refused(page, tmp_path):
    blank_png(tmp_path / "wide.png", 8000)
    upload(page, tmp_path / "wide.png")
    page.wait_for_timeout(2000)
    shows(page, "The image has 8000 x 8000 pixels; at most 50,000,000 are accepted.")

    page.reload()
    page.get_by_role("button", name="Look", exact=True).wait_for()
    PIL.Image.effect_noise((1500, 1500), 90).save(tmp_path / "noise.png")
    assert (tmp_path / "noise.png").stat().st_size > 2**20
    upload(page, tmp_path / "noise.png")
    page.get_by_text(re.compile("maximum allowed size|larger than|exceeds", re.IGNORECASE)).first.wait_for()
    shot(page, "huge.png")


def test_it_fits_a_phone(browser, address):
    page = browser.new_page(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    page.get_by_role("button", name="Look", exact=True).wait_for()
    upload(page, SCENE)
    ask(page, "what color is the circle?", "what shape is the red shape?")
    shot(page, "phone.png")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390

    page.get_by_text("is there a blue rectangle?").first.click()  # at the end of the page
    answer = page.locator("#result h3", has_text="is there a blue rectangle?")
    answer.wait_for()
    page.wait_for_function("document.querySelector('#result').getBoundingClientRect().top >= -1")
    assert answer.bounding_box()["y"] < 844
    page.close()


def test_ten_at_once_are_all_answered(address):
    client = pytest.importorskip("gradio_client")
    path = client.handle_file(str(SCENE))
    arguments = [path, "what color is the circle?", 0.25, "text"]

    def answer(_) -> str:
        return client.Client(address, verbose=False).predict(*arguments, api_name="/look")

    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(answer, range(10)))
    stripped = {re.sub(r"[\d.]+ ms", "", answer) for answer in answers}
    assert len(stripped) == 1 and "what color is the circle?" in answers[0]
