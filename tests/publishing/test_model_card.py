"""Model cards: valid metadata, facts of the model and of its training, and code that runs."""

import json
import re

import pytest
from random_checkpoint import save_random_checkpoint

import modeling_trips
from modeling_trips import TripsForQuestionAnswering, TripsProcessor
from modeling_trips.publishing.model_card import HEADS, make_model_card, read_results


TEXTS = ["what color is it?", "red blue yes no"]


def card_of(folder, name="TripsForQuestionAnswering", **options):
    """Make the card of a saved checkpoint."""
    model = getattr(modeling_trips, name).from_pretrained(folder)
    processor = TripsProcessor.from_pretrained(folder)
    return make_model_card(model, processor, "ada/model", **options)


def make_card(folder, name="TripsForQuestionAnswering", **options):
    """Save a random checkpoint and make its card; `options` are those of the card."""
    save_random_checkpoint(folder, getattr(modeling_trips, name), TEXTS, initializer_range=0.02)
    return card_of(folder, name, **options)


def write_results(folder, **fields):
    folder.mkdir()
    path = folder / "eval_results.json"
    path.write_text(json.dumps({"eval_accuracy": 0.75, "eval_samples": 30, **fields}))
    return path


def test_the_card_has_the_results_and_the_data_that_the_author_names(tmp_path):
    results = write_results(tmp_path / "run")
    card = make_card(tmp_path / "checkpoint", results=results, datasets=["signs", "org/vqa"], eval_dataset="ours")
    (measured,) = card.data.eval_results
    assert measured.metric_type == "accuracy"
    assert measured.metric_value == 0.75
    assert measured.dataset_name == "ours"
    assert measured.dataset_split == "validation"
    assert measured.dataset_args == {"num_examples": 30}
    assert card.data.datasets == ["org/vqa"]
    assert "- signs\n" in card.text


def test_the_split_is_that_of_the_results():
    (measured,) = read_results({"test_accuracy": 0.5, "test_loss": 1, "device_name": "a"}, "any", "ours")
    assert measured.metric_type == "accuracy"
    assert measured.dataset_split == "test"


def test_equal_metrics_are_one():
    (measured,) = read_results({"eval_accuracy": 0.5, "eval_exact_match": 0.5}, "any", "ours")
    assert measured.metric_type == "accuracy"
    both = read_results({"eval_accuracy": 0.5, "eval_exact_match": 0.4, "eval_vqa_accuracy": 0.6}, "any", "ours")
    assert len(both) == 3


def test_the_card_says_what_the_text_does(tmp_path):
    measured = {"eval_layer3_text_sensitivity": 0.03, "eval_layer3_image_sensitivity": 0.9}
    card = make_card(tmp_path / "checkpoint", results=write_results(tmp_path / "run", **measured))
    assert "Two texts about one image keep the same patches (0.03)." in card.text
    assert "Two images keep different patches (0.90)." in card.text


def test_unknown_facts_are_in_no_metadata(tmp_path):
    card = make_card(tmp_path)
    assert set(card.data.to_dict()) == {"library_name", "pipeline_tag", "tags"}
    assert "None" not in card.text
    template_marks = re.findall(r"\{[{%]|%\}", card.text.split("## Citation")[0])
    assert template_marks == []


def code_of(card):
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    return code


@pytest.mark.parametrize("name", HEADS)
def test_the_code_of_every_head_runs(name, tmp_path, capsys):
    card = make_card(tmp_path, name, with_code=False)
    exec(code_of(card).replace('"ada/model"', repr(str(tmp_path))), {})
    assert "tensor(" in capsys.readouterr().out  # boxes
    pipelines = re.findall(r'pipeline\("(.*?)"', code_of(card_of(tmp_path, name)))
    assert pipelines == ([HEADS[name][1]] if getattr(modeling_trips, name).pipeline_class else [])


def test_the_selection_is_that_of_a_run(tmp_path):
    save_random_checkpoint(tmp_path, TripsForQuestionAnswering, TEXTS, schedule="1:text:0.9,4:text:0.5")
    assert "| 1 | text | 0.9 |\n| 4 | text | 0.5 |" in card_of(tmp_path).text
