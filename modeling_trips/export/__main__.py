"""
Export a checkpoint to graphs that ONNX Runtime or OpenVINO runs on CPUs, with its processor: one folder, which
`load_exported` loads as the model that it was.

    python -m modeling_trips.export --model demo/model --output_dir demo-openvino
    python -m modeling_trips.export --model org/trips-vqa --backend onnx --dtype int8 --output_dir vqa-onnx

The graphs have the schedule and the image size of the checkpoint. Their answers and kept patches are those of PyTorch
in float32; what is the fastest on a machine, benchmarks/export_speed.py measures.
"""

import json
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser

import modeling_trips
from modeling_trips import TripsConfig, TripsPreTrainedModel, TripsProcessor

from ..conversion.files import whole_folder
from .exporting import BACKENDS, check_options, export_model


NUM_CALIBRATION_ROWS = 300  # as many as NNCF looks at


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Leaves the lines of the docstring as they are."""


@dataclass
class ExportArguments:
    model: str = field(metadata={"help": "The checkpoint: a folder, or a name on the Hub."})
    output_dir: str = field(metadata={"help": "Folder to write. It must not exist yet."})
    backend: str = field(default="openvino", metadata={"help": f"What is to run it: {' or '.join(BACKENDS)}."})
    dtype: str = field(default="fp32", metadata={"help": "fp32; bf16 (openvino); int8: weights of 8 bits."})
    calibration_file: str | None = field(
        default=None,
        metadata={
            "help": "JSON lines with an image (a path) and a question or text, for openvino with int8: activations "
            f"are rounded by what the first {NUM_CALIBRATION_ROWS} give. Faster than without."
        },
    )
    keep_rate: list[float] | None = field(
        default=None, metadata={"help": "Share of the tokens kept, of all selection layers or of each. 1.0: all."}
    )

    def __post_init__(self):
        check_options(self.backend, self.dtype, self.calibration_file is not None)
        if Path(self.output_dir).exists():
            raise ValueError(f"--output_dir {self.output_dir} exists. Choose another one, or remove it first.")


def load_model(args: ExportArguments) -> TripsPreTrainedModel:
    """The checkpoint in its own class, at the schedule that is asked for."""
    names = TripsConfig.from_pretrained(args.model).architectures or ["TripsModel"]
    model_class = getattr(modeling_trips, names[0], None)
    if model_class is None:
        raise ValueError(f"--model {args.model} is a {names[0]}, which is no model of this project.")
    fields = {}
    if args.keep_rate is not None:
        fields["keep_rate"] = args.keep_rate if len(args.keep_rate) > 1 else args.keep_rate[0]
    return model_class.from_pretrained(args.model, dtype="float32", **fields)


def read_calibration(path: str, processor: TripsProcessor) -> Iterator[dict[str, torch.Tensor]]:
    """The model's inputs, row by row."""
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines()[:NUM_CALIBRATION_ROWS]):
        try:
            row = json.loads(line)
            image, text = Path(path).parent / row["image"], row["question"] if "question" in row else row["text"]
            yield dict(processor(images=image, text=text, return_tensors="pt"))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"--calibration_file {path}, line {number + 1}, needs an `image`, and a `question` or `text`: {error}"
            ) from error


def main(argv: list[str] | None = None):
    parser = HfArgumentParser(
        ExportArguments, description=__doc__.strip(), usage="%(prog)s [options]", formatter_class=HelpFormatter
    )
    (args,) = parser.parse_args_into_dataclasses(args=argv)
    model, processor = load_model(args), TripsProcessor.from_pretrained(args.model)
    with whole_folder(args.output_dir) as folder:
        calibration = None
        if args.calibration_file is not None:
            calibration = list(read_calibration(args.calibration_file, processor))
        export_model(model, folder, args.backend, args.dtype, calibration)
        processor.save_pretrained(folder)
    print(f"Written to {args.output_dir}: a {type(model).__name__} for {args.backend}, {args.dtype}.")


if __name__ == "__main__":
    main()
