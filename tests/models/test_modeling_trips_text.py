"""Text encoder, fusion encoder and decoder against BERT with the same weights."""

import torch
from transformers import BertConfig, BertModel

from modeling_trips import (
    TripsFusionConfig,
    TripsFusionModel,
    TripsTextConfig,
    TripsTextModel,
)


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


def test_the_mean_of_a_text_leaves_its_padding_out():
    model = randomize(TripsTextModel(TripsTextConfig(**SIZES, num_hidden_layers=2, pooling_mode="mean")))
    output = model(IDS, MASK)
    expected = torch.stack([output.last_hidden_state[0].mean(dim=0), output.last_hidden_state[1, :3].mean(dim=0)])
    torch.testing.assert_close(output.pooler_output, expected)
    torch.testing.assert_close(model(IDS[1:, :3]).pooler_output, expected[1:])  # the text alone, without a mask


def test_skip_connected_fusion_is_berts_layers_in_mplugs_order():
    # Its code numbers the layers from 0, and connects those that 3 divides.
    assert TripsFusionConfig(num_hidden_layers=6, fusion_type="skip_connected").connected_layers == [4]
    reference = bert(7, is_decoder=True, add_cross_attention=True).encoder.layer
    config = TripsFusionConfig(**SIZES, num_hidden_layers=7, fusion_type="skip_connected", skip_stride=2)
    model = TripsFusionModel(config)
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
