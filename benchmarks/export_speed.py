"""
Measure one model on a CPU in PyTorch eager and compiled, ONNX Runtime and OpenVINO, in float32, bfloat16 and int8.

    python benchmarks/export_speed.py                                     # base size, 384 px, all backends
    python benchmarks/export_speed.py --task answer --texts_per_image 1 10 --output_json export.json
    python benchmarks/export_speed.py --ways eager-fp32 openvino-fp32 openvino-bf16 --export_dir exports

Weights are random. Backends take turns in one run after a warm-up, and medians are compared. A step computes an answer
of 2 tokens to each question, including the encoding of images and questions (`answer`), the match of each pair
(`match`), or the features of all images and texts (`features`). The agreement with PyTorch in float32 is counted for
kept patches and for answers, the better half of the matches, or the most similar image of each text. Exports in
--export_dir are reused. Calibration uses noise, so the agreement of calibrated models is not meaningful.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from measuring import TimingArguments, check_choices, run_benchmark
from tqdm.auto import tqdm

from modeling_trips import (
    SelectionSchedule,
    TripsConfig,
    TripsForQuestionAnswering,
    TripsForRetrieval,
    TripsPreTrainedModel,
)
from modeling_trips.conversion.files import whole_folder
from modeling_trips.export import BACKENDS, export_model, load_exported
from modeling_trips.export.running import RUNTIMES


REFERENCE, CALIBRATED = "eager-fp32", "openvino-int8-calibrated"
IN_PYTORCH = (REFERENCE, "eager-bf16", "compiled-fp32", "compiled-bf16")
EXPORTED = (*(f"{backend}-{dtype}" for backend, dtypes in BACKENDS.items() for dtype in dtypes), CALIBRATED)
WAYS = (*IN_PYTORCH, *EXPORTED)
ANSWER_LENGTH = {"min_new_tokens": 2, "max_new_tokens": 2}


@dataclass(kw_only=True)
class ExportSpeedArguments(TimingArguments):
    preset: str = field(default="base", metadata={"help": f"Model size: {', '.join(TripsConfig.presets())}."})
    image_size: int = field(default=384, metadata={"help": "Pixels per side."})
    schedule: str = field(default="5,10", metadata={"help": "Selection layers (5,10) or layer:guidance:keep_rate."})
    keep_rate: float = field(default=0.7, metadata={"help": "Keep rate of layers without one. 1.0: unpruned."})
    task: list[str] = field(default_factory=lambda: list(TASKS), metadata={"help": "answer, match or features."})
    ways: list[str] = field(
        default_factory=lambda: list(WAYS),
        metadata={"help": "Backends and dtypes, as in openvino-bf16. Default: all."},
    )
    batch_size: int = field(default=1, metadata={"help": "Images per step."})
    texts_per_image: list[int] = field(default_factory=lambda: [1], metadata={"help": "Texts per image."})
    text_length: int = field(default=40, metadata={"help": "Tokens per text."})
    export_dir: str = field(default="outputs/exports", metadata={"help": "Folder of the exported models."})

    def __post_init__(self):
        super().__post_init__()
        check_choices("--task", self.task, TASKS)
        check_choices("--ways", self.ways, WAYS)
        if REFERENCE not in self.ways:
            self.ways = [REFERENCE, *self.ways]


def answer(model: TripsForQuestionAnswering, inputs: dict) -> torch.Tensor:
    return model.generate(**inputs, **ANSWER_LENGTH)


def match(model: TripsForRetrieval, inputs: dict) -> torch.Tensor:
    scores = model.match(**inputs).itm_logits.softmax(dim=-1)[:, 1]
    return scores > scores.median()


def features(model: TripsForRetrieval, inputs: dict) -> torch.Tensor:
    images = model.get_image_features(inputs["pixel_values"]).pooler_output
    texts = model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output
    return (texts @ images.T).argmax(dim=-1)


TASKS: dict[str, tuple[type[TripsPreTrainedModel], Callable]] = {
    "answer": (TripsForQuestionAnswering, answer),
    "match": (TripsForRetrieval, match),
    "features": (TripsForRetrieval, features),
}


def make_model(task: str, args: ExportSpeedArguments) -> TripsPreTrainedModel:
    torch.manual_seed(0)
    config = TripsConfig.from_preset(
        args.preset,
        vision_config={"image_size": args.image_size},
        **SelectionSchedule.parse(args.schedule, args.keep_rate).config_fields,
    )
    return TASKS[task][0](config).eval()


def make_inputs(model: TripsPreTrainedModel, args: ExportSpeedArguments, texts_per_image: int) -> dict:
    torch.manual_seed(1)
    num_texts = args.batch_size * texts_per_image
    input_ids = torch.randint(1, model.config.text_config.vocab_size, (num_texts, args.text_length))
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": torch.randn(args.batch_size, 3, args.image_size, args.image_size),
        "image_index": torch.arange(args.batch_size).repeat_interleave(texts_per_image),
    }


def is_installed(way: str) -> bool:
    backend = way.partition("-")[0]
    return backend not in RUNTIMES or find_spec(RUNTIMES[backend]) is not None


def run_as(way: str, task: str, args: ExportSpeedArguments) -> TripsPreTrainedModel:
    """Return the model of a task for one backend and dtype."""
    backend, dtype, *_ = way.split("-")
    model = make_model(task, args)
    if way in IN_PYTORCH:
        model = model.to(torch.bfloat16 if dtype == "bf16" else torch.float32)
        if backend == "compiled":
            model.model.compile()  # without the decoder, whose cache grows
        return model
    name = type(model).__name__
    setting = f"{args.preset}-{args.image_size}px-{args.schedule}-{args.keep_rate:g}".replace(":", "_")
    folder = Path(args.export_dir) / f"{name}-{setting}-{way}"
    if not folder.exists():
        with whole_folder(folder) as partial:
            calibration = [make_inputs(model, args, 1)] if way == CALIBRATED else None
            export_model(model, partial, backend, dtype, calibration)
    return load_exported(folder)


def kept_patches(model: TripsPreTrainedModel, inputs: dict) -> list[set]:
    """Return the kept patches of each selection layer and text."""
    return [set(row) for layer in model.model(**inputs).selection for row in layer.kept_indices.tolist()]


@torch.no_grad()
def measure(task: str, models: dict[str, TripsPreTrainedModel], texts_per_image: int, args) -> list[dict]:
    """Return a row for each backend and dtype."""
    inputs = make_inputs(models[REFERENCE], args, texts_per_image)
    work, steps, results, kept = TASKS[task][1], {}, {}, {}
    for way, model in tqdm(models.items(), desc="first steps", leave=False):
        own = {**inputs, "pixel_values": inputs["pixel_values"].to(model.dtype)}
        steps[way] = lambda model=model, own=own: work(model, own)
        results[way], kept[way] = steps[way](), kept_patches(model, own)
    times = args.time_in_turns(steps, REFERENCE)
    same = {
        way: sum(len(row & other) for row, other in zip(rows, kept[REFERENCE])) / sum(map(len, kept[REFERENCE]))
        for way, rows in kept.items()
    }
    return [
        {
            **args.settings("ways", "export_dir"),
            "texts_per_image": texts_per_image,
            **{f"{package}_version": version(package) for package in RUNTIMES.values() if find_spec(package)},
            "task": task,
            "way": way,
            "throughput": args.batch_size * texts_per_image / own["latency"],
            "same_results": (results[way] == results[REFERENCE]).float().mean().item(),
            "same_patches": same[way],
            **own,
        }
        for way, own in times.items()
    ]


def print_table(rows: list[dict], args: ExportSpeedArguments):
    print(f"{'work':<24}  {'way':<14}  {'ms':>8}  texts/s  speed-up  same results  same patches")
    for row in rows:
        work = f"{row['task']}, {row['texts_per_image']} text(s) per image"
        print(
            f"{work:<24}  {row['way']:<14}  {1000 * row['latency']:8.1f}  {row['throughput']:7.2f}  "
            f"{row['speedup']:8.2f}  {row['same_results']:12.1%}  {row['same_patches']:12.1%}"
        )


def measure_all(args: ExportSpeedArguments) -> Iterator[dict]:
    ways = [way for way in args.ways if is_installed(way)]
    if len(ways) < len(args.ways):
        missing = [way for way in args.ways if way not in ways]
        print(f"Skipped, because a package is missing (pip install '.[export]'): {', '.join(missing)}")
    for model_class, tasks in itertools.groupby(args.task, key=lambda task: TASKS[task][0]):
        tasks = list(tasks)
        models = {way: run_as(way, tasks[0], args) for way in tqdm(ways, desc=model_class.__name__)}
        for task, texts_per_image in itertools.product(tasks, args.texts_per_image):
            yield from measure(task, models, texts_per_image, args)


def main(argv: list[str] | None = None) -> list[dict]:
    return run_benchmark(ExportSpeedArguments, __doc__, measure_all, print_table, argv)


if __name__ == "__main__":
    main()
