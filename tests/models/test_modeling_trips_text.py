"""The mean of a text, and the skip-connected fusion against BERT with the same weights."""

import torch
from random_models import make_random
from torch.testing import assert_close
from transformers import BertConfig, BertModel

from modeling_trips import TripsFusionConfig, TripsFusionModel, TripsTextConfig, TripsTextModel


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


def test_the_mean_of_a_text_leaves_its_padding_out():
    model = make_random(TripsTextModel(TripsTextConfig(**SIZES, num_hidden_layers=2, pooling_mode="mean")))
    output = model(IDS, MASK)
    states = output.last_hidden_state
    expected = torch.stack([states[0].mean(dim=0), states[1, :3].mean(dim=0)])
    assert_close(output.pooler_output, expected)
    alone = model(IDS[1:, :3])  # without a mask
    assert_close(alone.pooler_output, expected[1:])


def test_skip_connected_fusion_is_berts_layers_in_mplugs_order():
    # Its code numbers the layers from 0, and connects those that 3 divides.
    assert TripsFusionConfig(num_hidden_layers=6, fusion_type="skip_connected").connected_layers == [4]
    config = BertConfig(
        **SIZES, num_hidden_layers=7, is_decoder=True, add_cross_attention=True, attn_implementation="eager"
    )
    bert = make_random(BertModel(config, add_pooling_layer=False))
    fields = {"num_hidden_layers": 7, "fusion_type": "skip_connected", "skip_stride": 2}
    model = TripsFusionModel(TripsFusionConfig(**SIZES, **fields)).eval()
    weights = bert.state_dict()
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    text_states = torch.randn(2, 5, 24)
    image_states = torch.randn(2, 7, 24)

    text_mask = (1.0 - MASK[:, None, None].float()) * torch.finfo(torch.float32).min
    joined_mask = torch.nn.functional.pad(text_mask, (7, 0))
    text = text_states
    image = image_states
    for number, layer in enumerate(bert.encoder.layer, start=1):
        if number in (3, 6):
            layer.add_cross_attention = False
            joined = layer(torch.cat((image, text), dim=1), joined_mask)
            image = image + joined[:, :7]
            text = joined[:, 7:]
        else:
            text = layer(text, text_mask, encoder_hidden_states=image)
    output = model(text_states, image_states, MASK)
    assert_close(output.last_hidden_state, text, rtol=1e-4, atol=1e-5)
