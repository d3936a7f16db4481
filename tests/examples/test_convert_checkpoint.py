"""`examples/convert_checkpoint.py`: from a published file to a checkpoint with its processor."""

import argparse
import sys

import numpy as np
import pytest
import torch
from albef_reference import TINY, random_checkpoint
from convert_cases import TEXTS, convert, make_tokenizer
from json_files import read_json
from killed import kill_when
from PIL import Image
from places import EXAMPLES
from strange_pictures import noise
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from modeling_trips import TripsConfig, TripsForQuestionAnswering, TripsProcessor
from modeling_trips.conversion.processors import load_albef_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def sizes(tokenizer):
    return TINY._replace(vocab=len(tokenizer), max_length=64)


@pytest.fixture
def arguments(tmp_path, tokenizer, sizes):
    """Write a VQA checkpoint as published, with optimizer state and settings, and return the arguments."""
    tokenizer.save_pretrained(tmp_path / "bert")
    content = {
        "model": random_checkpoint("question-answering", sizes),
        "optimizer": {"state": {0: {"step": 1, "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-5}]},
        "config": {"image_res": 12, "schedular": {"lr": 1e-5}},
        "epoch": 7,
    }
    torch.save(content, tmp_path / "vqa.pth")
    return {
        "checkpoint": tmp_path / "vqa.pth",
        "output_dir": tmp_path / "out",
        "tokenizer": tmp_path / "bert",
        "num_attention_heads": sizes.num_heads,
    }


def test_the_folder_loads_with_its_processor_and_a_report(arguments, capsys):
    report = convert(arguments)
    folder = arguments["output_dir"]
    model, loading = TripsForQuestionAnswering.from_pretrained(folder, schedule="unpruned", output_loading_info=True)
    assert not any(loading.values())
    processor = TripsProcessor.from_pretrained(folder)
    inputs = processor(images=[Image.new("RGB", (30, 20), "teal")] * 4, text=TEXTS, return_tensors="pt")
    assert inputs["pixel_values"].shape == (4, 3, 12, 12)
    assert len(processor.post_process_answers(model.generate(**inputs, max_new_tokens=3))) == 4
    assert model.config.decoder_start_token_id == processor.tokenizer.cls_token_id
    assert model.config.decoder_config.eos_token_id == processor.tokenizer.sep_token_id
    written = read_json(folder / "conversion_report.json")
    source = torch.load(arguments["checkpoint"], weights_only=True)["model"]
    assert {*written["used"], *written["left_out"]} == source.keys()
    assert str(report) in capsys.readouterr().out


def test_the_options_set_schedule_and_resolution(arguments):
    convert(arguments, schedule="3:image:0.5,8:image:0.6", image_size=20)
    model = TripsForQuestionAnswering.from_pretrained(arguments["output_dir"])
    assert str(model.config.vision_config.schedule) == "3:image:0.5,8:image:0.6"
    assert model.model.vision_model.embeddings.position_embeddings.shape == (1, 26, 16)
    processor = TripsProcessor.from_pretrained(arguments["output_dir"])
    assert processor.image_processor.size == {"height": 20, "width": 20}
    assert processor.patch_size == 4


def test_images_are_prepared_as_albef_does(arguments):
    convert(arguments)
    processor = TripsProcessor.from_pretrained(arguments["output_dir"])
    image = noise(20, 30)
    pixels = np.asarray(image.resize((12, 12), Image.Resampling.BICUBIC)) / 255
    expected = (pixels - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    actual = processor(images=image, return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(actual, expected.transpose(2, 0, 1), atol=0.04)  # two grey levels


def clean(text, task):
    """Clean a text as ALBEF does: lower case, split at hyphens and slashes, no other punctuation."""
    text = text.lower().translate(str.maketrans("-/", "  ", ",.'!?\"()*#:;~"))
    text = " ".join(text.split())
    return text if task == "question-answering" else text.replace("<person>", "person")


@pytest.mark.parametrize(
    "task, head", [("question-answering", "TripsForQuestionAnswering"), ("retrieval", "TripsForRetrieval")]
)
def test_texts_are_prepared_as_albef_does(arguments, tokenizer, sizes, task, head):
    torch.save({"model": random_checkpoint(task, sizes)}, arguments["checkpoint"])
    convert(arguments)
    assert TripsConfig.from_pretrained(arguments["output_dir"]).architectures == [head]
    processor = TripsProcessor.from_pretrained(arguments["output_dir"])
    for text in TEXTS:
        words = tokenizer(clean(text, task), add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in words
        # ALBEF's own tokenizer puts no [SEP] after a text.
        assert processor(text=text)["input_ids"] == [[tokenizer.cls_token_id, *words]]
        assert processor.tokenizer(text, "red")["input_ids"][-1] == tokenizer.sep_token_id
    assert processor.tokenizer.mask_token_id in processor(text="a [MASK] circle")["input_ids"][0]


def test_texts_are_in_lower_case_whatever_the_tokenizer_does(tokenizer, tmp_path):
    vocabulary = tokenizer.get_vocab()
    cased = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordPiece(vocabulary, unk_token="[UNK]")), **tokenizer.special_tokens_map
    )
    cased.backend_tokenizer.pre_tokenizer = WhitespaceSplit()  # and no normalizer
    cased.save_pretrained(tmp_path)
    expected = [tokenizer.cls_token_id, vocabulary["red"], vocabulary["circle"]]
    assert load_albef_tokenizer(str(tmp_path))("RED Circle")["input_ids"] == expected


class Touch:
    """Object that makes the file `path` when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_file_that_holds_more_than_data_is_refused_and_runs_nothing(arguments, tmp_path):
    torch.save({"model": {}, "args": argparse.Namespace(lr=1)}, arguments["checkpoint"])
    with pytest.raises(ValueError, match="vqa.pth.*argparse.Namespace"):
        convert(arguments)
    torch.save({"model": {}, "args": Touch(tmp_path / "ran")}, arguments["checkpoint"])
    with pytest.raises(ValueError, match="vqa.pth"):
        convert(arguments)
    assert not (tmp_path / "ran").exists()
    assert not arguments["output_dir"].exists()


@pytest.mark.slow
def test_a_killed_conversion_leaves_nothing_under_the_name(arguments, tmp_path):
    options = [f"--{name}={value}" for name, value in arguments.items()]
    command = [sys.executable, str(EXAMPLES / "convert_checkpoint.py"), *options]
    kill_when(lambda: any(tmp_path.glob(".out-writing-*/whole/config.json")), command)
    folder = arguments["output_dir"]
    assert not folder.exists() or (folder / "conversion_report.json").exists()  # or it was faster, and is whole
    if not folder.exists():
        convert(arguments)
    TripsForQuestionAnswering.from_pretrained(folder)
    assert not any(tmp_path.glob(".out-writing-*"))
