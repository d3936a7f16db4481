"""Options, and errors in words: a command ends with a message, a program gets an exception."""

import contextlib
import io
import subprocess
import sys
from dataclasses import dataclass
from itertools import product

import pytest
from places import ROOT

from modeling_trips import SelectionSchedule, TripsConfig
from trips_examples.data.busy_scenes import busy_records
from trips_examples.data.tasks import TASKS
from trips_examples.data.vocabulary import BUNDLED_WORDS, train_tokenizer
from trips_examples.training.options import (
    DataArguments,
    ModelArguments,
    TrainingOptions,
    check_schedule,
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


@pytest.mark.parametrize(("options", "word"), [(["--rate=2"], "--rate is too large"), (["--rat3=1"], "--rat3")])
def test_wrong_options_exit_without_a_traceback(options, word, monkeypatch, capsys):
    of_options = make_parser(Options, description="A script.")
    monkeypatch.setattr("sys.argv", ["script.py", *options])
    with pytest.raises(SystemExit) as raised:
        of_options.check()
    assert raised.value.code == 2 and word in capsys.readouterr().err
    with pytest.raises(ValueError, match=word):
        of_options.parse_args_into_dataclasses(args=options)


@pytest.mark.parametrize(("launched", "code"), [({}, 2), ({"WORLD_SIZE": "2", "RANK": "0"}, None)])
def test_one_process_of_several_ends(launched, code, monkeypatch, capsys):
    of_options = make_parser(Options, description="A script.")
    monkeypatch.setattr("sys.argv", ["script.py"])
    for name, value in {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500", **launched}.items():
        monkeypatch.setenv(name, value)
    if code is None:
        of_options.check()
        return
    with pytest.raises(SystemExit) as exit:
        of_options.check()
    assert exit.value.code == code and "torchrun --nproc_per_node 2 script.py" in capsys.readouterr().err


def wrong_option():
    raise ValueError("--rate is too large")


def missing_file():
    open("nowhere.txt")


def wrong_configuration():
    TripsConfig(keep_rate=2.0)


@pytest.mark.parametrize("main", [wrong_option, missing_file, wrong_configuration])
def test_errors_of_the_user_end_a_script_in_words(main, monkeypatch):
    with pytest.raises(SystemExit) as exit:
        run_script(main)
    with pytest.raises(Exception) as error:
        main()
    assert str(error.value) in exit.value.code
    monkeypatch.setenv("TRIPS_TRACEBACK", "1")
    with pytest.raises(error.type):
        run_script(main)


WRONG = {
    "--help": 0,
    "--schedule=2:text:a_half": 2,
    "--train_file=nowhere.jsonl": 2,
    "--max_steps=0": 2,
}


@pytest.mark.slow
@pytest.mark.parametrize("option", WRONG)
@pytest.mark.parametrize("script", ["run_vqa", "run_pretraining"])
def test_options_are_checked_before_anything_heavy_is_imported(script, option):
    command = [sys.executable, "-X", "importtime", "-m", f"trips_examples.{script}", option]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    imported = {
        line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import time:")
    }
    assert result.returncode == WRONG[option], result.stderr[-2000:]
    assert "argparse" in imported and not imported & {"torch", "datasets", "accelerate", "matplotlib"}
    assert "Traceback" not in result.stderr and "usage: " in result.stdout + result.stderr


@pytest.mark.parametrize("option", ["--schedul=2", "--keep_rte=0.5"])  # of no class, and not guessed
def test_a_training_refuses_unknown_options(option):
    with pytest.raises(ValueError, match=option):
        parse_arguments(make_parser(ModelArguments, TrainingOptions, description=""), [option])


SCHEDULE_TEXTS = ["unpruned", "2:text:0.3", "6:image:0.5,9:text:0.5", "5,10", "3:image", "3::0.5", "12:random:1e-2"]
WRONG_SCHEDULES = [
    "",
    "2:text:2",
    "2:text:0",
    "2:txet:0.5",
    "0:text:0.5",
    "9:text:0.5,6:image:0.5",
    "2:text:0.5:1",
    "a",
    "2:text:nan",
]


@pytest.mark.parametrize("text", [*SCHEDULE_TEXTS, *WRONG_SCHEDULES])
def test_a_schedule_is_checked_at_once_as_the_models_read_it(text):
    try:
        SelectionSchedule.parse(text)
        is_right = True
    except ValueError:
        is_right = False
    assert is_right == (text in SCHEDULE_TEXTS)
    with contextlib.nullcontext() if is_right else pytest.raises(ValueError, match="--schedule"):
        check_schedule(text)


def test_a_schedule_sets_the_fields_of_the_configuration():
    for text in ("unpruned", "2:image:0.5,3:text:0.25"):
        config = TripsConfig.from_preset("tiny", **config_fields(ModelArguments(schedule=text)))
        assert str(config.vision_config.schedule) == text


@pytest.mark.parametrize("option", ["--keep_rate=1.0", "--selection_layers=2", "--selection_guidance=image"])
def test_an_option_of_earlier_versions_names_the_new_form(option):
    with pytest.raises(ValueError, match="--schedule.*unpruned"):
        make_parser(ModelArguments, description="").parse_args_into_dataclasses([option])


def test_help_all_lists_the_options_of_transformers():
    parser = make_parser(TrainingOptions, description="")
    assert "optim_target_modules" not in parser.format_help()
    with pytest.raises(SystemExit) as exit, contextlib.redirect_stdout(io.StringIO()) as printed:
        parse_arguments(parser, ["--help_all"])
    assert exit.value.code == 0 and "optim_target_modules" in printed.getvalue()


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
