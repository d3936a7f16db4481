"""
The model card of a published checkpoint, made from its configuration, a forward pass and files of measurements. Facts
that none of them has are marked as unknown.
"""

import copy
import json
import logging
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import PIL.Image
import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.dynamic_module_utils import get_relative_import_files

from modeling_trips import TripsConfig, TripsPreTrainedModel, TripsProcessor
from modeling_trips.configuration_trips import BEYOND, LOWEST, NEWEST_TESTED

from ..inspection.plan import plan_schedules
from .sentence_transformers import CROSS_ENCODER, SENTENCE_TRANSFORMER


logger = logging.getLogger(__name__)

TYPICAL_TEXT_LENGTH = 40  # tokens, as the paper counts
TEMPLATE = Path(__file__).with_name("model_card_template.md")
GUIDANCES = {
    "cls": "the text's [CLS] token",
    "mean": "the mean of the text's tokens",
    "image": "the image's own [CLS] token",
    "random": "chance",
}
# The Hub's task for a repository of Sentence Transformers, by the class that loads it.
HUB_TASKS = {SENTENCE_TRANSFORMER: "feature-extraction", CROSS_ENCODER: "text-ranking"}
# What an `eval_results.json` holds besides metrics.
NOT_METRICS = re.compile(
    r"loss|runtime|model_preparation_time|\w+_per_second|samples|images|reranked_pairs"  # the run's size and speed
    r"|layer\d+_\w+|patch_precision_at_random"  # what the selection does
    r"|chance_\w+|\w+_majority"  # what guessing would get
)


class Head(NamedTuple):
    """
    Purpose of a model.

    Args:
        purpose (`str`): End of the sentence that begins with "A TRIPS model".
        task (`str`): The closest of the Hub's tasks.
        text (`str`): Example of a text.
        has_pipeline (`bool`): Whether `pipeline(task)` runs the model. Otherwise only the metrics name the task.
    """

    purpose: str
    task: str
    text: str
    has_pipeline: bool = False


HEADS = {
    "TripsForConditionalGeneration": Head(" that describes images", "image-to-text", "", has_pipeline=True),
    # Whether a statement is true is a question about images, too: there is no task of statements.
    "TripsForImagesAndTextClassification": Head(
        " that classifies a text together with its images", "visual-question-answering", "all pictures are teal"
    ),
    "TripsForPreTraining": Head(
        " as pre-training leaves it, to be fine-tuned", "feature-extraction", "a teal picture"
    ),
    "TripsForQuestionAnswering": Head(
        " that answers questions about images", "visual-question-answering", "what color is it?", has_pipeline=True
    ),
    "TripsForRetrieval": Head(
        " that finds images by texts and texts by images",
        "zero-shot-image-classification",
        "a teal picture",
        has_pipeline=True,
    ),
    "TripsForVisualGrounding": Head(
        " that finds what a text describes in an image", "zero-shot-object-detection", "the teal shape"
    ),
    "TripsModel": Head(" without a head", "feature-extraction", "what color is it?"),
}


class DatasetName(NamedTuple):
    """A data set as the command line names it: "easy-VQA", or "VQAv2=org/vqa_v2" with its id on the Hub."""

    name: str
    hub_id: str | None

    @classmethod
    def parse(cls, text: str) -> "DatasetName":
        name, _, hub_id = text.partition("=")
        return cls(name, hub_id or None)

    @property
    def link(self) -> str:
        return f"[{self.name}](https://huggingface.co/datasets/{self.hub_id})" if self.hub_id else self.name


@dataclass
class CardArguments:
    license: str | None = field(default=None, metadata={"help": "License of the weights, as in apache-2.0."})
    language: list[str] | None = field(default=None, metadata={"help": "ISO 639 codes of the texts: --language en"})
    datasets: list[str] | None = field(
        default=None, metadata={"help": "Training data: names, with =id if on the Hub, as in VQAv2=org/vqa_v2."}
    )
    eval_dataset: str | None = field(
        default=None, metadata={"help": "Evaluation data. Default: --datasets, if it is one."}
    )
    eval_split: str | None = field(default=None, metadata={"help": "Evaluation split, as in test."})
    results: str | None = field(
        default=None, metadata={"help": "File of metrics. Default: test_results.json or eval_results.json."}
    )
    command: str | None = field(default=None, metadata={"help": "Command that trained the model."})
    speed: str | None = field(
        default=None,
        metadata={"help": "Rows of benchmarks/benchmark.py for this size and schedule."},
    )

    @property
    def train_datasets(self) -> list[DatasetName]:
        return [DatasetName.parse(text) for text in self.datasets or []]

    @property
    def evaluated_on(self) -> DatasetName | None:
        if self.eval_dataset is not None:
            return DatasetName.parse(self.eval_dataset)
        return self.train_datasets[0] if len(self.train_datasets) == 1 else None


def read_metrics(path: Path) -> tuple[dict[str, float], int | None]:
    """Return the metrics of an `eval_results.json` or `test_results.json`, and the number of examples if known."""
    results = json.loads(path.read_text(encoding="utf-8"))
    named = (re.fullmatch("(?:eval|test)_(.*)", name) for name in results)
    results = {name[1]: results[name[0]] for name in named if name}
    metrics = {name: value for name, value in results.items() if not NOT_METRICS.fullmatch(name)}
    if not metrics:
        raise ValueError(f"{path} holds no metric: names as in eval_accuracy are expected, as `Trainer` saves them.")
    return metrics, results.get("samples")


def headline_metrics(metrics: dict[str, float]) -> dict[str, float]:
    """
    Return the metrics that a card lists: all but the recalls by features alone, of which it lists the mean where there
    is no matching, and but for an exact match that is the accuracy.
    """
    mean = [] if "r_mean" in metrics else ["features_r_mean"]
    left_out = {"exact_match"} if metrics.get("exact_match") == metrics.get("accuracy") else set()
    return {
        name: value
        for name, value in metrics.items()
        if name in mean or not name.startswith("features_") and name not in left_out
    }


def read_speed(path: Path, config: TripsConfig, image_size: tuple[int, int]) -> list[dict]:
    """
    Return the rows of the benchmark that were measured at this model's size, resolution and schedule.

    Raises:
        ValueError: There is no such row.
    """
    rows = json.loads(path.read_text(encoding="utf-8"))
    rows = [rows] if isinstance(rows, dict) else rows
    fitting = [row for row in rows if _setting(row) == _own_setting(config, image_size)]
    if not fitting:
        raise ValueError(
            f"--speed {path}: none of its rows was measured at this model's size, {image_size[0]} x {image_size[1]} "
            f"pixels and with its schedule, {config.vision_config.schedule}. Measure it with "
            "benchmarks/benchmark.py."
        )
    return fitting


def _setting(row: dict) -> tuple:
    """Return size, resolution and schedule of a row of the benchmark."""
    options = {name: row[name] for name in ("selection_layers", "keep_rate", "selection_guidance") if name in row}
    return _own_setting(TripsConfig.from_preset(row["preset"], **options), (row["image_size"], row["image_size"]))


def _own_setting(config: TripsConfig, image_size: tuple[int, int]) -> tuple:
    parts = (config.vision_config, config.text_config, config.fusion_encoder_config)
    sizes = [(part.hidden_size, part.intermediate_size, part.num_hidden_layers) for part in parts]
    vision = config.vision_config
    return sizes, vision.patch_shape, image_size, vision.schedule


def count_cost(config: TripsConfig, image_size: tuple[int, int], text_length: int) -> dict[int, float]:
    """Return the MACs of the schedule over those of the unpruned model, by the number of texts per image."""
    config = copy.deepcopy(config)
    config.vision_config.image_size = image_size
    (row,) = plan_schedules(config, [config.vision_config.schedule], [1, 10], text_length)
    return row.ratios


def auto_class_of(config: TripsConfig) -> str:
    """Return the Auto class that loads the checkpoint with its own head."""
    own = [name for name, reference in config.auto_map.items() if reference.endswith(f".{config.architectures[0]}")]
    return own[-1] if own else "AutoModel"  # that of its task behind the one of any


def look_once(model: TripsPreTrainedModel, processor: TripsProcessor) -> tuple[tuple[int, int], list[int]]:
    """
    Run the model on a blank image. Return the image's height and width, and the number of tokens after each vision
    layer.
    """
    inputs = processor(images=PIL.Image.new("RGB", (64, 64)), text="what is it?", return_tensors="pt")
    with torch.no_grad():
        outputs = model.eval().base_model(**inputs, output_hidden_states=True)
    height, width = inputs["pixel_values"].shape[-2:]
    return (height, width), [states.shape[1] for states in outputs.vision_model_output.hidden_states]


def in_words(config: TripsConfig, guidance: str) -> str:
    """Describe a value of `selection_guidance`."""
    return GUIDANCES[config.text_config.pooling_mode if guidance == "text" else guidance]


def describe_selection(config: TripsConfig, tokens: list[int]) -> list[dict]:
    """Return a row per selection layer. `tokens[n]` is the number of tokens after layer n."""
    return [
        {
            "layer": layer,
            "guidance": in_words(config, selection.guidance),
            "keep_rate": selection.keep_rate,
            "tokens_before": tokens[layer - 1],
            "tokens_after": tokens[layer],
        }
        for layer, selection in config.vision_config.schedule.by_layer.items()
    ]


def code_of(model_class: type[TripsPreTrainedModel]) -> list[Path]:
    """Return the files of code in a checkpoint of a class: its module and the modules that it imports."""
    module = sys.modules[model_class.__module__].__file__
    return sorted({Path(module), *map(Path, get_relative_import_files(module))})


def make_metadata(
    name: str,
    head: Head,
    args: CardArguments,
    metrics: dict[str, float],
    with_code: bool,
    sentence_transformers: str | None = None,
) -> ModelCardData:
    """Return the card's YAML. Without the name of the data set there is no `model-index`."""
    evaluated_on, results = args.evaluated_on, []
    if metrics and evaluated_on is None:
        logger.warning("The metrics go into the text only: name what they were measured on with --eval_dataset.")
    elif metrics:
        results = [
            EvalResult(
                task_type=head.task,
                dataset_type=evaluated_on.hub_id or evaluated_on.name,
                dataset_name=evaluated_on.name,
                dataset_split=args.eval_split,
                metric_type=metric,
                metric_value=value,
            )
            for metric, value in metrics.items()
        ]
    tags = ["custom_code"] if with_code else []
    if sentence_transformers:
        tags += ["sentence-transformers", HUB_TASKS[sentence_transformers]]
    return ModelCardData(
        license=args.license,
        language=args.language,
        library_name="sentence-transformers" if sentence_transformers else "transformers",
        pipeline_tag=HUB_TASKS.get(sentence_transformers, head.task if head.has_pipeline else None),
        tags=["trips", "token-pruning", "vision-language", *tags],
        datasets=[dataset.hub_id for dataset in args.train_datasets if dataset.hub_id] or None,
        metrics=list(headline_metrics(metrics)) or None,
        model_name=name if results else None,
        eval_results=results or None,
    )


def make_model_card(
    model: TripsPreTrainedModel,
    processor: TripsProcessor,
    repo_id: str,
    args: CardArguments,
    results: Path | None = None,
    revision: str = "main",
    with_code: bool = True,
    sentence_transformers: str | None = None,
    with_handler: bool = False,
) -> ModelCard:
    """
    Make the model card of a checkpoint.

    Args:
        model (`TripsPreTrainedModel`): The saved model. Saving writes the place of the code to its configuration.
        processor (`TripsProcessor`): The model's processor.
        repo_id (`str`): Repository or folder that the card's code loads.
        args (`CardArguments`): Facts that the configuration does not have.
        results (`Path`, *optional*): An `eval_results.json`. Without one, the card says that nothing was measured.
        revision (`str`, *optional*, defaults to `"main"`): Branch that the card's code loads.
        with_code (`bool`, *optional*, defaults to `True`): Whether the checkpoint has the code of its classes.
            Otherwise it needs this project.
        sentence_transformers (`str`, *optional*): Class of Sentence Transformers that loads the repository:
            `"SentenceTransformer"` or `"CrossEncoder"`.
        with_handler (`bool`, *optional*, defaults to `False`): Whether the repository has a `handler.py`.

    Returns:
        `ModelCard`

    Raises:
        ValueError: `results` has no metric, or no row of `args.speed` fits the model.
    """
    code = code_of(type(model))
    config, name = model.config, repo_id.split("/")[-1]
    head, auto_class = HEADS[config.architectures[0]], auto_class_of(config)
    options = ", trust_remote_code=True" if with_code else ""
    if revision != "main":
        options += f', revision="{revision}"'
    if not with_code:
        head = head._replace(has_pipeline=False)  # by the tasks' names, Transformers finds them in checkpoints alone
    metrics, num_examples = read_metrics(results) if results else ({}, None)
    image_size, tokens = look_once(model, processor)
    text_length = processor.max_text_length(config)
    counted_length = min(text_length, TYPICAL_TEXT_LENGTH)
    measured_on = [args.evaluated_on.link if args.evaluated_on else "unknown data", args.eval_split or "unknown split"]
    measured_on.append(f"{num_examples:,} examples" if num_examples else "unknown number of examples")
    return ModelCard.from_template(
        make_metadata(name, head, args, metrics, with_code, sentence_transformers),
        template_path=str(TEMPLATE),
        name=name,
        repo_id=repo_id,
        config=config,
        vision=config.vision_config,
        architecture=type(model).__name__,
        head=head,
        generates=model.can_generate(),
        matches=hasattr(model, "match") and config.itm_weight > 0,  # or its matching head was not trained
        has_decoder=hasattr(model, "decoder"),
        auto_class=auto_class,
        imports=sorted([auto_class, "AutoProcessor"]) + (["pipeline"] if head.has_pipeline else []),
        options=options,
        with_code=with_code,
        sentence_transformers=sentence_transformers,
        with_handler=with_handler,
        command=args.command,
        transformers_version=transformers.__version__,
        transformers_range=f"transformers>={LOWEST},<{BEYOND}",
        transformers_tested=NEWEST_TESTED,
        num_code_files=len(code),
        num_code_lines=sum(len(path.read_text(encoding="utf-8").splitlines()) for path in code),
        num_parameters=model.num_parameters(),
        dtype=str(model.dtype).removeprefix("torch."),
        image_size=image_size,
        patches=[pixels // patch for pixels, patch in zip(image_size, config.vision_config.patch_shape)],
        text_length=text_length,
        counted_length=counted_length,
        cost={number: f"{ratio:.2f}" for number, ratio in count_cost(config, image_size, counted_length).items()},
        guidance=" or ".join(
            in_words(config, guidance) for guidance in sorted({*config.vision_config.selection_guidances})
        ),
        selection=describe_selection(config, tokens),
        train_datasets=args.train_datasets,
        languages=", ".join(args.language or []),
        measures={metric: f"{value:.4f}" for metric, value in headline_metrics(metrics).items()},
        measured_on=", ".join(measured_on),
        speed=read_speed(Path(args.speed), config, image_size) if args.speed else [],
    )
