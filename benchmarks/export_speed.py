r"""
Time answers of 2 tokens of a model of base size with random weights, in PyTorch and exported, in turns on one thread.

    python benchmarks/export_speed.py --num_threads 1 --output_json docs/results/export.json

Calibration is on noise, so the kept patches of a calibrated model say little.
"""

import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from measuring import OutputArguments, run_benchmark
from tqdm.auto import tqdm

from modeling_trips import TripsConfig, TripsForQuestionAnswering, TripsPreTrainedModel
from modeling_trips.export import BACKENDS, export_model, load_exported
from modeling_trips.inspection.speed import seconds_in_turns
from trips_examples.data.source import option


REFERENCE = "PyTorch, float32"
NAMES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO", "fp32": "float32", "bf16": "bfloat16", "int8": "int8"}


@dataclass(kw_only=True)
class ExportArguments(OutputArguments):
    schedule: str = option("5:text:0.7,10:text:0.7", "Schedule in its text form.")
    image_size: int = option(384, "Pixels per side.")
    repeats: int = option(7, "Timed rounds, after one of warm-up.")
    seed: int = option(0, "Seed of weights and inputs.")


def make_model(args: ExportArguments) -> TripsForQuestionAnswering:
    torch.manual_seed(args.seed)
    config = TripsConfig.from_preset("base", image_size=args.image_size, schedule=args.schedule)
    return TripsForQuestionAnswering(config).eval()


def make_inputs(args: ExportArguments) -> dict[str, torch.Tensor]:
    torch.manual_seed(args.seed + 1)
    input_ids = torch.randint(1, 30_000, (1, 40))
    pixel_values = torch.randn(1, 3, args.image_size, args.image_size)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "pixel_values": pixel_values}


def make_models(args: ExportArguments, folder: Path) -> dict[str, TripsPreTrainedModel]:
    models = {REFERENCE: make_model(args), "PyTorch, bfloat16": make_model(args).bfloat16()}
    ways = [(backend, dtype, None) for backend, dtypes in BACKENDS.items() for dtype in dtypes]
    ways.append(("openvino", "int8", [make_inputs(args)]))
    for backend, dtype, calibration in tqdm(ways, desc="Exporting"):
        name = f"{NAMES[backend]}, {NAMES[dtype]}"
        if calibration is not None:
            name += ", calibrated"
        export_model(make_model(args), folder / name, backend, dtype, calibration)
        models[name] = load_exported(folder / name)
    return models


def kept_patches(model: TripsPreTrainedModel, inputs: dict[str, torch.Tensor]) -> set[tuple[int, int]]:
    """Return pairs of selection layer and patch."""
    selection = model.model(**inputs).selection
    return {(number, patch) for number, layer in enumerate(selection) for patch in layer.kept_indices[0].tolist()}


@torch.no_grad()
def measure(args: ExportArguments) -> Iterator[dict]:
    with tempfile.TemporaryDirectory() as folder:
        models = make_models(args, Path(folder))
        steps = {}
        kept = {}
        for name, model in models.items():
            inputs = make_inputs(args)
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
            kept[name] = kept_patches(model, inputs)
            steps[name] = lambda model=model, inputs=inputs: model.generate(
                **inputs, min_new_tokens=2, max_new_tokens=2
            )
        seconds = seconds_in_turns(steps, warmup=1, repeats=args.repeats, clock="process")
    latency = {name: statistics.median(times) for name, times in seconds.items()}
    for name in models:
        yield {
            "image_size": args.image_size,
            "schedule": args.schedule,
            "texts_per_image": 1,
            "clock": "process",
            "onnxruntime_version": version("onnxruntime"),
            "openvino_version": version("openvino"),
            "way": name,
            "latency": latency[name],
            "speedup": latency[REFERENCE] / latency[name],
            "same_patches": len(kept[name] & kept[REFERENCE]) / len(kept[REFERENCE]),
        }


def report(rows: list[dict], args: ExportArguments):
    for row in rows:
        print(f"{row['way']:<40} {row['speedup']:.2f} times as fast, {row['same_patches']:.1%} of the patches")


if __name__ == "__main__":
    run_benchmark(ExportArguments, __doc__, measure, report)
