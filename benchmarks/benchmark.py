"""
Measure MACs and time of TRIPS against the unpruned baseline, the same weights at keep rate 1.0.

    python benchmarks/benchmark.py                     # base size, 224 and 384 px, three schedules
    python benchmarks/benchmark.py --mode forward training --output_json speed.json
    python benchmarks/benchmark.py --preset tiny --image_size 64 --schedule 3,4 --batch_size 1 32
    python benchmarks/benchmark.py --schedule 5:image:0.7,12:text:0.3 --batch_size 1 --texts_per_image 1 2 5 10
    python benchmarks/benchmark.py --device cuda --dtype bfloat16 --batch_size 1 8 32 128 --compile True

Pruned and unpruned steps alternate after a warm-up, and medians are compared. `FlopCounterMode` counts the
multiply-accumulates (MACs) of matrix products. A step is the forward pass of text encoder, vision tower and fusion
encoder, in `training` mode followed by the backward pass.
"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field

from measuring import OutputArguments, run_benchmark
from tqdm.auto import tqdm

from modeling_trips import SelectionSchedule, TripsConfig
from modeling_trips.configuration_trips import PRESETS
from modeling_trips.inspection.speed import MODES, Setting, measure
from trips_examples.training.options import run_script


@dataclass(kw_only=True)
class BenchmarkArguments(OutputArguments):
    preset: str = field(default="base", metadata={"help": f"Model size: {', '.join(PRESETS)}."})
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
    config_fields: str = field(default="{}", metadata={"help": "Further fields of TripsConfig, as JSON."})
    mode: list[str] = field(
        default_factory=lambda: ["forward"], metadata={"help": "What is measured.", "choices": [*MODES]}
    )
    dtype: list[str] = field(default_factory=lambda: ["float32"], metadata={"help": "float32, bfloat16, float16."})
    attn_implementation: str = field(default="sdpa", metadata={"help": "eager, sdpa or flash_attention_2."})
    compile: bool = field(default=False, metadata={"help": "Measure under torch.compile."})
    device: str = field(default="cpu", metadata={"help": "Device to measure: cpu, cuda or mps."})
    clock: str = field(
        default="wall", metadata={"help": "wall, or process (CPU time of one thread, for a shared machine)."}
    )
    warmup: int = field(default=2, metadata={"help": "Untimed rounds."})
    repeats: int = field(default=9, metadata={"help": "Timed rounds."})
    seed: int = field(default=0, metadata={"help": "Seed of weights and inputs."})


def settings_of(args: BenchmarkArguments) -> list[Setting]:
    schedules = [
        SelectionSchedule.parse(text, rate) for text, rate in itertools.product(args.schedule, args.keep_rate)
    ]
    shared = ("preset", "text_length", "attn_implementation", "device", "compile", "clock")
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
    names = ("selection_layers", "keep_rate", "selection_guidance")
    config = TripsConfig.from_preset(row["preset"], **{name: row[name] for name in names})
    texts = "" if row["texts_per_image"] == 1 else f" x {row['texts_per_image']} texts"
    work = f"{row['mode']} {row['image_size']} px, batch {row['batch_size']}{texts}"
    return f"{work}, {config.vision_config.schedule}"


def print_table(rows: list[dict], args: BenchmarkArguments):
    width = max(len(label(row)) for row in rows)
    print(f"{'setting':<{width}}  MACs ratio  time ratio  pairs/s  tokens per layer")
    for row in rows:
        print(
            f"{label(row):<{width}}  {row['macs_ratio']:10.3f}  {row['time_ratio']:10.3f}  {row['throughput']:7.1f}  "
            f"{' '.join(map(str, row['tokens_per_layer']))}"
        )


def main(argv: list[str] | None = None) -> list[dict]:
    def measure_all(args: BenchmarkArguments) -> Iterator[dict]:
        for setting in tqdm(settings_of(args), desc="settings"):
            yield measure(setting, args.warmup, args.repeats)

    return run_benchmark(BenchmarkArguments, __doc__, measure_all, print_table, argv)


if __name__ == "__main__":
    run_script(main)
