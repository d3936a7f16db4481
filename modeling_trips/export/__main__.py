"""
Export a checkpoint to graphs that ONNX Runtime or OpenVINO runs on CPUs, with its processor: one folder, which
`load_exported` loads as the model that it was.

    python -m modeling_trips.export --model demo/model --output_dir demo-openvino
    python -m modeling_trips.export --model org/trips-vqa --backend onnx --dtype int8 --output_dir vqa-onnx

The class of the model is the checkpoint's. Its schedule and image size are fixed in the graphs: give others here.
Answers, matches and features are those of PyTorch; what is faster on a machine, benchmarks/export_speed.py measures.
"""

from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

import modeling_trips
from modeling_trips import TripsConfig, TripsPreTrainedModel, TripsProcessor

from ..conversion.files import whole_folder
from .exporting import BACKENDS, check_dtype, export_model


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Leaves the lines of the docstring as they are."""


@dataclass
class ExportArguments:
    model: str = field(metadata={"help": "The checkpoint: a folder, or a name on the Hub."})
    output_dir: str = field(metadata={"help": "Folder to write. It must not exist yet."})
    backend: str = field(default="openvino", metadata={"help": f"What is to run it: {' or '.join(BACKENDS)}."})
    dtype: str = field(default="fp32", metadata={"help": "fp32; bf16 (openvino); int8: weights of 8 bits."})
    keep_rate: list[float] | None = field(
        default=None, metadata={"help": "Share of the tokens kept, of all selection layers or of each. 1.0: all."}
    )
    image_size: int | None = field(default=None, metadata={"help": "Pixels per side. Default: the checkpoint's."})

    def __post_init__(self):
        check_dtype(self.backend, self.dtype)
        if Path(self.output_dir).exists():
            raise ValueError(f"--output_dir {self.output_dir} exists. Choose another one, or remove it first.")


def load_model(args: ExportArguments) -> TripsPreTrainedModel:
    """The checkpoint in its own class, at the schedule and the size of images that are asked for."""
    config = TripsConfig.from_pretrained(args.model)
    if args.keep_rate is not None:
        config.keep_rate = args.keep_rate if len(args.keep_rate) > 1 else args.keep_rate[0]
