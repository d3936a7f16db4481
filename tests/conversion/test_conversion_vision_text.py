"""Weights of ViT, DeiT, CLIP, BERT and RoBERTa in TRIPS give the same outputs."""

import json

import pytest
import torch
from random_models import IMAGES, LAYERS, assert_close, make_random
from transformers import AutoConfig, AutoModel, BertForMaskedLM, ViTForImageClassification

from modeling_trips import TripsForQuestionAnswering, TripsForRetrieval, TripsModel, from_vision_text_pretrained


def make_vision(kind):
    fields = {**LAYERS, **IMAGES}
    if kind == "dinov2":
        fields["mlp_ratio"] = 2
    if kind == "clip":
        text = {**LAYERS, "num_hidden_layers": 1, "vocab_size": 20}
        fields = {"vision_config": fields, "text_config": text}
    config = AutoConfig.for_model(kind, **fields)
    return make_random(AutoModel.from_config(config))


def make_text(kind, num_hidden_layers=5, hidden_size=32):
    sizes = {**LAYERS, "hidden_size": hidden_size, "vocab_size": 50, "max_position_embeddings": 12}
    config = AutoConfig.for_model(kind, num_hidden_layers=num_hidden_layers, **sizes)
    return make_random(AutoModel.from_config(config))


def join(vision, text, model_class=TripsModel, **options):
    options = {"schedule": "unpruned", **options}
    return from_vision_text_pretrained(model_class, vision, text, output_loading_info=True, **options)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vit", "deit", "clip_vision_model", "clip", "dinov2"])
def test_vision_tower_matches_its_source(kind):
    vision = make_vision(kind)
    model, _ = join(vision, make_text("bert"))
    pixel_values = torch.randn(2, 3, 16, 16)
    tower = vision.vision_model if kind == "clip" else vision
    if kind == "deit":  # without DeiT's distillation token, the second one
        states = tower.embeddings(pixel_values)
        states = torch.cat((states[:, :1], states[:, 2:]), dim=1)
        for layer in tower.layers:
            states = layer(states)
        expected = tower.layernorm(states)
    else:
        expected = tower(pixel_values).last_hidden_state
    if kind.startswith("clip"):
        expected = tower.post_layernorm(expected)
    assert_close(model.vision_model(pixel_values).last_hidden_state, expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta"])
def test_text_encoder_matches_the_lower_layers_of_its_source(kind):
    text = make_text(kind)
    model, _ = join(make_vision("vit"), text, num_text_layers=3)
    pad = text.config.pad_token_id
    input_ids = torch.tensor([[5, 9, 30, 2], [7, 8, 2, pad]])
    attention_mask = (input_ids != pad).long()
    expected = text(input_ids, attention_mask=attention_mask, output_hidden_states=True).hidden_states[3]
    actual = model.text_model(input_ids, attention_mask).last_hidden_state
    assert_close(actual[attention_mask == 1], expected[attention_mask == 1])


def test_fusion_layers_start_from_the_next_layers_of_the_text_encoder():
    text = make_text("bert", num_hidden_layers=14)
    model, report = join(make_vision("vit"), text)
    assert model.config.text_config.num_hidden_layers == 7
    assert model.config.fusion_encoder_config.num_hidden_layers == 7
    source = text.state_dict()
    fusion = model.fusion_model.state_dict()
    shared = [name for name in fusion if "crossattention" not in name]
    assert len(shared) == 7 * 16
    for name in shared:
        number = int(name.split(".")[2])
        assert torch.equal(fusion[name], source[name.replace(f"layer.{number}.", f"layer.{number + 7}.")]), name
    assert set(report.new) == {f"fusion_model.{name}" for name in fusion if "crossattention" in name}


def test_decoder_starts_from_the_upper_text_layers():
    text = make_text("roberta")
    vision = make_vision("vit")
    model, report = join(
        vision,
        text,
        TripsForQuestionAnswering,
        decoder_from_text=True,
        decoder_config={"num_hidden_layers": 2},
    )
    source = text.state_dict()
    decoder = model.decoder.state_dict()
    for number in (0, 1):
        query = decoder[f"encoder.layer.{number}.attention.self.query.weight"]
        assert torch.equal(query, source[f"encoder.layer.{number + 3}.attention.self.query.weight"])
    positions = source["embeddings.position_embeddings.weight"]
    assert torch.equal(decoder["embeddings.position_embeddings.weight"], positions[2:])
    assert torch.equal(model.lm_head.decoder.weight, source["embeddings.word_embeddings.weight"])
    new = {name for name in report.new if name.startswith("decoder.")}
    assert new == {f"decoder.{name}" for name in decoder if "crossattention" in name}
    assert model.config.decoder_start_token_id == 0
    assert model.config.decoder_config.eos_token_id == 2
    _, report = join(vision, text, TripsForQuestionAnswering)
    assert "decoder.encoder.layer.0.attention.self.query.weight" in report.new


def test_towers_load_from_folders_and_new_weights_are_logged(tmp_path, caplog):
    vision = make_random(ViTForImageClassification(make_vision("vit").config))
    text = make_random(BertForMaskedLM(make_text("bert", hidden_size=24, num_hidden_layers=2).config))
    vision.save_pretrained(tmp_path / "vit")
    text.save_pretrained(tmp_path / "bert")
    model, report = join(tmp_path / "vit", str(tmp_path / "bert"), TripsForRetrieval)
    from_memory, _ = join(vision, text, TripsForRetrieval)
    expected = from_memory.state_dict()
    for name, weight in model.state_dict().items():
        assert name in report.new or torch.equal(weight, expected[name]), name
    assert report.left_out["vision.classifier.weight"] == "heads of the vision model"
    assert report.left_out["text.cls.predictions.bias"] == "heads of the text model"
    assert "model.vision_model.selection_projection.weight" in report.new  # text and vision differ in width
    assert {"itm_head.weight", "vision_proj.bias", "temp.weight"} <= set(report.new)
    assert f"new: {len(report.new)} (model.vision_model.selection_projection.weight, " in caplog.text


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vit", "deit", "clip_vision_model", "dinov2"])
def test_vision_tower_of_another_resolution(kind):
    vision = make_vision(kind)
    text = make_text("bert")
    native, _ = join(vision, text)
    larger, _ = join(vision, text, image_size=24)
    assert larger.config.vision_config.grid_size == (6, 6)
    pixel_values = torch.randn(2, 3, 24, 24)
    expected = native.vision_model(pixel_values)
    assert_close(larger.vision_model(pixel_values).last_hidden_state, expected.last_hidden_state)


POOLING_FILES = {
    "mean": {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "word_embedding_dimension": 32},
    "cls": {"pooling_mode": "cls", "embedding_dimension": 32},  # as of Sentence Transformers 5
}


def test_pooling_mode_is_read_from_the_folder(tmp_path):
    vision = make_vision("vit")
    text = make_text("bert", num_hidden_layers=1)

    def pooling_mode_with(text, **options):
        model, _ = join(vision, text, **options)
        return model.config.text_config.pooling_mode

    text.save_pretrained(tmp_path)
    assert pooling_mode_with(tmp_path) == "cls"
    (tmp_path / "1_Pooling").mkdir()
    for mode, config in POOLING_FILES.items():
        (tmp_path / "1_Pooling/config.json").write_text(json.dumps(config), encoding="utf-8")
        assert pooling_mode_with(tmp_path) == mode
    assert pooling_mode_with(text) == "cls"  # a model has no folder
    assert pooling_mode_with(text, pooling_mode="mean") == "mean"
