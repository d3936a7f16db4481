"""
Measure what patch selection saves inside models of Transformers and timm: each host with it and without it.

    python benchmarks/benchmark_hosts.py                                  # all hosts, base size, 384 px
    python benchmarks/benchmark_hosts.py --hosts vilt blip_vqa --keep_rate 0.5 --output_json hosts.json

Weights are random. Passes with and without selection alternate in one run, after a warm-up, and medians are compared.
Multiply-accumulates (MACs) of matrix products are counted by PyTorch's `FlopCounterMode`, in the same model. A pass is
the whole model's: text, vision tower, fusion and head.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import transformers
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from modeling_trips.hosts import apply_patch_selection, record_patch_selection, remove_patch_selection
from modeling_trips.inspection.speed import CLOCKS, check_clock, provenance
from trips_examples.training.files import write_json
from trips_examples.training.parser import make_parser


@dataclass
class Case:
    """One row: a host, how its patches are selected, and what it takes besides pixels."""

    make_model: Callable[[int], nn.Module]  # of the image size
    guidance: str = "image"
    selection_layers: tuple[int, ...] = (5, 10)
    num_class_tokens: int = 1
    takes_text: bool = True
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)  # further ones, for one image


def make_transformers_model(name: str, **sizes) -> Callable[[int], nn.Module]:
    """A model of Transformers, by its class's name, as its configuration makes it but for the sizes."""

    def make_model(image_size: int) -> nn.Module:
        model_class = getattr(transformers, name)
        config_class = model_class.config_class
        if name.startswith("Vilt"):
            return model_class(config_class(image_size=image_size, **sizes))
        return model_class(config_class(vision_config={"image_size": image_size, **sizes}))

    return make_model


def make_timm_model(image_size: int) -> nn.Module:
    import timm

    return timm.create_model("vit_base_patch16_224", img_size=image_size)


FIRST_TOKEN = {"decoder_input_ids": torch.tensor([[30522]])}  # the answer's first token is predicted

CASES = {
    "vilt": Case(make_transformers_model("ViltForQuestionAnswering"), "text"),
    "blip_vqa": Case(make_transformers_model("BlipForQuestionAnswering"), "text", inputs=FIRST_TOKEN),
    "blip_vqa_image": Case(make_transformers_model("BlipForQuestionAnswering"), inputs=FIRST_TOKEN),
    "blip_retrieval": Case(make_transformers_model("BlipForImageTextRetrieval"), "text"),
    "blip_captioning": Case(make_transformers_model("BlipForConditionalGeneration")),
    "bridgetower": Case(make_transformers_model("BridgeTowerModel"), selection_layers=(5, 7)),
    "clip": Case(make_transformers_model("CLIPModel", patch_size=16)),
    "siglip": Case(make_transformers_model("SiglipModel"), num_class_tokens=0),
    "timm_vit": Case(make_timm_model, takes_text=False),
}


@dataclass
class HostBenchmarkArguments:
    hosts: list[str] = field(default_factory=lambda: list(CASES), metadata={"help": f"Of {', '.join(CASES)}."})
    image_size: int = field(default=384, metadata={"help": "Pixels per side."})
    batch_size: int = field(default=2, metadata={"help": "Images per pass, each with a text."})
    text_length: int = field(default=40, metadata={"help": "Tokens per text."})
    keep_rate: float = field(default=0.7, metadata={"help": "Keep rate of both selection layers."})
    device: str = field(default="cpu", metadata={"help": "cpu, cuda, mps."})
    num_threads: int | None = field(default=None, metadata={"help": "CPU threads. Default: PyTorch's choice."})
    clock: str = field(
        default="wall",
        metadata={
            "help": "wall; or process: the processor's time, which other programs do not lengthen. The latter is for "
            "one thread of a busy machine."
        },
    )
    warmup: int = field(default=1, metadata={"help": "Passes of each variant before any is timed."})
    repeats: int = field(default=9, metadata={"help": "Timed passes of each variant."})
    output_json: str | None = field(default=None, metadata={"help": "Write one row per host to this file."})


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
    # The counter has no formula for the fused attention of a CPU; it sees the products of the plain one.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs)
    return counter.get_total_flops() // 2


@torch.no_grad()
def count_tokens(model: nn.Module, inputs: dict[str, torch.Tensor], num_class_tokens: int) -> tuple[int, int]:
    """Image tokens before the first selection layer and after the last one."""
    with record_patch_selection(model) as selections:
        model(**inputs)
    before = selections[0].candidate_indices.shape[1] + num_class_tokens
    after = selections[-1].kept_indices.shape[1] + 1 + num_class_tokens
    return before, after


def measure(name: str, args: HostBenchmarkArguments) -> dict:
    """One row of results: the setting, its counts and its medians."""
    case, time_of = CASES[name], CLOCKS[args.clock]
    torch.manual_seed(0)
    model = case.make_model(args.image_size).eval().to(args.device)
    inputs = make_inputs(case, args)

    def prune():
        entries = (f"{layer}:{case.guidance}:{args.keep_rate}" for layer in case.selection_layers)
        apply_patch_selection(model, ",".join(entries))

    @torch.no_grad()
    def forward():
        model(**inputs)

    prune()
    tokens = count_tokens(model, inputs, case.num_class_tokens)
    macs = count_macs(model, inputs)
    remove_patch_selection(model)
    unpruned_macs = count_macs(model, inputs)

    seconds, unpruned_seconds = [], []
    for round_number in range(args.warmup + args.repeats):
        remove_patch_selection(model)
        unpruned_elapsed = time_of(forward, args.device)
        prune()
        elapsed = time_of(forward, args.device)
        if round_number >= args.warmup:
            seconds.append(elapsed)
            unpruned_seconds.append(unpruned_elapsed)
    latency, unpruned_latency = statistics.median(seconds), statistics.median(unpruned_seconds)
    ratios = [pruned / unpruned for pruned, unpruned in zip(seconds, unpruned_seconds)]
    return {
        "host": type(model).__name__,
        "guidance": case.guidance,
        "selection_layers": list(case.selection_layers),
        "keep_rate": args.keep_rate,
        "image_size": args.image_size,
        "batch_size": args.batch_size,
        "text_length": args.text_length if case.takes_text else None,
        "device": args.device,
        "num_threads": torch.get_num_threads(),
        "clock": args.clock,
        **provenance(args.device),
        "unpruned_image_tokens": tokens[0],
        "image_tokens": tokens[1],
        "unpruned_macs": unpruned_macs,
        "macs": macs,
        "macs_ratio": macs / unpruned_macs,
        "unpruned_latency": unpruned_latency,
        "latency": latency,
        "time_ratio": latency / unpruned_latency,
        # The middle half of the ratios of single rounds says how noisy the machine was.
        "time_ratio_quartiles": statistics.quantiles(ratios, n=4)[::2] if len(ratios) > 1 else ratios * 2,
        "repeats": args.repeats,
    }


def print_table(rows: list[dict]):
    """In Markdown, for the README."""
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
            print(f"{row['host']} ({row['guidance']}): pays less than counted: {excess:.2f} times the MACs ratio.")


def main(argv: list[str] | None = None) -> list[dict]:
    parser = make_parser(HostBenchmarkArguments, description=__doc__)
    (args,) = parser.parse_args_into_dataclasses(args=argv)
    unknown = set(args.hosts) - set(CASES)
    if unknown:
        raise ValueError(f"--hosts must be of {', '.join(CASES)}, got {', '.join(sorted(unknown))}.")
    check_clock("--clock", args.clock, args.device)
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    rows = [measure(name, args) for name in tqdm(args.hosts, desc="hosts")]
    print_table(rows)
    if args.output_json is not None:
        write_json(args.output_json, rows)
    return rows


if __name__ == "__main__":
    main()
