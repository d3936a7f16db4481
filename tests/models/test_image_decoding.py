"""Decoding of untrusted image files within limits, in this process or in one that can be killed."""

import base64
import io
import struct
import threading
import zlib

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from tiny_processors import encoded, make_processor

from modeling_trips import convert_to_rgb
from modeling_trips.image_decoding_trips import ImageError, decode_image
from modeling_trips.isolated_decoding import IsolatedDecoder, _start_process


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n"


@pytest.fixture(scope="module")
def isolated():
    decoder = IsolatedDecoder(num_processes=1)
    yield decoder
    decoder.close()


@pytest.fixture(params=["here", "isolated"])
def decode(request, isolated):
    return decode_image if request.param == "here" else isolated.decode


@pytest.fixture
def image():
    pixels = np.random.default_rng(0).integers(0, 256, size=(20, 30, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def scan_bomb(side: int, num_scans: int) -> bytes:
    """Return a progressive JPEG with `num_scans` refinements of a few bytes; each needs a pass over all blocks."""
    source = encoded(Image.new("L", (side, side), 128), "JPEG", progressive=True, quality=50).getvalue()
    tables, position = b"", 2
    while (marker := source[position + 1]) != 0xDA:
        length = 2 + int.from_bytes(source[position + 2 : position + 4], "big")
        tables += source[position : position + length] if marker in (0xDB, 0xC2) else b""
        position += length

    def huffman_table(kind: int, value: int) -> bytes:
        return b"\xff\xc4" + struct.pack(">HB", 20, kind << 4) + bytes([1] + [0] * 15 + [value])

    def scan(start: int, end: int, low: int) -> bytes:
        return b"\xff\xda" + struct.pack(">HBBBBBB", 8, 1, 1, 0, start, end, low)

    blocks = ((side + 7) // 8) ** 2
    bits = ("0" + "1" * 14) * -(-blocks // 32767)
    bits += "1" * (-len(bits) % 8)
    runs = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    first = scan(0, 0, 1) + b"\0" * ((blocks + 7) // 8)
    refinements = (scan(1, 63, 1) + runs) * num_scans
    return b"\xff\xd8" + tables + huffman_table(0, 0) + huffman_table(1, 0xE0) + first + refinements + b"\xff\xd9"


def gif_with_comment(num_bytes: int) -> bytes:
    gif = encoded(Image.new("P", (20, 20)), "GIF").getvalue()
    frame = gif.index(b",", 13 + (3 << (gif[10] % 8 + 1)))
    blocks = b"".join(bytes([255]) + b"c" * 255 for _ in range(num_bytes // 255))
    return gif[:frame] + b"!\xfe" + blocks + b"\0" + gif[frame:]


def run_length_bmp() -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, 20, 20, 1, 8, 1, 42, 2835, 2835, 2, 2)
    palette = bytes([0, 0, 0, 0, 255, 255, 255, 0])
    pixels = b"\x14\x01\0\0" * 20 + b"\0\x01"
    offset = 14 + len(header) + len(palette)
    return b"BM" + struct.pack("<IHHI", offset + len(pixels), 0, 0, offset) + header + palette + pixels


def jpeg_with(image: Image.Image, marker: bytes, content: bytes) -> bytes:
    jpeg = encoded(image, "JPEG").getvalue()
    return jpeg[:2] + marker + struct.pack(">H", 2 + len(content)) + content + jpeg[2:]


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP", "JPEG"])
def test_accepted_formats_give_what_pillow_reads(decode, image, kind):
    data = encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {})).getvalue()
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    decoded = decode(data)
    assert (decoded.mode, decoded.size, decoded.tobytes()) == ("RGB", (30, 20), expected.tobytes())


def test_progressive_photos_are_accepted(decode, image):
    decode(encoded(image.resize((900, 600)), "JPEG", progressive=True).getvalue())


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (EPS, "format"),
        (encoded(Image.new("RGB", (20, 20)), "TIFF").getvalue(), "format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "format"),
        (encoded(Image.new("L", (101, 100)), "PNG").getvalue(), "pixels"),
        (scan_bomb(64, num_scans=101), "work"),
        (gif_with_comment(1 << 17), "work"),
        (run_length_bmp(), "work"),
        (encoded(Image.new("RGB", (64, 64), "teal"), "PNG").getvalue()[:-60], "broken"),
        (b"\xff\xd8\xff", "format"),
        (b"GIF89a\0", "format"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_others_are_refused_with_the_reason(decode, data, reason):
    with pytest.raises(ImageError) as error:
        decode(data, max_pixels=10_000)
    assert error.value.reason == reason


def test_scans_and_comments_are_counted_where_they_are(decode, image):
    decode(scan_bomb(64, num_scans=90))
    # Scan markers within a segment or after the end of the image do not count.
    decode(jpeg_with(image, b"\xff\xef", b"\xff\xda\0\2" * 200))
    decode(encoded(image, "JPEG").getvalue() + b"\xff\xda\0\2" * 200)
    decode(gif_with_comment(1 << 15))


def test_a_header_with_too_many_pixels_is_refused_before_the_pixels_are_read(decode):
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    with pytest.raises(ImageError) as error:
        decode(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    assert error.value.reason == "pixels"


# --- orientation ----------------------------------------------------------------------------------------------------


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations_are_those_of_pillow(image, orientation):
    from PIL import ImageOps

    data = encoded(image, "PNG", exif=oriented(orientation)).getvalue()
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert decode_image(data).tobytes() == expected.tobytes()


XMP = b"http://ns.adobe.com/xap/1.0/\0" + (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/"><tiff:Orientation>6 </tiff:Orientation>'
    b"</rdf:Description></rdf:RDF></x:xmpmeta>"
)


@pytest.mark.parametrize(
    "make",
    [
        lambda image: encoded(image, "JPEG", exif=oriented(6)).getvalue(),
        lambda image: jpeg_with(image, b"\xff\xe1", b"Exif\0\0no TIFF header at all"),
        lambda image: jpeg_with(image, b"\xff\xe1", XMP),
        lambda image: jpeg_with(image, b"\xff\xe1", XMP.replace(b">6 <", b">6<")),
        lambda image: encoded(image.convert("RGBA").rotate(0), "PNG", exif=oriented(3)).getvalue(),
    ],
    ids=["exif", "broken exif", "xmp with a space", "xmp", "png"],
)
def test_one_file_gives_one_tensor_by_every_road(make, image, tmp_path):
    image = image.resize((45, 33))
    data = make(image)
    path = tmp_path / "image"
    path.write_bytes(data)
    processor = make_processor()
    roads = [
        str(path),
        base64.b64encode(data).decode(),
        Image.open(io.BytesIO(data)),
        convert_to_rgb(Image.open(io.BytesIO(data))),
        convert_to_rgb(convert_to_rgb(Image.open(io.BytesIO(data)))),
        decode_image(data),
    ]
    first, *others = [processor(images=road, return_tensors="pt").pixel_values for road in roads]
    for other in others:
        assert torch.equal(first, other)


def test_an_eps_image_starts_no_program(tmp_path, monkeypatch):
    trace = tmp_path / "started"
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {trace}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    path = tmp_path / "image.png"
    path.write_bytes(EPS)
    processor = make_processor()
    for given in (str(path), Image.open(path), base64.b64encode(EPS).decode()):
        with pytest.raises(ValueError, match=r"images\[0\]"):
            processor(images=given)
    assert not trace.exists()


# --- processes ------------------------------------------------------------------------------------------------------


def test_a_file_that_takes_too_long_is_refused_and_its_process_ends(image):
    decoder = IsolatedDecoder(num_processes=1)
    decoder.decode(encoded(image, "PNG").getvalue())  # the process has started
    process = decoder._processes.queue[0]
    decoder.seconds = 0.01
    with pytest.raises(ImageError) as error:
        decoder.decode(scan_bomb(4096, num_scans=90))
    assert error.value.reason == "work"
    assert process.poll() is not None
    decoder.seconds = 60
    assert decoder.decode(encoded(image, "PNG").getvalue()).size == (30, 20)
    decoder.close()


def test_a_supervisor_that_ends_all_processes_ends_no_decoder(image):
    decoder = IsolatedDecoder(num_processes=1)
    data = encoded(image, "PNG").getvalue()
    process = _start_process()
    decoder._processes.queue[0] = process
    process.terminate()  # before it has begun
    assert decoder.decode(data).size == (30, 20)
    assert process.poll() is None and decoder._processes.queue[0] is process
    decoder.close()


def test_a_waiting_process_holds_no_image():
    decoder = IsolatedDecoder(num_processes=1, seconds=60)
    assert decoder.decode(encoded(Image.new("RGB", (4000, 4000)), "PNG").getvalue()).size == (4000, 4000)
    assert psutil.Process(decoder._processes.queue[0].pid).memory_info().rss < 80_000_000
    decoder.close()


def test_threads_share_the_processes(isolated):
    colors = [(index, 2 * index, 255 - index) for index in range(60)]
    results: dict[int, tuple] = {}

    def decode(index: int):
        data = encoded(Image.new("RGB", (20 + index, 20), colors[index]), "PNG").getvalue()
        decoded = isolated.decode(data)
        results[index] = (decoded.size, decoded.getpixel((0, 0)))

    threads = [threading.Thread(target=decode, args=(index,)) for index in range(len(colors))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {index: ((20 + index, 20), color) for index, color in enumerate(colors)}
