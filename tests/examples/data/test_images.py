"""All ways to read an image file give the same image or refuse it; paths that are not files are refused at once."""

import os
import socket

import numpy as np
import pytest
from PIL import Image
from strange_pictures import bomb, encoded, noise

from modeling_trips.image_decoding_trips import convert_to_rgb
from trips_examples.data.images import check_image, decode_image, decode_untrusted_image, first_rows
from trips_examples.data.tasks import BadRowError


PIXELS = noise(64, 40)
JUNK = b"Exif\0\0" + b"\0" * 64
XMP = (
    b"<x:xmpmeta xmlns:x='adobe:ns:meta/'><rdf:RDF><rdf:Description tiff:Orientation='6'>"
    b"</rdf:Description></rdf:RDF></x:xmpmeta>"
)


def exif(orientation):
    block = Image.Exif()
    block[0x0112] = orientation
    return block.tobytes()


FILES = {f"{kind} {n}": encoded(PIXELS, kind, exif=exif(n)) for kind in ("JPEG", "PNG", "WEBP") for n in range(10)}
FILES |= {f"{kind} junk": encoded(PIXELS, kind, exif=JUNK) for kind in ("JPEG", "PNG", "WEBP")}
FILES |= {kind: encoded(PIXELS, kind) for kind in ("TIFF", "JPEG2000", "AVIF", "GIF", "BMP")}
FILES |= {f"{kind} XMP": encoded(PIXELS, kind, xmp=XMP) for kind in ("JPEG", "WEBP")}


@pytest.fixture(params=FILES.values(), ids=FILES)
def file(request, tmp_path):
    path = tmp_path / "image"
    path.write_bytes(request.param)
    return str(path)


def test_an_image_is_the_same_by_every_road(file):
    content = open(file, "rb").read()
    expected = np.asarray(decode_image(file))
    for image in (decode_image(content), decode_untrusted_image(file), decode_untrusted_image(content)):
        np.testing.assert_array_equal(image, expected)
    np.testing.assert_array_equal(convert_to_rgb(Image.open(file)), expected)
    assert check_image(file) == check_image(content, decode=False) == decode_image(file).size


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket.png"))
    (tmp_path / "link.png").symlink_to(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", tmp_path / "link.png", tmp_path / "socket.png", "/dev/zero", tmp_path):
        for decode in (decode_image, decode_untrusted_image, check_image):
            with pytest.raises(BadRowError) as raised:
                decode(str(path))
            assert (raised.value.reason, raised.value.detail) == ("not a regular file", str(path))


def test_untrusted_images_have_limits(tmp_path):
    (tmp_path / "large.png").touch()
    os.truncate(tmp_path / "large.png", 1 << 40)  # without blocks on the disk
    for image, patch_size, reason in (
        (encoded(PIXELS, "PPM"), 1, "unreadable image"),
        (str(tmp_path / "large.png"), 1, "unreadable image"),
        (bomb(9000, 9000), 1, "unreadable image"),
        (str(tmp_path / "none.png"), 1, "missing image"),
        (encoded(PIXELS, "PNG"), 41, "image smaller than a patch"),
    ):
        with pytest.raises(BadRowError) as raised:
            decode_untrusted_image(image, patch_size)
        assert raised.value.reason == reason


def test_images_of_captions_come_once():
    rows, image_of_text = first_rows(["b", "a", "b", "c", "a"])
    assert rows == [0, 1, 3]
    assert image_of_text == [0, 1, 0, 2, 1]
