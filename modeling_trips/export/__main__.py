"""
Export a checkpoint with its processor to a folder of graphs for ONNX Runtime or OpenVINO on CPUs. `load_exported`
loads the folder as a model of the same class.

    python -m modeling_trips.export --model demo/model --output_dir demo-openvino
    python -m modeling_trips.export --model org/trips-vqa --backend onnx --output_dir vqa-onnx

The schedule and the image size are fixed at export. In float32, answers and kept patches match PyTorch.
"""

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator
from pathlib import Path

import torch

from modeling_trips import TripsProcessor

from ..inspection.checkpoints import load_checkpoint, load_processor
from .exporting import BACKENDS, export_model


NUM_CALIBRATION_ROWS = 300  # NNCF reads no more
TEXT_COLUMNS = ("question", "text", "caption", "captions", "expression")


def read_calibration(
    path: str, image_root: str | None, processor: TripsProcessor
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the model's inputs for each row."""
    folder = Path(path).parent if image_root is None else Path(image_root)
    num_read = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if num_read == NUM_CALIBRATION_ROWS:
                return
            if not line.strip():
                continue
            row = json.loads(line)
            texts = [row[column] for column in TEXT_COLUMNS if row.get(column)]
            if not texts or not row.get("image"):
                raise ValueError(f"{path}, line {number}, needs an `image` and one of {', '.join(TEXT_COLUMNS)}.")
            text = texts[0][0] if isinstance(texts[0], list) else texts[0]
            num_read += 1
            yield dict(processor(images=folder / row["image"], text=text, return_tensors="pt"))


def main(argv: list[str] | None = None):
    parser = ArgumentParser("modeling_trips.export", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Folder or Hub repository of the checkpoint.")
    parser.add_argument("--output_dir", required=True, help="Output folder, empty or new.")
    parser.add_argument("--backend", default="openvino", choices=BACKENDS, help="Runtime. Default: openvino.")
    parser.add_argument("--dtype", default="fp32", help="fp32; with openvino also bf16 or int8 (8-bit weights).")
    parser.add_argument(
        "--calibration_file",
        help=f"JSONL file whose first {NUM_CALIBRATION_ROWS} rows calibrate 8-bit activations (int8).",
    )
    parser.add_argument("--image_root", help="Root of the paths in --calibration_file. Default: its folder.")
    parser.add_argument("--schedule", help="In place of the checkpoint's: 6:image:0.5,9:text:0.5, or unpruned.")
    args = parser.parse_args(argv)
    fields = {} if args.schedule is None else {"schedule": args.schedule}
    model = load_checkpoint(args.model, dtype="float32", **fields)
    processor = load_processor(args.model, model.config)
    calibration = None
    if args.calibration_file is not None:
        calibration = list(read_calibration(args.calibration_file, args.image_root, processor))
        if not calibration:
            raise ValueError(f"--calibration_file {args.calibration_file} has no rows.")
    export_model(
        model,
        args.output_dir,
        backend=args.backend,
        dtype=args.dtype,
        calibration=calibration,
        processor=processor,
    )
    print(f"Exported {type(model).__name__} for {args.backend} in {args.dtype} to {args.output_dir}.")


if __name__ == "__main__":
    main()
