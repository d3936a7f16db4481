"""Decoding of image files from strangers, in this process or in one that can be killed."""

import io
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image
from strange_pictures import (
    animated_webp,
    bomb,
    encoded,
    gif_with_comment,
    jpeg_with,
    noise,
    run_length_bmp,
    scan_bomb,
)

from modeling_trips.image_decoding_trips import ImageError
from modeling_trips.untrusted_images import IsolatedDecoder, decode_untrusted
from modeling_trips.untrusted_images.isolated import _Worker


NOISE = noise(30, 20)
GRAY = NOISE.convert("L")
BLUE = encoded(Image.new("RGB", (1500, 1500), "blue"))
RED = encoded(Image.new("RGB", (9, 9), "red"))


@pytest.fixture(scope="module")
def decoder():
    decoder = IsolatedDecoder(num_processes=1)
    yield decoder
    decoder.close()


@pytest.fixture
def isolated(decoder):
    decoder.seconds = 60
    decoder.decode(RED)  # its process has started
    return decoder


@pytest.fixture(params=["here", "isolated"])
def decode(request, isolated):
    return decode_untrusted if request.param == "here" else isolated.decode


def worker_of(decoder):
    return decoder._workers.queue[0]


def check_red(image):
    assert image.size == (9, 9) and image.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    "data",
    [
        *(encoded(NOISE, kind) for kind in ("PNG", "GIF", "BMP", "JPEG", "WEBP", "TIFF", "JPEG2000", "AVIF")),
        encoded(NOISE.resize((900, 600)), "JPEG", progressive=True),
        encoded(NOISE.convert("CMYK"), "JPEG"),
        encoded(NOISE.quantize(16)),
        encoded(GRAY, "PNG", save_all=True, append_images=[GRAY.rotate(90, expand=True)] * 50),  # APNG
        encoded(NOISE, "GIF", save_all=True, append_images=[NOISE.rotate(180)] * 50),
        encoded(NOISE, "JPEG", icc_profile=b"\1" * 100_000, comment=b"c" * 50_000),
        scan_bomb(64, num_scans=90),
        gif_with_comment(1 << 15),
        # Scan markers within a segment or after the end of the image do not count.
        jpeg_with(NOISE, b"\xff\xef", b"\xff\xda\0\2" * 200),
        encoded(NOISE, "JPEG") + b"\xff\xda\0\2" * 200,
    ],
)
def test_accepted_files_give_what_pillow_reads(decode, data):
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    decoded = decode(data)
    assert (decoded.mode, decoded.size, decoded.tobytes()) == ("RGB", expected.size, expected.tobytes())


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "empty"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n", "format"),
        (encoded(NOISE, "PPM"), "format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "format"),
        (b"\xff\xd8\xff", "format"),
        (b"GIF89a\0", "format"),
        (encoded(Image.new("L", (101, 100))), "pixels"),
        (bomb(60_000, 60_000), "pixels"),
        (encoded(Image.new("L", (101, 100)), "JPEG", progressive=True), "pixels"),
        (encoded(Image.new("L", (801, 800)), "JPEG"), "pixels"),
        (animated_webp(canvas=(16_384, 16_384), frame=(8, 8)), "pixels"),
        (scan_bomb(64, num_scans=101), "work"),
        (gif_with_comment(1 << 17), "work"),
        (run_length_bmp(), "work"),
        (encoded(Image.effect_noise((64, 64), 50))[:-60], "broken"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_others_are_refused_with_the_reason(decode, data, reason):
    with pytest.raises(ImageError) as error:
        decode(data, max_pixels=10_000)
    assert error.value.reason == reason


class Interrupted(BaseException):
    """Exception of a signal, as `KeyboardInterrupt`."""


def test_interrupted_call_leaves_no_reply_to_the_next(isolated):
    def interrupt(*_):
        raise Interrupted

    previous, interrupted = signal.signal(signal.SIGALRM, interrupt), 0
    for milliseconds in (1, 2, 4, 8, 16, 32):
        try:
            signal.setitimer(signal.ITIMER_REAL, milliseconds / 1000)
            isolated.decode(BLUE)
            signal.setitimer(signal.ITIMER_REAL, 0)
        except Interrupted:
            interrupted += 1
        check_red(isolated.decode(RED))
    signal.signal(signal.SIGALRM, previous)
    assert interrupted >= 3


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_process_that_ended_or_stopped_while_idle_is_replaced(isolated, number):
    isolated.seconds = 2
    for _ in range(2):
        process = worker_of(isolated).process
        process.send_signal(number)
        check_red(isolated.decode(RED))
        assert worker_of(isolated).process is not process and process.poll() is not None


def test_file_that_takes_too_long_is_refused_and_its_process_ends(isolated):
    process = worker_of(isolated).process
    data = scan_bomb(6000, num_scans=90)
    isolated.seconds = 0.3
    with pytest.raises(ImageError) as error:
        isolated.decode(data)
    assert error.value.reason == "work" and process.poll() is not None
    isolated.seconds = 60
    check_red(isolated.decode(RED))


def test_supervisor_that_ends_all_processes_ends_no_decoder(isolated):
    worker = _Worker()
    isolated._workers.queue[0].end()
    isolated._workers.queue[0] = worker
    worker.process.terminate()  # before it has begun
    check_red(isolated.decode(RED))
    assert worker.process.poll() is None and worker_of(isolated) is worker


def test_threads_share_the_processes(isolated):
    colors = [(index, 2 * index, 255 - index) for index in range(60)]

    def decode(index):
        decoded = isolated.decode(encoded(Image.new("RGB", (20 + index, 20), colors[index])))
        return decoded.size, decoded.getpixel((0, 0))

    with ThreadPoolExecutor(len(colors)) as pool:
        results = list(pool.map(decode, range(len(colors))))
    assert results == [((20 + index, 20), color) for index, color in enumerate(colors)]
