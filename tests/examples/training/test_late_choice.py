"""The default selection of captioning, retrieval and pre-training."""

import pytest
from schedules import guidances_of, rates_of
from toy_pairs import write_parts
from transformers import HfArgumentParser

from modeling_trips import TripsConfig, TripsForRetrieval
from trips_examples.training.models import ModelStart, late_choice_fields
from trips_examples.training.options import ModelArguments


LATE = {3: ("image", 0.7), 4: ("text", 0.3)}


def selection_of(*options: str, late_choice: bool = True) -> dict[int, tuple[str, float]]:
    """Return guidance and keep rate by layer of the model that the options give."""
    (args,) = HfArgumentParser(ModelArguments).parse_args_into_dataclasses([*options])
    vision = ModelStart(TripsForRetrieval, args, late_choice=late_choice).config.vision_config
    return {layer: (guidances_of(vision)[layer], rate) for layer, rate in rates_of(vision).items()}


@pytest.mark.parametrize(
    ("num_layers", "layers"), [(12, [5, 10, 12]), (4, [3, 4]), (24, [10, 20, 24]), (6, [5, 6]), (3, [3]), (1, [1])]
)
def test_late_choice_fields_by_depth(num_layers, layers):
    fields = late_choice_fields(num_layers)
    assert fields["selection_layers"] == layers
    assert fields["keep_rate"] == [0.7] * (len(layers) - 1) + [0.3]
    assert fields["selection_guidance"] == ["image"] * (len(layers) - 1) + ["text"]
    TripsConfig(vision_config={"num_hidden_layers": num_layers}, **fields)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], LATE),
        (["--preset=small"], {5: ("image", 0.7), 10: ("image", 0.7), 12: ("text", 0.3)}),
        (["--keep_rate=1.0"], {}),
        (["--keep_rate", "0.9", "0.5"], {3: ("image", 0.9), 4: ("text", 0.5)}),
        (["--selection_guidance=random"], {3: ("random", 0.7), 4: ("random", 0.3)}),
        (["--selection_layers", "2", "3"], {2: ("text", 0.5), 3: ("text", 0.5)}),  # the paper's
        (["--selection_layers", "3", "--keep_rate", "0.7"], {3: ("text", 0.7)}),
    ],
    ids=str,
)
def test_new_models_select_late_unless_layers_are_given(options, expected):
    assert selection_of(*options) == expected


def test_other_tasks_have_the_schedule_of_the_preset():
    assert selection_of(late_choice=False) == {2: ("text", 0.5), 3: ("text", 0.5)}


def test_models_from_parts_select_late(tmp_path):
    parts = write_parts(tmp_path)
    assert selection_of(*parts) == {3: ("text", 0.3)}
    assert selection_of(*parts, "--keep_rate=1.0") == {}


def test_a_checkpoint_keeps_its_selection(tmp_path):
    start = ModelStart(TripsForRetrieval, ModelArguments(selection_layers=[2], keep_rate=[0.25]), late_choice=True)
    model, processor = start.finish(["a shape"])
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert selection_of(f"--model_name_or_path={tmp_path}") == {2: ("text", 0.25)}
