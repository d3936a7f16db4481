"""Loading of checkpoints for tools, with checks of the head and the weights."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

import modeling_trips
from modeling_trips import TripsConfig, TripsPreTrainedModel, TripsProcessor


EXPORT_MANIFEST = "export.json"
# Fields of a configuration that count parts or list them. Each part has at least one weight.
COUNTS = ("num_hidden_layers", "num_images", "num_labels", "schedule")
COUNTS += ("selection_layers", "keep_rate", "selection_guidance")  # of earlier versions, in place of the schedule
MAX_SEQUENCES = 64  # beams and returned sequences of a generation


def is_exported(name: str | Path) -> bool:
    """Return whether `name` is a folder that `python -m modeling_trips.export` wrote."""
    return (Path(name) / EXPORT_MANIFEST).is_file()


def check_head(
    name: str | Path, heads: Sequence[type[TripsPreTrainedModel]] | None = None, revision: str = "main"
) -> type[TripsPreTrainedModel]:
    """
    Return the class of a checkpoint or an exported model.

    Raises:
        OSError: There is no such checkpoint.
        ValueError: Its class is none of `heads`, by default none of this project.
    """
    config = AutoConfig.from_pretrained(name, revision=revision)
    architecture = (getattr(config, "architectures", None) or ["model without a head"])[0]
    model_class = getattr(modeling_trips, architecture, None)
    if not (isinstance(model_class, type) and issubclass(model_class, TripsPreTrainedModel)):
        raise ValueError(f"{name} is a {architecture}, which is not a TRIPS model.")
    if heads is not None and not issubclass(model_class, tuple(heads)):
        raise ValueError(f"{name} is a {architecture}. Give a {' or '.join(head.__name__ for head in heads)}.")
    return model_class


def load_checkpoint(
    name: str | Path, heads: Sequence[type[TripsPreTrainedModel]] | None = None, revision: str = "main", **options
) -> TripsPreTrainedModel:
    """
    Load a trained model in its saved class and in evaluation mode.

    Args:
        name (`str` or `Path`): Folder or Hub repository of a checkpoint.
        heads (`Sequence[type]`, *optional*): Accepted model classes. By default every model of this project.
        revision (`str`, *optional*, defaults to `"main"`): Branch, tag or commit on the Hub.
        options: Passed to `from_pretrained`, such as `dtype` or `schedule`.

    Raises:
        OSError: There is no such checkpoint.
        ValueError: The checkpoint is of another class or exported; describes more than its weights, which is found
            before memory is taken, or over 64 beams; or has weights that do not fit, are NaN or infinite.
    """
    if is_exported(name):
        raise ValueError(f"{name} is an exported model. Load it with `modeling_trips.export.load_exported`.")
    num_weights = _check_counts(name, revision)
    model_class = check_head(name, heads, revision)
    config = model_class.config_class.from_pretrained(name, revision=revision)
    with torch.device("meta"):
        num_described = model_class(config).num_parameters()
    if num_described > num_weights:
        raise ValueError(f"{name} describes a model of {num_described:,} weights, but has {num_weights:,}.")
    model, report = model_class.from_pretrained(name, revision=revision, output_loading_info=True, **options)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            raise ValueError(
                f"The weights of {name} do not fit a {model_class.__name__}: {problem} {sorted(report[problem])}."
            )
    broken = [key for key, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"The weights of {name} are NaN or infinite in {', '.join(broken[:5])}.")
    generation_config = getattr(model, "generation_config", None)
    for field in ("num_beams", "num_return_sequences"):
        num_sequences = getattr(generation_config, field, None) or 1
        if num_sequences > MAX_SEQUENCES:
            raise ValueError(f"`{field}` in the generation_config.json of {name} must be at most {MAX_SEQUENCES}.")
    return model.eval()


def load_processor(name: str | Path, config: TripsConfig, revision: str = "main") -> TripsProcessor:
    """
    Load the processor of a checkpoint or an exported model.

    Args:
        name (`str` or `Path`): Folder or Hub repository.
        config ([`TripsConfig`]): Configuration of its model.
        revision (`str`, *optional*, defaults to `"main"`): Branch, tag or commit on the Hub.

    Raises:
        ValueError: The processor makes images of more than twice the model's sides.
    """
    processor = TripsProcessor.from_pretrained(name, revision=revision)
    image_size = config.vision_config.image_size
    longer_side = image_size if isinstance(image_size, int) else max(image_size)
    most = 2 * longer_side
    for field in ("size", "crop_size", "pad_size"):
        sides = getattr(processor.image_processor, field, None) or {}
        if max(dict(sides).values(), default=0) > most:
            raise ValueError(f"`{field}` in the processor_config.json of {name} must be at most {most} pixels a side.")
    return processor


def _check_counts(name: str | Path, revision: str) -> int:
    """Return the number of weights of a checkpoint, and check that the raw configuration counts no more parts."""
    content, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
    shapes = list(_weight_shapes(name, revision))
    num_weights = sum(math.prod(shape) for shape in shapes)
    sub_configs = [value for value in content.values() if isinstance(value, dict)]
    for fields in (content, *sub_configs):
        for field in COUNTS:
            value: Any = fields.get(field, 0)
            value = value.split(",") if isinstance(value, str) else value
            number = len(value) if isinstance(value, list) else value
            if not isinstance(number, int | float):
                continue
            most = num_weights if field == "num_labels" else len(shapes)
            if number > most:
                raise ValueError(f"`{field}` in the config.json of {name} is {number:,}, but it has {most:,} weights.")
    return num_weights


def _weight_shapes(name: str | Path, revision: str) -> Iterator[list[int]]:
    """Yield the shapes of the stored weights."""
    quiet: Any = {"_raise_exceptions_for_missing_entries": False}
    paths = [cached_file(name, SAFE_WEIGHTS_NAME, revision=revision, **quiet)]
    if paths == [None]:
        index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, revision=revision)
        paths, _ = get_checkpoint_shard_files(name, index, revision=revision)
    for path in paths:
        with safe_open(path, "pt") as weights:
            for key in weights.keys():
                yield weights.get_slice(key).get_shape()
