"""Options, and errors in words: a command ends with a message, a program gets an exception."""

import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from places import ROOT

from modeling_trips import TripsConfig
from trips_examples.training import parser
from trips_examples.training.parser import make_parser, run_script


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
        of_options.parse_args_into_dataclasses()
    assert raised.value.code == 2 and word in capsys.readouterr().err
    with pytest.raises(ValueError, match=word):
        of_options.parse_args_into_dataclasses(args=options)


def test_help_lists_each_option_once():
    @dataclass
    class Long:
        a_long_option: float = 1.0

    text = make_parser(Long, description="A script.").format_help()
    assert "--a_long_option" in text and "--a-long-option" not in text
    assert (
        make_parser(Long, description="").parse_args_into_dataclasses(args=["--a-long-option=2"])[0].a_long_option == 2
    )


@pytest.fixture
def as_project(monkeypatch):
    """Count this file as a part of the project."""
    monkeypatch.setattr(parser, "PACKAGES", (__name__, "modeling_trips"))


def wrong_option():
    raise ValueError("--rate is too large")


def missing_file():
    open("nowhere.txt")


def wrong_configuration():
    TripsConfig(keep_rate=2.0)


def defect():
    [_, _] = [1]


def defect_elsewhere():
    torch.zeros(2).view(3)


@pytest.mark.parametrize("main", [wrong_option, missing_file, wrong_configuration])
def test_errors_of_the_user_end_a_script_in_words(main, as_project, monkeypatch):
    with pytest.raises(SystemExit) as exit:
        run_script(main)
    with pytest.raises(Exception) as error:
        main()
    assert str(error.value) in exit.value.code
    monkeypatch.setenv("TRIPS_TRACEBACK", "1")
    with pytest.raises(error.type):
        run_script(main)


@pytest.mark.parametrize("main", [defect, defect_elsewhere])
def test_other_errors_keep_their_traceback(main, as_project):
    with pytest.raises((ValueError, RuntimeError)):
        run_script(main)


@pytest.mark.slow
def test_a_script_ends_with_one_message(tmp_path):
    options = [f"--train_file={tmp_path / 'nowhere.jsonl'}", f"--output_dir={tmp_path}", "--do_eval=False"]
    command = [sys.executable, "-m", "trips_examples.run_vqa", *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr and "nowhere.jsonl" in result.stderr
