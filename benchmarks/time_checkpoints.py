r"""
Time trained models of one task in turns, so that a machine that slows down slows all: how long a batch takes to look
at and answer (in float32), and how long a step of training (forward and backward, in bfloat16 mixed precision where
the machine is fast at it, as the scripts train). Medians are written.

    python benchmarks/time_checkpoints.py --checkpoints outputs/ablation/text-seed0 outputs/ablation/unpruned-seed0 \
        --batch_size 32 --texts_per_image 4 --text_length 8 --output_json times.json

Images are random, of the size that each model's processor makes; texts are random words.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch

import modeling_trips
from modeling_trips import TripsForVisualGrounding, TripsPreTrainedModel, TripsProcessor
from modeling_trips.inspection.speed import medians_in_turns, provenance
from trips_examples.training.files import write_json
from trips_examples.training.options import bf16_is_fast
from trips_examples.training.parser import make_parser


LABEL_LENGTH = 3  # of an answer, its end included


@dataclass
class TimingArguments:
    checkpoints: list[str] = field(metadata={"help": "Folders of models that answer questions, or find boxes."})
    batch_size: int = field(default=32, metadata={"help": "Images per step."})
    texts_per_image: int = field(default=4, metadata={"help": "Texts about each image."})
    text_length: int = field(default=8, metadata={"help": "Tokens per text."})
    warmup: int = field(default=2, metadata={"help": "Rounds before any is timed."})
    repeats: int = field(default=15, metadata={"help": "Timed rounds."})
    num_threads: int = field(default=1, metadata={"help": "CPU threads."})
    training: bool = field(default=True, metadata={"help": "Whether to time steps of training, too."})
    clock: Literal["wall", "process"] = field(
        default="wall",
        metadata={"help": "wall; or process: the processor's time, for one thread of a busy machine."},
    )
    output_json: str | None = field(default=None, metadata={"help": "Write a row per checkpoint to this file."})


class TimedCheckpoint:
    """A trained model with a batch for it. CPUs run small models fastest with eager attention."""

    def __init__(self, folder: str, args: TimingArguments):
        (name,) = json.loads((Path(folder) / "config.json").read_text())["architectures"]
        model_class: type[TripsPreTrainedModel] = getattr(modeling_trips, name)
        self.model = model_class.from_pretrained(folder, attn_implementation="eager")
        self.inputs = self._make_inputs(TripsProcessor.from_pretrained(folder).image_processor.size, args)

    def _make_inputs(self, size: dict[str, int], args: TimingArguments) -> dict[str, torch.Tensor]:
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


def main(argv: list[str] | None = None) -> list[dict]:
    (args,) = make_parser(TimingArguments, description=__doc__).parse_args_into_dataclasses(args=argv)
    torch.set_num_threads(args.num_threads)
    steps = {}
    for folder in args.checkpoints:
        checkpoint = TimedCheckpoint(folder, args)
        steps[folder, "forward"] = checkpoint.forward
        if args.training:
            steps[folder, "training"] = checkpoint.train
    medians = medians_in_turns(steps, args.warmup, args.repeats, args.clock)
    settings = {name: value for name, value in asdict(args).items() if name not in ("checkpoints", "output_json")}
    rows = [
        {
            "checkpoint": Path(folder).name,
            **{f"{kind}_seconds": seconds for (timed, kind), seconds in medians.items() if timed == folder},
            **settings,
            **provenance("cpu"),
        }
        for folder in args.checkpoints
    ]
    for row in rows:
        seconds = [f"{name} {value:.3f}" for name, value in row.items() if name.endswith("_seconds")]
        print(f"{row['checkpoint']:<40} {', '.join(seconds)}")
    if args.output_json is not None:
        write_json(args.output_json, rows)
    return rows


if __name__ == "__main__":
    main()
