"""Core of the benchmarks: options, and rows with the fields of [`modeling_trips.inspection.provenance`]."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from modeling_trips.inspection.provenance import provenance
from trips_examples.data.source import option
from trips_examples.training.files import write_json
from trips_examples.training.options import make_parser


@dataclass(kw_only=True)
class OutputArguments:
    """Options of all benchmarks."""

    num_threads: int | None = option(None, "CPU threads. Default: PyTorch's choice.")
    output_json: str | None = option(None, "Output file of the rows.")


def run_benchmark(
    arguments_class: type,
    description: str,
    measure: Callable[..., Iterable[dict]],
    report: Callable[..., None],
    argv: list[str] | None = None,
) -> list[dict]:
    """
    Run a benchmark from the command line: parse the options, measure, write each row immediately, report.

    Args:
        arguments_class (`type`): Dataclass of options, based on [`OutputArguments`].
        description (`str`): Docstring of the script, for `--help`.
        measure (`Callable`): Function that yields rows for the options.
        report (`Callable`): Function that prints a table of the rows for the options.
        argv (`list[str]`, *optional*): Command line. Default: that of the process.

    Returns:
        `list[dict]`: The rows with their provenance, whose fields a row may override.
    """
    (args,) = make_parser(arguments_class, description=description).parse_args_into_dataclasses(args=argv)
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    seed = getattr(args, "seed", None)
    if seed is not None:
        torch.manual_seed(seed)
    rows: list[dict] = []
    for row in measure(args):
        rows.append(provenance(getattr(args, "device", "cpu"), seed) | row)
        if args.output_json is not None:
            write_json(args.output_json, rows)
    report(rows, args)
    return rows
