"""
Turn a published checkpoint of an unpruned model into a TRIPS model with its processor. Nothing is trained: TRIPS adds
no weights.

    python examples/convert_checkpoint.py --checkpoint vqa.pth --output_dir albef-vqa --keep_rate 0.7
    python examples/convert_checkpoint.py --checkpoint Salesforce/blip-vqa-base --output_dir blip-vqa
    python examples/convert_checkpoint.py --checkpoint dandelin/vilt-b32-mlm --output_dir vilt

It takes the files of ALBEF (https://github.com/salesforce/ALBEF): pre-trained, retrieval, RefCOCO and VQA; and
`BlipForQuestionAnswering` and every ViLT of Transformers, by name or folder. A ViLT becomes a `TripsModel` with a
single stream, from which every head starts but those of retrieval and pre-training. Every weight is used, or left out
by name; anything else is an error.
"""

import json
import pickle
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from tokenizers import Regex, normalizers, processors
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    BlipForQuestionAnswering,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.vilt import modeling_vilt

import modeling_trips
from modeling_trips import TripsPreTrainedModel, TripsProcessor
from modeling_trips.conversion import (
    ALBEF_TASKS,
    ConversionError,
    ConversionPlan,
    ConversionReport,
    albef_plan,
    blip_plan,
    check_blip_architecture,
    load_converted,
    vilt_plan,
)
from trips_examples.training.models import make_processor


WEIGHT_FILES = (".pth", ".pt", ".bin", ".safetensors")


@dataclass
class ConvertArguments:
    checkpoint: str = field(
        metadata={
            "help": "ALBEF's file (.pth, or its weights as .safetensors); name on the Hub or folder of a BLIP or ViLT."
        }
    )
    output_dir: str = field(metadata={"help": "Folder to write. It must not exist yet."})
    task: str | None = field(
        default=None,
        metadata={
            "help": f"One of {', '.join(ALBEF_TASKS)}. Default: what the checkpoint was trained for. A pre-trained "
            "ALBEF can be made ready to be fine-tuned for each of them."
        },
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Default: bert-base-uncased for ALBEF, the checkpoint's own for the others."}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Height and width in pixels. Default: the checkpoint's."}
    )
    num_attention_heads: int | None = field(
        default=None, metadata={"help": "Of ALBEF, whose file does not tell. Default: as many as are 64 wide."}
    )
    selection_layers: list[int] | None = field(
        default=None, metadata={"help": "ViT layers that select patches, numbered from 1: --selection_layers 5 10"}
    )
    keep_rate: list[float] | None = field(
        default=None, metadata={"help": "Share of the tokens kept: one rate, or one per layer. 1.0: no selection."}
    )
    selection_guidance: str | None = field(default=None, metadata={"help": "What selects: text, image or random."})

    def __post_init__(self):
        if Path(self.output_dir).exists():
            raise ValueError(f"--output_dir {self.output_dir} exists. Choose another one, or remove it first.")
        if Path(self.checkpoint).suffix in WEIGHT_FILES and not Path(self.checkpoint).is_file():
            raise ValueError(f"--checkpoint {self.checkpoint}: there is no such file.")

    def selection(self) -> dict:
        """The fields of `TripsConfig` that were given."""
        rate = self.keep_rate[0] if self.keep_rate is not None and len(self.keep_rate) == 1 else self.keep_rate
        fields = {
            "selection_layers": self.selection_layers,
            "keep_rate": rate,
            "selection_guidance": self.selection_guidance,
        }
        return {name: value for name, value in fields.items() if value is not None}


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """
    The state dict in a file: all of it, or its entry `model`. No code in the file is run.

    Raises:
        ValueError: if the file holds anything that is not data, or no state dict.
    """
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(unsafe_message(path)) from error
    content = content.get("model", content) if isinstance(content, dict) else content
    entries = content.items() if isinstance(content, dict) else [(type(content).__name__, content)]
    others = [str(name) for name, value in entries if not isinstance(value, torch.Tensor)]
    if others:
        raise ValueError(f"{path} has no entry `model`, and is no state dict itself: it holds {', '.join(others)}.")
    return content


def unsafe_message(path: Path) -> str:
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # no archive of PyTorch: a text, half a file, or one older than PyTorch 1.6
        return (
            f"{path} cannot be read as weights alone. Is the file complete? If it is older than PyTorch 1.6 and you "
            "trust it, load it with `torch.load(..., weights_only=False)` and save its weights anew."
        )
    return (
        f"{path} holds more than weights: {', '.join(names)}. Loading that can run code of the file's author. If you "
        'trust the file, take out its weights first: python -c "import torch; '
        f"torch.save(torch.load('{path}', map_location='cpu', weights_only=False)['model'], 'weights.pth')\""
    )


def albef_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """
    The tokenizer of an uncased BERT as ALBEF uses it: texts are in lower case and lose their punctuation, hyphens and
    slashes part words, and no [SEP] follows. All of it is part of the tokenizer's file.
    """
    tokenizer = AutoTokenizer.from_pretrained(name)
    special_tokens = {
        f"{key}_token": getattr(tokenizer, f"{key}_token") for key in ("pad", "unk", "cls", "sep", "mask")
    }
    absent = [key for key, token in special_tokens.items() if token is None]
    if absent:
        raise ValueError(f"--tokenizer {name} has no {', '.join(absent)}: give the tokenizer of a BERT.")
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"""[,.'!?"()*#:;~]"""), ""),
            normalizers.Replace(Regex("[-/]"), " "),
            normalizers.Replace("<person>", "person"),  # in captions, for a name
            *([] if backend.normalizer is None else [backend.normalizer]),
        ]
    )
    first, end = special_tokens["cls_token"], special_tokens["sep_token"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{first} $A",
        pair=f"{first} $A {end} $B:1 {end}:1",
        special_tokens=[(first, tokenizer.cls_token_id), (end, tokenizer.sep_token_id)],
    )
    # Not the class it was loaded as: BertTokenizer would put its own rules back when it is loaded again.
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special_tokens)


class Conversion(NamedTuple):
    """The weights of another model, how they become those of TRIPS, and what prepares images and texts for them."""

    source: dict[str, torch.Tensor]
    plan: ConversionPlan
    processor: TripsProcessor


def plan_albef(args: ConvertArguments) -> Conversion:
    source = read_weights(Path(args.checkpoint))
    tokenizer = albef_tokenizer(args.tokenizer or "bert-base-uncased")
    plan = albef_plan(
        source,
        args.task,
        args.image_size,
        args.num_attention_heads,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        **args.selection(),
    )
    return Conversion(source, plan, make_processor(tokenizer, plan.config))


def read_model(model_class: type[PreTrainedModel], checkpoint: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Those weights of a class of Transformers that a checkpoint has, and the keys that it has beyond them."""
    model, loaded = model_class.from_pretrained(checkpoint, use_safetensors=True, output_loading_info=True)
    source = {key: value for key, value in model.state_dict().items() if key not in loaded["missing_keys"]}
    return source, sorted(loaded["unexpected_keys"])


def plan_blip(args: ConvertArguments) -> Conversion:
    if args.num_attention_heads is not None or args.task not in (None, "question-answering"):
        raise ValueError("--num_attention_heads and --task are for ALBEF: BLIP's configuration has both.")
    config = AutoConfig.from_pretrained(args.checkpoint)
    check_blip_architecture((config.architectures or [type(config).__name__])[0])
    source, unexpected = read_model(BlipForQuestionAnswering, args.checkpoint)
    if unexpected:
        raise ConversionError(f"{args.checkpoint} has weights of no BLIP: {unexpected}.")
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.checkpoint)
    plan = blip_plan(source, config, args.image_size, **args.selection())
    return Conversion(source, plan, make_processor(tokenizer, plan.config))


def plan_vilt(args: ConvertArguments) -> Conversion:
    if args.num_attention_heads is not None or args.task is not None:
        raise ValueError(
            "--num_attention_heads and --task are for ALBEF: ViLT's configuration has the former, and what a ViLT "
            "becomes serves every task of a single stream."
        )
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.checkpoint)
    config = AutoConfig.from_pretrained(args.checkpoint, pad_token_id=tokenizer.pad_token_id)
    # "ViltForPreTraining", for one, stands in checkpoints but not in Transformers.
    model_class = getattr(modeling_vilt, (config.architectures or ["ViltModel"])[0], modeling_vilt.ViltModel)
    source, unexpected = read_model(model_class, args.checkpoint)
    source |= {key: torch.empty(0) for key in unexpected}  # an error, unless the plan leaves them out by name
    ends = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    plan = vilt_plan(source, config, image_size=args.image_size, decoder_config=ends, **args.selection())
    processor, own = make_processor(tokenizer, plan.config), AutoImageProcessor.from_pretrained(args.checkpoint)
    processor.image_processor.image_mean, processor.image_processor.image_std = own.image_mean, own.image_std
    return Conversion(source, plan, processor)


PLANS = {"blip": plan_blip, "vilt": plan_vilt}


def plan_conversion(args: ConvertArguments) -> Conversion:
    """A file is ALBEF's; what a model of Transformers is, its configuration says."""
    if Path(args.checkpoint).is_file():
        return plan_albef(args)
    model_type = PreTrainedConfig.get_config_dict(args.checkpoint)[0].get("model_type")
    if model_type not in PLANS:
        raise ConversionError(
            f"--checkpoint {args.checkpoint} is a model of type {model_type!r}. What is known: files of ALBEF "
            f"({', '.join(WEIGHT_FILES)}), and models of type {', '.join(PLANS)}."
        )
    return PLANS[model_type](args)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int):
    if len(tokenizer) != vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, but the checkpoint was trained with {vocab_size}: give its "
            "own with --tokenizer."
        )


def write(model: TripsPreTrainedModel, processor: TripsProcessor, report: ConversionReport, output_dir: Path):
    """Writes everything into another folder first, so that no part of it ever stands under its own name."""
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}-") as folder:
        target = Path(folder) / "model"
        model.save_pretrained(target)
        processor.save_pretrained(target)
        (target / "conversion_report.json").write_text(json.dumps(asdict(report), indent=1), encoding="utf-8")
        target.rename(output_dir)


def main(argv: list[str] | None = None) -> ConversionReport:
    parser = HfArgumentParser(ConvertArguments, description=__doc__)
    (args,) = parser.parse_args_into_dataclasses(args=argv)
    print(f"Reading {args.checkpoint}")
    source, plan, processor = plan_conversion(args)
    check_vocabulary(processor.tokenizer, plan.config.text_config.vocab_size)
    print(f"Making a {plan.model_class} of {len(source)} weights")
    model = getattr(modeling_trips, plan.model_class)(plan.config)
    report = load_converted(model, source, plan)
    print(report)
    write(model, processor, report, Path(args.output_dir))
    print(f"Written to {args.output_dir}, with all names in conversion_report.json")
    return report


if __name__ == "__main__":
    main()
