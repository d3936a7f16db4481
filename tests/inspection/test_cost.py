"""The cost formula against PyTorch's counter."""

import math
from dataclasses import replace

import pytest
from benchmark import Setting, count_macs

from modeling_trips import SelectionSchedule, TripsConfig
from modeling_trips.inspection.cost import forward_cost


MIXED = "1:image:0.7,3:image:0.5,4:text:0.3"
NARROW_TEXT = {"hidden_size": 96, "num_hidden_layers": 2, "intermediate_size": 200, "max_position_embeddings": 20}
WIDTHS = {"text_config": {"vocab_size": 50, **NARROW_TEXT}}


def config_of(schedule, **fields):
    return TripsConfig.from_preset("tiny", vision_config={"image_size": 64}, schedule=schedule, **fields)


@pytest.mark.parametrize(
    "text, fields",
    [
        ("2:image:0.5,3:image:0.5", {}),
        ("2:random:0.5,4:text:0.25", {}),
        ("1:text:0.1", {}),
        ("2:text:0.999", {}),  # all candidates are kept but scored
        ("2:text:1.0,3:image:0.5", {}),
        (MIXED, {"fuse_inattentive_tokens": False}),
        (MIXED, WIDTHS),  # a projection of the guidance
        (MIXED, {"fusion_type": "skip_connected"}),
        ("2:image:0.5", {"fusion_type": "skip_connected"}),
        ("2:image:0.5", {"fusion_type": "skip_connected", **WIDTHS}),  # a projection of the image tokens
        (MIXED, {"fusion_type": "single_stream"}),
        ("2:image:0.5,3:text:0.5", {"fusion_type": "single_stream", "fuse_inattentive_tokens": False}),
        *(("unpruned", {"fusion_type": name}) for name in ("cross_attention", "skip_connected", "single_stream")),
    ],
)
def test_formula_matches_pytorch_counter(text, fields):
    """Operations and numbers of tokens are those of a model of this schedule, for one and several texts per image."""
    schedule = SelectionSchedule.parse(text)
    cost = forward_cost(config_of(schedule, **fields), text_length=6)
    others = config_of(SelectionSchedule.parse(MIXED), **fields)
    assert cost == forward_cost(others, 6, schedule)  # in place of the configuration's schedule
    joint_length = 6 if fields.get("fusion_type") == "single_stream" else 0
    for texts_per_image in (1, 3):
        setting = Setting("tiny", 64, 1, texts_per_image, 6, config_fields=fields, schedule=str(schedule))
        assert cost.macs(texts_per_image) == count_macs(setting, setting.schedule)
        model = replace(setting, attn_implementation="eager").make_model("meta").eval()
        output = model(**setting.make_inputs(model), output_hidden_states=True)
        kept = [selection.kept_indices.shape[1] for selection in output.selection]
        assert cost.num_kept == [math.prod(model.config.vision_config.grid_size), *kept][-1]
        states = output.vision_model_output.hidden_states
        assert [joint_length + count for count in cost.tokens] == [each.shape[1] for each in states[1:]]
