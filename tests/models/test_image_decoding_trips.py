"""Decoding of image files within limits of format and size."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from programs import add_fake_ghostscript
from strange_pictures import encoded, jpeg_with, noise
from tiny_processors import make_processor

from modeling_trips import convert_to_rgb
from modeling_trips.image_decoding_trips import ImageError, decode_image


@pytest.fixture
def image():
    return noise(30, 20)


def oriented(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations_are_those_of_pillow(image, orientation):
    data = encoded(image, "PNG", exif=oriented(orientation))
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
        lambda image: encoded(image, "JPEG", exif=oriented(6)),
        lambda image: jpeg_with(image, b"\xff\xe1", b"Exif\0\0no TIFF header at all"),
        lambda image: jpeg_with(image, b"\xff\xe1", XMP),
        lambda image: encoded(image.convert("RGBA").rotate(0), "PNG", exif=oriented(3)),
    ],
    ids=["exif", "broken exif", "xmp with a space", "png"],
)
def test_one_file_gives_one_tensor_by_every_path(make, image, tmp_path):
    data = make(image.resize((45, 33)))
    path = tmp_path / "image"
    path.write_bytes(data)
    processor = make_processor()
    paths = [
        str(path),
        base64.b64encode(data).decode(),
        f"data:image/png;base64,{base64.b64encode(data).decode()}",
        Image.open(io.BytesIO(data)),
        convert_to_rgb(convert_to_rgb(Image.open(io.BytesIO(data)))),
        decode_image(data),
    ]
    first, *others = [processor(images=given, return_tensors="pt").pixel_values for given in paths]
    for other in others:
        assert torch.equal(first, other)


def test_an_eps_image_starts_no_program(tmp_path, monkeypatch):
    path, started = add_fake_ghostscript(tmp_path, monkeypatch.setenv)
    processor = make_processor()
    for given in (str(path), Image.open(path), base64.b64encode(path.read_bytes()).decode()):
        with pytest.raises(ValueError, match=r"images\[0\]"):
            processor(images=given)
    assert not started.exists()


@pytest.mark.parametrize("size, scale", [((800, 600), 1), ((801, 600), 2), ((1599, 1199), 2), ((6300, 4700), 8)])
def test_a_large_jpeg_is_scaled_as_it_is_decoded(size, scale):
    left = Image.new("RGB", size, "red")
    left.paste("blue", (size[0] // 2, 0, *size))
    decoded = decode_image(encoded(left, "JPEG", exif=oriented(6)), max_pixels=480_000)
    assert decoded.size == tuple(-(-side // scale) for side in reversed(size))  # upright
    width, height = decoded.size
    top, bottom = decoded.getpixel((width // 2, height // 4)), decoded.getpixel((width // 2, 3 * height // 4))
    assert top[0] > 200 > 50 > top[2] and bottom[2] > 200 > 50 > bottom[0]


def test_a_heic_photo_is_read():
    heif = pytest.importorskip("pillow_heif", reason="the extra photos")
    photo = Image.new("RGB", (64, 48), "red")
    photo.paste("blue", (32, 0, 64, 48))
    file = io.BytesIO()
    heif.from_pillow(photo).save(file, quality=-1)
    decoded = decode_image(file.getvalue())
    assert decoded.size == (64, 48)
    for x, color in ((16, (255, 0, 0)), (48, (0, 0, 255))):
        np.testing.assert_allclose(decoded.getpixel((x, 24)), color, atol=8)


def test_a_heic_photo_without_its_reader_names_the_package(monkeypatch):
    monkeypatch.setattr("modeling_trips.image_decoding_trips.READS_HEIC", False)
    with pytest.raises(ImageError, match="pip install pillow-heif") as error:
        decode_image(b"\0\0\0\x18ftypheic" + b"\0" * 100)
    assert error.value.reason == "format"


@pytest.mark.parametrize(
    "mode, color, expected",
    [
        ("1", 1, (255, 255, 255)),
        ("LA", (77, 0), (255, 255, 255)),
        ("PA", (0, 0), (255, 255, 255)),
        # 51 / 255 is a fifth: 0.2 * 10 + 0.8 * 255 = 206, and so on
        ("RGBA", (10, 20, 30, 51), (206, 208, 210)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("YCbCr", (100, 128, 128), (100, 100, 100)),
        ("I;16", 65535, (255, 255, 255)),
        ("I;16B", 257 * 100, (100, 100, 100)),
    ],
)
def test_every_mode_becomes_rgb(mode, color, expected):
    image = Image.new(mode, (2, 2), color)
    converted = convert_to_rgb(image)
    assert (converted.mode, converted.size) == ("RGB", (2, 2))
    assert converted.getpixel((1, 1)) == expected
    assert image.mode == mode and converted is not image


@pytest.mark.parametrize("transparent, expected", [(0, (10, 20, 30)), (1, (255, 255, 255))])
def test_a_transparent_color_of_a_palette_is_white(transparent, expected):
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.info["transparency"] = transparent
    assert convert_to_rgb(image).getpixel((1, 1)) == expected


def test_16_bit_grey_is_scaled_and_rounded():
    values = np.array([[0, 128, 129, 257], [385, 386, 32768, 65535]], dtype=np.uint16)
    # through a file: this is the mode in which Pillow opens a 16-bit PNG
    image = Image.open(io.BytesIO(encoded(Image.fromarray(values), "PNG")))
    assert np.asarray(convert_to_rgb(image))[..., 0].tolist() == [[0, 0, 1, 1], [1, 2, 128, 255]]
