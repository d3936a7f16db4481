"""Tests of exported models against PyTorch, at other sizes than those of tracing."""

import copy

import pytest
import torch
from tiny_models import CASES, kept_by, main_output
from tiny_question_answering import ANSWERS, inputs, make_model
from torch.testing import assert_close

from modeling_trips import TripsForPreTraining, TripsForRetrieval
from modeling_trips.export import export_model, load_exported
from modeling_trips.export.exporting import Recorder, describe, head_of
from modeling_trips.export.graphs import graphs_of
from modeling_trips.export.running import assemble


SIZES = [1, 2, 6]


def in_parts(model):
    """Cut the model into the parts that become graphs, which run in PyTorch."""
    model = copy.deepcopy(model)
    runners = {name: Recorder(graph.module) for name, graph in graphs_of(model).items()}
    return assemble(describe(model), runners, head_of(model), getattr(model, "generation_config", None))


def assert_same(parts, model, case):
    """Compare at several numbers of texts, and at another length than in tracing."""
    for num_texts in SIZES:
        inputs = case.make_inputs(num_texts)
        for name in ("input_ids", "attention_mask"):
            inputs[name] = inputs[name][:, :4]
        outputs = parts(**inputs)
        expected = model(**inputs)
        assert_close(main_output(outputs), main_output(expected), rtol=1e-4, atol=1e-4)
        assert kept_by(outputs) == kept_by(expected)


@pytest.mark.parametrize("case", [case for case in CASES if case.model_class is not TripsForPreTraining], ids=str)
@torch.no_grad()
def test_parts_match_the_whole_model(case):
    model = case.make_model()
    parts = in_parts(model)
    assert isinstance(parts, case.model_class)
    assert parts.device.type == "cpu"
    assert parts.dtype == torch.float32
    assert_same(parts, model, case)


@pytest.mark.parametrize("schedule", ["1:image:0.6,3:text:0.6", "1:image:0.6,3:image:0.6"])
@torch.no_grad()
def test_schedules_with_image_guidance_first(schedule):
    """The image cache holds selections."""
    model = CASES[0].make_model(schedule=schedule)
    assert_same(in_parts(model), model, CASES[0])


@pytest.fixture(scope="module", params=["parts", pytest.param("onnx", marks=pytest.mark.slow)])
def answerers(request, tmp_path_factory):
    """Make a question-answering model, and the same model in parts or exported."""
    model = make_model()
    if request.param == "parts":
        return model, in_parts(model)
    folder = tmp_path_factory.mktemp("export")
    export_model(model, folder, request.param)
    return model, load_exported(folder)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"min_new_tokens": 5}], ids=str)
def test_generate_uses_the_cache(answerers, options):
    model, exported = answerers
    answers = exported.generate(**inputs(), max_new_tokens=5, **options)
    assert torch.equal(answers, model.generate(**inputs(), max_new_tokens=5, **options))


def test_answers_are_ranked(answerers):
    model, exported = answerers
    ranking = exported.rank_answers(ANSWERS, k=3, answers_per_step=2, **inputs())
    expected = model.rank_answers(ANSWERS, k=3, answers_per_step=2, **inputs())
    assert torch.equal(ranking.answer_indices, expected.answer_indices)
    assert_close(ranking.scores, expected.scores, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_retrieval_matches_pairs_and_compares_features(tmp_path):
    (case,) = [case for case in CASES if case.model_class is TripsForRetrieval]
    model = case.make_model()
    export_model(model, tmp_path, "openvino")
    exported = load_exported(tmp_path)
    assert_same(exported, model, case)

    inputs = case.make_inputs(4)
    pairs = {"text_index": torch.tensor([3, 0, 0]), "image_index": torch.tensor([1, 1, 2])}
    images = {"pixel_values": inputs["pixel_values"]}
    texts = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}

    def results_of(model):
        features = [model.get_image_features(**images), model.get_text_features(**texts)]
        return [model.match(**inputs, **pairs).itm_logits, *(output.pooler_output for output in features)]

    assert_close(results_of(exported), results_of(model), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"output_attentions": True}, "`output_attentions`"),
        ({"input_ids": torch.ones(4, 13, dtype=torch.long)}, "13 tokens"),
        ({"pixel_values": torch.zeros(2, 3, 32, 32)}, "16 x 16 pixels"),
        ({"image_index": torch.tensor([0, 1, 2, 0])}, "image_index"),
    ],
    ids=str,
)
def test_unsupported_inputs_raise(answerers, changes, message):
    with pytest.raises(ValueError, match=message):
        answerers[1].model(**{**inputs(), "attention_mask": None, **changes})


def test_saving_without_the_graphs_is_refused(answerers, tmp_path):
    with pytest.raises(NotImplementedError):
        answerers[1].save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_unsupported_backends_dtypes_and_models_raise(tmp_path):
    model = CASES[0].make_model()
    (pretraining,) = [case for case in CASES if case.model_class is TripsForPreTraining]
    for named, given, *options in (
        ("'onnx' and 'bf16'", model, "onnx", "bf16"),
        ("'tensorrt'", model, "tensorrt"),
        ("Calibration", model, "openvino", "fp32", []),
        ("TripsForPreTraining", pretraining.make_model()),
        ("TripsVisionModel", model.vision_model),
    ):
        with pytest.raises(ValueError, match=named):
            export_model(given, tmp_path, *options)
    with pytest.raises(FileNotFoundError):
        load_exported(tmp_path)
    assert list(tmp_path.iterdir()) == []
