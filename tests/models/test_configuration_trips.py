"""Configuration: errors of invalid fields, presets, round trips and selection fields."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from json_files import read_json
from schedules import rates_of

from modeling_trips import (
    SelectionSchedule,
    TripsConfig,
    TripsForConditionalGeneration,
    TripsForPreTraining,
    TripsForQuestionAnswering,
    TripsFusionConfig,
    TripsTextConfig,
    TripsVisionConfig,
)


SMALL = {
    "vision_config": {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "schedule": "2"},
    "decoder_config": {"num_hidden_layers": 1, "bos_token_id": 1, "eos_token_id": 2},
}


# The class and an invalid field, the last given one, which the error names.
WRONG_VALUES = [
    (TripsVisionConfig, {"schedule": 5}),
    (TripsVisionConfig, {"schedule": "5:text:0.7:1"}),
    (TripsVisionConfig, {"schedule": "13:text:0.7"}),
    (TripsVisionConfig, {"keep_rate": [0.7]}),  # of an earlier version, as the next two
    (TripsVisionConfig, {"keep_rate": 0.0}),
    (TripsVisionConfig, {"selection_guidance": ["text"]}),
    (TripsVisionConfig, {"num_attention_heads": 7}),
    (TripsVisionConfig, {"image_size": 225}),
    (TripsVisionConfig, {"image_size": 240, "patch_embedding_type": "convolutional", "patch_size": 24}),
    (TripsFusionConfig, {"skip_stride": 0}),
    (TripsFusionConfig, {"fusion_type": "skip_connected", "skip_stride": 6}),
    (TripsConfig, {"schedule": "13"}),
    (TripsConfig, {"selection_layers": [2, 4]}),  # a part of the schedule
    (TripsVisionConfig, {"schedule": "2", "selection_layers": [2]}),
    (TripsConfig, {"itc_weight": float("nan")}),
    (TripsConfig, {"confidence_temperature": 0.0}),
    (TripsVisionConfig, {"trained_keep_rates": [0.25, 2.0]}),
    (TripsConfig, {"num_images": 0}),
    (TripsConfig, {"fusion_encoder_config": {"hidden_size": 384}}),
]


@pytest.mark.parametrize("config_class, fields", WRONG_VALUES, ids=lambda value: str(value)[:40])
def test_wrong_value_is_refused_when_a_config_is_made(config_class, fields):
    with pytest.raises((StrictDataclassError, ValueError), match=[*fields][-1]):
        config_class(**fields)


def test_defaults_are_the_papers():
    config = TripsConfig()
    assert str(config.schedule) == "5:text:0.7,10:text:0.7" and config.vision_config.fuse_inattentive_tokens
    layers = [
        part.num_hidden_layers for part in (config.vision_config, config.text_config, config.fusion_encoder_config)
    ]
    assert layers == [12, 6, 6]


def test_preset_overrides_are_merged_field_by_field_and_do_not_leak():
    before = TripsConfig.from_preset("tiny").to_dict()
    changed = TripsConfig.from_preset("tiny", schedule="2:text:0.123", image_size=96, text_config={"vocab_size": 99})
    assert str(changed.vision_config.schedule) == "2:text:0.123"
    assert changed.vision_config.image_size == 96
    assert changed.text_config.vocab_size == 99
    assert changed.text_config.hidden_size == 128  # the rest of the part stays the preset's
    assert changed.decoder_config.vocab_size == 99  # and dependent fields change too
    assert TripsConfig.from_preset("tiny").to_dict() == before


def test_parts_take_what_they_share_from_the_text_config():
    config = TripsConfig(
        vision_config={"hidden_size": 24, "num_attention_heads": 2},
        text_config={"vocab_size": 50, "hidden_size": 36, "num_hidden_layers": 2, "pad_token_id": 7},
        decoder_config={"bos_token_id": 5, "vocab_size": 60},
    )
    fusion = config.fusion_encoder_config
    assert (fusion.hidden_size, fusion.encoder_hidden_size, fusion.num_hidden_layers) == (36, 24, 6)
    decoder = config.decoder_config
    assert (decoder.hidden_size, decoder.encoder_hidden_size, decoder.vocab_size) == (36, 36, 60)
    assert config.vision_config.guidance_hidden_size == 36
    assert config.pad_token_id == 7
    assert config.decoder_start_token_id == 5


def test_round_trip_through_a_file(tmp_path):
    config = TripsConfig(**SMALL, schedule="2:image:0.3", fuse_inattentive_tokens=False)
    config.save_pretrained(tmp_path)
    loaded = TripsConfig.from_pretrained(tmp_path)
    assert loaded.to_diff_dict() == config.to_diff_dict()
    vision = loaded.vision_config
    assert vision.schedule == SelectionSchedule.parse("2:image:0.3")
    assert read_json(tmp_path / "config.json")["vision_config"]["schedule"] == "2:image:0.3"
    assert not vision.fuse_inattentive_tokens
    assert type(vision) is TripsVisionConfig
    assert type(loaded.text_config) is TripsTextConfig
    # A part can be read from the file of the whole.
    assert TripsVisionConfig.from_pretrained(tmp_path).to_diff_dict() == config.vision_config.to_diff_dict()


def test_selection_fields_are_those_of_the_vision_config():
    config = TripsConfig(**SMALL)
    config.schedule = "2:text:0.25"
    config.fuse_inattentive_tokens = False
    assert config.schedule == SelectionSchedule.parse("2:text:0.25")
    assert rates_of(config.vision_config) == {2: 0.25}
    assert not config.vision_config.fuse_inattentive_tokens
    assert not {"schedule", "fuse_inattentive_tokens"} & config.to_dict().keys()


def test_selection_fields_can_be_given_beside_a_part():
    config = TripsConfig(**SMALL, schedule="1:text:0.25,3:text:0.25")
    assert rates_of(config.vision_config) == {1: 0.25, 3: 0.25}
    assert config.vision_config.hidden_size == 16  # the given part is kept but for the selection
    config = TripsConfig(vision_config=TripsVisionConfig(hidden_size=24, num_attention_heads=2), schedule="1")
    assert config.vision_config.hidden_size == 24
    assert str(config.vision_config.schedule) == "1:text:0.7"
    config = TripsConfig(vision_config={"num_hidden_layers": 3}, schedule="2")  # the default ones do not fit
    assert rates_of(config.vision_config) == {2: 0.7}


@pytest.mark.parametrize(
    "lists, expected",
    [
        ({"selection_layers": [2, 3], "keep_rate": 1.0, "selection_guidance": "text"}, "unpruned"),
        ({"selection_layers": [], "keep_rate": 0.7, "selection_guidance": "text"}, "unpruned"),
        ({"selection_layers": [2], "keep_rate": 0.005, "selection_guidance": "text"}, "2:text:0.005"),
        (
            {
                "selection_layers": [1, 2, 3],
                "keep_rate": [0.5, 1.0, 0.0625],
                "selection_guidance": ["image", "text", "text"],
            },
            "1:image:0.5,3:text:0.0625",
        ),
        ({"selection_layers": [2, 3]}, "2:text:0.7,3:text:0.7"),
    ],
)
def test_the_lists_of_an_earlier_version_are_read_and_replaced(lists, expected, tmp_path):
    TripsConfig(**SMALL).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = read_json(path)
    del content["vision_config"]["schedule"]
    content["vision_config"] |= lists
    path.write_text(json.dumps(content))
    config = TripsConfig.from_pretrained(tmp_path)
    assert str(config.schedule) == expected
    assert not lists.keys() & config.vision_config.to_dict().keys()
    assert str(TripsConfig.from_pretrained(tmp_path, schedule="1:image:0.5").schedule) == "1:image:0.5"
    config.save_pretrained(tmp_path)
    assert str(TripsConfig.from_pretrained(tmp_path).schedule) == expected


def test_a_field_of_an_earlier_version_cannot_be_set(tmp_path):
    config = TripsConfig(**SMALL)
    config.save_pretrained(tmp_path)
    for part in (config, config.vision_config):
        with pytest.raises(ValueError, match="schedule"):
            part.keep_rate = 0.5
    with pytest.raises(ValueError, match="schedule"):
        TripsConfig.from_pretrained(tmp_path, selection_layers=[1, 2])


@pytest.fixture(scope="module")
def old_checkpoint(tmp_path_factory):
    """Return a pre-training checkpoint without a decoder objective, whose start token is outside its vocabulary."""
    path = tmp_path_factory.mktemp("old_checkpoint")
    decoder = {"num_hidden_layers": 1, "bos_token_id": 99}
    config = TripsConfig.from_preset(
        "tiny", text_config={"vocab_size": 12}, decoder_config=decoder, prefix_lm_weight=0
    )
    TripsForPreTraining(config).save_pretrained(path)
    return path


@pytest.mark.parametrize("head", [TripsForQuestionAnswering, TripsForConditionalGeneration, TripsForPreTraining])
def test_a_start_token_out_of_the_vocabulary_is_refused_by_heads_that_write(old_checkpoint, head):
    with pytest.raises(ValueError, match="decoder_start_token_id"):
        head(TripsConfig.from_pretrained(old_checkpoint, prefix_lm_weight=1.0))
    ends = {"bos_token_id": 1, "eos_token_id": 2}  # the fix that the error suggests
    config = head.from_pretrained(old_checkpoint, decoder_config=ends, decoder_start_token_id=1).config
    assert config.decoder_start_token_id == 1
    assert config.decoder_config.eos_token_id == 2
    assert config.decoder_config.num_hidden_layers == 1
