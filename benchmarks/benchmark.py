"""
Measure MACs and time of TRIPS against the unpruned baseline, the same weights at keep rate 1.0.

    python benchmarks/benchmark.py                     # base size, 224 and 384 px, three schedules
    python benchmarks/benchmark.py --mode training --config_fields '{"learns_relevance": true}'
    python benchmarks/benchmark.py --preset tiny --image_size 64 --schedule 3:text:0.7,4:text:0.7 --batch_size 1 32
    python benchmarks/benchmark.py --schedule 5:image:0.7,12:text:0.3 --batch_size 1 --texts_per_image 1 2 5 10
    python benchmarks/benchmark.py --device cuda --dtype bfloat16 --batch_size 1 8 32 128 --compile True

Pruned and unpruned steps alternate after a warm-up, and medians are compared. `FlopCounterMode` counts the
multiply-accumulates (MACs) of matrix products. A step is the forward pass of text encoder, vision tower and fusion
encoder, in `training` mode followed by the backward pass; questions train with `{"learns_relevance": true}`.
"""

import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from measuring import OutputArguments, run_benchmark
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm
from transformers import AutoModel

from modeling_trips import UNPRUNED, TripsConfig, TripsModel
from modeling_trips.configuration_trips import PRESETS
from modeling_trips.inspection.cost import forward_cost
from modeling_trips.inspection.speed import CLOCKS, seconds_in_turns
from trips_examples.data.source import option
from trips_examples.training.options import run_script


MODES = ("forward", "training")


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


@dataclass
class Setting:
    """
    Settings of a measurement: model from scratch, inputs, and kind of step. A step is the forward pass of text
    encoder, vision tower and fusion encoder; in mode `"training"` with its backward pass.
    """

    preset: str  # see [`TripsConfig.from_preset`]
    image_size: int  # pixels per side
    batch_size: int  # images
    texts_per_image: int  # which share its cached image states
    text_length: int  # tokens
    schedule: str
    mode: str = "forward"
    dtype: str = "float32"  # of weights and images
    attn_implementation: str = "sdpa"
    device: str = "cpu"
    compile: bool = False
    clock: str = "wall"  # "process": CPU time, for one thread on a shared machine
    config_fields: dict = field(default_factory=dict)  # further fields of [`TripsConfig`]

    def __post_init__(self):
        if self.clock not in CLOCKS or (self.clock == "process" and self.device != "cpu"):
            raise ValueError(
                f"`clock` must be one of {', '.join(CLOCKS)}, and wall on {self.device}, got {self.clock}."
            )

    def make_model(self, device: str) -> TripsModel:
        """Make a model with random weights on a device, in training mode unless `mode` is forward."""
        config = TripsConfig.from_preset(
            self.preset,
            vision_config={"image_size": self.image_size},
            schedule=self.schedule,
            **self.config_fields,
        )
        dtype = getattr(torch, self.dtype)
        with torch.device(device):
            model = AutoModel.from_config(config, attn_implementation=self.attn_implementation)
        return model.to(dtype).train(self.mode != "forward")

    def make_inputs(self, model: TripsModel) -> dict[str, torch.Tensor]:
        """Make random texts and images on the model's device. Texts of an image share its cached states."""
        num_texts = self.batch_size * self.texts_per_image
        vocab_size = model.config.text_config.vocab_size
        image_shape = (self.batch_size, 3, self.image_size, self.image_size)
        inputs = {
            "input_ids": torch.randint(vocab_size, (num_texts, self.text_length), device=model.device),
            "pixel_values": torch.randn(image_shape, device=model.device, dtype=model.dtype),
        }
        if self.texts_per_image > 1:
            images = torch.arange(self.batch_size, device=model.device)
            inputs["image_index"] = images.repeat_interleave(self.texts_per_image)  # (num_texts,)
        return inputs


def make_step(setting: Setting, model: Callable, inputs: dict[str, Any]) -> Callable[[], None]:
    """Return the measured step as a function without arguments."""
    is_training = setting.mode == "training"

    def step():
        with torch.set_grad_enabled(is_training):
            outputs = model(**inputs)
        if is_training:
            loss = outputs.last_hidden_state.float().square().mean()
            if outputs.relevance_losses is not None:
                loss = loss + outputs.relevance_losses.mean()
            loss.backward()

    return step


def count_macs(setting: Setting, schedule: str) -> int:
    """Count the MACs of all matrix products and convolutions of one step on the meta device."""
    # The counter needs eager attention.
    model = replace(setting, schedule=schedule, attn_implementation="eager").make_model("meta")
    with FlopCounterMode(display=False) as counter:
        make_step(setting, model, setting.make_inputs(model))()
    return counter.get_total_flops() // 2


def measure(setting: Setting, warmup: int, repeats: int) -> dict:
    """
    Measure a model and its unpruned baseline.

    Args:
        setting ([`Setting`]): Settings of the measurement.
        warmup (`int`): Untimed steps of each.
        repeats (`int`): Timed steps of each.

    Returns:
        `dict`: A row of results for JSON: the fields of the setting, `macs` of a step, `latency` and
        `unpruned_latency` (median seconds), `throughput` (texts per second), `macs_ratio` and `time_ratio` (pruned /
        unpruned), `tokens_per_layer`.
    """
    model = setting.make_model(setting.device)
    callable_model = torch.compile(model) if setting.compile else model
    inputs = setting.make_inputs(model)
    steps = {
        "pruned": make_step(setting, callable_model, inputs),
        "unpruned": make_step(setting, callable_model, {**inputs, "schedule": UNPRUNED}),
    }
    schedules = {"pruned": setting.schedule, "unpruned": "unpruned"}
    seconds = seconds_in_turns(
        steps, warmup, repeats, clock=setting.clock, device=setting.device, prepare=model.zero_grad
    )
    latency = {name: statistics.median(values) for name, values in seconds.items()}
    macs = {name: count_macs(setting, schedule) for name, schedule in schedules.items()}
    return {
        **asdict(setting),
        "macs": macs["pruned"],
        "macs_ratio": macs["pruned"] / macs["unpruned"],
        "time_ratio": latency["pruned"] / latency["unpruned"],
        "latency": latency["pruned"],
        "unpruned_latency": latency["unpruned"],
        "throughput": setting.batch_size * setting.texts_per_image / latency["pruned"],
        "tokens_per_layer": list(forward_cost(model.config, setting.text_length).tokens),
    }


def settings_of(args: BenchmarkArguments) -> list[Setting]:
    """Return what is measured: each schedule at each setting."""
    shared = {each.name: getattr(args, each.name) for each in fields(Setting)}
    shared["config_fields"] = json.loads(args.config_fields)
    names = ("mode", "dtype", "image_size", "batch_size", "texts_per_image", "schedule")
    settings = []
    for values in itertools.product(*(shared[name] for name in names)):
        own = dict(zip(names, values))
        settings.append(Setting(**shared | own))
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
            yield measure(setting, args.warmup, args.repeats)

    return run_benchmark(
        arguments_class=BenchmarkArguments,
        description=__doc__,
        measure=measure_all,
        report=print_table,
        argv=argv,
    )


if __name__ == "__main__":
    run_script(main)
