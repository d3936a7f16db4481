"""Command-line parser of the scripts, with options from dataclasses."""

from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter

from transformers import HfArgumentParser


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Formatter that keeps the line breaks of the docstring."""


class Parser(HfArgumentParser):
    """Parser that reports unknown and invalid options without a traceback."""

    def parse_args_into_dataclasses(self, args: list[str] | None = None, **kwargs) -> tuple:
        try:
            return super().parse_args_into_dataclasses(args=args, **kwargs)
        except ValueError as error:
            if args is None:  # a command line, not a call from Python
                self.error(str(error))
            raise


def make_parser(*classes: type, description: str) -> HfArgumentParser:
    """Make a parser of the options in these dataclasses with a short usage line."""
    return Parser(classes, description=description.strip(), usage="%(prog)s [options]", formatter_class=HelpFormatter)
