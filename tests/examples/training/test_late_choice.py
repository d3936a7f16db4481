"""Which patches a model for captions, retrieval or pre-training selects where no option says it."""

import pytest
from schedules import guidances_of, rates_of
from toy_pairs import write_parts
from transformers import HfArgumentParser

from modeling_trips import TripsConfig, TripsForConditionalGeneration, TripsForRetrieval
from trips_examples.training.late_choice import LateChoiceModelArguments, late_choice
from trips_examples.training.models import ModelStart
from trips_examples.training.pretraining_loading import PretrainingStart
from trips_examples.training.pretraining_options import PretrainingModelArguments
from trips_examples.training.retrieval_options import RetrievalModelArguments


LATE = {3: ("image", 0.7), 4: ("text", 0.3)}


def captioning_start(args: LateChoiceModelArguments) -> ModelStart:
    return ModelStart(TripsForConditionalGeneration, args)


def retrieval_start(args: RetrievalModelArguments) -> ModelStart:
    return ModelStart(TripsForRetrieval, args)


def selection_of(arguments: type, start, *options: str) -> dict[int, tuple[str, float]]:
    """Guidance and keep rate by layer, of the model that these options make."""
    (args,) = HfArgumentParser(arguments).parse_args_into_dataclasses([*options])
    vision = start(args).config.vision_config
    return {layer: (guidances_of(vision)[layer], rate) for layer, rate in rates_of(vision).items()}


@pytest.mark.parametrize(
    ("num_layers", "layers"), [(12, [5, 10, 12]), (4, [3, 4]), (24, [10, 20, 24]), (6, [5, 6]), (3, [3]), (1, [1])]
)
def test_a_late_choice_at_any_depth(num_layers, layers):
    fields = late_choice(num_layers)
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
def test_from_scratch_the_text_chooses_late_unless_layers_are_named(options, expected):
    for arguments, start in (
        (LateChoiceModelArguments, captioning_start),
        (RetrievalModelArguments, retrieval_start),
        (PretrainingModelArguments, PretrainingStart),
    ):
        assert selection_of(arguments, start, *options) == expected


def test_from_parts_it_does_so_at_the_depth_of_the_tower(tmp_path):
    parts = write_parts(tmp_path)
    assert selection_of(PretrainingModelArguments, PretrainingStart, *parts) == {3: ("text", 0.3)}
    assert selection_of(PretrainingModelArguments, PretrainingStart, *parts, "--keep_rate=1.0") == {}


def test_a_checkpoint_keeps_its_selection(tmp_path):
    start = retrieval_start(RetrievalModelArguments(selection_layers=[2], keep_rate=[0.25]))
    model, processor = start.finish(["a shape"])
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    options = [f"--model_name_or_path={tmp_path}"]
    assert selection_of(PretrainingModelArguments, PretrainingStart, *options) == {2: ("text", 0.25)}
