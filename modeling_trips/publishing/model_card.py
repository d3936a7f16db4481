"""The model card of a checkpoint. Its facts come from the checkpoint, the results of its training, and the author."""

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from modeling_trips import SelectionSchedule, TripsPreTrainedModel, TripsProcessor
from modeling_trips.configuration_trips import TRANSFORMERS
from modeling_trips.inspection.diagnostics import describe_sensitivities


HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
TEMPLATE = Path(__file__).with_name("model_card_template.md")
# Entries of an `eval_results.json` that are not metrics: time, size, diagnostics of the selection, and chance level.
NOT_METRICS = re.compile(
    r"loss|runtime|model_preparation_time|\w+_per_second|samples|images|reranked_pairs"
    r"|layer\d+_\w+|patch_precision_at_random|chance_\w+|\w+_majority"
    r"|different_predictions|most_frequent_share|collapsed|unwritable_\w+"
)


# End of "A TRIPS model that", task on the Hub (the closest one), and example of a text.
HEADS = {
    "TripsForConditionalGeneration": ("describes images", "image-to-text", ""),
    "TripsForImagesAndTextClassification": ("classifies images and text", "visual-question-answering", "all are teal"),
    "TripsForPreTraining": ("is pre-trained, to be fine-tuned", "feature-extraction", "a teal picture"),
    "TripsForQuestionAnswering": ("answers questions about images", "visual-question-answering", "what color is it?"),
    "TripsForRetrieval": ("matches images with texts", "zero-shot-image-classification", "a teal picture"),
    "TripsForVisualGrounding": ("locates what a text describes", "zero-shot-object-detection", "the teal shape"),
    "TripsModel": ("has no head", "feature-extraction", "what color is it?"),
}


def make_model_card(
    model: TripsPreTrainedModel,
    processor: TripsProcessor,
    repo_id: str,
    results: Path | None = None,
    with_code: bool = True,
    with_handler: bool = False,
    datasets: list[str] | None = None,
    eval_dataset: str | None = None,
    command: str | None = None,
    **metadata,
) -> ModelCard:
    """
    Make the model card of a checkpoint.

    Args:
        model, processor (`TripsPreTrainedModel`, `TripsProcessor`): The model and its processor.
        repo_id (`str`): Repository or folder that the card's code loads.
        results (`Path`, *optional*): The `test_results.json` or `eval_results.json` of a training.
        with_code (`bool`, *optional*, defaults to `True`): Whether the checkpoint has its code, or needs this project.
        with_handler (`bool`, *optional*, defaults to `False`): Whether the repository has a `handler.py`.
        datasets (`list[str]`, *optional*): Training data; ids on the Hub become links.
        eval_dataset (`str`, *optional*): Data of the results.
        command (`str`, *optional*): Command that trained the model.
        metadata: Fields of `huggingface_hub.ModelCardData`, such as `license` and `language`.

    Raises:
        ValueError: `results` has no metric.
    """
    purpose, task, text = HEADS[type(model).__name__]
    name = repo_id.split("/")[-1]
    has_pipeline = with_code and model.pipeline_class is not None  # Transformers finds it in checkpoints only
    run = json.loads(results.read_text(encoding="utf-8")) if results else {}
    measured = read_results(run, task, eval_dataset or "unknown data") if results else []
    hub_ids = [one for one in datasets or [] if HUB_ID.fullmatch(one)]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=task if has_pipeline else None,
        tags=["trips", "token-pruning", "vision-language"] + ["custom_code"] * with_code,
        datasets=hub_ids or None,
        model_name=name if measured else None,
        eval_results=measured or None,
        **metadata,
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        repo_id=repo_id,
        model=model,
        processor=processor,
        purpose=purpose,
        task=task,
        text=text,
        has_pipeline=has_pipeline,
        with_code=with_code,
        with_handler=with_handler,
        transformers_range=TRANSFORMERS,
        datasets=datasets,
        hub_ids=hub_ids,
        command=command,
        measured=measured,
        run=run,
        sensitivities=read_sensitivities(run, model.config.vision_config.schedule),
    )


def read_sensitivities(run: dict[str, Any], schedule: SelectionSchedule) -> list[str]:
    """Return in sentences what the patches of the last selection layer depend on, if the results say so."""
    if not schedule.layers:
        return []
    split = "test" if any(name.startswith("test_") for name in run) else "eval"
    layer = f"{split}_layer{schedule.layers[-1]}"
    return describe_sensitivities(run.get(f"{layer}_text_sensitivity"), run.get(f"{layer}_image_sensitivity"))


def read_results(run: dict[str, Any], task: str, dataset: str) -> list[EvalResult]:
    """
    Return the metrics in the content of a `test_results.json` or `eval_results.json`.

    Raises:
        ValueError: It has no metric.
    """
    values = {}
    for key, value in run.items():
        if key.startswith(("eval_", "test_")):
            values[key.partition("_")[2]] = value
    metrics = {name: value for name, value in values.items() if not NOT_METRICS.fullmatch(name)}
    for name in ("exact_match", "vqa_accuracy"):
        if name in metrics and metrics[name] == metrics.get("accuracy"):
            del metrics[name]  # of data with one answer to each question, or with several to each
    if not metrics:
        raise ValueError("The results of the model have no metric, such as eval_accuracy.")
    split = "test" if any(key.startswith("test_") for key in run) else "validation"
    size = {"num_examples": values["samples"]} if "samples" in values else None
    results = []
    for name, value in metrics.items():
        result = EvalResult(
            task_type=task,
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=name,
            metric_value=value,
            dataset_split=split,
            dataset_args=size,
        )
        results.append(result)
    return results
