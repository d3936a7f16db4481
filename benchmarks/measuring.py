"""
Core of the benchmarks: options, interleaved runs, medians, and rows with provenance.

Compared steps take turns in one process, so that changes of the machine affect all, and medians are compared. Every
row has the fields of [`modeling_trips.inspection.provenance`].
"""

import statistics
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass, field

import torch
import transformers

from modeling_trips.inspection.provenance import provenance
from modeling_trips.inspection.speed import check_clock, peak_memory, percentile_99, seconds_in_turns
from trips_examples.training.files import write_json
from trips_examples.training.parser import make_parser


@dataclass(kw_only=True)
class OutputArguments:
    """Options of all benchmarks."""

    num_threads: int | None = field(default=None, metadata={"help": "CPU threads. Default: PyTorch's choice."})
    output_json: str | None = field(default=None, metadata={"help": "Output file of the rows."})

    def settings(self, *left_out: str) -> dict:
        """Return the options for a row, without `left_out`, the output file and the fields of [`provenance`]."""
        left_out = {"num_threads", "output_json", "limit", *left_out}
        return {name: value for name, value in asdict(self).items() if name not in left_out}


@dataclass(kw_only=True)
class TimingArguments(OutputArguments):
    """Options of the benchmarks that time steps in turns."""

    device: str = field(default="cpu", metadata={"help": "Device to measure: cpu, cuda or mps."})
    clock: str = field(
        default="wall", metadata={"help": "wall, or process (CPU time of one thread, for a shared machine)."}
    )
    warmup: int = field(default=2, metadata={"help": "Untimed rounds."})
    repeats: int = field(default=9, metadata={"help": "Timed rounds."})
    limit: float | None = field(default=None, metadata={"help": "Seconds after which no further round is timed."})
    seed: int = field(default=0, metadata={"help": "Seed of weights and inputs."})

    def __post_init__(self):
        check_clock("--clock", self.clock, self.device)

    def time_in_turns(
        self,
        steps: dict[str, Callable[[], object]],
        reference: str | None = None,
        prepare: Callable[[str], object] | None = None,
    ) -> dict[str, dict]:
        """
        Time steps in turns.

        Args:
            steps (`dict[str, Callable]`): Steps by name.
            reference (`str`, *optional*): Step for comparison. Default: the first.
            prepare (`Callable[[str], object]`, *optional*): Untimed function of a step's name that runs before it.

        Returns:
            `dict[str, dict]`: For each step `latency` (median in seconds), `latency_p99` (`None` below 100 rounds),
            `peak_memory_bytes`, `speedup` over the reference, and `time_ratio_quartiles`, the quartiles over the
            rounds of the step's time divided by the reference's.
        """
        seconds = seconds_in_turns(steps, self.warmup, self.repeats, self.clock, self.device, prepare, self.limit)
        base = seconds[next(iter(steps)) if reference is None else reference]
        rows = {}
        for name, own in seconds.items():
            if prepare is not None:
                prepare(name)
            rows[name] = {
                "latency": statistics.median(own),
                "latency_p99": percentile_99(own),
                "speedup": statistics.median(base) / statistics.median(own),
                "time_ratio_quartiles": quartiles([one / other for one, other in zip(own, base)]),
                "peak_memory_bytes": peak_memory(steps[name], self.device),
            }
        return rows


def quartiles(values: list[float]) -> list[float]:
    """Return the first and the third quartile."""
    return statistics.quantiles(values, n=4)[::2] if len(values) > 1 else values * 2


def check_choices(option: str, given: Iterable[str], known: Collection[str]):
    """Raise a `ValueError` if an option has unknown values."""
    if wrong := [value for value in given if value not in known]:
        raise ValueError(f"{option} must be one of {', '.join(known)}, got {', '.join(wrong)}.")


def make_transformers_model(
    name: str, image_size: int, patch_size: int = 16, **fields
) -> transformers.PreTrainedModel:
    """Make a model of Transformers with random weights, and its default configuration but for these fields."""
    model_class = getattr(transformers, name)
    vision = {"image_size": image_size, "patch_size": patch_size}
    if not name.startswith("Vilt"):
        vision = {"vision_config": vision}
    return model_class(model_class.config_class(**vision, **fields))


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
