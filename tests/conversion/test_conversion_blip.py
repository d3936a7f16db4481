"""Weights of BLIP in TRIPS give the same outputs without selection."""

import pytest
import torch
from random_models import IMAGES, LAYERS, assert_close, make_random
from transformers import BlipConfig, BlipForQuestionAnswering

from modeling_trips import TripsForQuestionAnswering
from modeling_trips.conversion.blip import blip_plan
from modeling_trips.conversion.rules import ConversionError, load_converted


@pytest.fixture
def blip():
    text = {"vocab_size": 50, "num_hidden_layers": 2, "max_position_embeddings": 20, "bos_token_id": 48}
    config = BlipConfig(
        text_config={**LAYERS, **text, "sep_token_id": 3, "num_attention_heads": 2},
        vision_config={**LAYERS, **IMAGES},
    )
    return make_random(BlipForQuestionAnswering(config))


def convert_blip(blip, **options):
    plan = blip_plan(blip.state_dict(), blip.config, **{"schedule": "unpruned", **options})
    model = TripsForQuestionAnswering(plan.config).eval()
    return model, load_converted(model, blip.state_dict(), plan)


@torch.no_grad()
def test_converted_blip_gives_the_same_outputs(blip):
    model, report = convert_blip(blip)
    assert model.config.decoder_start_token_id == 48
    assert model.config.decoder_config.eos_token_id == 3
    assert {*report.used, *report.left_out} == set(blip.state_dict())
    assert report.new == []
    assert {*report.filled, *report.zero} == set(model.state_dict())
    inputs = {"input_ids": torch.randint(5, 48, (2, 7)), "pixel_values": torch.randn(2, 3, 16, 16)}
    answer_ids = torch.randint(5, 48, (2, 4))
    image_states = blip.vision_model(inputs["pixel_values"]).last_hidden_state
    question_states = blip.text_encoder(inputs["input_ids"], encoder_hidden_states=image_states).last_hidden_state
    logits = blip.text_decoder(answer_ids, encoder_hidden_states=question_states).logits
    outputs = model.model(**inputs)
    assert_close(outputs.vision_model_output.last_hidden_state, image_states)
    assert_close(outputs.last_hidden_state, question_states)
    assert_close(model(**inputs, decoder_input_ids=answer_ids).logits, logits)
    written = model.generate(**inputs, max_new_tokens=5)
    assert torch.equal(written, blip.generate(**inputs, max_new_tokens=5))


@torch.no_grad()
def test_blip_selection_is_scored_by_the_image(blip, tmp_path):
    model, _ = convert_blip(blip, schedule="2:image:0.5")
    model.save_pretrained(tmp_path)
    model = TripsForQuestionAnswering.from_pretrained(tmp_path)
    assert str(model.config.schedule) == "2:image:0.5"
    pixel_values = torch.randn(1, 3, 16, 16).expand(2, -1, -1, -1)
    (selection,) = model.model(input_ids=torch.tensor([[5, 6], [9, 8]]), pixel_values=pixel_values).selection
    first, second = selection.kept_indices
    assert len(first) == 8
    assert torch.equal(first, second)
    with pytest.raises(ConversionError, match="text-only"):
        convert_blip(blip, schedule="2:text:0.5")
