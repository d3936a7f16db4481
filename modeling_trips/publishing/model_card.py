"""
The model card of a checkpoint. Its facts come from the configuration, a forward pass, the results of the training run,
and the author.
"""

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


HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
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
        results (`Path`, *optional*): The `test_results.json` or `eval_results.json` of a training. It and a
            `train_results.json` beside it name the data.
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
    measured = read_results(results, head.task, args) if results else []
    inputs = processor(images=PIL.Image.new("RGB", (64, 64)), text="what is it?", return_tensors="pt")
    with torch.no_grad():
        outputs = model.eval().base_model(**inputs, output_hidden_states=True)
    trained_on = args.datasets or (_training_data(results) if results else [])
    data = ModelCardData(
        license=args.license,
        language=args.language,
        library_name="transformers",
        pipeline_tag=head.task if head.has_pipeline else None,
        tags=["trips", "token-pruning", "vision-language"] + ["custom_code"] * with_code,
        datasets=[dataset for dataset in args.datasets or [] if HUB_ID.fullmatch(dataset)] or None,
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
        datasets=[
            f"[{one}](https://huggingface.co/datasets/{one})" if HUB_ID.fullmatch(one) else one for one in trained_on
        ],
        command=args.command,
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
    dataset = args.eval_dataset or _data_of_run(content, split) or "unknown data"
    facts: dict[str, Any] = {
        "dataset_type": dataset,
        "dataset_name": dataset,
        "dataset_split": args.eval_split or split,
    }
    if "samples" in values:
        facts["dataset_args"] = {"num_examples": values["samples"]}
    return [EvalResult(task, metric_type=name, metric_value=value, **facts) for name, value in metrics.items()]


def _machine_of(results: Path) -> str | None:
    """Return precision and processor of a run in words, if its file of results has them."""
    content = json.loads(results.read_text(encoding="utf-8"))
    facts = [content.get(name) for name in ("precision", "device_name", "cpu_capability")]
    return "{} on {} ({})".format(*facts) if all(facts) else None


def _data_of_run(results: dict, split: str) -> str | None:
    """Return the data of a split, by the command in a file of results: the name of a file without its folder."""
    words = shlex.split((results.get("command") or "").replace("=", " "))
    given = {word.lstrip("-").replace("-", "_"): value for word, value in zip(words, words[1:])}
    if file := given.get(f"{split}_file"):
        return Path(file).name
    return given.get("dataset_name")


def _training_data(results: Path) -> list[str]:
    record = results.with_name("train_results.json")
    content = json.loads((record if record.is_file() else results).read_text(encoding="utf-8"))
    return [name] if (name := _data_of_run(content, "train")) else []
