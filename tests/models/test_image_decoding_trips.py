"""Decoding of image files within limits of format and size."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from strange_pictures import encoded, jpeg_with
from tiny_processors import make_processor

from modeling_trips import convert_to_rgb
from modeling_trips.image_decoding_trips import decode_image


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n"


@pytest.fixture
def image():
    pixels = np.random.default_rng(0).integers(0, 256, size=(20, 30, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def oriented(orientation: int) -> Image.Exif:
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
        lambda image: jpeg_with(image, b"\xff\xe1", XMP.replace(b">6 <", b">6<")),
        lambda image: encoded(image.convert("RGBA").rotate(0), "PNG", exif=oriented(3)),
    ],
    ids=["exif", "broken exif", "xmp with a space", "xmp", "png"],
)
def test_one_file_gives_one_tensor_by_every_path(make, image, tmp_path):
    data = make(image.resize((45, 33)))
    path = tmp_path / "image"
    path.write_bytes(data)
    processor = make_processor()
    paths = [
        str(path),
        base64.b64encode(data).decode(),
        Image.open(io.BytesIO(data)),
        convert_to_rgb(Image.open(io.BytesIO(data))),
        convert_to_rgb(convert_to_rgb(Image.open(io.BytesIO(data)))),
        decode_image(data),
    ]
    first, *others = [processor(images=given, return_tensors="pt").pixel_values for given in paths]
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
