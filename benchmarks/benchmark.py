r"""
Measure MACs and time of TRIPS against the unpruned baseline, the same weights at keep rate 1.0.

    python benchmarks/benchmark.py                     # base size, 224 and 384 px, three schedules
    python benchmarks/benchmark.py --mode forward training --plot speed.png --output_json speed.json
    python benchmarks/benchmark.py --preset tiny --image_size 64 --schedule 3,4 --batch_size 1 32
    python benchmarks/benchmark.py --schedule 5:image:0.7,12:text:0.3 --batch_size 1 --texts_per_image 1 2 5 10
    python benchmarks/benchmark.py --mode pretraining --image_size 256 --schedule 5,10 --batch_size 4
    python benchmarks/benchmark.py --device cuda --dtype bfloat16 --batch_size 1 8 32 128 --compile True \
        --compile_mode reduce-overhead --repeats 100 --limit 6          # with CUDA graphs

Pruned and unpruned steps alternate after a warm-up, and medians are compared. `FlopCounterMode` counts the
multiply-accumulates (MACs) of matrix products. A step is the forward pass of text encoder, vision tower and fusion
encoder, in `training` mode followed by the backward pass. In `pretraining` mode a step is the forward pass of all four
objectives and the backward pass, without the optimizer and a momentum teacher.
"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field

from measuring import TimingArguments, check_choices, run_benchmark
from tqdm.auto import tqdm

from modeling_trips import SelectionSchedule, TripsConfig
from modeling_trips.inspection.speed import MODES, Setting, measure


@dataclass(kw_only=True)
class BenchmarkArguments(TimingArguments):
    preset: str = field(default="base", metadata={"help": f"Model size: {', '.join(TripsConfig.presets())}."})
    image_size: list[int] = field(default_factory=lambda: [224, 384], metadata={"help": "Pixels per side."})
    batch_size: list[int] = field(default_factory=lambda: [8], metadata={"help": "Images per step."})
    texts_per_image: list[int] = field(default_factory=lambda: [1], metadata={"help": "Texts per image."})
    text_length: int = field(default=40, metadata={"help": "Tokens per text."})
    schedule: list[str] = field(
        default_factory=lambda: ["5,10", "2,10", "2,4,8"],
        metadata={"help": "Selection layers (5,10) or layer:guidance:keep_rate (5:image:0.7,12:text:0.3)."},
    )
    keep_rate: list[float] = field(
        default_factory=lambda: [0.7], metadata={"help": "Keep rates of layers without one."}
    )
    compare_repeating: bool = field(
        default=True, metadata={"help": "Also measure repeated images if texts share an image."}
    )
    config_fields: str = field(default="{}", metadata={"help": "Further fields of TripsConfig, as JSON."})
    mode: list[str] = field(default_factory=lambda: ["forward"], metadata={"help": f"Of {', '.join(MODES)}."})
    dtype: list[str] = field(default_factory=lambda: ["float32"], metadata={"help": "float32, bfloat16, float16."})
    attn_implementation: str = field(default="sdpa", metadata={"help": "eager, sdpa or flash_attention_2."})
    compile: bool = field(default=False, metadata={"help": "Measure under torch.compile."})
    compile_mode: str | None = field(default=None, metadata={"help": "Mode of torch.compile."})
    plot: str | None = field(default=None, metadata={"help": "Output figure of the ratios."})

    def __post_init__(self):
        super().__post_init__()
        check_choices("--mode", self.mode, MODES)


def settings_of(args: BenchmarkArguments) -> list[Setting]:
    schedules = [
        SelectionSchedule.parse(text, rate) for text, rate in itertools.product(args.schedule, args.keep_rate)
    ]
    shared = ("preset", "text_length", "attn_implementation", "device", "compile", "compile_mode", "clock")
    varied = ("mode", "dtype", "image_size", "batch_size", "texts_per_image")
    # Schedules with own rates appear once.
    grid = itertools.product(*(getattr(args, name) for name in varied), dict.fromkeys(schedules))
    return [
        Setting(
            **{name: getattr(args, name) for name in shared},
            **dict(zip(varied, values)),
            config_fields=json.loads(args.config_fields),
            **schedule.config_fields,
        )
        for *values, schedule in grid
    ]


def label(row: dict) -> str:
    texts = "" if row["texts_per_image"] == 1 else f" x {row['texts_per_image']} texts"
    return f"{work_of(row)}{texts}, {schedule_of(row)}"


def work_of(row: dict) -> str:
    return f"{row['mode']} {row['image_size']} px, batch {row['batch_size']}"


def schedule_of(row: dict) -> SelectionSchedule:
    names = ("selection_layers", "keep_rate", "selection_guidance")
    return TripsConfig.from_preset(row["preset"], **{name: row[name] for name in names}).vision_config.schedule


def print_table(rows: list[dict]):
    width = max(len(label(row)) for row in rows)
    print(f"{'setting':<{width}}  MACs ratio  time ratio  pairs/s  peak MiB (unpruned)  tokens per layer")
    for row in rows:
        memory = ""
        if row["peak_memory_bytes"] is not None:
            memory = f"{row['peak_memory_bytes'] / 2**20:.0f} ({row['unpruned_peak_memory_bytes'] / 2**20:.0f})"
        print(
            f"{label(row):<{width}}  {row['macs_ratio']:10.3f}  {row['time_ratio']:10.3f}  {row['throughput']:7.1f}  "
            f"{memory:>19}  {' '.join(map(str, row['tokens_per_layer']))}"
        )
    print_verdict(rows)


def print_verdict(rows: list[dict]):
    """Name the settings where the measured speedup falls short of the MAC ratio."""
    for row in rows:
        if "speedup_over_repeating_images" in row:
            speedup = row["speedup_over_repeating_images"]
            print(f"{label(row)}: sharing each image is {speedup:.2f} times as fast as repeating it.")
        if row["time_ratio"] >= 1.0:
            print(f"{label(row)}: pruning takes {row['time_ratio']:.2f} times the unpruned time.")
        elif row["time_ratio"] > 1.05 * row["macs_ratio"]:
            excess = row["time_ratio"] / row["macs_ratio"]
            print(f"{label(row)}: the time ratio is {excess:.2f} times the MAC ratio.")


def new_axes(width: float, height: float):
    from matplotlib.figure import Figure  # an extra

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def plot_rows(rows: list[dict], path: str):
    """Plot MAC and time ratios as bars, or as lines if texts share images."""
    if len({row["texts_per_image"] for row in rows}) > 1:
        plot_sharing(rows, path)
        return
    figure, axes = new_axes(9, 1.2 + 0.45 * len(rows))
    for offset, name, title in ((0.2, "macs_ratio", "counted MACs"), (-0.2, "time_ratio", "measured time")):
        places = [len(rows) - i + offset for i in range(len(rows))]
        bars = axes.barh(places, [row[name] for row in rows], height=0.38, label=title)
        axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks([len(rows) - i for i in range(len(rows))], [label(row) for row in rows])
    axes.set_xlim(0, 1.15 * max(1.0, *(row["time_ratio"] for row in rows)))
    axes.set_xlabel("pruned / unpruned (lower is better)")
    axes.set_title(f"TRIPS {rows[0]['preset']}, {rows[0]['device']}, {rows[0]['dtype']}")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    figure.savefig(path, dpi=120)


def plot_sharing(rows: list[dict], path: str):
    """Plot ratios against the number of texts per image: MAC ratios as lines, time ratios as points."""
    works, curves = sorted({work_of(row) for row in rows}), {}
    for row in sorted(rows, key=lambda row: row["texts_per_image"]):
        name = str(schedule_of(row)) if len(works) == 1 else f"{work_of(row)}, {schedule_of(row)}"
        curves.setdefault(name, []).append(row)
    figure, axes = new_axes(9, 6)
    for number, (name, curve) in enumerate(curves.items()):
        numbers, color = [row["texts_per_image"] for row in curve], f"C{number % 10}"
        axes.plot(numbers, [row["macs_ratio"] for row in curve], color=color, label=name)
        axes.plot(numbers, [row["time_ratio"] for row in curve], "o", color=color)
    axes.axhline(1.0, color="black", linewidth=1)
    axes.set(yscale="log", xlabel="texts per image", ylabel="pruned / unpruned (lower is better)")
    axes.set_xticks(sorted({row["texts_per_image"] for row in rows}))
    ticks = [0.2, 0.3, 0.4, 0.6, 0.8, 1, 1.5, 2, 3]
    axes.set_yticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    model = f"TRIPS {rows[0]['preset']}, {rows[0]['device']}, {rows[0]['dtype']}"
    axes.set_title("; ".join([model, *(works if len(works) == 1 else []), "lines: MAC ratio, points: time ratio"]))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, fontsize="small")
    figure.savefig(path, dpi=120)


def measure_all(args: BenchmarkArguments) -> Iterator[dict]:
    for setting in tqdm(settings_of(args), desc="settings"):
        yield measure(setting, args.warmup, args.repeats, args.compare_repeating, args.limit)


def report(rows: list[dict], args: BenchmarkArguments):
    print_table(rows)
    if args.plot is not None:
        plot_rows(rows, args.plot)


def main(argv: list[str] | None = None) -> list[dict]:
    return run_benchmark(BenchmarkArguments, __doc__, measure_all, report, argv)


if __name__ == "__main__":
    main()
