"""Errors of wrong options come before the data is read: the file of every run has a bad row too."""

import importlib
import json

import pytest
from huggingface_hub.errors import StrictDataclassError


SCRIPTS = ["run_vqa", "run_captioning", "run_retrieval", "run_nlvr2", "run_grounding", "run_pretraining"]
ERRORS = (ValueError, OSError, StrictDataclassError)  # the last one of Transformers' configurations


@pytest.fixture
def options(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "none.png"}))
    return [
        f"--train_file={tmp_path / 'rows.jsonl'}",
        f"--output_dir={tmp_path / 'out'}",
        "--preset=tiny",
        "--do_eval=False",
        "--max_steps=1",
        "--use_cpu=True",
    ]


def error_of(script, options):
    with pytest.raises(ERRORS) as raised:
        importlib.import_module(f"trips_examples.{script}").main(options)
    return str(raised.value)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_check_the_model_before_the_data(script, options):
    assert "rows.jsonl" in error_of(script, options)
    assert "--schedule 2:text:2" in error_of(script, [*options, "--schedule=2:text:2"])


@pytest.mark.parametrize(
    "option, message",
    [
        ("--schedule=9:text:0.5", "1..4"),
        ("--image_size=50", "`image_size` .50. must be a multiple of `patch_size`"),
        ("--preset=huge", "huge"),
        ("--tokenizer=nowhere", "--tokenizer nowhere"),
        ("--image_root=nowhere", "nowhere"),
        ("--validation_file=nowhere.json", "nowhere.json"),
        ("--dataset_name=busy_scenes", "dataset_name"),
        ("--do_eval=True", "no validation split"),
        ("--texts_per_image=0", "texts_per_image"),
    ],
)
def test_wrong_options_raise_before_data_are_read(option, message, options):
    with pytest.raises(ERRORS, match=message):
        importlib.import_module("trips_examples.run_vqa").main([*options, option])


def test_relevance_in_unpruned_steps_needs_some(options):
    assert "unpruned_share" in error_of("run_vqa", [*options, "--unpruned_share=0", "--relevance_share=0.5"])


def test_a_stream_refuses_what_it_does_not_read(options, tmp_path):
    stream = [f"--train_shards={tmp_path / 'rows.jsonl'}", f"--image_root={tmp_path}", "--columns=image_id=nr"]
    assert "--columns" in error_of("run_pretraining", [*options[1:], *stream])


@pytest.mark.parametrize("option", ["--image_size", "--max_image_size"])
def test_wrong_image_size_raises_before_data_are_read(option, options, checkpoints):
    checkpoint = f"--model={checkpoints['TripsForQuestionAnswering']}"
    message = f"{option} 50 must be a multiple of the model's patch size, 8"
    assert message in error_of("run_vqa", [*options, checkpoint, f"{option}=50"])
