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
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser

from modeling_trips import TripsPreTrainedModel, TripsProcessor

from ..conversion.files import whole_folder
from ..inspection.checkpoints import load_checkpoint
from .exporting import BACKENDS, check_folder, check_options, export_model


NUM_CALIBRATION_ROWS = 300  # as many as NNCF looks at
TEXT_COLUMNS = ("question", "text", "caption", "captions", "expression")


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Leaves the lines of the docstring as they are."""


@dataclass
class ExportArguments:
    model: str = field(metadata={"help": "The checkpoint: a folder, or a name on the Hub."})
    output_dir: str = field(metadata={"help": "Folder to write. It must be empty, or not exist yet."})
    backend: str = field(default="openvino", metadata={"help": f"What is to run it: {' or '.join(BACKENDS)}."})
    dtype: str = field(default="fp32", metadata={"help": "fp32; bf16 (openvino); int8: weights of 8 bits."})
    calibration_file: str | None = field(
        default=None,
        metadata={
            "help": "JSONL file that trains the model, for openvino with int8: activations are rounded by what its "
            f"first {NUM_CALIBRATION_ROWS} rows give. Faster than without."
        },
    )
    image_root: str | None = field(
        default=None,
        metadata={"help": "Folder that paths in --calibration_file are relative to. Default: that of the file."},
    )
    keep_rate: list[float] | None = field(
        default=None, metadata={"help": "Share of the tokens kept, of all selection layers or of each. 1.0: all."}
    )

    def __post_init__(self):
        check_options(self.backend, self.dtype, self.calibration_file is not None)
        check_folder(self.output_dir)
        if self.image_root is not None and self.calibration_file is None:
            raise ValueError("--image_root goes with --calibration_file.")


def load_model(args: ExportArguments) -> TripsPreTrainedModel:
    """The checkpoint in its own class, at the schedule that is asked for."""
    fields: dict[str, Any] = {}
    if args.keep_rate is not None:
        fields["keep_rate"] = args.keep_rate if len(args.keep_rate) > 1 else args.keep_rate[0]
    return load_checkpoint(args.model, dtype="float32", **fields)


def read_calibration(
    path: str, image_root: str | None, processor: TripsProcessor
) -> Iterator[dict[str, torch.Tensor]]:
    """The model's inputs, row by row."""
    folder = Path(path).parent if image_root is None else Path(image_root)
    with open(path, "rb") as file:
        lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
        for number, line in islice(lines, NUM_CALIBRATION_ROWS):
            try:
                row = json.loads(line)
                text = next((row[column] for column in TEXT_COLUMNS if row.get(column)), None)
                if text is None or not row.get("image"):
                    raise ValueError(f"it has {', '.join(row) or 'nothing'}")
                text = text[0] if isinstance(text, list) else text
                yield dict(processor(images=folder / row["image"], text=text, return_tensors="pt"))
            except (AttributeError, TypeError, ValueError) as error:
                raise ValueError(
                    f"--calibration_file {path}, line {number}, needs an `image` (a path relative to --image_root) "
                    f"and one of {', '.join(TEXT_COLUMNS)}: {error}"
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
            calibration = list(read_calibration(args.calibration_file, args.image_root, processor))
            if not calibration:
                raise ValueError(f"--calibration_file {args.calibration_file} has no rows.")
        export_model(model, folder, args.backend, args.dtype, calibration)
        processor.save_pretrained(folder)
    print(f"Written to {args.output_dir}: a {type(model).__name__} for {args.backend}, {args.dtype}.")


if __name__ == "__main__":
    main()
