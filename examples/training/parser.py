"""The command line of a script: its options are the fields of dataclasses, its help begins with its docstring."""

from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter

from transformers import HfArgumentParser


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Leaves the lines of the docstring, where commands stand, as they are."""


def make_parser(*classes: type, description: str) -> HfArgumentParser:
    """A parser of the options that these dataclasses have. Its usage is short: each option is explained below it."""
    return HfArgumentParser(
        classes, description=description.strip(), usage="%(prog)s [options]", formatter_class=HelpFormatter
    )
