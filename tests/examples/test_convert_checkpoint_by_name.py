"""`examples/convert_checkpoint.py` on folders of BLIP and ViLT."""

import json

import pytest
import torch
import transformers
from convert_cases import TEXTS, convert, make_tokenizer
from json_files import read_json
from PIL import Image
from random_models import make_random
from safetensors.torch import load_file, save_file
from strange_pictures import noise
from tiny_hosts import make_vilt
from transformers import BlipConfig, BlipForQuestionAnswering, ViltImageProcessor

from modeling_trips import TripsForQuestionAnswering, TripsModel, TripsProcessor


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


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


def test_a_folder_of_blip_converts_with_its_own_tokenizer(blip_folder, tmp_path):
    convert({"checkpoint": blip_folder, "output_dir": tmp_path / "out", "schedule": "unpruned"})
    model = TripsForQuestionAnswering.from_pretrained(tmp_path / "out")
    processor = TripsProcessor.from_pretrained(tmp_path / "out")
    inputs = processor(images=Image.new("RGB", (16, 16), "teal"), text="is it red?", return_tensors="pt")
    assert inputs["input_ids"][0, -1] == 3  # BLIP's tokenizer, unchanged
    assert model.generate(**inputs, max_new_tokens=4).shape[0] == 1


# ViLT


@pytest.fixture
def vilt_arguments(tmp_path, tokenizer):
    save_vilt(tmp_path / "vilt", tokenizer)
    return {"checkpoint": tmp_path / "vilt", "output_dir": tmp_path / "out", "schedule": "2:text:0.7"}


def save_vilt(folder, tokenizer, name="ViltForMaskedLM"):
    is_nlvr2 = name == "ViltForImagesAndTextClassification"
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 32, "image_size": 16, "patch_size": 4}
    images = {"num_images": 2, "modality_type_vocab_size": 3} if is_nlvr2 else {}
    vilt = make_random(make_vilt(getattr(transformers, name), **sizes, **images))
    vilt.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ViltImageProcessor(size={"shortest_edge": 16}, size_divisor=4).save_pretrained(folder)


def add_weights(folder, *names):
    path = folder / "model.safetensors"
    weights = {key: value.clone() for key, value in load_file(path).items()}
    save_file(weights | {name: torch.ones(2) for name in names}, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "name",
    ["ViltModel", "ViltForMaskedLM", "ViltForQuestionAnswering", "ViltForImagesAndTextClassification"],
)
def test_a_folder_of_any_vilt_converts_whole(vilt_arguments, tokenizer, name):
    folder = vilt_arguments["checkpoint"]
    save_vilt(folder, tokenizer, name)
    report = convert(vilt_arguments, schedule="unpruned")
    assert report.new == []
    assert set(load_file(folder / "model.safetensors")) <= {*report.used, *report.left_out}
    model, loading = TripsModel.from_pretrained(vilt_arguments["output_dir"], output_loading_info=True)
    assert not any(loading.values())
    assert model.config.fusion_encoder_config.fusion_type == "single_stream"
    processor = TripsProcessor.from_pretrained(vilt_arguments["output_dir"])
    images = [noise(16, 16, seed) for seed in (0, 1)]
    inputs = processor(images=images, text=["is it red?", "is it a red circle or a person?"], return_tensors="pt")
    pixels = ViltImageProcessor.from_pretrained(folder)(images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(inputs["pixel_values"], pixels)
    assert model(**inputs).last_hidden_state.std() > 0.05


def test_the_processor_is_vilts_in_another_resolution(vilt_arguments, tokenizer):
    convert(vilt_arguments, image_size=20)
    model = TripsModel.from_pretrained(vilt_arguments["output_dir"])
    assert model.vision_model.embeddings.position_embeddings.shape == (1, 26, 32)
    processor = TripsProcessor.from_pretrained(vilt_arguments["output_dir"])
    assert processor.image_processor.image_mean == processor.image_processor.image_std == (0.5, 0.5, 0.5)
    assert processor.image_processor.size == {"height": 20, "width": 20}
    assert processor.patch_size == 4
    assert processor.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert processor.tokenizer.model_max_length == 32
    assert processor(text=TEXTS)["input_ids"] == tokenizer(TEXTS, padding=True)["input_ids"]


@pytest.mark.parametrize("architectures", [None, ["ViltForMaskedLM"], ["ViltForPreTraining"]])
def test_heads_of_older_versions_of_vilt_are_left_out(vilt_arguments, architectures):
    add_weights(vilt_arguments["checkpoint"], "mlm_score.bias", "itm_score.fc.weight")
    path = vilt_arguments["checkpoint"] / "config.json"
    path.write_text(json.dumps({**read_json(path), "architectures": architectures}))
    report = convert(vilt_arguments)
    heads = {key for key, why in report.left_out.items() if why == "ViLT's heads"}
    assert {"mlm_score.bias", "itm_score.fc.weight", "mlm_score.transform.dense.weight"} <= heads
