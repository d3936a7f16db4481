"""Rules rename, split and report weights; a weight without a rule stops the conversion."""

import pytest
import torch

from modeling_trips import TripsConfig, TripsModel
from modeling_trips.conversion.rules import (
    ConversionError,
    ConversionPlan,
    Rule,
    convert_weights,
    make_converted,
    third,
)


RULES = (
    Rule(r"layer\.(\d+)\.query", lambda match: f"blocks.{int(match[1]) + 1}.qkv", third(0)),
    Rule(r"layer\.(\d+)\.value", lambda match: f"blocks.{int(match[1]) + 1}.qkv", third(2)),
    Rule(r"(\w+)\.weight", r"old_\1"),
)


def test_all_problems_are_named_at_once():
    source = {"blocks.1.qkv": torch.zeros(9), "surprise": torch.zeros(1)}
    shapes = {"layer.0.query": torch.Size([2]), "norm.weight": torch.Size([3]), "head": torch.Size([4])}
    with pytest.raises(ConversionError) as error:
        convert_weights(source, ConversionPlan(TripsModel, TripsConfig(), RULES), shapes)
    for name in ("old_norm", "surprise", "head", "blocks.1.qkv"):
        assert name in str(error.value)


def test_control_characters_in_names_are_escaped():
    hostile = "queue\x1b[2J\n\udc80"
    plan = ConversionPlan(TripsModel, TripsConfig(), RULES, left_out={"(?s)queue.*": "a queue"})
    with pytest.raises(ConversionError) as error:
        convert_weights({hostile[2:]: torch.zeros(1)}, plan, {})
    assert r"eue\x1b[2J\n\udc80" in str(error.value)
    assert "\x1b" not in str(error.value)
    _, report = convert_weights({hostile: torch.zeros(1)}, plan, {})
    assert r"left out, a queue: 1 (queue\x1b[2J\n\udc80)" in str(report)
    assert "\x1b" not in str(report)


def test_a_small_file_does_not_make_a_model_larger_than_the_memory():
    made = []

    class Model(torch.nn.Linear):
        def __init__(self, config):
            super().__init__(10**7, 10**7)  # 400 TB
            made.append(self.weight.device.type)

    plan = ConversionPlan(Model, TripsConfig(), (Rule("(.*)", r"\1"),))
    with pytest.raises(ConversionError, match="weight"):
        make_converted({"weight": torch.zeros(2, 2), "bias": torch.zeros(10**7)}, plan)
    assert made == ["meta"]
