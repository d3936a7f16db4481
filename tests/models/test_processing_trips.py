# Copyright 2026 The TRIPS for Transformers authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Tests of the processor: every kind of image, texts, image_index, boxes, saving."""

import io
import re

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertTokenizer, BlipImageProcessor, CLIPImageProcessor, ViTImageProcessor

from modeling_trips.image_preparation_trips import convert_to_rgb
from modeling_trips.processing_trips import TripsProcessor


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "what", "is", "red", "this", "?", "a", "cat"]
VOCABULARY = {word: index for index, word in enumerate(WORDS)}
PAD, CLS, SEP = VOCABULARY["[PAD]"], VOCABULARY["[CLS]"], VOCABULARY["[SEP]"]


def make_processor(image_processor=None, patch_size=16, **tokenizer_kwargs):
    tokenizer = BertTokenizer(vocab=VOCABULARY, **{"model_max_length": 12, **tokenizer_kwargs})
    if image_processor is None:
        image_processor = BlipImageProcessor(size={"height": 32, "width": 32})
    return TripsProcessor(image_processor, tokenizer, patch_size=patch_size)


@pytest.fixture
def processor():
    return make_processor()


@pytest.fixture
def image():
    pixels = np.random.default_rng(0).integers(0, 256, size=(20, 30, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image, image_format, **kwargs) -> io.BytesIO:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **kwargs)
    buffer.seek(0)
    return buffer


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
        (Image.new("La", (2, 2), (0, 0)), (255, 255, 255)),
        (palette_image(), (10, 20, 30)),
        (palette_image(transparency=0), (10, 20, 30)),
        (palette_image(transparency=1), (255, 255, 255)),
        (Image.new("PA", (2, 2), (0, 0)), (255, 255, 255)),
        (Image.new("RGB", (2, 2), (10, 20, 30)), (10, 20, 30)),
        (Image.new("RGBA", (2, 2), (10, 20, 30, 255)), (10, 20, 30)),
        (Image.new("RGBA", (2, 2), (10, 20, 30, 0)), (255, 255, 255)),
        # 51 / 255 is a fifth: 0.2 * 10 + 0.8 * 255 = 206, and so on
        (Image.new("RGBA", (2, 2), (10, 20, 30, 51)), (206, 208, 210)),
        (Image.new("RGBa", (2, 2), (0, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGBX", (2, 2), (10, 20, 30, 0)), (10, 20, 30)),
        (Image.new("CMYK", (2, 2), (0, 255, 255, 0)), (255, 0, 0)),
        (Image.new("YCbCr", (2, 2), (100, 128, 128)), (100, 100, 100)),
        (Image.new("HSV", (2, 2), (0, 255, 255)), (255, 0, 0)),
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
    with pytest.raises(ValueError, match=f'Mode "{mode}" has no fixed range'):
        convert_to_rgb(Image.new(mode, (2, 2)))
    with pytest.raises(ValueError, match=r"`images\[1\]`.*no fixed range"):
        processor(images=[Image.new("RGB", (16, 16)), Image.new(mode, (16, 16))])


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (3, 2), "black")
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn clockwise by a quarter to see it upright": the top left corner goes to the top right
    rotated = convert_to_rgb(Image.open(encoded(image, "PNG", exif=exif)))
    assert rotated.size == (2, 3)
    assert rotated.getpixel((1, 0)) == (255, 0, 0)
    assert rotated.getpixel((0, 0)) == (0, 0, 0)


def test_image_without_pixels_is_refused(processor):
    with pytest.raises(ValueError, match=r"`images\[0\]`.*no pixels.*\(0, 5\)"):
        processor(images=Image.new("RGB", (0, 5)))
    with pytest.raises(ValueError, match=r"`images\[0\]`.*\(3, 0, 5\)"):
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
    ("make", "size"),
    [
        (lambda: Image.new("RGB", (300, 15)), "15 x 300"),
        (lambda: np.zeros((40, 15), dtype=np.uint8), "40 x 15"),
        (lambda: np.zeros((15, 40, 3), dtype=np.uint8), "15 x 40"),
        (lambda: torch.zeros(3, 1, 3), "1 x 3"),
    ],
    ids=["picture", "grey array", "channels last", "channels first"],
)
def test_an_image_smaller_than_a_patch_is_named(processor, image, make, size):
    processor(images=[image, np.zeros((16, 16, 3), dtype=np.uint8), torch.zeros(3, 16, 40)])
    with pytest.raises(ValueError, match=rf"`images\[1\]` .*{size} pixels .*fewer than one patch of 16 x 16"):
        processor(images=[image, make()])


def test_paths_give_the_same_as_pictures(processor, tmp_path):
    path = tmp_path / "half_clear.png"
    image = Image.new("RGBA", (16, 16), (10, 20, 30, 51))
    image.save(path)
    expected = processor(images=image, return_tensors="pt").pixel_values
    for given in (path, str(path), [str(path)]):
        assert torch.equal(processor(images=given, return_tensors="pt").pixel_values, expected)


def test_missing_path_is_named(processor, image):
    with pytest.raises(ValueError, match=r"`images\[1\]` /nowhere/cat\.png cannot be used"):
        processor(images=[image, "/nowhere/cat.png"])


def test_truncated_jpeg_is_named(processor, image, tmp_path):
    whole = encoded(image.resize((200, 200)), "JPEG").getvalue()
    path = tmp_path / "half.jpg"
    path.write_bytes(whole[: len(whole) // 2])
    for given in (str(path), Image.open(path)):
        with pytest.raises(ValueError, match=rf"`images\[1\]` {re.escape(str(path))} cannot be used.*truncated"):
            processor(images=[image, given])


@pytest.mark.parametrize("wrong", [3, {"image": 1}, np.zeros((2, 2, 2, 2, 2))], ids=["int", "dict", "5d"])
def test_other_things_are_no_images(processor, image, wrong):
    with pytest.raises(ValueError, match=r"`images\[1\]`.*expected a"):
        processor(images=[image, wrong])


def test_no_images_at_all(processor):
    with pytest.raises(ValueError, match="`images` is empty"):
        processor(images=[])
    with pytest.raises(ValueError, match="at least one input"):
        processor()


# --- text -----------------------------------------------------------------------------------------------------------


def test_texts_are_padded_to_the_longest(processor):
    inputs = processor(text=["what is this ?", "red ?"], return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask", "token_type_ids"}
    assert inputs.input_ids.tolist() == [[CLS, 5, 6, 8, 9, SEP], [CLS, 7, 9, SEP, PAD, PAD]]
    assert inputs.attention_mask.tolist() == [[1] * 6, [1, 1, 1, 1, 0, 0]]


def test_token_type_ids_only_if_the_tokenizer_makes_them(image):
    processor = make_processor(model_input_names=["input_ids", "attention_mask"])
    assert set(processor(images=image, text="red")) == {"pixel_values", "input_ids", "attention_mask"}
    assert processor.model_input_names == ["pixel_values", "input_ids", "attention_mask"]


def test_empty_text_is_a_prompt(processor, image):
    assert processor(images=image, text="", return_tensors="pt").input_ids.tolist() == [[CLS, SEP]]


@pytest.mark.parametrize(
    "kwargs", [{}, {"return_tensors": "pt"}, {"padding": False}, {"return_attention_mask": False}]
)
def test_long_text_is_never_cut_silently(processor, kwargs):
    fits, too_long = "cat " * 10, "cat " * 11  # and [CLS], [SEP]; model_max_length is 12
    assert len(processor(text=["a", fits], **kwargs)["input_ids"][1]) == 12
    with pytest.raises(ValueError, match=r"`text\[1\]` has 13 tokens.*only 12.*truncation=True"):
        processor(text=["a", too_long], **kwargs)
    with pytest.raises(ValueError, match=r"`text\[0\]` has 13 tokens.*only 12"):
        processor(text=too_long, **kwargs)


@pytest.mark.parametrize("padding", [True, False, "max_length"])
def test_max_length_alone_does_not_cut(processor, padding):
    with pytest.raises(ValueError, match=r"`text\[1\]` has 6 tokens.*only 5"):
        processor(text=["red ?", "what is this ?"], max_length=5, padding=padding)
    with pytest.raises(ValueError, match=r"`text\[0\]` has 6 tokens.*only 5"):
        processor(text="what is this ?", text_kwargs={"max_length": 5, "padding": padding})


def test_max_length_does_not_raise_the_models_limit(processor):
    with pytest.raises(ValueError, match=r"`text\[0\]` has 13 tokens.*only 12"):
        processor(text="cat " * 11, max_length=20)


def test_truncation_on_request(processor):
    inputs = processor(text=["red ?", "what is this ?"], max_length=5, truncation=True)
    assert inputs["input_ids"] == [[CLS, 7, 9, SEP, PAD], [CLS, 5, 6, 8, SEP]]
    assert processor(text="cat " * 30, truncation=True, return_tensors="pt").input_ids.shape == (1, 12)


def test_padding_does_not_count_as_text(processor):
    inputs = processor(text=["red", "cat"], padding="max_length", max_length=20, return_tensors="pt")
    assert inputs.input_ids.shape == (2, 20)


@pytest.mark.parametrize("return_tensors", [None, "pt"])
def test_padding_on_the_left_is_refused(return_tensors):
    processor = make_processor(padding_side="left")
    options = {"return_tensors": return_tensors}
    with pytest.raises(ValueError, match=r"`text\[1\]` is padded on the left.*padding_side='right'"):
        processor(text=["what is this", "cat"], **options)
    assert [list(row) for row in processor(text=["red", "cat"], **options)["input_ids"]] == [[2, 7, 3], [2, 11, 3]]
    rows = processor(text=["what is this", "cat"], padding_side="right", **options)["input_ids"]
    assert list(rows[1]) == [CLS, VOCABULARY["cat"], SEP, PAD, PAD]


@pytest.mark.parametrize("text", [("red", "cat"), ["red", 5], [["red"], ["cat"]]])
def test_texts_must_be_strings(processor, image, text):
    with pytest.raises(ValueError, match="must be a string or list of strings"):
        processor(images=[image, image], text=text)


def test_tokenizer_and_image_kwargs_reach_their_processors(processor, image):
    inputs = processor(
        images=image,
        text="red",
        images_kwargs={"size": {"height": 16, "width": 48}},
        text_kwargs={"add_special_tokens": False},
        return_tensors="pt",
    )
    assert inputs.pixel_values.shape == (1, 3, 16, 48)
    assert inputs.input_ids.tolist() == [[7]]


# --- image_index ----------------------------------------------------------------------------------------------------


def test_as_many_images_as_texts(processor, image):
    assert "image_index" not in processor(images=[image] * 2, text=["red ?", "a cat ?"])
    for images, text, counts in (([image] * 2, ["a"] * 3, "2 images and 3"), (image, ["a", "a"], "1 images and 2")):
        with pytest.raises(ValueError, match=f"Got {counts} texts.*`image_index`"):
            processor(images=images, text=text)


@pytest.mark.parametrize("as_given", [list, torch.tensor, np.array], ids=["list", "tensor", "array"])
def test_image_index_lets_texts_share_images(processor, image, as_given):
    inputs = processor(images=[image] * 2, text=["a"] * 3, image_index=as_given([1, 0, 1]), return_tensors="pt")
    assert inputs.pixel_values.shape[0] == 2 and inputs.input_ids.shape[0] == 3
    assert inputs.image_index.dtype == torch.int64
    assert inputs.image_index.tolist() == [1, 0, 1]


@pytest.mark.parametrize("as_given", [list, torch.tensor, np.array], ids=["list", "tensor", "array"])
def test_a_text_may_be_about_several_images(processor, image, as_given):
    inputs = processor(
        images=[image] * 3, text=["a", "red"], image_index=as_given([[0, 1], [2, 0]]), return_tensors="pt"
    )
    assert inputs.pixel_values.shape[0] == 3
    assert inputs.image_index.dtype == torch.int64
    assert inputs.image_index.tolist() == [[0, 1], [2, 0]]


@pytest.mark.parametrize(
    ("image_index", "message"),
    [
        ([0, 2, 1], r"`image_index\[1\]` is 2, but must be in \[0, 1\]"),
        ([0, 1, -1], r"`image_index\[2\]` is -1, but must be in \[0, 1\]"),
        ([0, 1], "got 2 for 3 texts"),
        ([[0, 1], [0, 2], [1, 1]], r"`image_index\[1\]` is \[0, 2\], but must be in \[0, 1\]"),
    ],
)
def test_image_index_is_validated(processor, image, image_index, message):
    with pytest.raises(ValueError, match=message):
        processor(images=[image] * 2, text=["a"] * 3, image_index=image_index)


def test_image_index_needs_both(processor, image):
    for inputs in ({"images": image}, {"text": "red"}):
        with pytest.raises(ValueError, match="pass both"):
            processor(**inputs, image_index=[0])


# --- back: answers and boxes ----------------------------------------------------------------------------------------


def test_answers_have_no_special_tokens_and_no_spaces(processor, monkeypatch):
    sequences = torch.tensor([[CLS, 10, 11, SEP, PAD], [CLS, 7, SEP, PAD, PAD], [CLS, SEP, PAD, PAD, PAD]])
    assert processor.post_process_answers(sequences) == ["a cat", "red", ""]
    assert processor.post_process_image_text_to_text(sequences)[:2] == ["a cat", "red"]
    # byte-pair tokenizers leave the space before the first word
    monkeypatch.setattr(processor.tokenizer, "batch_decode", lambda *args, **kwargs: [" red "])
    assert processor.post_process_answers(sequences[1:2]) == ["red"]


def test_boxes_of_a_squashed_image():
    # 4 x 4 patches of 16 pixels in 64 x 64; the image of 64 x 32 (width x height) has patches of 16 x 8
    processor = make_processor(BlipImageProcessor(size={"height": 64, "width": 64}))
    first, second = processor.patch_boxes(torch.tensor([[0, 5, 11, -1], [15, -1, 3, 4]]), [(32, 64), (32, 64)])
    assert first.dtype == torch.float32
    assert first.tolist() == [[0, 0, 16, 8], [16, 8, 32, 16], [48, 16, 64, 24]]
    assert second.tolist() == [[48, 24, 64, 32], [48, 0, 64, 8], [0, 8, 16, 16]]


def test_boxes_of_a_resize_that_is_not_square():
    # 32 x 64 (height x width) is a grid of 2 rows, 4 columns; 100 x 80 (height x width) has patches of 50 x 20
    processor = make_processor(BlipImageProcessor(size={"height": 32, "width": 64}))
    (boxes,) = processor.patch_boxes(torch.tensor([[1, 6]]), torch.tensor([[100, 80]]))
    assert boxes.tolist() == [[20, 0, 40, 50], [40, 50, 60, 100]]


def test_boxes_at_another_resolution():
    processor = make_processor(BlipImageProcessor(size={"height": 64, "width": 64}))
    size = {"height": 32, "width": 32}
    assert processor.patch_boxes([[3]], [(64, 64)], size=size)[0].tolist() == [[32, 32, 64, 64]]
    assert processor.patch_boxes([[3]], [(64, 64)], size=32)[0].tolist() == [[32, 32, 64, 64]]


def test_boxes_without_a_resize():
    processor = make_processor(BlipImageProcessor(do_resize=False))
    # 70 x 33 (height x width): a grid of 4 rows, 2 columns; the remainder is no patch
    assert processor.patch_boxes([[7]], [(70, 33)])[0].tolist() == [[16, 48, 32, 64]]
    with pytest.raises(ValueError, match="8 is out of the grid of 4 x 2"):
        processor.patch_boxes([[8]], [(70, 33)])


def test_boxes_of_a_center_crop():
    # 120 x 60 (width x height) -> 64 x 32 -> the middle 32 x 32, from x = 16: one pixel is 1.875 of the original,
    # so the left patch starts at 30 and the right one ends at 90
    clip = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    (boxes,) = make_processor(clip).patch_boxes([[0, 1, 2]], [(60, 120)])
    assert boxes.tolist() == [[30, 0, 60, 30], [60, 0, 90, 30], [30, 30, 60, 60]]
    # without the crop the grid has 2 rows, 4 columns
    (boxes,) = make_processor(clip).patch_boxes([[7]], [(60, 120)], do_center_crop=False)
    assert boxes.tolist() == [[90, 30, 120, 60]]


def test_boxes_of_a_crop_larger_than_the_image_are_clipped():
    clip = CLIPImageProcessor(do_resize=False, crop_size={"height": 64, "width": 64})
    # 40 x 20 (height x width) in the middle of 64 x 64: it starts at y = 12, x = 22
    (boxes,) = make_processor(clip).patch_boxes([[0, 1, 5, 2]], [(40, 20)])
    assert boxes[1:].tolist() == [[0, 0, 10, 4], [0, 4, 10, 20], [10, 0, 20, 4]]
    assert boxes[0, 0] == boxes[0, 2]  # in the padding only: empty


@pytest.mark.parametrize("size", [(60, 120), (90, 50), (33, 47), (40, 20)], ids=str)
@pytest.mark.parametrize("kind", ["squash", "crop", "pad"])
def test_boxes_agree_with_the_pixels(size, kind):
    """Whatever the geometry: with all but one patch's box blackened, the light is in that patch."""
    if kind == "squash":
        image_processor = BlipImageProcessor(size={"height": 64, "width": 64}, do_normalize=False)
    elif kind == "crop":
        image_processor = CLIPImageProcessor(size=64, crop_size=64, do_normalize=False)
    else:
        image_processor = CLIPImageProcessor(do_resize=False, crop_size=64, do_normalize=False)
    processor = make_processor(image_processor)
    for index in (5, 6, 9):
        x0, y0, x1, y1 = processor.patch_boxes([[index]], [size])[0][0].round().int().tolist()
        image = np.zeros((*size, 3), dtype=np.uint8)
        image[y0:y1, x0:x1] = 255
        pixel_values = processor(images=image, return_tensors="pt").pixel_values[0, 0]
        light = pixel_values.reshape(4, 16, 4, 16).sum(dim=(1, 3)).flatten()
        assert light[index] > 0.85 * light.sum() > 0


@pytest.mark.parametrize("index", [4, -2])
def test_index_out_of_the_grid_is_named(processor, index):
    with pytest.raises(ValueError, match=rf"`patch_indices\[1\]`.*{index} is out of the grid of 2 x 2"):
        processor.patch_boxes([[0], [index]], [(10, 10), (10, 10)])


@pytest.mark.parametrize(
    "options",
    [{"size": {"longest_edge": 32}}, {"size": {"shortest_edge": 32, "longest_edge": 64}}, {"do_pad": True}],
    ids=str,
)
def test_resize_that_cannot_be_traced_back_is_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        make_processor(BlipImageProcessor(**options)).patch_boxes([[0]], [(10, 10)])


def test_boxes_need_one_size_per_row(processor):
    with pytest.raises(ValueError, match="Got 2 rows of `patch_indices` and 1"):
        processor.patch_boxes([[0], [0]], [(10, 10)])


# --- construction and saving ----------------------------------------------------------------------------------------


def test_default_image_processor_is_albefs(image):
    processor = TripsProcessor(tokenizer=BertTokenizer(vocab=VOCABULARY))
    assert processor(images=image, return_tensors="pt").pixel_values.shape == (1, 3, 384, 384)


@pytest.mark.parametrize("patch_size", [0, -16, 2.5, None])
def test_patch_size_must_be_a_positive_integer(patch_size):
    with pytest.raises(ValueError, match=f"`patch_size` must be a positive integer, got {patch_size}"):
        make_processor(patch_size=patch_size)


def test_a_loaded_processor_gives_the_same(image, tmp_path):
    clip = CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 24, "width": 24}, image_mean=[0.1] * 3)
    processor = make_processor(clip, patch_size=8)
    processor.save_pretrained(tmp_path)
    loaded = TripsProcessor.from_pretrained(tmp_path)
    assert loaded.patch_size == 8 and isinstance(loaded.image_processor, CLIPImageProcessor)
    call = {"images": [image], "text": ["a cat", "red ?"], "image_index": [0, 0], "return_tensors": "pt"}
    before, after = processor(**call), loaded(**call)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(processor.patch_boxes([[4]], [(20, 30)])[0], loaded.patch_boxes([[4]], [(20, 30)])[0])
    with pytest.raises(ValueError, match="13 tokens"):
        loaded(text="cat " * 11)


def test_saving_leaves_the_processor_as_it_was(processor, tmp_path):
    before = processor.to_dict().keys()
    processor.save_pretrained(tmp_path)
    assert processor.to_dict().keys() == before
    assert '"AutoProcessor": "processing_trips.TripsProcessor"' in (tmp_path / "processor_config.json").read_text()


def test_answers_become_labels_by_hand(processor):
    labels = processor.encode_answers(["red cat", "a"])
    red, cat, a = (VOCABULARY[word] for word in ("red", "cat", "a"))
    assert labels.tolist() == [[red, cat, SEP], [a, SEP, -100]]
    assert processor.post_process_answers(labels.clamp(min=0)) == ["red cat", "a"]


@pytest.mark.parametrize(
    ("answers", "message"),
    [(["red", " "], r"`answers\[1\]` \(' '\) has no tokens"), (["red", "cat " * 12], r"`answers\[1\]` has 13 tokens")],
)
def test_answers_that_cannot_be_labels_are_refused(processor, answers, message):
    with pytest.raises(ValueError, match=message):
        processor.encode_answers(answers)


@pytest.mark.parametrize(
    "answer", ["2.5", "10:30", "1,000", "1/2", "don't", "t-shirt", "a cat", "yes", "men's room 3"]
)
def test_answers_survive_encoding_and_decoding(answer):
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789.,:/'-"]
    vocabulary = WORDS[:5] + letters + [f"##{letter}" for letter in letters]
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(vocabulary)}, model_max_length=32)
    processor = TripsProcessor(tokenizer=tokenizer)
    assert processor.post_process_answers(processor.encode_answers([answer]).clamp(min=0)) == [answer]
