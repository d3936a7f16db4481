"""Text encoder, fusion encoder and decoder against BERT with the same weights."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import BertConfig, BertLMHeadModel, BertModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from modeling_trips import (
    TripsDecoder,
    TripsDecoderConfig,
    TripsFusionConfig,
    TripsFusionModel,
    TripsTextConfig,
    TripsTextModel,
)
from modeling_trips.modeling_trips_text import CACHE_NAME, TripsLMHead


SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_attention_heads": 3,
    "intermediate_size": 32,
    "max_position_embeddings": 12,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
IDS = torch.tensor([[1, 5, 7, 9, 2], [1, 8, 2, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def randomize(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "LayerNorm.weight" in name else 0.3 * noise)
    return model.eval()


def bert(num_layers, model_class=BertModel, **fields):
    config = BertConfig(**SIZES, num_hidden_layers=num_layers, attn_implementation="eager", **fields)
    kwargs = {"add_pooling_layer": False} if model_class is BertModel else {}
    return randomize(model_class(config, **kwargs))


def load_by_name(model, weights, prefix=""):
    """Load every weight of `model` from the same name after `prefix`. Missing weights are an error."""
    model.load_state_dict({name: weights[prefix + name] for name in model.state_dict()}, strict=True)
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------------
# Text encoder


def test_text_encoder_is_the_first_layers_of_bert():
    reference = bert(3)
    model = load_by_name(TripsTextModel(TripsTextConfig(**SIZES, num_hidden_layers=2)), reference.state_dict())
    token_types = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 1, 0, 0]])
    output = model(IDS, MASK, token_types, output_hidden_states=True)
    expected = reference(IDS, MASK, token_types, output_hidden_states=True).hidden_states
    torch.testing.assert_close(output.last_hidden_state, expected[2])
    torch.testing.assert_close(output.hidden_states, expected[:3])
    torch.testing.assert_close(output.pooler_output, expected[2][:, 0])


def test_the_mean_of_a_text_leaves_its_padding_out():
    model = randomize(TripsTextModel(TripsTextConfig(**SIZES, num_hidden_layers=2, pooling_mode="mean")))
    output = model(IDS, MASK)
    expected = torch.stack([output.last_hidden_state[0].mean(dim=0), output.last_hidden_state[1, :3].mean(dim=0)])
    torch.testing.assert_close(output.pooler_output, expected)
    torch.testing.assert_close(model(IDS[1:, :3]).pooler_output, expected[1:])  # the text alone, without a mask


def test_text_encoder_takes_embeddings_in_place_of_ids():
    model = randomize(TripsTextModel(TripsTextConfig(**SIZES, num_hidden_layers=1)))
    embeds = model.get_input_embeddings()(IDS)
    expected = model(IDS, MASK).last_hidden_state
    torch.testing.assert_close(model(inputs_embeds=embeds, attention_mask=MASK).last_hidden_state, expected)
    for wrong in ({}, {"input_ids": IDS, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="inputs_embeds"):
            model(**wrong)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_padding_changes_no_text(attn_implementation):
    config = TripsTextConfig(**SIZES, num_hidden_layers=2)
    model = randomize(TripsTextModel._from_config(config, attn_implementation=attn_implementation))
    padded = model(IDS, MASK).last_hidden_state
    torch.testing.assert_close(padded[1:, :3], model(IDS[1:, :3]).last_hidden_state)
    other_padding = IDS.masked_fill(MASK == 0, 17)
    torch.testing.assert_close(model(other_padding, MASK).last_hidden_state[1, :3], padded[1, :3])


def test_text_longer_than_the_positions_is_refused():
    model = TripsTextModel(TripsTextConfig(**SIZES, num_hidden_layers=1))
    model(torch.ones(1, 12, dtype=torch.long))
    with pytest.raises(ValueError, match="max_position_embeddings"):
        model(torch.ones(1, 13, dtype=torch.long))


# ---------------------------------------------------------------------------------------------------------------------
# Fusion encoder


def test_fusion_encoder_is_the_upper_layers_of_bert_with_cross_attention():
    reference = bert(4, is_decoder=True, add_cross_attention=True)
    upper = reference.encoder.layer[2:]
    model = TripsFusionModel(TripsFusionConfig(**SIZES, num_hidden_layers=2))
    upper_weights = {f"encoder.layer.{name}": weight for name, weight in upper.state_dict().items()}
    load_by_name(model, upper_weights)
    text_states, image_states = torch.randn(2, 5, 24), torch.randn(2, 7, 24)

    # BERT's eager layers are bidirectional under a padding mask.
    hidden = (1.0 - MASK[:, None, None].float()) * torch.finfo(torch.float32).min
    expected = text_states
    for layer in upper:
        expected = layer(expected, hidden, encoder_hidden_states=image_states)
    output = model(text_states, image_states, MASK)
    torch.testing.assert_close(output.last_hidden_state, expected)


def test_fusion_encoder_looks_both_ways_and_at_images_of_another_width():
    model = randomize(TripsFusionModel(TripsFusionConfig(**SIZES, num_hidden_layers=1, encoder_hidden_size=10)))
    text_states, image_states = torch.randn(1, 4, 24), torch.randn(1, 6, 10)
    expected = model(text_states, image_states).last_hidden_state
    changed = text_states.clone()
    changed[:, -1] += 1
    assert (model(changed, image_states).last_hidden_state[0, 0] - expected[0, 0]).abs().max() > 1e-3
    # Attention does not depend on the order of the image tokens, but on each of them.
    torch.testing.assert_close(model(text_states, image_states.flip(1)).last_hidden_state, expected)
    for token in range(6):
        changed = image_states.clone()
        changed[:, token] += 1
        assert (model(text_states, changed).last_hidden_state - expected).abs().max() > 1e-3


def test_fusion_encoder_records_both_attentions():
    config = TripsFusionConfig(**SIZES, num_hidden_layers=2)
    model = randomize(TripsFusionModel._from_config(config, attn_implementation="eager"))
    output = model(torch.randn(2, 5, 24), torch.randn(2, 7, 24), output_attentions=True, output_hidden_states=True)
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, 3, 5, 5)] * 2
    assert [tuple(weights.shape) for weights in output.cross_attentions] == [(2, 3, 5, 7)] * 2
    assert len(output.hidden_states) == 3
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)


# ---------------------------------------------------------------------------------------------------------------------
# Skip-connected fusion


def skip_connected(attn_implementation="sdpa", num_hidden_layers=5, **fields):
    """Layers 3 (and 6) are the connected ones."""
    config = TripsFusionConfig(
        **SIZES, num_hidden_layers=num_hidden_layers, fusion_type="skip_connected", skip_stride=2, **fields
    )
    return randomize(TripsFusionModel._from_config(config, attn_implementation=attn_implementation))


def test_skip_connected_fusion_is_berts_layers_in_mplugs_order():
    reference = bert(7, is_decoder=True, add_cross_attention=True).encoder.layer
    model = skip_connected(num_hidden_layers=7)
    load_by_name(model, {f"encoder.layer.{name}": weight for name, weight in reference.state_dict().items()})
    text_states, image_states = torch.randn(2, 5, 24), torch.randn(2, 7, 24)

    text_mask = (1.0 - MASK[:, None, None].float()) * torch.finfo(torch.float32).min
    text, image = text_states, image_states
    for number, layer in enumerate(reference, start=1):
        if number in (3, 6):
            layer.add_cross_attention = False
            joined = layer(torch.cat((image, text), dim=1), torch.nn.functional.pad(text_mask, (7, 0)))
            image, text = image + joined[:, :7], joined[:, 7:]
        else:
            text = layer(text, text_mask, encoder_hidden_states=image)
    output = model(text_states, image_states, MASK)
    torch.testing.assert_close(output.last_hidden_state, text, rtol=1e-4, atol=1e-5)


def test_mplug_base_has_one_connected_layer():
    config = TripsFusionConfig(num_hidden_layers=6, fusion_type="skip_connected")
    assert config.connected_layers == [4]  # its code numbers the layers from 0, and connects those that 3 divides
    names = {"TripsCrossLayer": [1, 2, 3, 5, 6], "TripsConnectedLayer": [4]}
    with torch.device("meta"):
        layers = TripsFusionModel(config).encoder.layer
    for name, numbers in names.items():
        assert [number for number, layer in enumerate(layers, start=1) if type(layer).__name__ == name] == numbers


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"skip_stride": 0}, "`skip_stride` must be at least 1, got 0"),
        ({"skip_stride": 6, "fusion_type": "skip_connected"}, r"`skip_stride` \(6\) must be below.*\(6\)"),
        ({"fusion_type": "concatenated"}, "cross_attention.*skip_connected.*single_stream"),
    ],
)
def test_wrong_fusion_is_refused(fields, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        TripsFusionConfig(**fields)
    config = TripsFusionConfig()
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        for name, value in fields.items():
            setattr(config, name, value)
        TripsFusionModel(config)


@pytest.mark.parametrize("width", [24, 10])
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_padding_and_batch_change_nothing_in_skip_connected_fusion(attn_implementation, width):
    model = skip_connected(attn_implementation, encoder_hidden_size=width)
    assert (model.image_projection is None) == (width == 24)
    text_states, image_states = torch.randn(2, 5, 24), torch.randn(2, 7, width)
    together = model(text_states, image_states, MASK).last_hidden_state
    alone = model(text_states[1:, :3], image_states[1:]).last_hidden_state
    torch.testing.assert_close(together[1:, :3], alone, rtol=1e-4, atol=1e-5)
    other_padding = text_states.masked_fill(MASK.unsqueeze(-1) == 0, 3.0)
    torch.testing.assert_close(model(other_padding, image_states, MASK).last_hidden_state[1, :3], together[1, :3])
    flipped = model(text_states.flip(0), image_states.flip(0), MASK.flip(0)).last_hidden_state.flip(0)
    torch.testing.assert_close(flipped[MASK == 1], together[MASK == 1], rtol=1e-4, atol=1e-5)


def test_behind_a_connected_layer_image_tokens_have_seen_the_text_and_each_other():
    model = skip_connected("eager")
    text_states, image_states = torch.randn(1, 5, 24), torch.randn(1, 7, 24)
    seen = []
    for layer in model.encoder.layer:
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    model(text_states, image_states)
    model(text_states + 1, image_states)
    first, second = seen[:5], seen[5:]
    for number, (states, changed) in enumerate(zip(first, second), start=1):
        assert torch.equal(states, image_states) == torch.equal(changed, image_states) == (number <= 3)
        assert torch.equal(states, changed) == (number <= 3)


def test_skip_connected_fusion_records_both_kinds_of_attention():
    model = skip_connected("eager")
    output = model(torch.randn(2, 5, 24), torch.randn(2, 7, 24), output_attentions=True, output_hidden_states=True)
    assert [tuple(weights.shape[2:]) for weights in output.attentions] == [(5, 5)] * 2 + [(12, 12)] + [(5, 5)] * 2
    assert [tuple(weights.shape) for weights in output.cross_attentions] == [(2, 3, 5, 7)] * 4
    assert [tuple(states.shape) for states in output.hidden_states] == [(2, 5, 24)] * 6
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)


def test_skip_connected_fusion_takes_the_weights_of_a_cross_attending_one(tmp_path):
    saved = randomize(TripsFusionModel(TripsFusionConfig(**SIZES, num_hidden_layers=5)))
    saved.save_pretrained(tmp_path)
    model, report = TripsFusionModel.from_pretrained(
        tmp_path, fusion_type="skip_connected", skip_stride=2, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert {name.rpartition("crossattention")[0] for name in report["unexpected_keys"]} == {"encoder.layer.2."}
    weights = saved.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


# ---------------------------------------------------------------------------------------------------------------------
# Decoder


@pytest.fixture
def decoder_and_reference():
    reference = bert(2, BertLMHeadModel, is_decoder=True, add_cross_attention=True)
    weights = reference.state_dict()
    config = TripsDecoderConfig(**SIZES, num_hidden_layers=2, bos_token_id=1, eos_token_id=2)
    decoder = load_by_name(TripsDecoder(config), weights, "bert.")
    head_weights = {
        name.replace("cls.predictions.", "").replace("transform.", ""): weight
        for name, weight in weights.items()
        if name.startswith("cls.predictions.") and name != "cls.predictions.bias"
    }
    return decoder, load_by_name(TripsLMHead(config), head_weights), reference


def test_decoder_is_berts(decoder_and_reference):
    decoder, head, reference = decoder_and_reference
    states, states_mask = torch.randn(2, 6, 24), torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    logits = head(decoder(IDS, MASK, states, states_mask).last_hidden_state)
    expected = reference(IDS, MASK, encoder_hidden_states=states, encoder_attention_mask=states_mask).logits
    torch.testing.assert_close(logits[MASK == 1], expected[MASK == 1])


def test_decoder_sees_no_later_token(decoder_and_reference):
    decoder, _, _ = decoder_and_reference
    states = torch.randn(2, 6, 24)
    expected = decoder(IDS, encoder_hidden_states=states).last_hidden_state
    changed = IDS.clone()
    changed[:, 3] = 30
    output = decoder(changed, encoder_hidden_states=states).last_hidden_state
    torch.testing.assert_close(output[:, :3], expected[:, :3])
    assert (output[:, 3:] - expected[:, 3:]).abs().amax(dim=(1, 2)).min() > 1e-3


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_decoder_with_a_cache_equals_without(decoder_and_reference, attn_implementation):
    decoder, _, _ = decoder_and_reference
    decoder.set_attn_implementation(attn_implementation)
    states, states_mask = torch.randn(2, 6, 24), torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    expected = decoder(IDS, None, states, states_mask).last_hidden_state
    cache, pieces = EncoderDecoderCache(DynamicCache(), DynamicCache()), []
    for start, end in ((0, 2), (2, 3), (3, 5)):
        output = decoder(IDS[:, start:end], None, states, states_mask, cache=cache, use_cache=True)
        pieces.append(output.last_hidden_state)
        states = torch.full_like(states, torch.nan)  # keys and values of the states are read from the cache
    assert output[CACHE_NAME].get_seq_length() == 5
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected)


def test_decoder_records_both_attentions(decoder_and_reference):
    decoder, _, _ = decoder_and_reference
    decoder.set_attn_implementation("eager")
    output = decoder(IDS, encoder_hidden_states=torch.randn(2, 6, 24), output_attentions=True)
    assert [tuple(weights.shape) for weights in output.cross_attentions] == [(2, 3, 5, 6)] * 2
    for weights in output.attentions:
        assert torch.equal(weights, weights.tril())
