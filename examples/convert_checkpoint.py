r"""
Turn a published checkpoint of an unpruned model into a TRIPS model with its processor. Nothing is trained: TRIPS adds
no weights.

    python examples/convert_checkpoint.py --checkpoint vqa.pth --output_dir albef-vqa \
        --schedule 5:text:0.7,10:text:0.7
    python examples/convert_checkpoint.py --checkpoint Salesforce/blip-vqa-base --output_dir blip-vqa
    python examples/convert_checkpoint.py --checkpoint dandelin/vilt-b32-mlm --output_dir vilt

It takes the files of ALBEF (https://github.com/salesforce/ALBEF): pre-trained, retrieval, RefCOCO and VQA; and
`BlipForQuestionAnswering` and every ViLT of Transformers, by name or folder. A ViLT becomes a `TripsModel` with a
single stream, from which every head starts but those of retrieval and pre-training. Every weight is used, or left out
by name; anything else is an error.
"""

from dataclasses import MISSING, asdict, dataclass
from pathlib import Path

from trips_examples.data.source import check_is_file, option
from trips_examples.training.checks import check_schedule
from trips_examples.training.options import SCHEDULE_HELP, make_parser, run_script


@dataclass
class ConvertArguments:
    checkpoint: str = option(MISSING, "ALBEF's file (.pth, .safetensors); name or folder of a BLIP or ViLT.")
    output_dir: str = option(MISSING, "Folder to write. It must not exist yet.")
    task: str | None = option(None, "ALBEF: pretraining, retrieval or question-answering. Default: its own.")
    tokenizer: str | None = option(None, "Default: bert-base-uncased for ALBEF, the checkpoint's own for the others.")
    image_size: int | None = option(None, "Height and width in pixels. Default: the checkpoint's.")
    num_attention_heads: int | None = option(None, "Of ALBEF, whose file does not tell. Default: of 64 features each.")
    schedule: str | None = option(None, SCHEDULE_HELP)

    def __post_init__(self):
        if self.schedule is not None:
            check_schedule(self.schedule)
        if Path(self.output_dir).exists():
            raise ValueError(f"--output_dir {self.output_dir} exists. Choose another one, or remove it first.")
        is_file_name = Path(self.checkpoint).suffix in (".pth", ".pt", ".bin", ".safetensors")
        if is_file_name:
            check_is_file("checkpoint", self.checkpoint)


OPTIONS = make_parser(ConvertArguments, description=__doc__, script=__name__)

import json

from modeling_trips.conversion import ConversionReport
from modeling_trips.conversion.published import convert_published
from modeling_trips.inspection.files import whole_folder


def main(argv: list[str] | None = None) -> ConversionReport:
    (args,) = OPTIONS.parse_args_into_dataclasses(args=argv)
    print(f"Reading {args.checkpoint}")
    given = {name: value for name, value in vars(args).items() if value is not None}
    output_dir = given.pop("output_dir")
    model, processor, report = convert_published(**given)
    print(f"A {type(model).__name__} with these weights:\n{report}")
    with whole_folder(output_dir) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        report_text = json.dumps(asdict(report), indent=1)
        (folder / "conversion_report.json").write_text(report_text, encoding="utf-8")
    print(f"Written to {output_dir}, with all names in conversion_report.json")
    return report


if __name__ == "__main__":
    run_script(main)
