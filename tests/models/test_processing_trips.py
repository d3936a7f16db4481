"""The processor: texts, image_index, answers, construction and saving."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_processors import CLS, PAD, SEP, VOCABULARY, WORDS, make_processor
from transformers import BertTokenizer, CLIPImageProcessor

from modeling_trips.processing_trips import TripsProcessor


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


def test_token_type_ids_only_if_the_tokenizer_makes_them(image):
    processor = make_processor(model_input_names=["input_ids", "attention_mask"])
    assert set(processor(images=image, text="red")) == {"pixel_values", "input_ids", "attention_mask"}
    assert processor.model_input_names == ["pixel_values", "input_ids", "attention_mask"]


def test_empty_text_is_a_prompt(processor, image):
    assert processor(images=image, text="", return_tensors="pt").input_ids.tolist() == [[CLS, SEP]]


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


@pytest.mark.parametrize("padding", [True, False, "max_length"])
def test_max_length_alone_does_not_cut(processor, padding):
    with pytest.raises(ValueError, match=r"text\[1\]"):
        processor(text=["red ?", "what is this ?"], max_length=5, padding=padding)
    with pytest.raises(ValueError, match=r"text\[0\]"):
        processor(text="what is this ?", text_kwargs={"max_length": 5, "padding": padding})


def test_truncation_on_request(processor):
    inputs = processor(text=["red ?", "what is this ?"], max_length=5, truncation=True)
    assert inputs["input_ids"] == [[CLS, 7, 9, SEP, PAD], [CLS, 5, 6, 8, SEP]]
    assert processor(text="cat " * 30, truncation=True, return_tensors="pt").input_ids.shape == (1, 12)


def test_padding_does_not_count_as_text(processor):
    inputs = processor(text=["red", "cat"], padding="max_length", max_length=20, return_tensors="pt")
    assert inputs.input_ids.shape == (2, 20)


@pytest.mark.parametrize("text", [["red", 5], [["red"], ["cat"]], 5])
def test_texts_must_be_strings(processor, image, text):
    with pytest.raises(ValueError, match="text") as error:
        processor(images=[image, image], text=text)
    assert repr(text) in str(error.value)


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


@pytest.mark.parametrize("image_index", [0, ["0", "1"], [0, None], [[0], ["1"]], torch.tensor([0.0, 1.0])], ids=str)
def test_image_index_must_be_integers(processor, image, image_index):
    with pytest.raises(ValueError, match="image_index"):
        processor(images=[image] * 2, text=["a"] * 2, image_index=image_index)


def test_image_index_needs_both(processor, image):
    for inputs in ({"images": image}, {"text": "red"}):
        with pytest.raises(ValueError, match="image_index"):
            processor(**inputs, image_index=[0])


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


def test_default_image_processor_is_albefs(image):
    processor = TripsProcessor(tokenizer=BertTokenizer(vocab=VOCABULARY))
    assert processor(images=image, return_tensors="pt").pixel_values.shape == (1, 3, 384, 384)


@pytest.mark.parametrize("patch_size", [0, -16, 2.5, None])
def test_patch_size_must_be_a_positive_integer(patch_size):
    with pytest.raises(ValueError, match="patch_size"):
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
