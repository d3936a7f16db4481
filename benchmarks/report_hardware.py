r"""
Makes docs/hardware.md: what pruning saves on several machines, side by side, of the rows that people send.

    python benchmarks/benchmark.py --mode forward training --schedule 5,10 --batch_size 1 8 \
        --output_json docs/results/hardware/my_machine.json
    python benchmarks/report_hardware.py

Each file in docs/results/hardware is a machine's; what docs/results/hardware/schema.json does not allow is named.
"""

import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import benchmark
from jsonschema import Draft202012Validator

from trips_examples.training.files import write_whole
from trips_examples.training.parser import make_parser


DOCS = Path(__file__).resolve().parent.parent / "docs"
SCHEMA = DOCS / "results/hardware/schema.json"
DEFAULTS = {"selection_guidance": "text", "clock": "wall"}  # of rows that were written before there were others
CLOCKS = {"wall": "wall", "process": "the processor's: it did other work, too"}
PAGE = r"""# Machines side by side

What pruning saves on each: time of a step, pruned / unpruned, and in brackets texts per second, pruned. Both twins
took their steps in turns, and medians are compared ([how](speed.md)); texts have 40 tokens where nothing else is said.

{table}

{machines}

**Yours is missing.** Run this, on a GPU with `--device cuda --dtype bfloat16` and larger batches, and send the file. A
row holds what [the schema](results/hardware/schema.json) says.

```bash
python benchmarks/benchmark.py --mode forward training --schedule 5,10 --batch_size 1 8 \
    --output_json docs/results/hardware/my_machine.json
python benchmarks/report_hardware.py    # checks the files, and makes this page anew
```

Times on one machine do not tell what another would take; the ratios hardly differ where arithmetic is what takes time.
[Other experiments](experiments.md) that are still to be made.
"""


@dataclass
class ReportArguments:
    folder: str = field(default=str(SCHEMA.parent), metadata={"help": "Its JSON files hold the rows."})
    output: str = field(default=str(DOCS / "hardware.md"), metadata={"help": "The page."})


def read_rows(path: Path) -> list[dict]:
    """
    The rows of a machine.

    Raises:
        ValueError: if the schema does not allow them; the first thing that is wrong is named.
    """
    rows = json.loads(path.read_text(encoding="utf-8"))
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    for error in Draft202012Validator(schema).iter_errors(rows):
        place = "".join(f"[{part!r}]" for part in error.absolute_path)
        raise ValueError(
            f"{path}{place}: {error.message}. Let benchmarks/benchmark.py write the rows (--output_json)."
        )
    return [{**DEFAULTS, **row} for row in rows]


def work_of(row: dict) -> tuple[str, str]:
    """What was done, and who chose in which layer."""
    tokens = "" if row["text_length"] == 40 else f" of {row['text_length']} tokens"
    texts = "" if row["texts_per_image"] == 1 and not tokens else f" x {row['texts_per_image']} text(s){tokens}"
    return f"{row['preset']}, {benchmark.work_of(row)}{texts}", str(benchmark.schedule_of(row))


def machine_of(row: dict) -> str:
    threads = ""
    if row["device"] == "cpu":
        threads = f", {row['num_threads']} thread{'s' * (row['num_threads'] > 1)}"
    return f"{row['device_name']}{threads}, {row['dtype']}{', compiled' * row['compile']}"


def details_of(row: dict, file: str) -> str:
    parts = (machine_of(row), row["attn_implementation"], CLOCKS[row["clock"]], row["torch_version"])
    return table_row(*parts, f"[{file}](results/hardware/{file})")


def table_row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def render(folder: Path) -> str:
    """
    The page.

    Raises:
        ValueError: if there are no rows, or a machine did the same twice.
    """
    measured: dict[tuple[str, str], dict[str, dict]] = defaultdict(dict)  # rows by what was done and who did it
    details: dict[str, None] = {}
    for path in sorted(set(folder.glob("*.json")) - {folder / SCHEMA.name}):
        for row in read_rows(path):
            if machine_of(row) in measured[work_of(row)]:
                raise ValueError(f"{path}: {machine_of(row)} did this before: {'; '.join(work_of(row))}.")
            measured[work_of(row)][machine_of(row)] = row
            details[details_of(row, path.name)] = None
    if not measured:
        raise ValueError(f"{folder} holds no rows: let benchmarks/benchmark.py write some (--output_json).")
    machines = sorted({machine for row in measured.values() for machine in row})
    table = [table_row("what", "who chooses where", "work counted", *machines), "|---" * (3 + len(machines)) + "|"]
    for work, by_machine in sorted(measured.items()):
        counted = f"{next(iter(by_machine.values()))['macs_ratio']:.2f}"
        table.append(table_row(*work, counted, *(cell(by_machine.get(machine)) for machine in machines)))
    head = [table_row("machine", "attention", "clock", "PyTorch", "rows"), "|---" * 5 + "|"]
    return PAGE.replace("{table}", "\n".join(table)).replace("{machines}", "\n".join([*head, *details]))


def cell(row: dict | None) -> str:
    return "" if row is None else f"{row['time_ratio']:.2f} ({row['throughput']:,.1f})"


def main(argv: list[str] | None = None):
    (args,) = make_parser(ReportArguments, description=__doc__).parse_args_into_dataclasses(args=argv)
    write_whole(args.output, render(Path(args.folder)))
    print(f"Written: {args.output}")


if __name__ == "__main__":
    main()
