"""Wrong options end a command with a message, and raise an exception in a program."""

from dataclasses import dataclass

import pytest

from trips_examples.training.parser import make_parser


@dataclass
class Options:
    rate: float = 1.0

    def __post_init__(self):
        if self.rate > 1:
            raise ValueError("--rate is too large")


@pytest.mark.parametrize(("options", "word"), [(["--rate=2"], "--rate is too large"), (["--rat3=1"], "--rat3")])
def test_wrong_options_exit_without_a_traceback(options, word, monkeypatch, capsys):
    parser = make_parser(Options, description="A script.")
    monkeypatch.setattr("sys.argv", ["script.py", *options])
    with pytest.raises(SystemExit) as raised:
        parser.parse_args_into_dataclasses()
    assert raised.value.code == 2 and word in capsys.readouterr().err
    with pytest.raises(ValueError, match=word):
        parser.parse_args_into_dataclasses(args=options)
