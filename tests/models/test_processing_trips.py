"""The processor: images, texts, image_index, answers, boxes, construction and saving."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_processors import CLS, PAD, SEP, VOCABULARY, WORDS, make_bert_tokenizer, make_processor
from transformers import AutoProcessor, BertTokenizer, BlipImageProcessor, CLIPImageProcessor

from modeling_trips import TripsProcessor
from modeling_trips.processing_trips import clean_caption, clean_question


@pytest.fixture
def processor():
    return make_processor()


@pytest.fixture
def image():
    pixels = np.random.default_rng(0).integers(0, 256, size=(20, 30, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# --- text -----------------------------------------------------------------------------------------------------------


def test_texts_are_padded_to_the_longest(processor):
    inputs = processor(text=["what is this ?", "red ?"], return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask", "token_type_ids"}
    assert inputs.input_ids.tolist() == [[CLS, 5, 6, 8, 9, SEP], [CLS, 7, 9, SEP, PAD, PAD]]
    assert inputs.attention_mask.tolist() == [[1] * 6, [1, 1, 1, 1, 0, 0]]


@pytest.mark.parametrize(
    "kwargs", [{}, {"return_tensors": "pt"}, {"padding": False}, {"return_attention_mask": False}, {"max_length": 20}]
)
def test_long_text_is_never_cut_silently(processor, kwargs):
    fits, too_long = "cat " * 10, "cat " * 11  # and [CLS], [SEP]; model_max_length is 12
    assert len(processor(text=["a", fits], **kwargs)["input_ids"][1]) == 12
    with pytest.raises(ValueError, match=r"text\[1\]"):
        processor(text=["a", too_long], **kwargs)
    with pytest.raises(ValueError, match=r"text\[0\]"):
        processor(text=too_long, **kwargs)


def test_truncation_on_request(processor):
    inputs = processor(text=["red ?", "what is this ?"], max_length=5, truncation=True)
    assert inputs["input_ids"] == [[CLS, 7, 9, SEP, PAD], [CLS, 5, 6, 8, SEP]]
    assert processor(text="cat " * 30, truncation=True, return_tensors="pt").input_ids.shape == (1, 12)


# --- image_index ----------------------------------------------------------------------------------------------------


def test_as_many_images_as_texts(processor, image):
    assert "image_index" not in processor(images=[image] * 2, text=["red ?", "a cat ?"])
    for images, text in (([image] * 2, ["a"] * 3), (image, ["a", "a"])):
        with pytest.raises(ValueError, match="image_index"):
            processor(images=images, text=text)


@pytest.mark.parametrize("as_given", [list, torch.tensor, np.array], ids=["list", "tensor", "array"])
@pytest.mark.parametrize("image_index", [[1, 0, 1], [[0, 1], [1, 1], [1, 0]]], ids=["one image", "two images"])
def test_image_index_lets_texts_share_images(processor, image, image_index, as_given):
    inputs = processor(images=[image] * 2, text=["a"] * 3, image_index=as_given(image_index), return_tensors="pt")
    assert inputs.pixel_values.shape[0] == 2 and inputs.input_ids.shape[0] == 3
    assert inputs.image_index.dtype == torch.int64
    assert inputs.image_index.tolist() == image_index


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


# --- answers --------------------------------------------------------------------------------------------------------


def test_answers_have_no_special_tokens_and_no_spaces(processor, monkeypatch):
    sequences = torch.tensor([[CLS, 10, 11, SEP, PAD], [CLS, 7, SEP, PAD, PAD], [CLS, SEP, PAD, PAD, PAD]])
    assert processor.post_process_answers(sequences) == ["a cat", "red", ""]
    assert processor.post_process_image_text_to_text(sequences)[:2] == ["a cat", "red"]
    # byte-pair tokenizers leave the space before the first word
    monkeypatch.setattr(processor.tokenizer, "batch_decode", lambda *args, **kwargs: [" red "])
    assert processor.post_process_answers(sequences[1:2]) == ["red"]


def test_answers_become_labels_by_hand(processor):
    labels = processor.encode_answers(["red cat", "a"])
    red, cat, a = (VOCABULARY[word] for word in ("red", "cat", "a"))
    assert labels.tolist() == [[red, cat, SEP], [a, SEP, -100]]
    assert processor.post_process_answers(labels.clamp(min=0)) == ["red cat", "a"]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (["red", " "], r"`answers\[1\]` \(' '\) has no tokens"),
        (["red", "cat " * 12], r"`answers\[1\]` has 13 tokens .* only 12 are allowed\. Shorten it\.$"),
        ("red", r"`answers` must be a list of at least one text, got 'red'"),  # not its letters
        ([], r"`answers` must be a list of at least one text, got \[\]"),
        (["red", 5], r"`answers` must be a list of at least one text, got \['red', 5\]"),
    ],
)
def test_answers_that_cannot_be_labels_are_refused(processor, answers, message):
    with pytest.raises(ValueError, match=message):
        processor.encode_answers(answers)


def test_answers_that_no_model_can_write_are_warned_of_once(processor, caplog):
    first, second, known = processor.encode_answers(["a zebra", "a quiz", "a cat"]).tolist()
    assert first == second != known
    processor.encode_answers(["a zebra", "red"])
    assert [record.message for record in caplog.records] == [
        f"The answer {answer!r} holds words that the tokenizer does not know." for answer in ("a zebra", "a quiz")
    ]


@pytest.mark.parametrize(
    "answer", ["2.5", "10:30", "1,000", "1/2", "don't", "t-shirt", "a cat", "yes", "men's room 3"]
)
def test_answers_survive_encoding_and_decoding(answer):
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789.,:/'-"]
    vocabulary = WORDS[:5] + letters + [f"##{letter}" for letter in letters]
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(vocabulary)}, model_max_length=32)
    processor = TripsProcessor(tokenizer=tokenizer)
    assert processor.post_process_answers(processor.encode_answers([answer]).clamp(min=0)) == [answer]


# --- construction and saving ----------------------------------------------------------------------------------------


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


# --- images -> pixel_values -----------------------------------------------------------------------------------------


def test_pixel_values_are_the_image_processors(processor, image):
    pixel_values = processor(images=[image, image], return_tensors="pt").pixel_values
    expected = processor.image_processor(images=[image, image], return_tensors="pt").pixel_values
    assert pixel_values.shape == (2, 3, 32, 32) and pixel_values.dtype == torch.float32
    assert torch.equal(pixel_values, expected)


@pytest.mark.parametrize(
    "small",
    [Image.new("RGB", (300, 15)), np.zeros((15, 40, 3), dtype=np.uint8), torch.zeros(3, 1, 3)],
    ids=["picture", "channels last", "channels first"],
)
def test_an_image_smaller_than_a_patch_is_named(processor, image, small):
    processor(images=[image, np.zeros((16, 16, 3), dtype=np.uint8), torch.zeros(3, 16, 40)])
    with pytest.raises(ValueError, match=r"images\[1\]"):
        processor(images=[image, small])


TEXT = "What's a <Person>'s t-shirt [MASK], (2.5/3)?"
QUESTION = "Whats a <Person>s t shirt [MASK] 25 3"
CAPTION = "Whats a persons t shirt [MASK] 25 3"


@pytest.fixture
def tokenizer():
    return make_bert_tokenizer([TEXT.replace("[MASK]", ""), QUESTION.replace("[MASK]", "")])


def test_cleaning_by_hand():
    assert clean_question(TEXT) == QUESTION
    assert clean_caption(TEXT) == CAPTION
    assert clean_question("""a,b.c'd!e?f"g(h)i*j#k:l;m~n""") == "abcdefghijklmn"
    assert clean_question("& $5 a_b @ é") == "& $5 a_b @ é"


@pytest.mark.parametrize(
    ("text_cleaning", "expected"), [(None, TEXT), ("albef_question", QUESTION), ("albef_caption", CAPTION)]
)
def test_texts_are_cleaned_and_answers_are_not(tokenizer, tmp_path, text_cleaning, expected):
    processor = TripsProcessor(tokenizer=tokenizer, text_cleaning=text_cleaning)
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "processor_config.json").read_text())["text_cleaning"] == text_cleaning
    for one in (processor, TripsProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        ids = tokenizer(expected)["input_ids"]
        assert one(text=TEXT)["input_ids"] == ids and tokenizer.mask_token_id in ids
        assert one(text=[TEXT, "a"])["input_ids"][0] == ids
        assert one.encode_answers([TEXT])[0, :-1].tolist() == tokenizer(TEXT, add_special_tokens=False)["input_ids"]


def test_boxes_of_a_center_crop():
    # 120 x 60 (width x height) -> 64 x 32 -> the middle 32 x 32, from x = 16: one pixel is 1.875 of the original,
    # so the left patch starts at 30 and the right one ends at 90
    clip = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    (boxes,) = make_processor(clip).patch_boxes([[0, 1, 2]], [(60, 120)])
    assert boxes.tolist() == [[30, 0, 60, 30], [60, 0, 90, 30], [30, 30, 60, 60]]


@pytest.mark.parametrize("size", [(60, 120), (90, 50), (33, 47), (40, 20)], ids=str)
@pytest.mark.parametrize("kind", ["squash", "crop", "pad"])
def test_boxes_agree_with_the_pixels(size, kind):
    """With all pixels outside a patch's box blackened, only that patch is bright."""
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
