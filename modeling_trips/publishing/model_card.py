"""The model card of a checkpoint. Its facts come from the checkpoint, the results of its training, and the author."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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
    """End of "A TRIPS model that", task on the Hub, example of a text, and whether `pipeline` runs it."""

    purpose: str
    task: str
    text: str
    has_pipeline: bool = False


HEADS = {
    "TripsForConditionalGeneration": Head("describes images", "image-to-text", "", True),
    "TripsForImagesAndTextClassification": Head(  # the Hub's closest task
        "classifies a text with its images", "visual-question-answering", "all pictures are teal"
    ),
    "TripsForPreTraining": Head("is pre-trained, to be fine-tuned", "feature-extraction", "a teal picture"),
    "TripsForQuestionAnswering": Head(
        "answers questions about images", "visual-question-answering", "what color is it?", True
    ),
    "TripsForRetrieval": Head(
        "finds images by texts and texts by images", "zero-shot-image-classification", "a teal picture", True
    ),
    "TripsForVisualGrounding": Head(
        "finds what a text describes in an image", "zero-shot-object-detection", "the teal shape"
    ),
    "TripsModel": Head("has no head", "feature-extraction", "what color is it?"),
}


@dataclass
class CardArguments:
    """Facts for the model card that the checkpoint does not have, as the options of `push_to_hub.py`."""

    license: str | None = None
    language: list[str] | None = None
    datasets: list[str] | None = None
    eval_dataset: str | None = None
    eval_split: str | None = None
    command: str | None = None


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
        results (`Path`, *optional*): The `test_results.json` or `eval_results.json` of a training.
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
    run = json.loads(results.read_text(encoding="utf-8")) if results else {}
    machine = [run.get(name) for name in ("precision", "device_name", "cpu_capability")]
    measured = read_results(results, head.task, args) if results else []
    vision, datasets = model.config.vision_config, args.datasets or []
    data = ModelCardData(
        license=args.license,
        language=args.language,
        library_name="transformers",
        pipeline_tag=head.task if head.has_pipeline else None,
        tags=["trips", "token-pruning", "vision-language"] + ["custom_code"] * with_code,
        datasets=[one for one in datasets if HUB_ID.fullmatch(one)] or None,
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
        architecture=type(model).__name__,
        head=head,
        matches=hasattr(model, "match") and model.config.itm_weight > 0,  # otherwise its matching head was not trained
        options=", trust_remote_code=True" if with_code else "",
        with_code=with_code,
        with_handler=with_handler,
        transformers_version=transformers.__version__,
        transformers_range=TRANSFORMERS,
        image_size=[patches * side for patches, side in zip(vision.grid_size, vision.patch_shape)],
        text_length=processor.max_text_length(model.config),
        selection=vision.schedule.by_layer,
        datasets=[
            f"[{one}](https://huggingface.co/datasets/{one})" if HUB_ID.fullmatch(one) else one for one in datasets
        ],
        command=args.command,
        measured=measured,
        machine="{} on {} ({})".format(*machine) if all(machine) else None,
    )


def read_results(path: Path, task: str, args: CardArguments) -> list[EvalResult]:
    """
    Return the metrics of a `test_results.json` or `eval_results.json`.

    Raises:
        ValueError: The file has no metric.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    values = {key.partition("_")[2]: value for key, value in content.items() if key.startswith(("eval_", "test_"))}
    metrics = {name: value for name, value in values.items() if not NOT_METRICS.fullmatch(name)}
    if not metrics:
        raise ValueError(f"{path} has no metric. Give a file with names such as eval_accuracy.")
    split = "test" if path.name.startswith("test") else "validation"
    dataset = args.eval_dataset or "unknown data"
    facts: dict[str, Any] = {
        "dataset_type": dataset,
        "dataset_name": dataset,
        "dataset_split": args.eval_split or split,
        "dataset_args": {"num_examples": values["samples"]} if "samples" in values else None,
    }
    return [EvalResult(task, metric_type=name, metric_value=value, **facts) for name, value in metrics.items()]
