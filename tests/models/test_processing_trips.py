"""The processor: images, texts, image_index, answers, construction and saving."""

import io

import numpy as np
import pytest
import torch
from json_files import read_json
from PIL import Image
from strange_pictures import encoded, noise
from tiny_processors import CLS, PAD, SEP, VOCABULARY, WORDS, make_bert_tokenizer, make_processor
from transformers import AutoProcessor, BertTokenizer
from transformers.utils.logging import warning_once

from modeling_trips import TripsProcessor
from modeling_trips.processing_trips import clean_caption, clean_question


@pytest.fixture
def processor():
    return make_processor()


@pytest.fixture
def image():
    return noise(30, 20)


def test_texts_are_padded_to_the_longest(processor):
    inputs = processor(text=["what is this ?", "red ?"], return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask", "token_type_ids"}
    assert inputs.input_ids.tolist() == [[CLS, 5, 6, 8, 9, SEP], [CLS, 7, 9, SEP, PAD, PAD]]
    assert inputs.attention_mask.tolist() == [[1] * 6, [1, 1, 1, 1, 0, 0]]


@pytest.mark.parametrize(
    "kwargs", [{}, {"padding": False}, {"return_attention_mask": False}, {"return_tensors": "pt"}], ids=str
)
def test_long_text_is_never_cut_silently(processor, kwargs):
    fits = "cat " * 10  # and [CLS], [SEP]; model_max_length is 12
    assert len(processor(text=["a", fits], **kwargs)["input_ids"][1]) == 12
    with pytest.raises(ValueError, match=r"text\[1\]"):
        processor(text=["a", fits + "cat"], **kwargs)


def test_padding_may_be_longer_than_a_text(processor):
    inputs = processor(text="cat", padding="max_length", max_length=20)
    assert len(inputs["input_ids"][0]) == 20


def test_truncation_on_request(processor):
    inputs = processor(text=["red ?", "what is this ?"], max_length=5, truncation=True)
    assert inputs["input_ids"] == [[CLS, 7, 9, SEP, PAD], [CLS, 5, 6, 8, SEP]]
    assert processor(text="cat " * 30, truncation=True, return_tensors="pt").input_ids.shape == (1, 12)


@pytest.mark.parametrize("image_index", [[1, 0, 1], [[0, 1], [1, 1], [1, 0]]], ids=["one image", "two images"])
def test_image_index_lets_texts_share_images(processor, image, image_index):
    inputs = processor(images=[image] * 2, text=["a"] * 3, image_index=image_index, return_tensors="pt")
    assert len(inputs.pixel_values) == 2
    assert len(inputs.input_ids) == 3
    assert inputs.image_index.dtype == torch.int64
    assert inputs.image_index.tolist() == image_index


INDICES = [None, [0, 2, 1], [0, 1, -1], [0, 1], [[0, 1], [0, 2], [1, 1]], 0, ["0", "1", "1"], [0, None, 1]]


@pytest.mark.parametrize("images, image_index", [*(([noise(8, 8)] * 2, index) for index in INDICES), (None, [0] * 3)])
def test_an_image_index_that_fits_nothing_is_refused(processor, images, image_index):
    with pytest.raises(ValueError, match="image_index"):
        processor(images=images, text=["a"] * 3, image_index=image_index)


def test_answers_become_text_and_labels_by_hand(processor):
    red, a, cat = (VOCABULARY[word] for word in ("red", "a", "cat"))
    sequences = torch.tensor([[CLS, a, cat, SEP, PAD], [CLS, red, SEP, PAD, PAD], [CLS, SEP, PAD, PAD, PAD]])
    assert processor.post_process_answers(sequences) == ["a cat", "red", ""]
    assert processor.post_process_image_text_to_text(sequences) == ["a cat", "red", ""]
    labels = processor.encode_answers(["red cat", "a"])
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
    characters = [*"abcdefghijklmnopqrstuvwxyz0123456789.,:/'-"]
    words = WORDS[:5] + characters + [f"##{character}" for character in characters]
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(words)}, model_max_length=32)
    processor = TripsProcessor(tokenizer=tokenizer)
    labels = processor.encode_answers([answer])
    assert processor.post_process_answers(labels.clamp(min=0)) == [answer]


@pytest.mark.parametrize("to_array", [np.array, lambda image: torch.tensor(np.array(image))], ids=["numpy", "torch"])
def test_arrays_give_the_same_as_pictures(processor, image, to_array):
    grey = image.convert("L")

    def pixels_of(images):
        return processor(images=images, return_tensors="pt").pixel_values

    expected = pixels_of([image, grey])
    assert torch.equal(pixels_of([to_array(image), to_array(grey)]), expected)
    assert torch.equal(pixels_of([image, to_array(grey)]), expected)
    assert torch.equal(pixels_of(to_array(grey)), expected[1:])
    batch = torch.as_tensor(np.stack([to_array(image), to_array(image)]))
    assert torch.equal(pixels_of(batch), expected[[0, 0]])


def half_a_jpeg():
    whole = encoded(Image.effect_noise((200, 200), 64), "JPEG")
    return Image.open(io.BytesIO(whole[: len(whole) // 2]))


@pytest.mark.parametrize(
    "unusable",
    [
        Image.new("I", (16, 16)),  # a mode without a range
        Image.new("RGB", (0, 5)),
        np.zeros((3, 0, 5), dtype=np.uint8),
        half_a_jpeg(),
        "/nowhere/cat.png",
        {"image": 1},
        np.zeros((2, 2, 2, 2, 2)),
    ],
    ids=["mode", "empty", "empty array", "truncated", "path", "dict", "dimensions"],
)
def test_an_image_that_cannot_be_used_is_named(processor, image, unusable):
    with pytest.raises(ValueError, match=r"images\[1\]"):
        processor(images=[image, unusable])


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
    "text_cleaning, cleaned", [(None, TEXT), ("albef_question", QUESTION), ("albef_caption", CAPTION)]
)
def test_texts_are_cleaned_and_answers_are_not(tokenizer, tmp_path, text_cleaning, cleaned):
    saved = TripsProcessor(tokenizer=tokenizer, text_cleaning=text_cleaning)
    saved.save_pretrained(tmp_path)
    assert read_json(tmp_path / "processor_config.json")["text_cleaning"] == text_cleaning
    expected = tokenizer(cleaned)["input_ids"]
    assert tokenizer.mask_token_id in expected
    answer = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    for processor in (saved, TripsProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert processor(text=TEXT)["input_ids"] == [expected]
        assert processor(text=[TEXT, "a"])["input_ids"][0] == expected
        assert processor.encode_answers([TEXT])[0, :-1].tolist() == answer
