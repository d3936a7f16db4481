"""
Export a checkpoint with its processor to a folder of graphs for ONNX Runtime or OpenVINO on CPUs. `load_exported`
loads the folder as a model of the same class.

    python -m modeling_trips.export --model demo/model --output_dir demo-openvino
    python -m modeling_trips.export --model org/trips-vqa --backend onnx --dtype int8 --output_dir vqa-onnx

The schedule and the image size are fixed at export. In float32, answers and kept patches match PyTorch.
"""

import json
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser

from modeling_trips import TripsProcessor

from ..inspection.checkpoints import load_checkpoint, load_processor
from ..inspection.files import whole_folder
from .exporting import BACKENDS, check_folder, check_options, export_model


NUM_CALIBRATION_ROWS = 300  # NNCF reads no more
TEXT_COLUMNS = ("question", "text", "caption", "captions", "expression")


@dataclass
class ExportArguments:
    model: str = field(metadata={"help": "Folder or Hub repository of the checkpoint."})
    output_dir: str = field(metadata={"help": "Output folder, empty or new."})
    backend: str = field(default="openvino", metadata={"help": f"Runtime: {' or '.join(BACKENDS)}."})
    dtype: str = field(default="fp32", metadata={"help": "fp32; with openvino also bf16 or int8 (8-bit weights)."})
    calibration_file: str | None = field(
        default=None,
        metadata={"help": f"JSONL file whose first {NUM_CALIBRATION_ROWS} rows calibrate 8-bit activations (int8)."},
    )
    image_root: str | None = field(
        default=None,
        metadata={"help": "Root folder of the image paths in --calibration_file. Default: its folder."},
    )
    keep_rate: list[float] | None = field(
        default=None, metadata={"help": "Share of the tokens kept: one value, or one per layer. 1.0: unpruned."}
    )

    def __post_init__(self):
        check_options(self.backend, self.dtype, self.calibration_file is not None)
        check_folder(self.output_dir)
        if self.image_root is not None and self.calibration_file is None:
            raise ValueError("--image_root needs --calibration_file.")


def read_calibration(
    path: str, image_root: str | None, processor: TripsProcessor
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the model's inputs for each row."""
    folder = Path(path).parent if image_root is None else Path(image_root)
    with open(path, "rb") as file:
        lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
        for number, line in islice(lines, NUM_CALIBRATION_ROWS):
            try:
                row = json.loads(line)
                text = next((row[column] for column in TEXT_COLUMNS if row.get(column)), None)
                if text is None or not row.get("image"):
                    raise ValueError(f"got {', '.join(row) or 'nothing'}")
                text = text[0] if isinstance(text, list) else text
                yield dict(processor(images=folder / row["image"], text=text, return_tensors="pt"))
            except (AttributeError, TypeError, ValueError) as error:
                raise ValueError(
                    f"--calibration_file {path}, line {number}, needs an `image` (relative to --image_root) "
                    f"and one of {', '.join(TEXT_COLUMNS)}: {error}"
                ) from error


def main(argv: list[str] | None = None):
    parser = HfArgumentParser(
        ExportArguments,
        description=__doc__.strip(),
        usage="%(prog)s [options]",
        formatter_class=RawDescriptionHelpFormatter,
    )
    (args,) = parser.parse_args_into_dataclasses(args=argv)
    fields: dict[str, Any] = {}
    if args.keep_rate is not None:
        fields["keep_rate"] = args.keep_rate if len(args.keep_rate) > 1 else args.keep_rate[0]
    model = load_checkpoint(args.model, dtype="float32", **fields)
    processor = load_processor(args.model, model.config)
    with whole_folder(args.output_dir) as folder:
        calibration = None
        if args.calibration_file is not None:
            calibration = list(read_calibration(args.calibration_file, args.image_root, processor))
            if not calibration:
                raise ValueError(f"--calibration_file {args.calibration_file} has no rows.")
        export_model(model, folder, args.backend, args.dtype, calibration)
        processor.save_pretrained(folder)
    print(f"Exported {type(model).__name__} for {args.backend} in {args.dtype} to {args.output_dir}.")


if __name__ == "__main__":
    main()
