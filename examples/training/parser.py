"""Command lines of the scripts: options from dataclasses, and errors in words."""

import ast
import os
import sys
from argparse import ArgumentDefaultsHelpFormatter, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import MISSING
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers.hf_argparser import HfArgumentParser

from trips_examples.training.options import RunOptions
from trips_examples.training.recipe import recipe


TRAINING_FILES = ("training_args.py", "training_args_seq2seq.py")  # of Transformers


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Formatter that keeps the line breaks of the docstring and lists an option once, with `_`."""

    def _format_action_invocation(self, action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = [name for name in action.option_strings if "-" not in name.lstrip("-")]
        values = "" if action.nargs == 0 else f" {self._format_args(action, action.dest.upper())}"
        return ", ".join(names) + values


class Parser(HfArgumentParser):
    """
    Parser of the options in dataclasses, which guesses no abbreviated ones. With [`RunOptions`] among them, the script
    also takes the options of Transformers' `TrainingArguments`: [`check`] accepts them by name, and `parse_arguments`
    reads them.

    Args:
        classes (`type`): Dataclasses, one object of each is returned.
        description (`str`): Text above the options.
        task (`str`, *optional*): Task of the [`recipe`] that sets the defaults of runs on own data.
        defaults: Defaults that override those of the classes.
    """

    def __init__(self, *classes: type, description: str, task: str | None = None, **defaults):
        layout = {"usage": "%(prog)s [options]", "formatter_class": HelpFormatter, "allow_abbrev": False}
        super().__init__(classes, description=description.strip(), **layout)
        self.classes, self.task, self.defaults = classes, task, defaults
        self.trains = any(issubclass(each, RunOptions) for each in classes)
        self.set_defaults(**defaults)
        of_recipe = recipe(task, {"train_file": None})
        for action in self._actions:
            if of_recipe.get(action.dest) is not None:
                action.help += f" On own data, without a start: {of_recipe[action.dest]}."
        if self.trains:
            self.add_argument("--help_all", action="help", help="Show the options of Transformers' Trainer, too.")

    def check(self):
        """
        End the process at `--help`, or with a message if the command line has unknown or wrong options or names files
        that do not exist. Scripts call it before the imports that take seconds.
        """
        if self.trains and "--help_all" in sys.argv:
            return  # `parse_arguments` knows them
        try:
            *options, rest = self.parse_args_into_dataclasses(return_remaining_strings=True)
            known = training_options() if self.trains else set()
            names = [word[2:].partition("=")[0].replace("-", "_") for word in rest if word.startswith("--")]
            if unknown := [f"--{name}" for name in names if name not in known] or (rest if not names else []):
                raise ValueError(f"There is no option {', '.join(unknown)}. --help lists the options.")
            for each in options:
                if hasattr(each, "check_files"):
                    each.check_files()
        except (ValueError, OSError) as error:
            self.error(str(error))

    def parse_known_args(self, args=None, namespace=None) -> tuple[Namespace, list[str]]:
        if namespace is None:  # options of the recipe that are not typed
            blank = Namespace(**{action.dest: MISSING for action in self._actions})
            typed = vars(super().parse_known_args(args, blank)[0])
            typed = {name: value for name, value in typed.items() if value is not MISSING}
            namespace = Namespace(**recipe(self.task, typed))
        return super().parse_known_args(args, namespace)

    def parse_args_into_dataclasses(self, args: list[str] | None = None, **kwargs) -> tuple:
        try:
            return super().parse_args_into_dataclasses(args=args, **kwargs)
        except ValueError as error:
            if args is None:  # a command line, not a call from Python
                self.error(str(error))
            raise


def training_options() -> set[str]:
    """Return the names of the options of Transformers' trainings, which its import would take seconds to tell."""
    folder = Path(find_spec("transformers").origin).parent
    trees = [ast.parse((folder / name).read_text(encoding="utf-8")) for name in TRAINING_FILES]
    fields = [node.target for tree in trees for node in ast.walk(tree) if isinstance(node, ast.AnnAssign)]
    names = {target.id for target in fields if isinstance(target, ast.Name)}
    return names | {f"no_{name}" for name in names}


def make_parser(*classes: type, description: str, task: str | None = None, **defaults) -> Parser:
    """Return a [`Parser`] of the options in these dataclasses."""
    return Parser(*classes, description=description, task=task, **defaults)


def run_script(main: Callable[[], object]):
    """
    Run the `main` of a script. Errors of values, files and missing packages end the process with status 1 and one
    message; `TRIPS_TRACEBACK=1` shows their traceback. Other exceptions keep theirs. At the end, the processes of a
    launch wait for each other.
    """
    try:
        main()
    except (ValueError, OSError, ImportError, FloatingPointError, StrictDataclassError) as error:
        if os.environ.get("TRIPS_TRACEBACK", "0") != "0":
            raise
        sys.exit(f"error: {error}\n(TRIPS_TRACEBACK=1 shows the traceback.)")
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.barrier()  # gloo can abort processes that only exit
        distributed.destroy_process_group()
