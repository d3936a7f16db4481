"""examples/convert_checkpoint.py: from a published file to a folder that loads, with the processor it belongs with."""

import argparse
import json

import numpy as np
import pytest
import torch
from albef_reference import TINY, Albef, random_checkpoint
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    BertConfig,
    BlipConfig,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    PreTrainedTokenizerFast,
    ViltConfig,
    ViltForImageAndTextRetrieval,
    ViltForImagesAndTextClassification,
    ViltForMaskedLM,
    ViltForQuestionAnswering,
    ViltForTokenClassification,
    ViltImageProcessor,
    ViltModel,
)

from modeling_trips import (
    TripsForConditionalGeneration,
    TripsForImagesAndTextClassification,
    TripsForQuestionAnswering,
    TripsForRetrieval,
    TripsForVisualGrounding,
    TripsModel,
    TripsProcessor,
)
from modeling_trips.conversion.rules import ConversionError
from trips_examples import convert_checkpoint
from trips_examples.data.vocabulary import train_wordpiece_tokenizer


TEXTS = [
    "What's the man-made thing on the left/right side?",
    "Is it (really) a RED circle; or not...",
    'a <Person> says "hello" #2: yes!',
    "Café * plain ~ text",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece_tokenizer([*TEXTS, "a person", "whats its"])


@pytest.fixture(scope="module")
def sizes(tokenizer):
    return TINY._replace(vocab=len(tokenizer), max_length=64)


@pytest.fixture
def arguments(tmp_path, tokenizer, sizes):
    """Converts a VQA checkpoint as it is published, with its optimizer's state and settings beside the weights."""
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


def convert(arguments, **others):
    argv = []
    for name, value in {**arguments, **others}.items():
        argv += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return convert_checkpoint.main(argv)


def weights_of(arguments):
    return torch.load(arguments["checkpoint"], weights_only=True)["model"]


@torch.no_grad()
def test_the_folder_loads_and_computes_what_albef_does(arguments, sizes, capsys):
    report = convert(arguments)
    folder = arguments["output_dir"]
    model, loading = TripsForQuestionAnswering.from_pretrained(folder, keep_rate=1.0, output_loading_info=True)
    assert not any(loading.values())
    albef = Albef(weights_of(arguments), sizes)
    processor = TripsProcessor.from_pretrained(folder)
    inputs = processor(images=[Image.new("RGB", (30, 20), "teal")] * 4, text=TEXTS, return_tensors="pt")
    assert inputs["pixel_values"].shape == (4, 3, 12, 12)
    answer_ids = torch.tensor([[processor.tokenizer.cls_token_id, 9, 8]]).expand(4, -1)
    logits = model(**inputs, decoder_input_ids=answer_ids).logits
    torch.testing.assert_close(logits, albef.decoder_logits(**inputs, answer_ids=answer_ids), atol=1e-4, rtol=0)
    assert len(processor.post_process_answers(model.generate(**inputs, max_new_tokens=3))) == 4
    assert model.config.decoder_start_token_id == processor.tokenizer.cls_token_id
    assert model.config.decoder_config.eos_token_id == processor.tokenizer.sep_token_id
    written = json.loads((folder / "conversion_report.json").read_text())
    assert {*written["used"], *written["left_out"]} == set(weights_of(arguments))
    assert str(report) in capsys.readouterr().out


def test_the_options_set_schedule_and_resolution(arguments):
    convert(arguments, selection_layers=[3, 8], keep_rate=[0.5, 0.6], selection_guidance="image", image_size=20)
    model = TripsForQuestionAnswering.from_pretrained(arguments["output_dir"])
    assert (model.config.selection_layers, model.config.keep_rate) == ([3, 8], [0.5, 0.6])
    assert model.config.selection_guidance == "image"
    assert model.model.vision_model.embeddings.position_embeddings.shape == (1, 26, 16)
    processor = TripsProcessor.from_pretrained(arguments["output_dir"])
    assert processor.image_processor.size == {"height": 20, "width": 20} and processor.patch_size == 4


def test_images_are_prepared_as_albef_does(arguments):
    convert(arguments)
    processor = TripsProcessor.from_pretrained(arguments["output_dir"])
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8))
    pixels = np.asarray(image.resize((12, 12), Image.Resampling.BICUBIC)) / 255
    expected = (pixels - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    actual = processor(images=image, return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(actual, expected.transpose(2, 0, 1), atol=0.04)  # two grey levels


def clean(text: str) -> str:
    """A caption as ALBEF tokenizes it: in lower case, words parted at hyphens and slashes, no other punctuation."""
    letters = [letter for letter in text.lower().replace("<person>", "person") if letter not in ",.'!?\"()*#:;~"]
    return " ".join("".join(" " if letter in "-/" else letter for letter in letters).split())


@pytest.mark.parametrize("text", TEXTS)
def test_texts_are_prepared_as_albef_does(arguments, tokenizer, text):
    convert(arguments)
    processor = TripsProcessor.from_pretrained(arguments["output_dir"])
    words = tokenizer(clean(text), add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in words
    # ALBEF's own tokenizer puts no [SEP] after a text.
    assert processor(text=text)["input_ids"] == [tokenizer.cls_token_id, *words]
    assert processor.tokenizer(text, "red")["input_ids"][-1] == tokenizer.sep_token_id
    assert processor.tokenizer.mask_token_id in processor(text="a [MASK] circle")["input_ids"]


def test_texts_are_in_lower_case_whatever_the_tokenizer_does(tokenizer, tmp_path):
    vocabulary = tokenizer.get_vocab()
    cased = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordPiece(vocabulary, unk_token="[UNK]")), **tokenizer.special_tokens_map
    )
    cased.backend_tokenizer.pre_tokenizer = WhitespaceSplit()  # and no normalizer
    cased.save_pretrained(tmp_path)
    expected = [tokenizer.cls_token_id, *(vocabulary[word] for word in ("red", "circle"))]
    assert convert_checkpoint.albef_tokenizer(str(tmp_path))("RED - Circle!")["input_ids"] == expected


@pytest.mark.parametrize("name", ["plain.pth", "weights.safetensors"])
def test_weights_alone_convert_too(arguments, tmp_path, name):
    weights = weights_of(arguments)
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file({key: value.clone() for key, value in weights.items()}, path)
    else:
        torch.save(weights, path)
    convert(arguments)
    convert(arguments, checkpoint=path, output_dir=tmp_path / "again")
    model, again = (TripsForQuestionAnswering.from_pretrained(tmp_path / folder) for folder in ("out", "again"))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))


class Touch:
    """Makes the file `path` when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_file_that_holds_more_than_data_is_refused_and_runs_nothing(arguments, tmp_path):
    torch.save({"model": {}, "args": argparse.Namespace(lr=1)}, arguments["checkpoint"])
    with pytest.raises(
        ValueError, match=r"vqa.pth holds more than weights: argparse.Namespace\. .*weights_only=False"
    ):
        convert(arguments)
    torch.save({"model": {}, "args": Touch(tmp_path / "ran")}, arguments["checkpoint"])
    with pytest.raises(ValueError, match="holds more than weights"):
        convert(arguments)
    assert not (tmp_path / "ran").exists() and not arguments["output_dir"].exists()


def test_a_file_that_is_no_checkpoint_is_refused_by_name(arguments, tmp_path):
    arguments["checkpoint"].write_text("<html>Not found</html>")
    with pytest.raises(ValueError, match=r"vqa.pth cannot be read as weights alone\. Is the file complete\?"):
        convert(arguments)
    torch.save({"state": {"a": torch.ones(1)}, "epoch": 3}, arguments["checkpoint"])
    with pytest.raises(ValueError, match="no entry `model`, and is no state dict itself: it holds state, epoch"):
        convert(arguments)
    with pytest.raises(ValueError, match=r"missing.pth: there is no such file"):
        convert(arguments, checkpoint=tmp_path / "missing.pth")


def test_a_tokenizer_of_another_vocabulary_is_refused(arguments, tmp_path):
    train_wordpiece_tokenizer(["abc"]).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"The tokenizer has 13 tokens, but the checkpoint was trained with \d+"):
        convert(arguments, tokenizer=tmp_path / "other")


def test_a_failed_conversion_leaves_nothing_behind(arguments, tmp_path, monkeypatch):
    weights = weights_of(arguments)
    del weights["visual_encoder.norm.bias"]
    torch.save({"model": weights}, tmp_path / "broken.pth")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConversionError, match="visual_encoder.norm.bias"):
        convert(arguments, checkpoint=tmp_path / "broken.pth")
    monkeypatch.setattr(TripsProcessor, "save_pretrained", lambda *_: 1 / 0)  # after the model was written
    with pytest.raises(ZeroDivisionError):
        convert(arguments)
    assert sorted(tmp_path.iterdir()) == before


def test_an_existing_folder_is_not_overwritten(arguments):
    convert(arguments)
    with pytest.raises(ValueError, match="--output_dir .*out exists"):
        convert(arguments)


def test_a_retrieval_checkpoint_becomes_a_retrieval_model(arguments, sizes):
    torch.save({"model": random_checkpoint("retrieval", sizes)}, arguments["checkpoint"])
    convert(arguments)
    model = TripsForRetrieval.from_pretrained(arguments["output_dir"])
    assert torch.equal(model.itm_head.weight, weights_of(arguments)["itm_head.weight"])
    assert model.vision_proj.out_features == sizes.projection


# BLIP


@pytest.fixture
def blip_folder(tmp_path, tokenizer):
    layers = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 2}
    text = {"vocab_size": len(tokenizer), "bos_token_id": 4, "sep_token_id": 3, "max_position_embeddings": 32}
    config = BlipConfig(
        text_config={**layers, **text},
        vision_config={**layers, "image_size": 16, "patch_size": 4},
        initializer_range=0.3,
    )
    BlipForQuestionAnswering(config).save_pretrained(tmp_path / "blip")
    tokenizer.save_pretrained(tmp_path / "blip")
    return tmp_path / "blip"


@torch.no_grad()
def test_a_folder_of_blip_converts_with_its_own_tokenizer(blip_folder, tmp_path):
    convert({"checkpoint": blip_folder, "output_dir": tmp_path / "out", "selection_layers": [2], "keep_rate": 1.0})
    model = TripsForQuestionAnswering.from_pretrained(tmp_path / "out")
    processor = TripsProcessor.from_pretrained(tmp_path / "out")
    inputs = processor(images=Image.new("RGB", (16, 16), "teal"), text="is it red?", return_tensors="pt")
    assert inputs["input_ids"][0, -1] == 3  # BLIP's tokenizer as it is
    blip = BlipForQuestionAnswering.from_pretrained(blip_folder)
    written = blip.generate(inputs["input_ids"], inputs["pixel_values"], max_new_tokens=4)
    assert model.generate(**inputs, max_new_tokens=4).tolist() == written.tolist()


def test_other_models_of_blip_and_options_for_albef_are_refused(blip_folder, tmp_path):
    arguments = {"checkpoint": blip_folder, "output_dir": tmp_path / "out"}
    with pytest.raises(ValueError, match="--num_attention_heads and --task are for ALBEF"):
        convert(arguments, num_attention_heads=4)
    config = BlipConfig.from_pretrained(blip_folder)
    BlipForImageTextRetrieval(config).save_pretrained(tmp_path / "retrieval")
    with pytest.raises(ConversionError, match="A BlipForImageTextRetrieval cannot become a TRIPS model"):
        convert(arguments, checkpoint=tmp_path / "retrieval")


# ViLT


VILT_CLASSES = [
    ViltModel,
    ViltForMaskedLM,
    ViltForQuestionAnswering,
    ViltForImageAndTextRetrieval,
    ViltForImagesAndTextClassification,
    ViltForTokenClassification,
]


@pytest.fixture
def vilt_arguments(tmp_path, tokenizer):
    save_vilt(tmp_path / "vilt", tokenizer)
    return {"checkpoint": tmp_path / "vilt", "output_dir": tmp_path / "out", "selection_layers": [2]}


def save_vilt(folder, tokenizer, model_class=ViltForMaskedLM):
    is_nlvr2 = model_class is ViltForImagesAndTextClassification
    config = ViltConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=32,
        image_size=16,
        patch_size=4,
        num_images=2 if is_nlvr2 else -1,
        modality_type_vocab_size=3 if is_nlvr2 else 2,
    )
    vilt = model_class(config)
    for parameter in vilt.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    vilt.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ViltImageProcessor(size={"shortest_edge": 16}, size_divisor=4).save_pretrained(folder)


def change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def add_weights(folder, *names):
    path = folder / "model.safetensors"
    weights = {key: value.clone() for key, value in load_file(path).items()}
    save_file(weights | {name: torch.ones(2) for name in names}, path, metadata={"format": "pt"})


@torch.no_grad()
@pytest.mark.parametrize("model_class", VILT_CLASSES)
def test_a_folder_of_any_vilt_converts_and_computes_the_same(vilt_arguments, tokenizer, model_class):
    folder = vilt_arguments["checkpoint"]
    save_vilt(folder, tokenizer, model_class)
    report = convert(vilt_arguments, keep_rate=1.0)
    assert report.new == [] and set(load_file(folder / "model.safetensors")) <= {*report.used, *report.left_out}
    model, loading = TripsModel.from_pretrained(vilt_arguments["output_dir"], output_loading_info=True)
    assert not any(loading.values()) and model.config.fusion_type == "single_stream"
    processor = TripsProcessor.from_pretrained(vilt_arguments["output_dir"])
    images = [Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)) for seed in (0, 1)]
    inputs = processor(images=images, text=["is it red?", "is it a red circle or a person?"], return_tensors="pt")
    pixels = ViltImageProcessor.from_pretrained(folder)(images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(inputs["pixel_values"], pixels)
    # ViLT draws an order of the patches: the states of the others are the same for all of them.
    states = ViltModel.from_pretrained(folder)(**inputs).last_hidden_state
    text_length = inputs["input_ids"].shape[1]
    outputs = model(**inputs)
    assert outputs.last_hidden_state.std() > 0.05
    torch.testing.assert_close(outputs.last_hidden_state, states[:, :text_length], atol=1e-5, rtol=0)
    image_states = outputs.vision_model_output.last_hidden_state
    torch.testing.assert_close(image_states[:, 0], states[:, text_length], atol=1e-5, rtol=0)
    torch.testing.assert_close(image_states.sum(dim=1), states[:, text_length:].sum(dim=1), atol=1e-4, rtol=0)


def test_the_processor_is_vilts(vilt_arguments, tokenizer):
    convert(vilt_arguments)
    processor = TripsProcessor.from_pretrained(vilt_arguments["output_dir"])
    assert processor.image_processor.image_mean == processor.image_processor.image_std == (0.5, 0.5, 0.5)
    assert processor.image_processor.size == {"height": 16, "width": 16} and processor.patch_size == 4
    assert processor.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert processor.tokenizer.model_max_length == 32
    assert processor(text=TEXTS)["input_ids"] == tokenizer(TEXTS, padding=True)["input_ids"]


@pytest.mark.parametrize(
    ("model_class", "parts"),
    [
        (TripsForQuestionAnswering, {"decoder", "lm_head"}),
        (TripsForConditionalGeneration, {"decoder", "lm_head"}),
        (TripsForImagesAndTextClassification, {"classifier"}),
        (TripsForVisualGrounding, {"box_head"}),
    ],
)
def test_heads_of_a_single_stream_load_from_a_converted_vilt(vilt_arguments, tokenizer, model_class, parts):
    convert(vilt_arguments)
    model, loading = model_class.from_pretrained(vilt_arguments["output_dir"], output_loading_info=True)
    assert {key.partition(".")[0] for key in loading["missing_keys"]} == parts and not loading["unexpected_keys"]
    assert model.config.decoder_start_token_id == tokenizer.cls_token_id
    assert model.config.decoder_config.eos_token_id == tokenizer.sep_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id


def test_selection_and_resolution_are_set_for_a_vilt(vilt_arguments):
    convert(vilt_arguments, selection_layers=[1, 3], keep_rate=[0.5, 0.6], selection_guidance="image", image_size=20)
    model = TripsModel.from_pretrained(vilt_arguments["output_dir"])
    assert (model.config.selection_layers, model.config.keep_rate) == ([1, 3], [0.5, 0.6])
    assert model.config.selection_guidance == "image"
    assert model.vision_model.embeddings.position_embeddings.shape == (1, 26, 32)
    processor = TripsProcessor.from_pretrained(vilt_arguments["output_dir"])
    assert processor.image_processor.size == {"height": 20, "width": 20}


@pytest.mark.parametrize("architectures", [None, ["ViltForMaskedLM"], ["ViltForPreTraining"]])
def test_heads_of_older_versions_of_vilt_are_left_out(vilt_arguments, architectures):
    add_weights(vilt_arguments["checkpoint"], "mlm_score.bias", "itm_score.fc.weight")
    change_config(vilt_arguments["checkpoint"], architectures=architectures)
    report = convert(vilt_arguments)
    heads = {key for key, why in report.left_out.items() if why == "ViLT's heads"}
    assert {"mlm_score.bias", "itm_score.fc.weight", "mlm_score.transform.dense.weight"} <= heads


def test_a_weight_that_is_no_vilts_is_refused_by_name(vilt_arguments):
    add_weights(vilt_arguments["checkpoint"], "vilt.adapter.weight")
    with pytest.raises(ConversionError, match=r"left out by name \(1\):\n +vilt.adapter.weight"):
        convert(vilt_arguments)
    assert not vilt_arguments["output_dir"].exists()


@pytest.mark.parametrize("option", [{"task": "question-answering"}, {"num_attention_heads": 4}])
def test_options_for_albef_are_refused_for_a_vilt(vilt_arguments, option):
    with pytest.raises(ValueError, match="--num_attention_heads and --task are for ALBEF: ViLT's configuration"):
        convert(vilt_arguments, **option)


@pytest.mark.parametrize("model_type", ["bert", "a-type-of-its-own"])
def test_a_model_of_another_type_is_refused_by_name(tmp_path, model_type):
    BertConfig().save_pretrained(tmp_path)
    change_config(tmp_path, model_type=model_type)
    known = r"files of ALBEF \(.pth, .pt, .bin, .safetensors\), and models of type blip, vilt"
    with pytest.raises(ConversionError, match=f"is a model of type '{model_type}'. What is known: {known}"):
        convert({"checkpoint": tmp_path, "output_dir": tmp_path / "out"})
