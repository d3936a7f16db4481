"""Options, and errors in words: a command ends with a message, a program gets an exception."""

import contextlib
import io
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from huggingface_hub import constants
from places import EXAMPLES

from modeling_trips import TripsConfig
from trips_examples.data.busy_scenes import busy_records
from trips_examples.data.tasks import TASKS
from trips_examples.data.vocabulary import BUNDLED_WORDS, train_tokenizer
from trips_examples.training.checks import why_offline
from trips_examples.training.options import (
    DataArguments,
    ModelArguments,
    TrainingOptions,
    config_fields,
    make_parser,
    run_script,
)
from trips_examples.training.runs import parse_arguments


@dataclass
class Options:
    rate: float = 1.0

    def __post_init__(self):
        if self.rate > 1:
            raise ValueError("--rate is too large")


@pytest.mark.parametrize("options, word", [(["--rate=2"], "--rate is too large"), (["--rat3=1"], "--rat3")])
def test_wrong_options_exit_without_a_traceback(options, word, monkeypatch, capsys):
    of_options = make_parser(Options, description="A script.")
    monkeypatch.setattr("sys.argv", ["script.py", *options])
    with pytest.raises(SystemExit) as raised:
        of_options.check()
    assert raised.value.code == 2
    assert word in capsys.readouterr().err
    with pytest.raises(ValueError, match=word):
        of_options.parse_args_into_dataclasses(args=options)


def test_one_process_of_several_ends(monkeypatch, capsys):
    of_options = make_parser(Options, description="A script.")
    monkeypatch.setattr("sys.argv", ["script.py"])
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(SystemExit) as exit:
        of_options.check()
    assert exit.value.code == 2
    assert "torchrun --nproc_per_node 2 script.py" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    of_options.check()


@pytest.mark.parametrize(
    "main, word",
    [
        (lambda: ModelArguments(num_fusion_layers=2), "--num_fusion_layers"),
        (lambda: open("nowhere.txt"), "nowhere.txt"),
        (lambda: TripsConfig(schedule="5:text:2.0"), "`keep_rate`"),
    ],
)
def test_errors_of_the_user_end_a_script_in_one_line(main, word, monkeypatch):
    with pytest.raises(SystemExit) as exit:
        run_script(main)
    assert word in exit.value.code
    assert "\n" not in exit.value.code
    with pytest.raises(Exception) as error:
        main()
    monkeypatch.setenv("TRIPS_TRACEBACK", "1")
    with pytest.raises(error.type):
        run_script(main)


def test_an_error_from_inside_pytorch_keeps_its_traceback():
    with pytest.raises(ValueError):
        run_script(lambda: torch.nn.functional.cross_entropy(torch.zeros(2, 3), torch.zeros(3).long()))


HUB = "http://127.0.0.1:9"  # nobody answers there
ROWS = "examples/scene.png"
OWN = f"--train_file={ROWS}"
WRONG = {  # options, and what the error names
    "--train_file=nowhere.jsonl": "nowhere.jsonl",
    "--max_steps=0": "--max_steps",
    "--resume_from_checkpoint=last --output_dir=nowhere": "--resume_from_checkpoint last: nowhere",
    "--resume_from_checkpoint=nowhere": "nowhere",
    "--output_dir=examples/trips-tiny-scenes": "--overwrite_output_dir",
    "--model=nope/model": HUB,
    "--model=./nope": "./nope",
    "--tokenizer=nope": HUB,
    f"{OWN}": "make_towers.py",
}


WITHOUT_HUB = {  # scripts and options that need the Hub
    "ask": "--model=nope/model",
    "app": "--model=nope/model",
    "check_data": "--task=vqa --preset=tiny --dataset_name=nope/data",
    "convert_checkpoint": "--checkpoint=nope/model --output_dir=nowhere",
    "evaluate_vlm": f"--model=nope/model --validation_file={ROWS}",
    "predict": "--model=nope/model --images=. --questions=what? --output=nowhere.csv",
    "push_to_hub": "--model=examples/trips-tiny-scenes --repo_id=ada/scenes",
    "run_vqa": "--preset=tiny --dataset_name=nope/data",
    "run_pretraining": "--preset=tiny --dataset_name=nope/data",
    "search": "--model=nope/model --images=nowhere --text=dog",
    "train_guide": "--model=nope/model",
}


@pytest.mark.parametrize("script", ["evaluate_vlm", "predict", "search"])
def test_a_device_that_is_not_here_is_named(script):
    command = [sys.executable, EXAMPLES / f"{script}.py", *WITHOUT_HUB[script].split(), "--device=xpu:7"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "--device xpu:7" in ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, options, code, word",
    [
        *((script, "--help", 0, "--schedule") for script in ("run_vqa", "run_pretraining")),
        ("ask", "--image=nowhere.png", 2, "nowhere.png"),
        *(("run_vqa", options, 2, word) for options, word in WRONG.items()),
        *((script, options, 2, HUB) for script, options in WITHOUT_HUB.items()),
    ],
)
def test_a_script_answers_before_it_imports_anything_heavy(script, options, code, word):
    assert word in answer_of(script, options, code)


@pytest.mark.slow
def test_a_hub_that_accepts_and_does_not_answer(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        start = time.monotonic()
        assert constants.ENDPOINT in why_offline.__wrapped__()
        assert time.monotonic() - start < 10


def answer_of(script, options, code):
    """Run a script that does not import what is slow, and return what it prints: one line, if it fails."""
    command = [sys.executable, "-X", "importtime", "-m", f"trips_examples.{script}", *options.split()]
    environment = {**os.environ, "HF_ENDPOINT": HUB, "HF_HUB_OFFLINE": "0"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == code, result.stderr[-2000:]
    imported = set()
    errors = []
    for line in result.stderr.splitlines():
        if line.startswith("import time:"):
            imported.add(line.rpartition("|")[2].strip())
        else:
            errors.append(line)
    assert "argparse" in imported
    assert not imported & {"torch", "datasets", "accelerate", "matplotlib"}
    assert len(errors) == (1 if code else 0)
    return result.stdout + "".join(errors)


def test_a_schedule_sets_the_fields_of_the_configuration():
    for text in ("unpruned", "2:image:0.5,3:text:0.25"):
        config = TripsConfig.from_preset("tiny", **config_fields(ModelArguments(schedule=text)))
        assert str(config.vision_config.schedule) == text


def test_help_all_lists_the_options_of_experiments_and_of_transformers():
    parser = make_parser(ModelArguments, TrainingOptions, description="")
    short = parser.format_help()
    assert "training:" in short and "--learning_rate" in short
    assert not {"--adam_beta2", "--fusion_type", "--optim_target_modules"} & set(short.split())
    with pytest.raises(SystemExit) as exit, contextlib.redirect_stdout(io.StringIO()) as printed:
        parse_arguments(parser, ["--help_all"])
    assert exit.value.code == 0
    assert {"--adam_beta2", "--fusion_type", "--optim_target_modules"} <= set(printed.getvalue().split())


def test_bundled_tasks_share_a_vocabulary():
    tokenizer = train_tokenizer(DataArguments().vocabulary({}, "question"))
    assert {word for word in BUNDLED_WORDS if len(tokenizer.tokenize(word)) > 1} == set()
    texts = {"a picture of "}
    for task, grid in product(TASKS, (2, 4)):
        for record in busy_records(task, "train", 100, grid):
            columns = {"question", "answer", "statement", "expression"} & record.keys()
            texts |= {record[column] for column in columns} | set(record.get("captions", []))
    assert len(texts) > 500
    tokens = tokenizer.tokenize(" ".join(texts))
    assert not [token for token in tokens if token.startswith("##") or token == "[UNK]"]
