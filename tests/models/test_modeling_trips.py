"""The model without a head: data flow, the gradient of the text encoder, and one checkpoint for every selection."""

import logging
from concurrent.futures import ThreadPoolExecutor
from inspect import signature

import pytest
import torch
from tiny_models import Case, each_generator, each_model, kept_by, main_output

from modeling_trips import UNPRUNED, SelectionSchedule, TripsForRetrieval, TripsModel


CASE = Case(TripsModel)


def test_a_checkpoint_is_the_same_for_every_selection(tmp_path):
    model = CASE.make_model()
    inputs = CASE.make_inputs()
    model.save_pretrained(tmp_path)
    unpruned, report = TripsModel.from_pretrained(tmp_path, schedule="unpruned", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    outputs = unpruned(**inputs)
    assert outputs.vision_model_output.last_hidden_state.shape[1] == 65
    expected = model(**inputs, schedule=UNPRUNED)
    torch.testing.assert_close(outputs.last_hidden_state, expected.last_hidden_state)


def lengths_of(outputs):
    return [layer.kept_indices.shape[1] for layer in outputs.selection]


def test_a_changed_field_of_the_vision_tower_takes_effect_and_is_what_is_saved(tmp_path):
    model = CASE.make_model()
    inputs = CASE.make_inputs()
    assert lengths_of(model(**inputs)) == [39, 24]
    vision = model.config.vision_config
    vision.schedule = "1:image:0.25,3:text:0.25"
    changed = model(**inputs)
    assert lengths_of(changed) == [16, 5]
    assert model.encode_images(inputs["pixel_values"]).next_layer == 3
    model.save_pretrained(tmp_path)
    loaded = TripsModel.from_pretrained(tmp_path)
    assert kept_by(loaded(**inputs)) == kept_by(changed)


@pytest.mark.parametrize("schedule, word", [("1:text:1.5", "keep_rate"), ("1,4", "1..3")])
def test_a_wrong_schedule_of_the_configuration_is_refused(schedule, word):
    model = CASE.make_model()
    with pytest.raises(ValueError, match=word):
        model.config.schedule = schedule
        model(**CASE.make_inputs())


@each_model
@torch.no_grad()
def test_a_schedule_of_a_pass_is_that_of_a_configuration_and_changes_none(case):
    model = case.make_model()
    other = case.make_model(schedule="2:image:0.5,3:text:0.25")
    inputs = case.make_inputs()
    before = model(**inputs)
    outputs = model(**inputs, schedule=SelectionSchedule.parse("2:image:0.5,3:text:0.25"))
    expected = other(**inputs)
    assert kept_by(outputs) == kept_by(expected) != kept_by(before)
    assert torch.equal(main_output(outputs), main_output(expected))
    assert torch.equal(main_output(model(**inputs)), main_output(before))
    with pytest.raises(ValueError, match="this schedule"):
        model(**inputs, schedule=SelectionSchedule.parse("4:image:0.5"))


def test_threads_share_a_model_with_schedules_of_their_own():
    model = CASE.make_model()
    inputs = CASE.make_inputs()
    texts = ("1:image:0.5", "2:text:0.2,3:text:0.5")
    schedules = [None, UNPRUNED, *(SelectionSchedule.parse(text) for text in texts)]

    def run(schedule):
        with torch.no_grad():
            return model(**inputs, schedule=schedule).last_hidden_state

    expected = [run(schedule) for schedule in schedules]
    with ThreadPoolExecutor(len(schedules)) as pool:
        for states, of_schedule in zip(pool.map(run, schedules * 10), expected * 10):
            assert torch.equal(states, of_schedule)


# ---------------------------------------------------------------------------------------------------------------------
# Wrong inputs


@each_model
def test_wrong_inputs_are_refused_by_name(case):
    model = case.make_model()
    inputs = case.make_inputs()
    if case.model_class is TripsForRetrieval:  # without losses it compares all images with all texts
        inputs["return_loss"] = True
    images = inputs["pixel_values"].flatten(0, -4)
    wrong = [
        ("image_index", {"pixel_values": images[:3]}),
        ("image_index", {"pixel_values": images[:3], "image_index": torch.tensor([0])}),
        ("pixel_values", {"pixel_values": inputs["pixel_values"][..., :15]}),
        ("max_position_embeddings", {"input_ids": torch.ones(4, 17, dtype=torch.long), "attention_mask": None}),
        ("input_ids", {"input_ids": None}),
    ]
    if "image_cache" in signature(case.model_class.forward).parameters:
        wrong.append(("image_cache", {"pixel_values": None}))
        wrong.append(("image_cache", {"image_cache": model.base_model.encode_images(images)}))
    for name, changed in wrong:
        with pytest.raises(ValueError, match=name):
            model(**{**inputs, **changed})


@each_model
@pytest.mark.parametrize("keep_rate", [0.25, 1.0])
def test_a_call_may_have_another_keep_rate(case, keep_rate):
    model = case.make_model(schedule="2")
    schedule = SelectionSchedule.parse(f"2:text:{keep_rate}")
    outputs = model(**case.make_inputs(), keep_rate=keep_rate)
    expected = model(**case.make_inputs(), schedule=schedule)
    assert torch.equal(main_output(outputs), main_output(expected))
    assert kept_by(outputs) == kept_by(expected)


@each_generator
def test_answers_at_another_keep_rate(case):
    model = case.make_model(schedule="2")
    inputs = {name: value for name, value in case.make_inputs().items() if name != "decoder_input_ids"}
    encoder_outputs = model.get_encoder()(**inputs, schedule=UNPRUNED)
    expected = model.generate(encoder_outputs=encoder_outputs, attention_mask=inputs["attention_mask"])
    for options in ({"keep_rate": 1.0}, {"schedule": UNPRUNED}):
        assert torch.equal(model.generate(**inputs, **options), expected)
    answer_ids = torch.tensor([[5, 2], [6, 2], [7, 2]])
    ranking = model.rank_answers(answer_ids, **inputs, keep_rate=1.0)
    assert torch.equal(ranking.scores, model.rank_answers(answer_ids, **inputs, schedule=UNPRUNED).scores)


WRONG_RATES = [("2", rate) for rate in (0, -0.5, 1.5, True, "all", float("nan"))]
WRONG_RATES += [("unpruned", 0.5), ("1,3", 0.5)]  # not one layer


@pytest.mark.parametrize("schedule, keep_rate", WRONG_RATES)
def test_a_wrong_keep_rate_is_refused(schedule, keep_rate):
    with pytest.raises(ValueError, match="keep_rate"):
        CASE.make_model(schedule=schedule)(**CASE.make_inputs(), keep_rate=keep_rate)


def test_a_keep_rate_outside_of_those_of_training_is_a_warning(caplog):
    model = CASE.make_model(schedule="2", trained_keep_rates=[0.25, 0.5])
    logger = logging.getLogger("transformers")
    with caplog.at_level("WARNING"):
        logger.propagate = True
        model(**CASE.make_inputs(), keep_rate=0.3)
        assert not caplog.records
        model(**CASE.make_inputs(), keep_rate=0.125)
        model(**CASE.make_inputs(), keep_rate=0.125)
    logger.propagate = False
    (record,) = caplog.records
    assert "0.125" in record.message
