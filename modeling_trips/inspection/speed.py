"""
MAC ratio and measured speedup of a model against its unpruned baseline, the same weights at keep rate 1.0.

Steps of both alternate, so that changes of the machine affect both, and medians are compared.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm
from transformers import AutoModel

from modeling_trips import UNPRUNED, TripsConfig, TripsModel

from .cost import forward_cost


MODES = ("forward", "training")
CLOCKS = {"wall": time.perf_counter, "process": time.process_time}  # the latter: CPU time of all threads


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
            states = model(**inputs).last_hidden_state
        if is_training:
            states.float().square().mean().backward()

    return step


def count_macs(setting: Setting, schedule: str) -> int:
    """Count the MACs of all matrix products and convolutions of one step on the meta device."""
    # The counter needs eager attention.
    model = replace(setting, schedule=schedule, attn_implementation="eager").make_model("meta")
    with FlopCounterMode(display=False) as counter:
        make_step(setting, model, setting.make_inputs(model))()
    return counter.get_total_flops() // 2


def seconds_in_turns(
    steps: Mapping[Any, Callable[[], object]],
    warmup: int,
    repeats: int,
    clock: str = "wall",
    device: str = "cpu",
    prepare: Callable[[], object] | None = None,
) -> dict[Any, list[float]]:
    """
    Time several steps in turns, so that changes of the machine affect all.

    Args:
        steps (`dict`): Functions by name.
        warmup (`int`): Untimed rounds.
        repeats (`int`): Timed rounds.
        clock (`str`, *optional*, defaults to `"wall"`): `"wall"`, or `"process"` for CPU time.
        device (`str`, *optional*, defaults to `"cpu"`): Device that is synchronized after each step.
        prepare (`Callable`, *optional*): Untimed function that is called before each step.

    Returns:
        `dict`: The seconds of each timed round, by the names of `steps`.
    """
    seconds: dict[Any, list[float]] = {name: [] for name in steps}
    for round_number in tqdm(range(-warmup, repeats), desc="rounds", leave=False, disable=None):
        for name, step in steps.items():
            if prepare is not None:
                prepare()
            start = CLOCKS[clock]()
            step()
            if device != "cpu":
                torch.accelerator.synchronize()
            if round_number >= 0:
                seconds[name].append(CLOCKS[clock]() - start)
    return seconds


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
    seconds = seconds_in_turns(
        steps, warmup, repeats, clock=setting.clock, device=setting.device, prepare=model.zero_grad
    )
    latency = {name: statistics.median(values) for name, values in seconds.items()}
    macs = {"pruned": count_macs(setting, setting.schedule), "unpruned": count_macs(setting, "unpruned")}
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
