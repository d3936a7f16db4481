"""Model cards: valid metadata, facts of the model, and only measured results."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from loopback_hub import LoopbackHub
from places import ROOT
from random_checkpoint import save_random_checkpoint
from transformers import dynamic_module_utils

from modeling_trips import (
    TripsConfig,
    TripsForConditionalGeneration,
    TripsForImagesAndTextClassification,
    TripsForPreTraining,
    TripsForQuestionAnswering,
    TripsForRetrieval,
    TripsForVisualGrounding,
    TripsModel,
    TripsProcessor,
)
from modeling_trips.inspection.speed import Setting, count_macs
from modeling_trips.publishing.model_card import CardArguments, make_model_card
from modeling_trips.registration_trips import CLASSES


SPEED = ROOT / "docs" / "results" / "speed_tiny_cpu.json"
WHOLE_MODELS = sorted((cls for cls in CLASSES if cls.config_class is TripsConfig), key=lambda cls: cls.__name__)
NUMBER = r"\d+\.\d+"
# First output of the card's code, by head.
ANSWERS = {
    TripsForConditionalGeneration: r"\[\{'generated_text': .*\}\]\n.*\n\['.*'\]",
    TripsForImagesAndTextClassification: rf"\{{'LABEL_0': {NUMBER}, 'LABEL_1': {NUMBER}\}}",
    TripsForPreTraining: rf"\[{NUMBER}\]",
    TripsForQuestionAnswering: r"\[\{'score': .*\}, \{'score': .*\}\]\n.*\n\['.*'\]",
    TripsForRetrieval: rf"\[.*'label': 'a teal picture'.*\]\n\[{NUMBER}\]",
    TripsForVisualGrounding: r"tensor\(\[\[( *\d+\.\d*,?){4}\]\]\)",
    TripsModel: r"odict_keys\(\['last_hidden_state', .*\]\)",
}
BOXES = r"\[tensor\(\[\["
# Those that Hugging Face gives to models, as far as they fit.
HUB_TASKS = {
    "feature-extraction",
    "image-to-text",
    "visual-question-answering",
    "zero-shot-image-classification",
    "zero-shot-object-detection",
}
RECALLS = [f"{direction}_r{k}" for direction in ("i2t", "t2i") for k in (1, 5, 10)] + ["r_mean"]
FEATURE_RECALLS = [f"features_{name}" for name in RECALLS]
RUN = ["loss", "runtime", "model_preparation_time", "samples_per_second", "steps_per_second", "samples"]
SELECTION = ["layer2_entropy", "layer10_patch_precision", "patch_precision_at_random"]
# Contents of eval_results.json of each script: metrics and other fields.
WRITTEN = {
    "vqa": (["accuracy", "exact_match"], RUN + SELECTION),
    "grounding": (["accuracy", "mean_iou"], RUN + SELECTION),
    "captioning": ([*(f"bleu_{length}" for length in range(1, 5)), "meteor", "rouge_l", "cider"], RUN),
    "retrieval": (FEATURE_RECALLS + RECALLS, ["reranked_pairs", "reranked_pairs_per_second", "samples", "images"]),
    "pretraining": (
        [*FEATURE_RECALLS, "itm_accuracy", "mlm_accuracy", "prefix_lm_accuracy"],
        ["chance_r1", "mlm_majority", "prefix_lm_majority", "samples"],
    ),
}
# Metrics in the card, if it does not list all. `model-index` has all.
LISTED = {
    "vqa": ["accuracy"],  # which is the exact match where a question has one answer
    "retrieval": RECALLS,
    "pretraining": ["features_r_mean", "itm_accuracy", "mlm_accuracy", "prefix_lm_accuracy"],
}


@pytest.fixture
def results(tmp_path) -> Path:
    path = tmp_path / "eval_results.json"
    path.write_text('{"epoch": 6.0, "eval_accuracy": 0.9971, "eval_loss": 0.01, "eval_samples": 9673}')
    return path


def make_checkpoint(folder: Path, model_class=TripsForQuestionAnswering, image_size: int = 64, **options):
    """Save a model and its processor; `options` are fields of the configuration."""
    texts = ["what color is it?", "red blue yes no"]
    save_random_checkpoint(folder, model_class, texts, initializer_range=0.02, **options)
    processor = TripsProcessor.from_pretrained(folder)
    processor.image_processor.size = {"height": image_size, "width": image_size}
    processor.save_pretrained(folder)
    return model_class.from_pretrained(folder), processor


def make_card(folder: Path, args: CardArguments | None = None, results: Path | None = None, **options) -> ModelCard:
    return make_model_card(*make_checkpoint(folder, **options), "ada/model", args or CardArguments(), results)


def test_the_metadata_loads_again_and_passes_the_hub_s_check(tmp_path, results, monkeypatch):
    args = CardArguments(
        license="apache-2.0",
        language=["en"],
        datasets=["easy-VQA", "VQAv2=org/vqa_v2"],
        eval_dataset="easy-VQA",
        eval_split="test",
    )
    make_card(tmp_path, args, results).save(tmp_path / "README.md")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.content == (tmp_path / "README.md").read_text()
    measured = {
        "task": {"type": "visual-question-answering"},
        "dataset": {"name": "easy-VQA", "type": "easy-VQA", "split": "test"},
        "metrics": [{"type": "accuracy", "value": 0.9971}],
    }
    assert card.data.to_dict() == {
        "license": "apache-2.0",
        "language": ["en"],
        "library_name": "transformers",
        "pipeline_tag": "visual-question-answering",
        "tags": ["trips", "token-pruning", "vision-language", "custom_code"],
        "datasets": ["org/vqa_v2"],
        "metrics": ["accuracy"],
        "model-index": [{"name": "model", "results": [measured]}],
    }
    with LoopbackHub(users={}) as hub:
        hub.connect(monkeypatch, tmp_path)
        card.validate()
        assert "POST /api/validate-yaml" in hub.requests
    assert "- [VQAv2](https://huggingface.co/datasets/org/vqa_v2)" in card.text
    assert "| easy-VQA, test, 9,673 examples | 0.9971 |" in card.text


def test_what_is_not_known_is_said_to_be_unknown(tmp_path):
    card = make_card(tmp_path)
    assert set(card.data.to_dict()) == {"library_name", "pipeline_tag", "tags"}
    sections = dict(re.findall(r"^## (.*)\n\n(.*)", card.text, re.MULTILINE))
    assert sections["Training data"] == "Unknown: whoever published this checkpoint did not say."
    assert sections["Accuracy"] == "Not measured."
    assert "\n\nTime was not measured.\n" in card.text
    assert "It is not stated which languages it knows." in card.text
    assert "None" not in card.text and not re.search(r"\{[{%]|%\}", card.text.split("## Citation")[0])


def test_the_facts_are_those_of_the_checkpoint(tmp_path):
    # At 96 pixels: 144 patches and [CLS]; ceil(.9 * 144) = 130 and a fused one; ceil(.5 * 131) = 66 and a fused one.
    schedule = {"selection_layers": [1, 4], "keep_rate": [0.9, 0.5]}
    text = make_card(tmp_path, image_size=96, **schedule).text
    assert "| 1 | the text's [CLS] token | 0.9 | 145 | 132 |\n| 4 | the text's [CLS] token | 0.5 | 132 | 68 |" in text
    assert "resized to 96 x 96 pixels (height x width), 12 x 12 patches" in text
    with torch.device("meta"):
        expected = TripsForQuestionAnswering(TripsConfig.from_pretrained(tmp_path)).num_parameters()
    assert f"| parameters | {expected:,} |" in text


def test_a_checkpoint_that_keeps_everything_says_so(tmp_path):
    text = make_card(tmp_path, keep_rate=1.0, selection_guidance="image").text
    assert "No layer of this checkpoint drops anything." in text and "the image's own [CLS] token" in text
    assert "selection[-1]" not in text and "can share more" not in text and "lost to all later layers" not in text


def code_of(card: ModelCard) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    return code


def forget_remote_code():
    """Forget the modules of checkpoints that were imported from the cache of another test."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        del sys.modules[name]


@pytest.fixture
def run_code(tmp_path, monkeypatch, capsys):
    """Run a card's code with the checkpoint in `tmp_path`, and return the output."""
    monkeypatch.setattr("sys.path", [path for path in sys.path if path != dynamic_module_utils.HF_MODULES_CACHE])
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))  # is added to `sys.path`
    forget_remote_code()

    def run(card: ModelCard) -> str:
        exec(code_of(card).replace('"ada/model"', repr(str(tmp_path))), {})
        return capsys.readouterr().out

    yield run
    forget_remote_code()


@pytest.mark.parametrize("model_class", WHOLE_MODELS)
def test_the_code_of_every_head_runs_and_shows_what_the_head_is_for(model_class, tmp_path, run_code):
    card = make_card(tmp_path, model_class=model_class)
    assert re.match(f"{ANSWERS[model_class]}\n{BOXES}", run_code(card))
    (auto_class,) = re.findall(r"model = (\w+)\.from_pretrained", code_of(card))
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["auto_map"][auto_class].endswith(f".{model_class.__name__}")


@pytest.mark.parametrize(
    ("model_class", "options", "answer"),
    [
        (TripsForImagesAndTextClassification, {"num_images": 3, "num_labels": 3}, r"\{.*'LABEL_2': .*\}"),
        (TripsForPreTraining, {"itc_weight": 0.0, "itm_weight": 0.0}, ANSWERS[TripsModel]),
        (TripsForRetrieval, {"itm_weight": 0.0}, rf"\[.*\]\n{ANSWERS[TripsModel]}"),
    ],
    ids=["three images", "no matching in pre-training", "no matching in retrieval"],
)
def test_the_code_fits_the_configuration_of_a_head(model_class, options, answer, tmp_path, run_code):
    assert re.match(f"{answer}\n{BOXES}", run_code(make_card(tmp_path, model_class=model_class, **options)))


@pytest.mark.parametrize("model_class", WHOLE_MODELS)
def test_metrics_of_every_head_reach_the_model_index(model_class, tmp_path, results, caplog):
    card = make_card(tmp_path, CardArguments(datasets=["NLVR2"]), results, model_class=model_class)
    (measured,) = card.data.eval_results
    assert (measured.dataset_name, measured.metric_value) == ("NLVR2", 0.9971)
    assert measured.task_type in HUB_TASKS
    assert "--eval_dataset" not in caplog.text
    assert ("Accuracy is that of VQAv2" in card.text) == (model_class is TripsForQuestionAnswering)
    # The card shows the pipeline of the tag, and another test runs it.
    pipelines = re.findall(r'pipeline\("(.*?)"', code_of(card))
    assert [card.data.pipeline_tag] == (pipelines[:1] or [None]) and pipelines[:1] in ([], [measured.task_type])
    assert pipelines[1:] == (["image-text-to-text"] if model_class.can_generate() else [])


def test_a_branch_is_named_in_the_code(tmp_path):
    card = make_model_card(*make_checkpoint(tmp_path), "ada/model", CardArguments(), revision="next")
    assert card.text.count('trust_remote_code=True, revision="next")') == 4


def test_a_checkpoint_without_code_needs_the_project_and_offers_no_pipeline(tmp_path):
    args = CardArguments(command="python train.py --seed 1")
    card = make_model_card(*make_checkpoint(tmp_path), "folder/model", args, with_code=False)
    assert "trust_remote_code" not in card.text and "pipeline(" not in card.text
    assert "\nimport modeling_trips" in code_of(card) and "install TRIPS for Transformers" in card.text
    assert card.data.pipeline_tag is None and card.data.tags == ["trips", "token-pruning", "vision-language"]
    assert "\nMade by `python train.py --seed 1`.\n" in card.text


def test_speed_is_that_of_rows_of_this_size_and_schedule(tmp_path):
    args = CardArguments(speed=str(SPEED))
    text = make_card(tmp_path, args, selection_layers=[2, 3], keep_rate=0.5).text
    row = json.loads(SPEED.read_text())[0]
    numbers = f"{row['macs_ratio']:.2f} | {row['time_ratio']:.2f} | {row['throughput']:.1f} |"
    assert f"| forward | 1 | 1 | Intel Xeon, 2 threads | float32 | {numbers}" in text
    others = ({"keep_rate": 0.7}, {"selection_layers": [1, 3]}, {"image_size": 96})
    for options in others:
        with pytest.raises(ValueError, match="--speed"):
            make_card(tmp_path, args, **options)
    with pytest.raises(ValueError, match="--speed"):
        make_card(tmp_path, args, fusion_encoder_config={"num_hidden_layers": 1})


def test_the_cost_is_counted_at_one_and_at_ten_texts_per_image(tmp_path):
    schedule = {"selection_layers": [2, 4], "keep_rate": [0.5, 0.25], "selection_guidance": ["image", "text"]}
    ratios = []
    for number in (1, 10):
        setting = Setting("tiny", 64, 1, number, text_length=40, **schedule)
        ratios.append(count_macs(setting, setting.keep_rate) / count_macs(setting, 1.0))
    text = make_card(tmp_path, **schedule).text
    counted = f"(texts of 40 tokens) are {ratios[0]:.2f} of the\nunpruned model's for one text per image, and "
    assert f"{counted}{ratios[1]:.2f} for ten" in text
    assert "Counted, the multiply-accumulates" not in make_card(tmp_path, keep_rate=1.0).text


def test_a_file_without_metrics_is_refused(tmp_path):
    path = tmp_path / "train_results.json"
    path.write_text('{"train_loss": 0.1, "eval_runtime": 2.0}')
    with pytest.raises(ValueError, match="train_results.json"):
        make_card(tmp_path, results=path)


@pytest.mark.parametrize("script", WRITTEN)
def test_diagnostics_and_chance_are_no_metrics(script, tmp_path):
    metrics, others = WRITTEN[script]
    listed = LISTED.get(script, metrics)
    path = tmp_path / "eval_results.json"
    path.write_text(json.dumps({"epoch": 6.0, **{f"eval_{name}": 0.5 for name in metrics + others}}))
    card = make_card(tmp_path, CardArguments(eval_dataset="ours"), path)
    assert [result.metric_type for result in card.data.eval_results] == metrics
    assert card.data.metrics == listed
    assert f"| measured on | {' | '.join(listed)} |" in card.text


@pytest.mark.parametrize("model_class", [TripsForConditionalGeneration, TripsForQuestionAnswering, TripsForRetrieval])
def test_a_card_tells_of_the_handler_with_a_request_that_it_takes(model_class, tmp_path):
    parts = make_checkpoint(tmp_path, model_class=model_class)
    card = make_model_card(*parts, "ada/model", CardArguments(), with_handler=True)
    (request,) = re.findall(r"`(\{.inputs.*\})`", card.text)
    inputs = json.loads(request)["inputs"]
    assert "image" in inputs and len(inputs) == 2 and "`handler.py`" in card.text
    assert "handler.py" not in make_model_card(*parts, "ada/model", CardArguments()).text


def test_metrics_of_unknown_data_stay_out_of_the_model_index(tmp_path, results, caplog):
    card = make_card(tmp_path, results=results)
    assert "model-index" not in card.data.to_dict() and "--eval_dataset" in caplog.text
    assert "| unknown data, unknown split, 9,673 examples | 0.9971 |" in card.text
