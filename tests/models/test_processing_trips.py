"""The processor: images, texts, image_index, answers, construction and saving."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_processors import CLS, PAD, SEP, VOCABULARY, WORDS, encoded, make_bert_tokenizer, make_processor
from transformers import AutoProcessor, BertTokenizer, CLIPImageProcessor
from transformers.utils.logging import warning_once

from modeling_trips import TripsProcessor
from modeling_trips.processing_trips import clean_caption, clean_question


@pytest.fixture
def processor():
    return make_processor()


@pytest.fixture
def image():
    pixels = np.random.default_rng(0).integers(0, 256, size=(20, 30, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_texts_are_padded_to_the_longest(processor):
    inputs = processor(text=["what is this ?", "red ?"], return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask", "token_type_ids"}
    assert inputs.input_ids.tolist() == [[CLS, 5, 6, 8, 9, SEP], [CLS, 7, 9, SEP, PAD, PAD]]
    assert inputs.attention_mask.tolist() == [[1] * 6, [1, 1, 1, 1, 0, 0]]


@pytest.mark.parametrize(
    "kwargs", [{}, {"padding": False}, {"return_attention_mask": False}, {"return_tensors": "pt"}], ids=str
)
def test_long_text_is_never_cut_silently(processor, kwargs):
    fits, too_long = "cat " * 10, "cat " * 11  # and [CLS], [SEP]; model_max_length is 12
    assert len(processor(text=["a", fits], **kwargs)["input_ids"][1]) == 12
    with pytest.raises(ValueError, match=r"text\[1\]"):
        processor(text=["a", too_long], **kwargs)
    assert len(processor(text="cat", padding="max_length", max_length=20)["input_ids"]) == 20  # padding is no text


def test_truncation_on_request(processor):
    inputs = processor(text=["red ?", "what is this ?"], max_length=5, truncation=True)
    assert inputs["input_ids"] == [[CLS, 7, 9, SEP, PAD], [CLS, 5, 6, 8, SEP]]
    assert processor(text="cat " * 30, truncation=True, return_tensors="pt").input_ids.shape == (1, 12)


@pytest.mark.parametrize("image_index", [[1, 0, 1], [[0, 1], [1, 1], [1, 0]]], ids=["one image", "two images"])
def test_image_index_lets_texts_share_images(processor, image, image_index):
    inputs = processor(images=[image] * 2, text=["a"] * 3, image_index=image_index, return_tensors="pt")
    assert inputs.pixel_values.shape[0] == 2 and inputs.input_ids.shape[0] == 3
    assert inputs.image_index.dtype == torch.int64
    assert inputs.image_index.tolist() == image_index


@pytest.mark.parametrize(
    "image_index", [None, [0, 2, 1], [0, 1, -1], [0, 1], [[0, 1], [0, 2], [1, 1]], 0, ["0", "1", "1"], [0, None, 1]]
)
def test_an_image_index_that_fits_nothing_is_refused(processor, image, image_index):
    with pytest.raises(ValueError, match="image_index"):
        processor(images=[image] * 2, text=["a"] * 3, image_index=image_index)
    with pytest.raises(ValueError, match="image_index"):
        processor(text="red", image_index=[0])


def test_answers_become_text_and_labels_by_hand(processor):
    sequences = torch.tensor([[CLS, 10, 11, SEP, PAD], [CLS, 7, SEP, PAD, PAD], [CLS, SEP, PAD, PAD, PAD]])
    assert processor.post_process_answers(sequences) == ["a cat", "red", ""]
    assert processor.post_process_image_text_to_text(sequences)[:2] == ["a cat", "red"]
    labels = processor.encode_answers(["red cat", "a"])
    red, cat, a = (VOCABULARY[word] for word in ("red", "cat", "a"))
    assert labels.tolist() == [[red, cat, SEP], [a, SEP, -100]]
    assert processor.post_process_answers(labels.clamp(min=0)) == ["red cat", "a"]


@pytest.mark.parametrize("answers", [["red", " "], ["red", "cat " * 12], "red", [], ["red", 5]], ids=str)
def test_answers_that_cannot_be_labels_are_refused(processor, answers):
    with pytest.raises(ValueError, match="answers"):
        processor.encode_answers(answers)


def test_answers_that_no_model_can_write_are_warned_of_once(processor, caplog):
    warning_once.cache_clear()  # another test may have been warned
    first, second, known = processor.encode_answers(["a zebra", "a quiz", "a cat"]).tolist()
    assert first == second != known
    processor.encode_answers(["a zebra", "red"])
    assert len(caplog.records) == 1


@pytest.mark.parametrize("answer", ["2.5", "10:30", "1/2", "don't", "t-shirt", "men's room 3"])
def test_answers_survive_encoding_and_decoding(answer):
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789.,:/'-"]
    vocabulary = WORDS[:5] + letters + [f"##{letter}" for letter in letters]
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(vocabulary)}, model_max_length=32)
    processor = TripsProcessor(tokenizer=tokenizer)
    assert processor.post_process_answers(processor.encode_answers([answer]).clamp(min=0)) == [answer]


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
    with pytest.raises(ValueError, match="text"):
        loaded(text="cat " * 11)


@pytest.mark.parametrize("make", [np.array, lambda image: torch.from_numpy(np.array(image))], ids=["numpy", "torch"])
def test_arrays_give_the_same_as_pictures(processor, image, make):
    grey = image.convert("L")
    expected = processor(images=[image, grey], return_tensors="pt").pixel_values
    assert torch.equal(processor(images=[make(image), make(grey)], return_tensors="pt").pixel_values, expected)
    assert torch.equal(processor(images=make(grey), return_tensors="pt").pixel_values, expected[1:])
    batch = torch.as_tensor(np.stack([make(image)] * 2))
    assert torch.equal(processor(images=batch, return_tensors="pt").pixel_values, expected[[0, 0]])


def half_a_jpeg(image):
    whole = encoded(image.resize((200, 200)), "JPEG")
    return Image.open(io.BytesIO(whole.getvalue()[: whole.getbuffer().nbytes // 2]))


@pytest.mark.parametrize(
    "make",
    [
        lambda image: Image.new("I", (16, 16)),  # a mode without a range
        lambda image: Image.new("RGB", (0, 5)),
        lambda image: np.zeros((3, 0, 5), dtype=np.uint8),
        half_a_jpeg,
        lambda image: "/nowhere/cat.png",
        lambda image: {"image": 1},
        lambda image: np.zeros((2, 2, 2, 2, 2)),
    ],
)
def test_an_image_that_cannot_be_used_is_named(processor, image, make):
    processor(images=[image, np.zeros((16, 16, 3), dtype=np.uint8), torch.zeros(3, 16, 40)])
    with pytest.raises(ValueError, match=r"images\[1\]"):
        processor(images=[image, make(image)])


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
