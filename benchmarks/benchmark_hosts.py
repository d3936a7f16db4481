"""
Measure MACs and time of models of Transformers and timm with and without patch selection.

    python benchmarks/benchmark_hosts.py                                  # all models, base size, 384 px
    python benchmarks/benchmark_hosts.py --hosts vilt blip_vqa --keep_rate 0.5 --output_json hosts.json

Weights are random. Passes with and without selection alternate in one run, after a warm-up, and medians are compared.
Multiply-accumulates (MACs) of matrix products are counted by PyTorch's `FlopCounterMode`, in the same model. A pass is
the whole model's: text, vision tower, fusion and head.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from measuring import TimingArguments, check_choices, make_transformers_model, run_benchmark
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from modeling_trips.hosts import apply_patch_selection, record_patch_selection, remove_patch_selection


@dataclass
class Case:
    """Model of another library with its selection and its inputs besides pixels."""

    make_model: Callable[[int], nn.Module]  # from the image size
    guidance: str = "image"
    selection_layers: tuple[int, ...] = (5, 10)
    num_class_tokens: int = 1
    takes_text: bool = True
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)  # further inputs for one image


def make_timm_model(image_size: int) -> nn.Module:
    import timm

    return timm.create_model("vit_base_patch16_224", img_size=image_size)


FIRST_TOKEN = {"decoder_input_ids": torch.tensor([[30522]])}  # predicts the first token of the answer

CASES = {
    "vilt": Case(partial(make_transformers_model, "ViltForQuestionAnswering", patch_size=32), "text"),
    "blip_vqa": Case(partial(make_transformers_model, "BlipForQuestionAnswering"), "text", inputs=FIRST_TOKEN),
    "blip_vqa_image": Case(partial(make_transformers_model, "BlipForQuestionAnswering"), inputs=FIRST_TOKEN),
    "blip_retrieval": Case(partial(make_transformers_model, "BlipForImageTextRetrieval"), "text"),
    "blip_captioning": Case(partial(make_transformers_model, "BlipForConditionalGeneration")),
    "bridgetower": Case(partial(make_transformers_model, "BridgeTowerModel"), selection_layers=(5, 7)),
    "clip": Case(partial(make_transformers_model, "CLIPModel")),
    "siglip": Case(partial(make_transformers_model, "SiglipModel"), num_class_tokens=0),
    "timm_vit": Case(make_timm_model, takes_text=False),
}


@dataclass(kw_only=True)
class HostBenchmarkArguments(TimingArguments):
    hosts: list[str] = field(
        default_factory=lambda: list(CASES),
        metadata={"help": "Models to measure. Default: all."},
    )
    image_size: int = field(default=384, metadata={"help": "Pixels per side."})
    batch_size: int = field(default=2, metadata={"help": "Images per pass, each with a text."})
    text_length: int = field(default=40, metadata={"help": "Tokens per text."})
    keep_rate: float = field(default=0.7, metadata={"help": "Keep rate of both selection layers."})

    def __post_init__(self):
        super().__post_init__()
        check_choices("--hosts", self.hosts, CASES)


def make_inputs(case: Case, args: HostBenchmarkArguments) -> dict[str, torch.Tensor]:
    pixels = torch.randn(args.batch_size, 3, args.image_size, args.image_size)
    if not case.takes_text:
        return {"x": pixels.to(args.device)}
    inputs = {
        "pixel_values": pixels,
        "input_ids": torch.randint(1000, 30000, (args.batch_size, args.text_length)),
        **{name: tensor.expand(args.batch_size, -1) for name, tensor in case.inputs.items()},
    }
    return {name: tensor.to(args.device) for name, tensor in inputs.items()}


@torch.no_grad()
def count_macs(model: nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    # The counter does not support fused attention on CPUs.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs)
    return counter.get_total_flops() // 2


@torch.no_grad()
def count_tokens(model: nn.Module, inputs: dict[str, torch.Tensor], num_class_tokens: int) -> tuple[int, int]:
    """Count the image tokens before the first selection layer and after the last one."""
    with record_patch_selection(model) as selections:
        model(**inputs)
    before = selections[0].candidate_indices.shape[1] + num_class_tokens
    after = selections[-1].kept_indices.shape[1] + 1 + num_class_tokens
    return before, after


def measure(name: str, args: HostBenchmarkArguments) -> dict:
    """Return a row of results."""
    case = CASES[name]
    model = case.make_model(args.image_size).eval().to(args.device)
    inputs = make_inputs(case, args)

    def prepare(variant: str):
        remove_patch_selection(model)
        if variant == "pruned":
            entries = (f"{layer}:{case.guidance}:{args.keep_rate}" for layer in case.selection_layers)
            apply_patch_selection(model, ",".join(entries))

    @torch.no_grad()
    def forward():
        model(**inputs)

    prepare("pruned")
    tokens = count_tokens(model, inputs, case.num_class_tokens)
    macs = count_macs(model, inputs)
    prepare("unpruned")
    unpruned_macs = count_macs(model, inputs)
    times = args.time_in_turns({"unpruned": forward, "pruned": forward}, "unpruned", prepare)
    pruned, unpruned = times["pruned"], times["unpruned"]
    return {
        "host": type(model).__name__,
        "guidance": case.guidance,
        "selection_layers": list(case.selection_layers),
        "keep_rate": args.keep_rate,
        "image_size": args.image_size,
        "batch_size": args.batch_size,
        "text_length": args.text_length if case.takes_text else None,
        "device": args.device,
        "clock": args.clock,
        "repeats": args.repeats,
        "unpruned_image_tokens": tokens[0],
        "image_tokens": tokens[1],
        "unpruned_macs": unpruned_macs,
        "macs": macs,
        "macs_ratio": macs / unpruned_macs,
        "unpruned_latency": unpruned["latency"],
        "latency": pruned["latency"],
        "time_ratio": pruned["latency"] / unpruned["latency"],
        "time_ratio_quartiles": pruned["time_ratio_quartiles"],
    }


def print_table(rows: list[dict], args: HostBenchmarkArguments):
    """Print the rows in Markdown."""
    print("| host (guidance) | layers | image tokens | GMACs per pair | ratio | ms per pair | ratio (middle half) |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        scale = 1e9 * row["batch_size"]
        milliseconds = [1000 * row[name] / row["batch_size"] for name in ("unpruned_latency", "latency")]
        low, high = row["time_ratio_quartiles"]
        print(
            f"| `{row['host']}` ({row['guidance']}) | {', '.join(map(str, row['selection_layers']))} "
            f"| {row['unpruned_image_tokens']} -> {row['image_tokens']} "
            f"| {row['unpruned_macs'] / scale:.1f} -> {row['macs'] / scale:.1f} | {row['macs_ratio']:.3f} "
            f"| {milliseconds[0]:.0f} -> {milliseconds[1]:.0f} | {row['time_ratio']:.3f} ({low:.3f}..{high:.3f}) |"
        )
    for row in rows:
        if row["time_ratio"] > 1.05 * row["macs_ratio"]:
            excess = row["time_ratio"] / row["macs_ratio"]
            print(f"{row['host']} ({row['guidance']}): the time ratio is {excess:.2f} times the MAC ratio.")


def measure_all(args: HostBenchmarkArguments) -> Iterator[dict]:
    for name in tqdm(args.hosts, desc="hosts"):
        yield measure(name, args)


def main(argv: list[str] | None = None) -> list[dict]:
    return run_benchmark(HostBenchmarkArguments, __doc__, measure_all, print_table, argv)


if __name__ == "__main__":
    main()
