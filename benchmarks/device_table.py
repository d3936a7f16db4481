r"""
Everything that is to be known about speed on one machine with a GPU, in one go: TRIPS beside its unpruned twin and
beside other models, from one image to 256, in the middle (p50) and at worst (p99), with memory, training steps and
CUDA graphs, as rows, as a table and as a picture.

    python benchmarks/device_table.py --output_dir table      # on a GPU: at most 20 minutes
    python benchmarks/device_table.py --device cpu --dtype float32 --preset tiny --image_size 64 --batch_size 1 8 \
        --schedule 2,3 --tower_schedule 2:image,3:image --peers timm-vit --output_dir table    # does it run, anywhere?

What is measured is written at once: started again it goes on. When the minutes are over, what is left is named. What
finds no memory is named. `twins.json` is a file for docs/results/hardware (report_hardware.py).
"""

import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path

import benchmark
import peers
import torch
from tqdm.auto import tqdm

from modeling_trips import SelectionSchedule
from modeling_trips.inspection.speed import Setting, measure
from trips_examples.training.files import write_json, write_whole
from trips_examples.training.parser import make_parser


TOO_LARGE = "out_of_memory.json"  # the names of what found no memory


@dataclass
class DeviceTableArguments:
    output_dir: str = field(metadata={"help": "Folder of the rows, table.md and table.png."})
    device: str = field(default="cuda", metadata={"help": "cuda, mps, cpu."})
    dtype: str = field(default="bfloat16", metadata={"help": "float32, bfloat16, float16."})
    preset: str = field(default="base", metadata={"help": "Size of TRIPS."})
    image_size: int = field(default=384, metadata={"help": "Pixels per side."})
    batch_size: list[int] = field(default_factory=lambda: [1, 8, 32, 128, 256], metadata={"help": "Images per step."})
    texts_per_image: list[int] = field(default_factory=lambda: [1, 10], metadata={"help": "Texts about each image."})
    schedule: list[str] = field(
        default_factory=lambda: ["5,10", "2:text:0.05"], metadata={"help": "As of benchmark.py."}
    )
    tower_schedule: str = field(default="5:image,10:image", metadata={"help": "As of peers.py."})
    peers: list[str] | None = field(default=None, metadata={"help": "Of them alone, as of peers.py. Default: all."})
    minutes: float = field(default=20.0, metadata={"help": "No other measurement begins after so many."})
    seconds: float = field(default=6.0, metadata={"help": "Timed steps of one measurement take about so long."})
    repeats: int = field(default=100, metadata={"help": "Timed steps at most; p99 needs a hundred."})


@dataclass(frozen=True)
class Cell:
    """One measurement: the rows of one setting."""

    name: str
    file: str  # of all rows of its kind
    measure: Callable[[], list[dict]]


def twins(args: DeviceTableArguments) -> Iterator[Cell]:
    """TRIPS beside its unpruned twin: forward and training steps; compiled at both ends of one text per image."""
    compiled_sizes = {args.batch_size[0], args.batch_size[-1]}
    grid = itertools.product(
        args.batch_size, args.texts_per_image, args.schedule, ("forward", "training"), (False, True)
    )
    for batch_size, texts, schedule, mode, compiled in grid:
        if compiled and (mode == "training" or texts > 1 or batch_size not in compiled_sizes):
            continue
        setting = Setting(
            preset=args.preset,
            image_size=args.image_size,
            batch_size=batch_size,
            texts_per_image=texts,
            text_length=40,
            mode=mode,
            dtype=args.dtype,
            device=args.device,
            compile=compiled,
            compile_mode="reduce-overhead" if compiled and args.device == "cuda" else None,
            **SelectionSchedule.parse(schedule, 0.7).config_fields,
        )
        name = f"{mode}{', compiled' * compiled}, batch {batch_size} x {texts}, {schedule}"
        yield Cell(name, "twins.json", partial(measure_twins, setting, args))


def measure_twins(setting: Setting, args: DeviceTableArguments) -> list[dict]:
    return [measure(setting, 3, args.repeats, compare_repeating=False, limit=args.seconds)]


def beside_peers(args: DeviceTableArguments) -> Iterator[Cell]:
    """TRIPS beside other models, task by task."""
    for task in peers.TASKS:
        numbers = args.texts_per_image if peers.TASKS[task].has_texts else [1]
        models = cache(partial(peers.make_models, task, peer_arguments(args)))  # the same for all batches
        for batch_size, texts in itertools.product(args.batch_size, numbers):
            work = partial(measure_peers, task, models, batch_size, texts, args)
            yield Cell(f"{task}, batch {batch_size} x {texts}", "peers.json", work)


def measure_peers(task: str, models: Callable, batch_size: int, texts: int, args: DeviceTableArguments) -> list[dict]:
    return peers.measure(task, models(), texts, replace(peer_arguments(args), batch_size=batch_size))


def peer_arguments(args: DeviceTableArguments) -> peers.PeerArguments:
    return peers.PeerArguments(
        peers=args.peers,
        schedule=args.schedule,
        preset=args.preset,
        tower_schedule=args.tower_schedule,
        image_size=args.image_size,
        dtype=args.dtype,
        device=args.device,
        warmup=3,
        repeats=args.repeats,
        limit=2 * args.seconds,
    )


def run(cells: list[Cell], args: DeviceTableArguments) -> list[str]:
    """Measures what is not there yet, written one by one, until the minutes are over; the names of what is left."""
    folder, start, left = Path(args.output_dir), time.monotonic(), []
    for cell in (bar := tqdm(cells, desc="measurements")):
        rows, too_large = read_rows(folder / cell.file), read_rows(folder / TOO_LARGE)
        if cell.name in too_large or any(row["cell"] == cell.name for row in rows):
            continue
        if time.monotonic() - start > 60 * args.minutes:
            left.append(cell.name)
            continue
        bar.set_description(cell.name)
        try:
            found = [{"cell": cell.name, **row} for row in cell.measure()]
        except torch.OutOfMemoryError:
            found = []
        if found:
            write_json(folder / cell.file, rows + found)
        else:  # peers.py leaves out each model that finds no memory
            write_json(folder / TOO_LARGE, [*too_large, cell.name])
        if args.device == "cuda":
            torch.cuda.empty_cache()
    return left


def read_rows(path: Path) -> list:
    return json.loads(path.read_text()) if path.exists() else []


def render(folder: Path) -> str:
    """The rows as two tables in Markdown, and what found no memory."""
    twins, others = read_rows(folder / "twins.json"), read_rows(folder / "peers.json")
    first = (twins or others)[0]
    versions = f"PyTorch {first['torch_version']}, Transformers {first['transformers_version']}"
    lines = [f"# {first['device_name']}, {first['dtype']}, {first['image_size']} px", "", versions, ""]
    lines += [
        "| TRIPS and its twin | work counted | time | p50, ms | twin | p99, ms | twin | texts/s | MiB | twin |",
        "|---" * 10 + "|",
    ]
    for row in twins:
        times = [milliseconds(row[twin + name]) for name in ("latency", "latency_p99") for twin in ("", "unpruned_")]
        memory = [mebibytes(row[twin + "peak_memory_bytes"]) for twin in ("", "unpruned_")]
        ratios = (f"{row['macs_ratio']:.2f}", f"{row['time_ratio']:.2f}")
        lines.append(cells(row["cell"], *ratios, *times, f"{row['throughput']:,.0f}", *memory))
    lines += ["", "| beside others | model | p50, ms | p99, ms | per second | speed-up | MiB |", "|---" * 7 + "|"]
    for row in others:
        times = milliseconds(row["latency"]), milliseconds(row["latency_p99"])
        speed = f"{row['throughput']:,.0f}", f"{row['speedup']:.2f} of {row['compared_with']}"
        lines.append(cells(row["cell"], row["model"], *times, *speed, mebibytes(row["peak_memory_bytes"])))
    if too_large := read_rows(folder / TOO_LARGE):
        lines += ["", f"Out of memory: {'; '.join(too_large)}."]
    return "\n".join(lines) + "\n"


def cells(*values: str) -> str:
    return f"| {' | '.join(values)} |"


def milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1000 * seconds:.1f}"


def mebibytes(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:,.0f}"


def plot(folder: Path, path: Path):
    """Left the time of TRIPS in that of its twin, right answers per second beside other models, against the batch."""
    figure, (left, right) = benchmark.new_axes(13, 6.5, columns=2)
    for name, rows in grouped(read_rows(folder / "twins.json"), twin_label).items():
        left.plot([row["batch_size"] for row in rows], [row["time_ratio"] for row in rows], "o-", label=name)
    left.set(xscale="log", xlabel="images per step", ylabel="time, pruned / unpruned (lower is better)")
    answers = [row for row in read_rows(folder / "peers.json") if row["task"] == "answer"]
    for name, rows in grouped(answers, lambda row: f"{row['model']}, {row['texts_per_image']} per image").items():
        right.plot([row["batch_size"] for row in rows], [row["throughput"] for row in rows], "o-", label=name)
    right.set(xscale="log", yscale="log", xlabel="images per step", ylabel="answers per second (higher is better)")
    for axes in (left, right):
        sizes = sorted({size for line in axes.get_lines() for size in line.get_xdata() if size >= 1})
        axes.set_xticks(sizes, labels=[f"{size:g}" for size in sizes])
        axes.xaxis.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small", ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    left.axhline(1.0, color="black", linewidth=1)
    figure.savefig(path, dpi=120)


def twin_label(row: dict) -> str:
    compiled = ", compiled" * row["compile"]
    return f"{row['mode']}{compiled}, {row['texts_per_image']} per image, {benchmark.schedule_of(row)}"


def grouped(rows: list[dict], label: Callable[[dict], str]) -> dict[str, list[dict]]:
    groups: dict[str, list[dict]] = {}
    for row in sorted(rows, key=lambda row: row["batch_size"]):
        groups.setdefault(label(row), []).append(row)
    return groups


def main(argv: list[str] | None = None):
    (args,) = make_parser(DeviceTableArguments, description=__doc__).parse_args_into_dataclasses(args=argv)
    folder = Path(args.output_dir)
    left = run([*twins(args), *beside_peers(args)], args)
    if any((folder / name).exists() for name in ("twins.json", "peers.json")):
        write_whole(folder / "table.md", render(folder))
        plot(folder, folder / "table.png")
        print(f"Written: {folder / 'table.md'}, {folder / 'table.png'}, and the rows beside them.")
    if left:
        print(f"Not measured within {args.minutes:g} minutes, {len(left)}: {'; '.join(left)}. Run it again to go on.")


if __name__ == "__main__":
    main()
