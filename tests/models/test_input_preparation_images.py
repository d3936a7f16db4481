"""Images of every kind become `pixel_values`; the error of an invalid image names it."""

import base64

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_processors import encoded, make_processor
from transformers import ViTImageProcessor

from modeling_trips.image_decoding_trips import convert_to_rgb


@pytest.fixture
def processor():
    return make_processor()


@pytest.fixture
def image():
    pixels = np.random.default_rng(0).integers(0, 256, size=(20, 30, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# --- convert_to_rgb -------------------------------------------------------------------------------------------------


def palette_image(transparency=None):
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("1", (2, 2), 1), (255, 255, 255)),
        (Image.new("L", (2, 2), 77), (77, 77, 77)),
        (Image.new("LA", (2, 2), (77, 255)), (77, 77, 77)),
        (Image.new("LA", (2, 2), (77, 0)), (255, 255, 255)),
        (palette_image(), (10, 20, 30)),
        (palette_image(transparency=0), (10, 20, 30)),
        (palette_image(transparency=1), (255, 255, 255)),
        (Image.new("PA", (2, 2), (0, 0)), (255, 255, 255)),
        (Image.new("RGB", (2, 2), (10, 20, 30)), (10, 20, 30)),
        (Image.new("RGBA", (2, 2), (10, 20, 30, 255)), (10, 20, 30)),
        (Image.new("RGBA", (2, 2), (10, 20, 30, 0)), (255, 255, 255)),
        # 51 / 255 is a fifth: 0.2 * 10 + 0.8 * 255 = 206, and so on
        (Image.new("RGBA", (2, 2), (10, 20, 30, 51)), (206, 208, 210)),
        (Image.new("CMYK", (2, 2), (0, 255, 255, 0)), (255, 0, 0)),
        (Image.new("YCbCr", (2, 2), (100, 128, 128)), (100, 100, 100)),
        (Image.new("I;16", (2, 2), 65535), (255, 255, 255)),
        (Image.new("I;16B", (2, 2), 257 * 100), (100, 100, 100)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else str(value),
)
def test_every_mode_becomes_rgb(image, expected):
    mode = image.mode
    converted = convert_to_rgb(image)
    assert (converted.mode, converted.size) == ("RGB", (2, 2))
    assert converted.getpixel((1, 1)) == expected
    assert image.mode == mode and converted is not image


def test_16_bit_grey_is_scaled_and_rounded():
    values = np.array([[0, 128, 129, 257], [385, 386, 32768, 65535]], dtype=np.uint16)
    # through a file: this is the mode in which Pillow opens a 16-bit PNG
    image = Image.open(encoded(Image.fromarray(values), "PNG"))
    assert np.asarray(convert_to_rgb(image))[..., 0].tolist() == [[0, 0, 1, 1], [1, 2, 128, 255]]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_modes_without_a_range_are_refused(mode, processor):
    with pytest.raises(ValueError, match=f'"{mode}"'):
        convert_to_rgb(Image.new(mode, (2, 2)))
    with pytest.raises(ValueError, match=r"images\[1\]"):
        processor(images=[Image.new("RGB", (16, 16)), Image.new(mode, (16, 16))])


def test_image_without_pixels_is_refused(processor):
    with pytest.raises(ValueError, match=r"images\[0\]"):
        processor(images=Image.new("RGB", (0, 5)))
    with pytest.raises(ValueError, match=r"images\[0\]"):
        processor(images=np.zeros((3, 0, 5), dtype=np.uint8))


# --- images -> pixel_values -----------------------------------------------------------------------------------------


def test_pixel_values_are_the_image_processors(processor, image):
    pixel_values = processor(images=[image, image], return_tensors="pt").pixel_values
    expected = processor.image_processor(images=[image, image], return_tensors="pt").pixel_values
    assert pixel_values.shape == (2, 3, 32, 32) and pixel_values.dtype == torch.float32
    assert torch.equal(pixel_values, expected)


def test_rgba_reaches_the_model_on_white(image):
    # ViT's image processor does not convert to RGB by itself
    processor = make_processor(ViTImageProcessor(size={"height": 32, "width": 32}))
    clear = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    white = Image.new("RGB", (16, 16), "white")
    pixel_values = processor(images=[clear, white], return_tensors="pt").pixel_values
    assert pixel_values.shape == (2, 3, 32, 32)
    assert torch.equal(pixel_values[0], pixel_values[1])


@pytest.mark.parametrize("make", [np.array, lambda image: torch.from_numpy(np.array(image))], ids=["numpy", "torch"])
def test_arrays_give_the_same_as_pictures(processor, image, make):
    grey = image.convert("L")
    expected = processor(images=[image, grey], return_tensors="pt").pixel_values
    assert torch.equal(processor(images=[make(image), make(grey)], return_tensors="pt").pixel_values, expected)
    assert torch.equal(processor(images=make(grey), return_tensors="pt").pixel_values, expected[1:])
    batch = torch.as_tensor(np.stack([make(image)] * 2))
    assert torch.equal(processor(images=batch, return_tensors="pt").pixel_values, expected[[0, 0]])


@pytest.mark.parametrize(
    "small",
    [Image.new("RGB", (300, 15)), np.zeros((15, 40, 3), dtype=np.uint8), torch.zeros(3, 1, 3)],
    ids=["picture", "channels last", "channels first"],
)
def test_an_image_smaller_than_a_patch_is_named(processor, image, small):
    processor(images=[image, np.zeros((16, 16, 3), dtype=np.uint8), torch.zeros(3, 16, 40)])
    with pytest.raises(ValueError, match=r"images\[1\]"):
        processor(images=[image, small])


def test_missing_path_is_named(processor, image, tmp_path):
    for path in ("/nowhere/cat.png", tmp_path):
        with pytest.raises(ValueError, match=r"images\[1\]"):
            processor(images=[image, path])


def test_base64_gives_the_same_as_the_picture(processor, image):
    text = base64.b64encode(encoded(image, "PNG").getvalue()).decode()
    expected = processor(images=image, return_tensors="pt").pixel_values
    for given in (text, f"data:image/png;base64,{text}"):
        assert torch.equal(processor(images=given, return_tensors="pt").pixel_values, expected)
    with pytest.raises(ValueError, match=r"images\[0\]") as error:
        processor(images=f"data:image/png;base64,{text[: len(text) // 8]}")
    assert "no such file" not in str(error.value)


def test_truncated_jpeg_is_named(processor, image, tmp_path):
    whole = encoded(image.resize((200, 200)), "JPEG").getvalue()
    path = tmp_path / "half.jpg"
    path.write_bytes(whole[: len(whole) // 2])
    for given in (str(path), Image.open(path)):
        with pytest.raises(ValueError, match=r"images\[1\]"):
            processor(images=[image, given])


@pytest.mark.parametrize("wrong", [3, {"image": 1}, np.zeros((2, 2, 2, 2, 2))], ids=["int", "dict", "5d"])
def test_other_things_are_no_images(processor, image, wrong):
    with pytest.raises(ValueError, match=r"images\[1\]"):
        processor(images=[image, wrong])


def test_no_images_at_all(processor):
    with pytest.raises(ValueError, match="images"):
        processor(images=[])
    with pytest.raises(ValueError, match="at least one input"):
        processor()
