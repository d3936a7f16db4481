"""A checkpoint that comes with this project: half the bytes, none of the code."""

import json
import tempfile
from pathlib import Path

import torch

from modeling_trips import TripsForQuestionAnswering, TripsProcessor
from modeling_trips.configuration_trips import remove_code_references
from trips_examples.training.files import write_whole


WEIGHTS = "model.safetensors"


def ship(source: Path, target: Path) -> tuple[TripsForQuestionAnswering, TripsProcessor]:
    """
    Writes the model and the processor of `source` into `target`. The weights are stored as bfloat16, and load as
    float32, with which CPUs are faster. They load where this project is installed.

    Returns:
        The model, in bfloat16, and the processor, for a card.
    """
    model = TripsForQuestionAnswering.from_pretrained(source, dtype=torch.bfloat16)
    processor = TripsProcessor.from_pretrained(source)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        for path in Path(folder).glob("*.json"):
            fields = json.loads(path.read_text(encoding="utf-8"))
            if path.name == "config.json":
                fields["dtype"] = "float32"
            remove_code_references(fields)
            write_whole(target / path.name, json.dumps(fields, indent=2, ensure_ascii=False) + "\n")
        write_whole(target / WEIGHTS, (Path(folder) / WEIGHTS).read_bytes())
    return model, processor
