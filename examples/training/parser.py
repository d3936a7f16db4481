"""The command line of a script: its options are the fields of dataclasses, its help begins with its docstring."""

from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter

from transformers import HfArgumentParser


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Leaves the lines of the docstring, where commands stand, as they are."""


class Parser(HfArgumentParser):
    """Ends a command whose options do not exist or do not fit as argparse does, without a traceback."""

    def parse_args_into_dataclasses(self, args: list[str] | None = None, **kwargs) -> tuple:
        try:
            return super().parse_args_into_dataclasses(args=args, **kwargs)
        except ValueError as error:
            if args is None:  # not a program, which may catch it
                self.error(str(error))
            raise


def make_parser(*classes: type, description: str) -> HfArgumentParser:
    """A parser of the options that these dataclasses have. Its usage is short: each option is explained below it."""
    return Parser(classes, description=description.strip(), usage="%(prog)s [options]", formatter_class=HelpFormatter)
