"""
The model card of a checkpoint. Its facts come from the configuration, a forward pass, the results of the training run,
and the author. A fact that none of them states is marked as unknown.
"""

import argparse
import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image
import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from modeling_trips import TripsPreTrainedModel, TripsProcessor
from modeling_trips.configuration_trips import TRANSFORMERS


TEMPLATE = Path(__file__).with_name("model_card_template.md")
# Entries of an `eval_results.json` that are not metrics: time, size, diagnostics of the selection, and chance level.
NOT_METRICS = re.compile(
    r"loss|runtime|model_preparation_time|\w+_per_second|samples|images|reranked_pairs"
    r"|layer\d+_\w+|patch_precision_at_random|chance_\w+|\w+_majority"
    r"|different_predictions|most_frequent_share|collapsed|\w+_with_lost_signs"
)


class Head(NamedTuple):
    """End of "A TRIPS model that", task on the Hub, Auto class, example of a text, and whether `pipeline` runs it."""

    purpose: str
    task: str
    auto_class: str
    text: str
    has_pipeline: bool = False


# fmt: off
HEADS = {
    "TripsForConditionalGeneration": Head(
        "describes images", "image-to-text", "AutoModelForImageTextToText", "", True
    ),
    "TripsForImagesAndTextClassification": Head(
        "classifies a text with its images", "visual-question-answering",  # the Hub's closest task
        "AutoModelForSequenceClassification", "all pictures are teal",
    ),
    "TripsForPreTraining": Head(
        "is pre-trained, to be fine-tuned", "feature-extraction", "AutoModelForPreTraining", "a teal picture"
    ),
    "TripsForQuestionAnswering": Head(
        "answers questions about images", "visual-question-answering", "AutoModelForVisualQuestionAnswering",
        "what color is it?", True,
    ),
    "TripsForRetrieval": Head(
        "finds images by texts and texts by images", "zero-shot-image-classification",
        "AutoModelForZeroShotImageClassification", "a teal picture", True,
    ),
    "TripsForVisualGrounding": Head(
        "finds what a text describes in an image", "zero-shot-object-detection",
        "AutoModelForZeroShotObjectDetection", "the teal shape",
    ),
    "TripsModel": Head("has no head", "feature-extraction", "AutoModel", "what color is it?"),
}
# fmt: on


@dataclass
class CardArguments:
    """Facts for the model card that the checkpoint does not have."""

    license: str | None = field(default=None, metadata={"help": "License of the weights, as in apache-2.0."})
    language: list[str] | None = field(default=None, metadata={"help": "ISO 639 codes of the texts, as in en."})
    datasets: list[str] | None = field(default=None, metadata={"help": "Training data. Default: names of its files."})
    eval_dataset: str | None = field(default=None, metadata={"help": "Evaluation data. Default: name of its file."})
    eval_split: str | None = field(default=None, metadata={"help": "Evaluation split. Default: that of the results."})
    command: str | None = field(default=None, metadata={"help": "Command that trained the model."})


def make_model_card(
    model: TripsPreTrainedModel,
    processor: TripsProcessor,
    repo_id: str,
    args: CardArguments,
    results: Path | None = None,
    former: ModelCard | None = None,
    with_code: bool = True,
    with_handler: bool = False,
) -> ModelCard:
    """
    Make the model card of a checkpoint.

    Args:
        model (`TripsPreTrainedModel`): The model.
        processor (`TripsProcessor`): The model's processor.
        repo_id (`str`): Repository or folder that the card's code loads.
        args (`CardArguments`): Facts that the checkpoint does not have.
        results (`Path`, *optional*):
            The `test_results.json` or `eval_results.json` of a training. A `train_results.json` beside it names the
            training data.
        former (`ModelCard`, *optional*): Earlier card of the same weights, for what nothing else states.
        with_code (`bool`, *optional*, defaults to `True`): Whether the checkpoint has the code of its classes.
            Otherwise it needs this project.
        with_handler (`bool`, *optional*, defaults to `False`): Whether the repository has a `handler.py`.

    Returns:
        `ModelCard`

    Raises:
        ValueError: `results` has no metric.
    """
    head, name = HEADS[type(model).__name__], repo_id.split("/")[-1]
    if not with_code:
        head = head._replace(has_pipeline=False)  # Transformers finds these pipelines in checkpoints only
    known: Any = former.data if former else ModelCardData()  # its fields are set by name
    measured = read_results(results, head.task, args) if results else known.eval_results or []
    inputs = processor(images=PIL.Image.new("RGB", (64, 64)), text="what is it?", return_tensors="pt")
    with torch.no_grad():
        outputs = model.eval().base_model(**inputs, output_hidden_states=True)
    data = ModelCardData(
        license=args.license or known.license,
        language=args.language or known.language,
        library_name="transformers",
        pipeline_tag=head.task if head.has_pipeline else None,
        tags=["trips", "token-pruning", "vision-language"] + ["custom_code"] * with_code,
        datasets=[dataset for dataset in args.datasets or [] if _is_hub_id(dataset)] or known.datasets,
        metrics=[result.metric_type for result in measured] or None,
        model_name=name if measured else None,
        eval_results=measured or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        repo_id=repo_id,
        model=model,
        config=model.config,
        architecture=type(model).__name__,
        head=head,
        matches=hasattr(model, "match") and model.config.itm_weight > 0,  # otherwise its matching head was not trained
        options=", trust_remote_code=True" if with_code else "",
        with_code=with_code,
        with_handler=with_handler,
        transformers_version=transformers.__version__,
        transformers_range=TRANSFORMERS,
        image_size=inputs["pixel_values"].shape[-2:],
        text_length=processor.max_text_length(model.config),
        selection=model.config.vision_config.schedule.by_layer,
        tokens=[states.shape[1] for states in outputs.vision_model_output.hidden_states],
        training_data=_training_data(args, results) or _section(former, "Training data") or "Unknown.",
        measured=measured,
        machine=_machine_of(results) if results else None,
    )


def read_results(path: Path, task: str, args: CardArguments) -> list[EvalResult]:
    """
    Return the metrics of a `test_results.json` or `eval_results.json`. The command in the file names the data.

    Raises:
        ValueError: The file has no metric.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    values = {key.partition("_")[2]: value for key, value in content.items() if key.startswith(("eval_", "test_"))}
    metrics = {name: value for name, value in values.items() if not NOT_METRICS.fullmatch(name)}
    if not metrics:
        raise ValueError(f"{path} has no metric. Give a file with names such as eval_accuracy.")
    split = "test" if path.name.startswith("test") else "validation"
    only = args.datasets[0] if args.datasets and len(args.datasets) == 1 else None
    dataset = args.eval_dataset or only or _data_of_run(content, split) or "unknown data"
    return [
        EvalResult(
            task_type=task,
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=args.eval_split or split,
            dataset_args={"num_examples": values["samples"]} if "samples" in values else None,
            metric_type=name,
            metric_value=value,
        )
        for name, value in metrics.items()
    ]


def _machine_of(results: Path) -> str | None:
    """Return precision and processor of a run in words, if its file of results has them."""
    content = json.loads(results.read_text(encoding="utf-8"))
    facts = [content.get(name) for name in ("precision", "device_name", "cpu_capability")]
    return "{} on {} ({})".format(*facts) if all(facts) else None


def _data_of_run(results: dict, split: str) -> str | None:
    """Return the data of a split, by the command in a file of results: the name of a file without its folder."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{split}_file", f"--{split}-file", dest="file")
    parser.add_argument("--dataset_name", "--dataset-name", dest="name")
    options, _ = parser.parse_known_args(shlex.split(results.get("command") or ""))
    name = options.file or options.name
    return Path(name).name if name and (options.file or Path(name).exists()) else name


def _training_data(args: CardArguments, results: Path | None) -> str:
    """Return the section on the training data, empty if neither the author nor the run's files name them."""
    names = args.datasets or []
    if not names and results:
        record = results.with_name("train_results.json")
        content = json.loads((record if record.is_file() else results).read_text(encoding="utf-8"))
        names = [name] if (name := _data_of_run(content, "train")) else []
    links = [
        f"- [{name}](https://huggingface.co/datasets/{name})" if _is_hub_id(name) else f"- {name}" for name in names
    ]
    return "\n".join(links + [f"\nMade by `{args.command}`."] * bool(args.command))


def _is_hub_id(name: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name))


def _section(card: ModelCard | None, title: str) -> str | None:
    match = re.search(rf"^## {title}\n+(.*?)\n+## ", card.text, re.MULTILINE | re.DOTALL) if card else None
    return match[1] if match else None
