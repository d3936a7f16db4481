r"""
Time trained models of one task in turns: the forward pass of a batch in float32, and a training step (forward and
backward pass, in bfloat16 mixed precision on CPUs with fast bfloat16). Medians are written.

    python benchmarks/time_checkpoints.py --checkpoints outputs/ablation/text-seed0 outputs/ablation/unpruned-seed0 \
        --batch_size 32 --texts_per_image 4 --text_length 8 --output_json times.json

Images are random, at the size of each model's processor; texts are random words.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from measuring import TimingArguments, run_benchmark

import modeling_trips
from modeling_trips import TripsForVisualGrounding, TripsPreTrainedModel, TripsProcessor
from trips_examples.training.options import bf16_is_fast


LABEL_LENGTH = 3  # tokens of an answer with its end token


@dataclass(kw_only=True)
class CheckpointTimingArguments(TimingArguments):
    checkpoints: list[str] = field(metadata={"help": "Folders of models for question answering or grounding."})
    batch_size: int = field(default=32, metadata={"help": "Images per step."})
    texts_per_image: int = field(default=4, metadata={"help": "Texts per image."})
    text_length: int = field(default=8, metadata={"help": "Tokens per text."})
    num_threads: int = field(default=1, metadata={"help": "CPU threads."})
    training: bool = field(default=True, metadata={"help": "Also time training steps."})


class TimedCheckpoint:
    """Trained model with a batch. It uses eager attention, the fastest for small models on CPUs."""

    def __init__(self, folder: str, args: CheckpointTimingArguments):
        (name,) = json.loads((Path(folder) / "config.json").read_text())["architectures"]
        model_class: type[TripsPreTrainedModel] = getattr(modeling_trips, name)
        self.model = model_class.from_pretrained(folder, attn_implementation="eager")
        self.inputs = self._make_inputs(TripsProcessor.from_pretrained(folder).image_processor.size, args)

    def _make_inputs(self, size: dict[str, int], args: CheckpointTimingArguments) -> dict[str, torch.Tensor]:
        num_texts, vocab_size = args.batch_size * args.texts_per_image, self.model.config.text_config.vocab_size
        inputs = {
            "pixel_values": torch.randn(args.batch_size, 3, size["height"], size["width"]),
            "input_ids": torch.randint(5, vocab_size, (num_texts, args.text_length)),
            "attention_mask": torch.ones(num_texts, args.text_length, dtype=torch.long),
            "image_index": torch.arange(args.batch_size).repeat_interleave(args.texts_per_image),
        }
        boxes = torch.tensor([0.5, 0.5, 0.25, 0.25]).expand(num_texts, 4)
        if isinstance(self.model, TripsForVisualGrounding):
            return {**inputs, "labels": boxes}
        return {**inputs, "labels": torch.randint(5, vocab_size, (num_texts, LABEL_LENGTH)), "regions": boxes}

    @torch.no_grad()
    def forward(self):
        self.model.eval()(**self.inputs)

    def train(self):
        self.model.train().zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16_is_fast()):
            loss = self.model(**self.inputs).loss
        loss.backward()


def measure(args: CheckpointTimingArguments) -> Iterator[dict]:
    steps = {}
    for folder in args.checkpoints:
        checkpoint = TimedCheckpoint(folder, args)
        steps[f"{folder} forward"] = checkpoint.forward
        if args.training:
            steps[f"{folder} training"] = checkpoint.train
    times = args.time_in_turns(steps)
    for folder in args.checkpoints:
        kinds = [kind for kind in ("forward", "training") if f"{folder} {kind}" in times]
        seconds = {f"{kind}_seconds": times[f"{folder} {kind}"]["latency"] for kind in kinds}
        yield {"checkpoint": Path(folder).name, **seconds, **args.settings("checkpoints")}


def print_table(rows: list[dict], args: CheckpointTimingArguments):
    for row in rows:
        seconds = [f"{name} {value:.3f}" for name, value in row.items() if name.endswith("_seconds")]
        print(f"{row['checkpoint']:<40} {', '.join(seconds)}")


def main(argv: list[str] | None = None) -> list[dict]:
    return run_benchmark(CheckpointTimingArguments, __doc__, measure, print_table, argv)


if __name__ == "__main__":
    main()
