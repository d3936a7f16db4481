"""
Measure MACs and time of TRIPS against the unpruned baseline, the same weights at keep rate 1.0.

    python benchmarks/benchmark.py                     # base size, 224 and 384 px, three schedules
    python benchmarks/benchmark.py --mode forward training --output_json speed.json
    python benchmarks/benchmark.py --preset tiny --image_size 64 --schedule 3:text:0.7,4:text:0.7 --batch_size 1 32
    python benchmarks/benchmark.py --schedule 5:image:0.7,12:text:0.3 --batch_size 1 --texts_per_image 1 2 5 10
    python benchmarks/benchmark.py --mode training --schedule 6:text:0.0625 --config_fields '{"selection_gate": 0.2}'
    python benchmarks/benchmark.py --device cuda --dtype bfloat16 --batch_size 1 8 32 128 --compile True

Pruned and unpruned steps alternate after a warm-up, and medians are compared. `FlopCounterMode` counts the
multiply-accumulates (MACs) of matrix products. A step is the forward pass of text encoder, vision tower and fusion
encoder, in `training` mode followed by the backward pass.
"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass

from measuring import OutputArguments, run_benchmark
from tqdm.auto import tqdm

from modeling_trips.configuration_trips import PRESETS
from modeling_trips.inspection.speed import MODES, Setting, measure
from trips_examples.data.source import option
from trips_examples.training.options import run_script


@dataclass(kw_only=True)
class BenchmarkArguments(OutputArguments):
    preset: str = option("base", f"Model size: {', '.join(PRESETS)}.")
    image_size: list[int] = option([224, 384], "Pixels per side.")
    batch_size: list[int] = option([8], "Images per step.")
    texts_per_image: list[int] = option([1], "Texts per image.")
    text_length: int = option(40, "Tokens per text.")
    schedule: list[str] = option(
        ["5:text:0.7,10:text:0.7", "2:text:0.7,10:text:0.7", "2:text:0.7,4:text:0.7,8:text:0.7"],
        "Schedules in their text form.",
    )
    config_fields: str = option("{}", "Further fields of TripsConfig, as JSON.")
    mode: list[str] = option(["forward"], "What is measured.", choices=[*MODES])
    dtype: list[str] = option(["float32"], "float32, bfloat16, float16.")
    attn_implementation: str = option("sdpa", "eager, sdpa or flash_attention_2.")
    compile: bool = option(False, "Measure under torch.compile.")
    device: str = option("cpu", "Device to measure: cpu, cuda or mps.")
    clock: str = option("wall", "wall, or process (CPU time of one thread, for a shared machine).")
    warmup: int = option(2, "Untimed rounds.")
    repeats: int = option(9, "Timed rounds.")
    seed: int = option(0, "Seed of weights and inputs.")


def settings_of(args: BenchmarkArguments) -> list[Setting]:
    """Return what is measured: each schedule at each setting."""
    settings = []
    for mode, dtype, image_size, batch_size, texts_per_image, schedule in itertools.product(
        args.mode, args.dtype, args.image_size, args.batch_size, args.texts_per_image, args.schedule
    ):
        setting = Setting(
            preset=args.preset,
            image_size=image_size,
            batch_size=batch_size,
            texts_per_image=texts_per_image,
            text_length=args.text_length,
            mode=mode,
            dtype=dtype,
            attn_implementation=args.attn_implementation,
            device=args.device,
            compile=args.compile,
            clock=args.clock,
            config_fields=json.loads(args.config_fields),
            schedule=schedule,
        )
        settings.append(setting)
    return settings


def label(row: dict) -> str:
    texts = "" if row["texts_per_image"] == 1 else f" x {row['texts_per_image']} texts"
    return f"{row['mode']} {row['image_size']} px, batch {row['batch_size']}{texts}, {row['schedule']}"


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
            has_gate = "selection_gate" in setting.config_fields
            yield {"gate": "yes" if has_gate else "no"} | measure(setting, args.warmup, args.repeats)

    return run_benchmark(
        arguments_class=BenchmarkArguments,
        description=__doc__,
        measure=measure_all,
        report=print_table,
        argv=argv,
    )


if __name__ == "__main__":
    run_script(main)
