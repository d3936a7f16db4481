"""Weights of ALBEF in TRIPS give the same outputs without selection."""

import pytest
import torch
from albef_reference import TINY, Albef, random_checkpoint
from random_models import assert_close

from modeling_trips import TripsForPreTraining, TripsForQuestionAnswering
from modeling_trips.conversion.albef import albef_plan, detect_albef_task
from modeling_trips.conversion.rules import ConversionError, load_converted


TASKS = ["question-answering", "retrieval", "pretraining"]


def convert_albef(source, **options):
    options = {
        "num_attention_heads": TINY.num_heads,
        "schedule": "unpruned",
        "bos_token_id": 1,
        "eos_token_id": 2,
        **options,
    }
    plan = albef_plan(source, **options)
    model = plan.model_class(plan.config).eval()
    return model, load_converted(model, source, plan)


def make_inputs():
    image_size = TINY.grid * TINY.patch_size
    return {
        "input_ids": torch.randint(5, TINY.vocab, (2, 7)),
        "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3]),
        "pixel_values": torch.randn(2, 3, image_size, image_size),
    }


@torch.no_grad()
def assert_same_outputs(model, albef):
    inputs = make_inputs()
    texts = inputs["input_ids"], inputs["attention_mask"]
    outputs = model.model(**inputs)
    assert_close(outputs.vision_model_output.last_hidden_state, albef.image_states(inputs["pixel_values"]))
    assert_close(outputs.text_model_output.last_hidden_state, albef.text_states(*texts))
    assert_close(outputs.last_hidden_state, albef.fused_states(**inputs))
    if isinstance(model, TripsForQuestionAnswering):
        answer_ids = torch.randint(5, TINY.vocab, (2, 4))
        logits = model(**inputs, decoder_input_ids=answer_ids).logits
        assert_close(logits, albef.decoder_logits(**inputs, answer_ids=answer_ids))
        return
    image_features = model.get_image_features(inputs["pixel_values"]).pooler_output
    assert_close(image_features, albef.image_features(inputs["pixel_values"]))
    assert_close(model.get_text_features(*texts).pooler_output, albef.text_features(*texts))
    assert_close(model.match(**inputs).itm_logits, albef.matching_logits(**inputs))
    assert model.temp.weight.item() == pytest.approx(0.2)
    if isinstance(model, TripsForPreTraining):
        words = model.masked_token_logits(
            inputs["input_ids"], attention_mask=inputs["attention_mask"], pixel_values=inputs["pixel_values"]
        )
        assert_close(words, albef.masked_language_logits(**inputs))


@pytest.mark.parametrize("task", TASKS)
def test_converted_albef_gives_the_same_outputs(task):
    source = random_checkpoint(task)
    model, report = convert_albef(source)
    assert detect_albef_task(source) == task
    assert_same_outputs(model, Albef(source))
    assert sorted([*report.used, *report.left_out]) == sorted(source)
    assert report.zero == []
    assert all(name.startswith(("decoder.", "lm_head.")) for name in report.new)
    assert (report.new == []) == (task != "pretraining")


QKV = "visual_encoder.blocks.3.attn.qkv.weight"


@pytest.mark.parametrize(
    "key, weight",
    [
        (QKV, None),  # is missing
        ("text_encoder.encoder.layer.2.adapter.weight", torch.zeros(2)),
        ("visual_encoder.pos_embed", torch.zeros(1, 11, 16)),
        (QKV, torch.zeros(48, 16, dtype=torch.int64)),
        *((QKV, torch.full((48, 16), value)) for value in (float("nan"), -float("inf"), -70000.0)),
    ],
)
def test_a_weight_that_does_not_fit_is_named(key, weight):
    source = random_checkpoint("retrieval") | {key: weight}
    if weight is None:
        del source[key]
    with pytest.raises(ConversionError, match=key):
        convert_albef(source)


def test_separate_output_layer_is_not_tied(tmp_path):
    source = random_checkpoint("question-answering")
    source["text_decoder.cls.predictions.decoder.weight"] = torch.randn(TINY.vocab, TINY.width)
    model, report = convert_albef(source)
    assert "text_decoder.cls.predictions.decoder.weight" in report.used
    assert_same_outputs(model, Albef(source))
    model.save_pretrained(tmp_path)
    assert_same_outputs(TripsForQuestionAnswering.from_pretrained(tmp_path), Albef(source))


def test_pretrained_checkpoint_converts_to_retrieval():
    source = random_checkpoint("pretraining")
    model, report = convert_albef(source, task="retrieval")
    assert_same_outputs(model, Albef(source))
    assert report.left_out["text_encoder.cls.predictions.transform.dense.weight"] == "not part of this task"
    assert report.new == []


def test_decoder_starts_from_pretrained_fusion_layers():
    source = random_checkpoint("pretraining")
    model, report = convert_albef(source, task="question-answering")
    decoder = {key.replace("text_encoder.", "text_decoder."): value for key, value in source.items() if ".cls." in key}
    for key, value in source.items():
        name = key.replace("text_encoder.", "text_decoder.", 1)
        if key.startswith("text_encoder.bert.embeddings."):
            decoder[name] = value
        for layer in range(6, 12):
            if key.startswith(f"text_encoder.bert.encoder.layer.{layer}."):
                decoder[name.replace(f"layer.{layer}.", f"layer.{layer - 6}.")] = value
    assert_same_outputs(model, Albef(source | decoder))
    assert report.left_out["itm_head.weight"] == "not part of this task"
    assert report.new == []


@torch.no_grad()
@pytest.mark.parametrize("k", [3, 8])
def test_answers_are_ranked_like_in_albef(k):
    source = random_checkpoint("question-answering")
    model, _ = convert_albef(source)
    inputs = make_inputs()
    # Eight first tokens, so that the first stage has no ties; of one to four tokens.
    answer_ids = torch.zeros(8, 6, dtype=torch.long)
    answer_ids[:, 0] = 1
    answer_ids[:, 1] = torch.arange(10, 18)
    for row in range(8):
        length = 1 + row % 4
        answer_ids[row, 2 : 1 + length] = torch.randint(20, 60, (length - 1,))
        answer_ids[row, 1 + length] = 2
    model.config.decoder_start_token_id = 1
    expected_ids, expected = Albef(source).rank_answers(**inputs, answer_ids=answer_ids, k=k)
    assert model.config.answer_ranking == "albef"
    ranking = model.rank_answers(answer_ids[:, 1:], k=k, **inputs)
    assert ranking.answer_indices.tolist() == expected_ids.tolist()
    torch.testing.assert_close(ranking.scores.softmax(-1), expected, atol=1e-5, rtol=1e-4)
    model.config.answer_ranking = "likelihood"
    by_likelihood = model.rank_answers(answer_ids[:, 1:], k=k, **inputs).scores.softmax(-1)
    assert not torch.allclose(by_likelihood, expected, rtol=0.1)
