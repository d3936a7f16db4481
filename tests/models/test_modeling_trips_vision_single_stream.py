"""The single stream against its definition, and errors of unsupported options."""

import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from schedules import rates_of
from tiny_models import kept_by
from tiny_retrieval import images
from tiny_single_stream import IDS, MASK, make_config, make_model

from modeling_trips import (
    TripsConfig,
    TripsForPreTraining,
    TripsForRetrieval,
    TripsModel,
)


def naive_layer_norm(module, states):
    centered = states - states.mean(-1, keepdim=True)
    variance = centered.square().mean(-1, keepdim=True)
    return centered / (variance + module.eps).sqrt() * module.weight + module.bias


def naive_run(model, ids, image):
    """Run one text without padding and one image. Return the states of the text and the kept patches of each layer."""
    config = model.config.vision_config
    tower = model.vision_model
    text = model.text_model(ids[None]).last_hidden_state[0]
    embeddings, _ = tower.embeddings(image[None])
    image = embeddings[0]
    types = tower.modality_embeddings.weight
    tokens = torch.cat((text + types[0], image + types[1]))
    first = len(text) + 1  # the first candidate
    original = list(range(len(image) - 1))
    selections = []
    guide = {"text": 0, "image": len(text)}[config.schedule.selections[0].guidance]
    width = config.hidden_size // config.num_attention_heads
    for number, layer in enumerate(tower.layers, start=1):
        attention = layer.attention
        normed = naive_layer_norm(layer.layernorm_before, tokens)
        query = attention.q_proj(normed).split(width, dim=1)
        key = attention.k_proj(normed).split(width, dim=1)
        value = attention.v_proj(normed).split(width, dim=1)
        mixed = [(q @ k.T / math.sqrt(width)).softmax(dim=1) @ v for q, k, v in zip(query, key, value)]
        tokens = tokens + attention.o_proj(torch.cat(mixed, dim=1))
        if number in rates_of(config):
            by_head = [(k[first:] @ q[guide] / math.sqrt(width)).softmax(dim=0) for q, k in zip(query, key)]
            scores = sum(by_head) / len(by_head)
            num_kept = math.ceil(rates_of(config)[number] * len(scores))
            ranked = scores.argsort(descending=True).tolist()
            kept = sorted(ranked[:num_kept])
            rest = ranked[num_kept:]
            candidates = tokens[first:]
            fused = scores[rest] @ candidates[rest]
            tokens = torch.cat((tokens[:first], candidates[kept], fused[None]))
            original = [original[i] for i in kept]
            selections.append(original)
            original = original + [-1]
        tokens = tokens + layer.mlp(naive_layer_norm(layer.layernorm_after, tokens))
    return naive_layer_norm(tower.layernorm, tokens)[: len(text)], selections


@pytest.mark.parametrize("guidance", ["text", "image"])
@torch.no_grad()
def test_selection_follows_the_formula_for_each_pair_alone(guidance):
    model = make_model(schedule=f"1:{guidance}:0.5,3:{guidance}:0.5").double()
    output = model(IDS, images(4).double(), MASK)
    for row in range(4):
        length = int(MASK[row].sum())
        states, selections = naive_run(model, IDS[row, :length], images(4)[row].double())
        torch.testing.assert_close(output.last_hidden_state[row, :length], states)
        assert [entry[row] for entry in kept_by(output)] == selections


@pytest.mark.parametrize(
    "fields", [{"text_config": {"hidden_size": 384}}, {"vision_config": {"use_pre_layernorm": True}}]
)
def test_parts_that_cannot_be_joined_are_refused(fields):
    with pytest.raises(StrictDataclassError):
        TripsConfig(**fields, fusion_type="single_stream")


def test_two_towers_do_not_become_one_stream_by_chance(tmp_path):
    TripsModel(TripsConfig.from_preset("tiny")).save_pretrained(tmp_path)
    with pytest.raises(StrictDataclassError, match="num_hidden_layers"):
        TripsModel.from_pretrained(tmp_path, fusion_type="single_stream")
    no_layers = {"fusion_type": "single_stream", "text_config": {"num_hidden_layers": 0}}
    model, report = TripsModel.from_pretrained(tmp_path, **no_layers, output_loading_info=True)
    assert report["missing_keys"] == {"vision_model.modality_embeddings.weight"}


@pytest.mark.parametrize("model_class", [TripsForRetrieval, TripsForPreTraining])
def test_features_of_an_image_alone_are_refused(model_class):
    with pytest.raises(ValueError, match=model_class.__name__):
        model_class(make_config())
