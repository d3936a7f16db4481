"""`examples/model_card.py`: metadata that loads again, facts that are the model's, nothing that nobody measured."""

import ast
import json
import re
from pathlib import Path

import pytest
import torch
from example_datasets import train_wordpiece_tokenizer
from example_training import make_processor
from huggingface_hub import ModelCard
from loopback_hub import LoopbackHub
from model_card import CardArguments, make_model_card

from modeling_trips import TripsConfig, TripsForConditionalGeneration, TripsForQuestionAnswering, TripsModel
from modeling_trips.registration_trips import MODELS, model_classes


SPEED = Path(__file__).resolve().parent.parent / "docs" / "results" / "speed_tiny_cpu.json"
WHOLE_MODELS = sorted(
    {cls for name in MODELS for cls in model_classes(name, TripsConfig)}, key=lambda cls: cls.__name__
)


@pytest.fixture
def results(tmp_path) -> Path:
    path = tmp_path / "eval_results.json"
    path.write_text('{"epoch": 6.0, "eval_accuracy": 0.9971, "eval_loss": 0.01, "eval_samples": 9673}')
    return path


def make_checkpoint(folder: Path, model_class=TripsForQuestionAnswering, image_size: int = 64, **options):
    """A saved model and its processor; `options` are fields of the configuration."""
    tokenizer = train_wordpiece_tokenizer(["what color is it?", "red blue yes no"])
    config = TripsConfig.from_preset("tiny", text_config={"vocab_size": len(tokenizer)}, **options)
    model = model_class(config)
    model.save_pretrained(folder)
    processor = make_processor(tokenizer, config)
    processor.image_processor.size = {"height": image_size, "width": image_size}
    return model, processor


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
    assert sections["Accuracy"] == sections["Speed"] == "Not measured."
    assert "It is not stated which languages it knows." in card.text
    assert "None" not in card.text and "{" not in card.text.split("## Citation")[0]


def test_the_facts_are_those_of_the_checkpoint(tmp_path):
    # At 96 pixels: 144 patches and [CLS]; ceil(.9 * 144) = 130 and a fused one; ceil(.5 * 131) = 66 and a fused one.
    text = make_card(tmp_path, image_size=96, selection_layers=[1, 4], keep_rate=[0.9, 0.5]).text
    assert "| 1 | 0.9 | 145 | 132 |\n| 4 | 0.5 | 132 | 68 |" in text
    assert "resized to 96 x 96 pixels (height x width), 12 x 12 patches" in text
    with torch.device("meta"):
        expected = TripsForQuestionAnswering(TripsConfig.from_pretrained(tmp_path)).num_parameters()
    assert f"| parameters | {expected:,} |" in text
    assert "fused into one token" in text and "the text's [CLS] token" in text


def test_a_checkpoint_that_keeps_everything_says_so(tmp_path):
    text = make_card(tmp_path, keep_rate=1.0, selection_guidance="image").text
    assert "No layer of this checkpoint drops anything." in text and "the image's own [CLS] token" in text
    assert "selection[-1]" not in text and "can share more" not in text and "lost to all later layers" not in text


@pytest.mark.parametrize("model_class", WHOLE_MODELS)
def test_the_code_of_every_head_names_its_own_class(model_class, tmp_path):
    card = make_card(tmp_path, model_class=model_class)
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    ast.parse(code)
    saved = json.loads((tmp_path / "config.json").read_text())
    (auto_class,) = re.findall(r"model = (\w+)\.from_pretrained", code)
    assert saved["auto_map"][auto_class].endswith(f".{model_class.__name__}")
    if card.data.pipeline_tag is not None:
        assert saved["custom_pipelines"][card.data.pipeline_tag]["pt"] == [auto_class]
        assert f'pipeline("{card.data.pipeline_tag}"' in code


def test_tasks_follow_from_the_head(tmp_path):
    assert make_card(tmp_path, model_class=TripsForConditionalGeneration).data.pipeline_tag == "image-to-text"
    assert make_card(tmp_path, model_class=TripsModel).data.pipeline_tag is None


def test_a_branch_is_named_in_the_code(tmp_path):
    card = make_model_card(*make_checkpoint(tmp_path), "ada/model", CardArguments(), revision="next")
    assert card.text.count('trust_remote_code=True, revision="next")') == 3


def test_speed_is_that_of_rows_of_this_size_and_schedule(tmp_path):
    args = CardArguments(speed=str(SPEED))
    text = make_card(tmp_path, args, selection_layers=[2, 3], keep_rate=0.5).text
    row = json.loads(SPEED.read_text())[0]
    numbers = f"{row['macs_ratio']:.2f} | {row['time_ratio']:.2f} | {row['throughput']:.1f} |"
    assert f"| forward | 1 | 1 | Intel Xeon, 2 threads | float32 | {numbers}" in text
    for options in ({"keep_rate": 0.7}, {"selection_layers": [1, 3]}, {"image_size": 96}):
        with pytest.raises(ValueError, match="none of its rows was measured at this model's size"):
            make_card(tmp_path, args, **options)
    with pytest.raises(ValueError, match="none of its rows"):
        make_card(tmp_path, args, fusion_encoder_config={"num_hidden_layers": 1})


def test_a_file_without_metrics_is_refused(tmp_path):
    path = tmp_path / "train_results.json"
    path.write_text('{"train_loss": 0.1, "eval_runtime": 2.0}')
    with pytest.raises(ValueError, match="train_results.json holds no metric: names as in eval_accuracy"):
        make_card(tmp_path, results=path)


def test_metrics_of_unknown_data_stay_out_of_the_model_index(tmp_path, results, caplog):
    card = make_card(tmp_path, results=results)
    assert "model-index" not in card.data.to_dict() and "--eval_dataset" in caplog.text
    assert "| unknown data, unknown split, 9,673 examples | 0.9971 |" in card.text
