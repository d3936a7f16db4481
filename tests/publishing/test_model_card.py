"""Model cards: valid metadata, facts of the model and of its training, and code that runs."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from random_checkpoint import save_random_checkpoint

import modeling_trips
from modeling_trips import TripsForQuestionAnswering, TripsProcessor
from modeling_trips.publishing.model_card import HEADS, CardArguments, make_model_card, read_results


TEXTS = ["what color is it?", "red blue yes no"]
COMMAND = "python examples/run_vqa.py --train_file /home/ada/signs/train.jsonl --validation-file='my signs/val.jsonl'"


def make_card(folder: Path, args: CardArguments | None = None, name: str = "TripsForQuestionAnswering", **options):
    """Save a random checkpoint and make its card; `options` are those of the card."""
    model_class = getattr(modeling_trips, name)
    save_random_checkpoint(folder, model_class, TEXTS, initializer_range=0.02)
    model, processor = model_class.from_pretrained(folder), TripsProcessor.from_pretrained(folder)
    return make_model_card(model, processor, "ada/model", args or CardArguments(), **options)


def write_results(folder: Path, split: str = "eval", **fields) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{split}_results.json"
    path.write_text(json.dumps({f"{split}_accuracy": 0.75, f"{split}_samples": 30, **fields}))
    return path


def test_the_card_names_what_the_run_knows(tmp_path):
    results = write_results(tmp_path / "run", command=COMMAND)
    card = make_card(tmp_path / "checkpoint", results=results)
    (measured,) = card.data.eval_results
    assert (measured.metric_type, measured.metric_value) == ("accuracy", 0.75)
    assert (measured.dataset_name, measured.dataset_split) == ("val.jsonl", "validation")
    assert measured.dataset_args == {"num_examples": 30}
    assert "- train.jsonl\n" in card.text and "/home/ada" not in card.content


@pytest.mark.parametrize(
    ("split", "command", "args", "expected"),
    [
        ("test", "run_vqa.py --dataset_name org/vqa_v2", CardArguments(), ("org/vqa_v2", "test")),
        ("test", "run_vqa.py --test_file a/t.jsonl", CardArguments(eval_split="dev"), ("t.jsonl", "dev")),
        ("eval", COMMAND, CardArguments(eval_dataset="ours"), ("ours", "validation")),
        ("eval", None, CardArguments(), ("unknown data", "validation")),
    ],
)
def test_the_author_comes_before_the_run(split, command, args, expected, tmp_path):
    (measured,) = read_results(write_results(tmp_path, split, command=command), "any", args)
    assert (measured.dataset_name, measured.dataset_split) == expected


def test_unknown_facts_are_in_no_metadata(tmp_path):
    card = make_card(tmp_path)
    assert set(card.data.to_dict()) == {"library_name", "pipeline_tag", "tags"}
    assert "None" not in card.text and not re.search(r"\{[{%]|%\}", card.text.split("## Citation")[0])


def code_of(card: ModelCard) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    return code


@pytest.mark.parametrize("name", HEADS)
def test_the_code_of_every_head_runs(name, tmp_path, capsys):
    card = make_card(tmp_path, name=name, with_code=False)
    exec(code_of(card).replace('"ada/model"', repr(str(tmp_path))), {})
    assert "tensor(" in capsys.readouterr().out  # boxes
    saved = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert saved[HEADS[name].auto_class].endswith(f".{name}")
    pipelines = re.findall(r'pipeline\("(.*?)"', code_of(make_card(tmp_path, name=name)))
    assert pipelines == ([HEADS[name].task] if HEADS[name].has_pipeline else [])


def test_the_selection_is_that_of_a_run(tmp_path):
    save_random_checkpoint(tmp_path, TripsForQuestionAnswering, TEXTS, selection_layers=[1, 4], keep_rate=[0.9, 0.5])
    parts = TripsForQuestionAnswering.from_pretrained(tmp_path), TripsProcessor.from_pretrained(tmp_path)
    text = make_model_card(*parts, "ada/model", CardArguments()).text
    # 64 patches and [CLS]; ceil(.9 * 64) = 58 and a fused one; ceil(.5 * 59) = 30 and a fused one.
    assert "| 1 | text | 0.9 | 65 | 60 |\n| 4 | text | 0.5 | 60 | 32 |" in text
