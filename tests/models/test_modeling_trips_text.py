"""Text encoder, fusion encoder and decoder against BERT with the same weights."""

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, BertModel

from modeling_trips import (
    TripsDecoder,
    TripsDecoderConfig,
    TripsFusionConfig,
    TripsFusionModel,
    TripsTextConfig,
    TripsTextModel,
)
from modeling_trips.modeling_trips_text import TripsLMHead


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
