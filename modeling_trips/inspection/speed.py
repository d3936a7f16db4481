"""
MAC ratio and measured speedup of a model against its unpruned baseline, the same weights at keep rate 1.0.

Steps of both alternate, so that changes of the machine affect both, and medians are compared.
"""

import os
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm
from transformers import AutoModel, AutoModelForPreTraining

from modeling_trips import UNPRUNED, TripsConfig, TripsForPreTraining, TripsModel

from .cost import forward_cost


MODES = ("forward", "training", "pretraining")
MIN_REPEATS = 5  # minimum under a time limit


@dataclass
class Setting:
    """
    Settings of a measurement: model from scratch, inputs, and kind of step.

    Args:
        preset (`str`): Size of the model, see [`TripsConfig.presets`].
        image_size (`int`): Pixels per side.
        batch_size (`int`): Images per step.
        texts_per_image (`int`): Texts per image, which share its cached image states.
        text_length (`int`): Tokens per text.
        selection_layers (`list[int]`): Selection layers, numbered from 1.
        keep_rate (`float` or `list[float]`): Share of the tokens kept: one value, or one per layer.
        selection_guidance (`str` or `list[str]`, *optional*, defaults to `"text"`): One value, or one per layer.
        mode (`str`, *optional*, defaults to `"forward"`): One of `MODES`: the forward pass of text encoder, vision
            tower and fusion encoder; the same with its backward pass; or forward and backward pass of all pre-training
            objectives with a momentum teacher, without the optimizer and the teacher's update.
        dtype (`str`, *optional*, defaults to `"float32"`): Dtype of weights and images.
        attn_implementation (`str`, *optional*, defaults to `"sdpa"`): Attention implementation.
        device (`str`, *optional*, defaults to `"cpu"`): Device.
        num_threads (`int`, *optional*): Number of PyTorch's threads, only recorded.
        compile (`bool`, *optional*, defaults to `False`): Compile the model.
        compile_mode (`str`, *optional*): `mode` of `torch.compile`: `"reduce-overhead"` records CUDA graphs.
        clock (`str`, *optional*, defaults to `"wall"`): One of `CLOCKS`. `"process"` is CPU time, for one thread on a
            shared machine.
        config_fields (`dict`, *optional*): Further fields of [`TripsConfig`].
    """

    preset: str
    image_size: int
    batch_size: int
    texts_per_image: int
    text_length: int
    selection_layers: list[int]
    keep_rate: float | list[float]
    selection_guidance: str | list[str] = "text"
    mode: str = "forward"
    dtype: str = "float32"
    attn_implementation: str = "sdpa"
    device: str = "cpu"
    num_threads: int = field(default_factory=torch.get_num_threads)
    compile: bool = False
    compile_mode: str | None = None
    clock: str = "wall"
    config_fields: dict = field(default_factory=dict)

    def __post_init__(self):
        check_clock("`clock`", self.clock, self.device)

    def make_model(self, device: str, attn_implementation: str | None = None) -> TripsModel | TripsForPreTraining:
        """Make a model with random weights on a device, in training mode unless `mode` is forward."""
        config = TripsConfig.from_preset(
            self.preset,
            vision_config={"image_size": self.image_size},
            selection_layers=self.selection_layers,
            keep_rate=self.keep_rate,
            selection_guidance=self.selection_guidance,
            **self.config_fields,
        )
        auto_class = AutoModelForPreTraining if self.mode == "pretraining" else AutoModel
        with torch.device(device):
            model = auto_class.from_config(config, attn_implementation=attn_implementation or self.attn_implementation)
        return model.to(getattr(torch, self.dtype)).train(self.mode != "forward")

    def make_inputs(self, model: TripsModel, share_images: bool = True) -> dict[str, torch.Tensor]:
        """
        Make random texts and images on the model's device.

        Args:
            model (`TripsModel` or `TripsForPreTraining`): Model from `make_model`.
            share_images (`bool`, *optional*, defaults to `True`): Share the cached states of an image among its texts
                instead of repeating the image.
        """
        num_texts = self.batch_size * self.texts_per_image
        config, device = model.config, model.device
        images = torch.zeros if device.type == "meta" else torch.randn
        pixel_values = images(self.batch_size, 3, self.image_size, self.image_size, device=device, dtype=model.dtype)
        image_index = torch.arange(self.batch_size, device=device).repeat_interleave(self.texts_per_image)
        shape = (num_texts, self.text_length)
        input_ids = torch.randint(config.text_config.vocab_size, shape, device=device)
        inputs = {"input_ids": input_ids, "pixel_values": pixel_values[image_index]}
        if self.texts_per_image > 1 and share_images:
            inputs = {"input_ids": input_ids, "pixel_values": pixel_values, "image_index": image_index}
        return inputs | self.pretraining_inputs(input_ids) if self.mode == "pretraining" else inputs

    def pretraining_inputs(self, input_ids: torch.Tensor) -> dict:
        """Make inputs with all words masked and captions cut in the middle, for a step without a momentum teacher."""
        prompts, labels = input_ids.chunk(2, dim=1)
        texts = {"mlm_input_ids": input_ids, "mlm_labels": input_ids, "prompt_input_ids": prompts, "labels": labels}
        return {**texts, "image_ids": torch.arange(self.batch_size, device=input_ids.device)}


def make_step(setting: Setting, model: Callable, inputs: dict[str, Any]) -> Callable[[], None]:
    """Return the measured step as a function without arguments."""

    def forward():
        with torch.no_grad():
            model(**inputs)

    def forward_backward():
        model(**inputs).last_hidden_state.float().square().mean().backward()

    def pretraining():
        model(**inputs).loss.backward()

    return {"forward": forward, "training": forward_backward, "pretraining": pretraining}[setting.mode]


def count_macs(setting: Setting, keep_rate: float | list[float]) -> int:
    """Count the MACs of all matrix products and convolutions of one step on the meta device."""
    # The counter needs eager attention.
    model = replace(setting, keep_rate=keep_rate).make_model("meta", attn_implementation="eager")
    inputs = setting.make_inputs(model)
    with FlopCounterMode(display=False) as counter:
        make_step(setting, model, inputs)()
    return counter.get_total_flops() // 2


def timed(step: Callable[[], object], device: str) -> float:
    """Return the seconds of one step, including synchronization of the device."""
    start = time.perf_counter()
    step()
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def processor_time(step: Callable[[], object], device: str) -> float:
    """Return the CPU seconds of all threads of this process for one step."""
    start = time.process_time()
    step()
    return time.process_time() - start


CLOCKS = {"wall": timed, "process": processor_time}


def check_clock(name: str, clock: str, device: str):
    """Raise a `ValueError` with the option's `name` if the clock is unknown or not supported on the device."""
    if clock not in CLOCKS or (clock == "process" and device != "cpu"):
        raise ValueError(f"{name} must be one of {', '.join(CLOCKS)}, and wall on {device}, got {clock}.")


def seconds_in_turns(
    steps: Mapping[Any, Callable[[], object]],
    warmup: int,
    repeats: int,
    clock: str = "wall",
    device: str = "cpu",
    prepare: Callable[[Any], object] | None = None,
    limit: float | None = None,
) -> dict[Any, list[float]]:
    """
    Time several steps in turns, so that changes of the machine affect all.

    Args:
        steps (`dict`): Functions by name.
        warmup (`int`): Untimed rounds.
        repeats (`int`): Timed rounds.
        clock (`str`, *optional*, defaults to `"wall"`): One of `CLOCKS`.
        device (`str`, *optional*, defaults to `"cpu"`): Device that is synchronized after each step.
        prepare (`Callable`, *optional*): Untimed function that is called with the name of a step before it.
        limit (`float`, *optional*): Seconds after which timing stops, after at least `MIN_REPEATS` rounds.

    Returns:
        `dict[Any, list[float]]`: The seconds of each timed round, by the names of `steps`.
    """
    seconds: dict[Any, list[float]] = {name: [] for name in steps}
    start = time.perf_counter()
    for round_number in tqdm(range(-warmup, repeats), desc="rounds", leave=False, disable=None):
        if round_number == 0:
            start = time.perf_counter()
        if limit is not None and round_number >= MIN_REPEATS and time.perf_counter() - start > limit:
            break
        for name, step in steps.items():
            if prepare is not None:
                prepare(name)
            elapsed = CLOCKS[clock](step, device)
            if round_number >= 0:
                seconds[name].append(elapsed)
    return seconds


def percentile_99(seconds: list[float]) -> float | None:
    """Return the 99th percentile, or None for fewer than 100 steps."""
    return None if len(seconds) < 100 else statistics.quantiles(seconds, n=100, method="inclusive")[-1]


def peak_memory(step: Callable[[], object], device: str) -> int | None:
    """
    Return the peak bytes during one step: memory allocated by PyTorch on CUDA, resident memory of the process on
    Linux's CPU, None elsewhere.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    clear_refs = Path("/proc/self/clear_refs")
    if device != "cpu" or not os.access(clear_refs, os.W_OK):
        return None
    clear_refs.write_text("5")  # resets the peak to the current size
    step()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def measure(
    setting: Setting, warmup: int, repeats: int, compare_repeating: bool = True, limit: float | None = None
) -> dict:
    """
    Measure a model, its unpruned baseline, and, if texts share images, the model with repeated images.

    Args:
        setting ([`Setting`]): Settings of the measurement.
        warmup (`int`): Untimed steps of each.
        repeats (`int`): Timed steps of each.
        compare_repeating (`bool`, *optional*, defaults to `True`): Measure the model with repeated images.
        limit (`float`, *optional*): Seconds of all rounds, see [`seconds_in_turns`].

    Returns:
        `dict`: A row of results for JSON: the fields of the setting, `macs` of a step, `latency` (median seconds),
        `latency_p99` (None for fewer than 100 steps), `throughput` (texts per second), `peak_memory_bytes` (None if
        unknown), `macs_ratio` and `time_ratio` (pruned / unpruned), `tokens_per_layer`; of the unpruned baseline
        `unpruned_latency`, `unpruned_latency_p99` and `unpruned_peak_memory_bytes`; with `compare_repeating`
        `speedup_over_repeating_images`.
    """
    model = setting.make_model(setting.device)
    callable_model = torch.compile(model, mode=setting.compile_mode) if setting.compile else model
    inputs = setting.make_inputs(model)
    variants = {"pruned": inputs, "unpruned": {**inputs, "schedule": UNPRUNED}}
    if setting.texts_per_image > 1 and compare_repeating:
        variants["repeated"] = setting.make_inputs(model, share_images=False)
    steps = {name: make_step(setting, callable_model, own) for name, own in variants.items()}

    def prepare(name: str):
        model.zero_grad(set_to_none=True)

    seconds = seconds_in_turns(steps, warmup, repeats, setting.clock, setting.device, prepare, limit)
    latency = {name: statistics.median(values) for name, values in seconds.items()}

    memory = {}
    for name, step in steps.items():
        prepare(name)
        memory[name] = peak_memory(step, setting.device)
    macs = {"pruned": count_macs(setting, setting.keep_rate), "unpruned": count_macs(setting, 1.0)}
    num_texts = setting.batch_size * setting.texts_per_image
    row = {
        **asdict(setting),
        "macs": macs["pruned"],
        "macs_ratio": macs["pruned"] / macs["unpruned"],
        "time_ratio": latency["pruned"] / latency["unpruned"],
        "latency": latency["pruned"],
        "unpruned_latency": latency["unpruned"],
        "latency_p99": percentile_99(seconds["pruned"]),
        "unpruned_latency_p99": percentile_99(seconds["unpruned"]),
        "throughput": num_texts / latency["pruned"],
        "peak_memory_bytes": memory["pruned"],
        "unpruned_peak_memory_bytes": memory["unpruned"],
        "tokens_per_layer": list(forward_cost(model.config, setting.text_length).tokens),
    }
    if "repeated" in latency:
        row["speedup_over_repeating_images"] = latency["repeated"] / latency["pruned"]
    return row
