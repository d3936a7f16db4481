"""Command lines of the scripts: options from dataclasses, and errors in words."""

import linecache
import os
import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable
from traceback import walk_tb

from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser


PACKAGES = ("__main__", "modeling_trips", "trips_examples")


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Formatter that keeps the line breaks of the docstring and lists an option once, with `_`."""

    def _format_action_invocation(self, action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = [name for name in action.option_strings if "-" not in name.lstrip("-")]
        values = "" if action.nargs == 0 else f" {self._format_args(action, action.dest.upper())}"
        return ", ".join(names) + values


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


def run_script(main: Callable[[], object]):
    """
    Run the `main` of a script. An error of the user's options, files or data ends the process with status 1 and one
    message; `TRIPS_TRACEBACK=1` shows its traceback. Other exceptions keep theirs. At the end, the processes of a
    launch wait for each other.
    """
    try:
        main()
    except Exception as error:
        if os.environ.get("TRIPS_TRACEBACK", "0") != "0" or not is_user_error(error):
            raise
        sys.exit(f"error: {error}\n(TRIPS_TRACEBACK=1 shows the traceback.)")
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.barrier()  # gloo can abort processes that only exit
        distributed.destroy_process_group()


def is_user_error(error: Exception) -> bool:
    """Return whether an error is about files or an invalid configuration, or a `raise` of this project's code."""
    if isinstance(error, (OSError, StrictDataclassError)):
        return True
    *_, (frame, line) = walk_tb(error.__traceback__)
    is_raised = linecache.getline(frame.f_code.co_filename, line).lstrip().startswith("raise ")
    is_ours = frame.f_globals["__name__"].partition(".")[0] in PACKAGES
    return is_raised and is_ours and isinstance(error, (ValueError, TypeError, FloatingPointError, ImportError))
