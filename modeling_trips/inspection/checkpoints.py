"""Loading of checkpoints for tools. Files of strangers are checked before they take memory or time."""

import json
import math
from base64 import b64decode
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import get_session, validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

import modeling_trips
from modeling_trips import TripsConfig, TripsPreTrainedModel, TripsProcessor


EXPORT_MANIFEST = "export.json"
HUB_SECONDS = 5  # for the Hub to answer
MAX_JSON_BYTES = 32 << 20
CONFIGS = ("config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json")
MAX_FIELDS = 5000  # of a part of a configuration; unknown ones take time
# Fields that name other files or code.
UNCHECKED = ("configuration_files", "fusion_config", "quantization_config", "transformers_weights")
# Fields that count parts or list them. Each part has at least one weight.
COUNTS = (
    *("num_hidden_layers", "num_images", "schedule"),
    *("selection_layers", "keep_rate", "selection_guidance"),  # of earlier versions, in place of the schedule
)
SEQUENCES = ("num_beams", "num_return_sequences")  # of a generation
MAX_SEQUENCES = 64
FLOATS = ("F64", "F32", "F16", "BF16")
MAX_SETTINGS = 16_384  # characters of a tokenizer but for its vocabulary
MAX_GROWTH = 1000  # of a text by the tokenizer


def local_folder(name: str | Path, revision: str = "main") -> Path:
    """
    Return `name`, if it is a folder, or else the folder of the files of this Hub repository. The Hub is asked once; if
    it does not answer within 5 seconds, its cache is used.

    Raises:
        OSError: There is no such folder, and no such repository on the Hub or in its cache.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        validate_repo_id(str(name))
    except HFValidationError as error:
        raise FileNotFoundError(f"{name} is no folder, and no name of a repository on the Hub.") from error
    answers: list = []

    def ask():
        with suppress(Exception):  # of any kind, and the Hub is offline
            answers.append(get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS))

    asking = Thread(target=ask, daemon=True)
    asking.start()
    asking.join(HUB_SECONDS)
    try:
        folder = snapshot_download(
            str(name),
            revision=revision,
            allow_patterns=["*.json", "*.safetensors", "*.txt"],
            ignore_patterns=["*/*"],
            local_files_only=not answers,
        )
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{name} is no folder, and not in the cache of the Hub, and {constants.ENDPOINT} cannot be reached. Check "
            "the name, the network and HF_HUB_OFFLINE."
        ) from error
    return Path(folder)


def is_exported(name: str | Path) -> bool:
    """Return whether `name` is a folder that `python -m modeling_trips.export` wrote."""
    return (Path(name) / EXPORT_MANIFEST).is_file()


@contextmanager
def reading(folder: Path):
    """Raise a `ValueError` of one line, whatever Transformers raises for the files of a folder."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        cause = error.__cause__ if error.__cause__ is not None else error
        message = " ".join(str(cause).split())
        raise ValueError(f"{folder} cannot be read as a model: {type(cause).__name__}: {message:.500}") from error


def check_head(
    folder: str | Path, heads: Sequence[type[TripsPreTrainedModel]] | None = None
) -> type[TripsPreTrainedModel]:
    """
    Return the class of a checkpoint or an exported model.

    Raises:
        OSError: There is no such checkpoint.
        ValueError: Its class is none of `heads`, by default none of this project.
    """
    read_json(Path(folder) / "config.json")
    with reading(Path(folder)):
        config = AutoConfig.from_pretrained(folder)
        architecture = str((config.architectures or ["model without a head"])[0])
    model_class = getattr(modeling_trips, architecture, None)
    is_model = isinstance(model_class, type) and issubclass(model_class, TripsPreTrainedModel)
    if not is_model or model_class is TripsPreTrainedModel:
        raise ValueError(f"{folder} is a {architecture:.100}, which is not a TRIPS model.")
    if heads is not None and not issubclass(model_class, tuple(heads)):
        raise ValueError(f"{folder} is a {architecture}. Give a {' or '.join(head.__name__ for head in heads)}.")
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
        ValueError: The checkpoint is of another class, exported, damaged or an adapter; describes more than its
            weights, which is found before memory is taken, or over 64 beams; names what is not checked; or has weights
            that do not fit, are not floating-point, NaN or infinite.
    """
    folder = local_folder(name, revision)
    if is_exported(folder):
        raise ValueError(f"{name} is an exported model. Load it with `modeling_trips.export.load_exported`.")
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{name} has an adapter_config.json. Merge the adapter, and save the model without it.")
    stored = _stored_weights(folder)
    num_weights = sum(math.prod(shape) for shape, _ in stored.values())
    _check_configs(folder, num_weights, num_parts=len(stored))
    model_class = check_head(folder, heads)
    with reading(folder):
        config = model_class.config_class.from_pretrained(folder)
        with torch.device("meta"):
            described = model_class(config)
    num_described = described.num_parameters()
    if num_described > num_weights:
        raise ValueError(f"{name} describes a model of {num_described:,} weights, but has {num_weights:,}.")
    _check_weights(folder, stored, described)
    options.setdefault("use_safetensors", True)
    model, report = model_class.from_pretrained(folder, output_loading_info=True, **options)
    for problem in ("missing_keys", "unexpected_keys"):
        if report[problem]:
            keys = ", ".join(sorted(report[problem]))
            raise ValueError(f"The weights of {name} do not fit a {model_class.__name__}: {problem} {keys:.500}.")
    broken = [key for key, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"The weights of {name} are NaN or infinite in {', '.join(broken[:5])}.")
    return model.eval()


def load_processor(name: str | Path, config: TripsConfig, revision: str = "main") -> TripsProcessor:
    """
    Load the processor of a checkpoint or an exported model.

    Args:
        name (`str` or `Path`): Folder or Hub repository.
        config ([`TripsConfig`]): Configuration of its model.
        revision (`str`, *optional*, defaults to `"main"`): Branch, tag or commit on the Hub.

    Raises:
        OSError: There is no such processor.
        ValueError: The processor makes images of more than twice the model's sides; or its tokenizer has more tokens
            than the model, or makes texts more than 1,000 times as long.
    """
    folder = local_folder(name, revision)
    _check_tokenizer(folder, num_tokens=config.text_config.vocab_size)
    with reading(folder):
        processor = TripsProcessor.from_pretrained(folder)
    num_tokens = len(processor.tokenizer)
    if num_tokens > config.text_config.vocab_size:
        raise ValueError(f"The tokenizer of {name} has {num_tokens:,} tokens, more than the model.")
    image_size = config.vision_config.image_size
    longer_side = image_size if isinstance(image_size, int) else max(image_size)
    most = 2 * longer_side
    for field in ("size", "crop_size", "pad_size"):
        sides = getattr(processor.image_processor, field, None) or {}
        if max(dict(sides).values(), default=0) > most:
            raise ValueError(f"`{field}` in the processor_config.json of {name} must be at most {most} pixels a side.")
    return processor


def read_json(path: Path) -> dict:
    """Return the object of a JSON file of at most 32 MiB. A `ValueError` for another one names the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file.")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path} must have at most {MAX_JSON_BYTES:,} bytes, got {path.stat().st_size:,}.")
    try:
        content = json.loads(path.read_bytes())
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path} is not valid JSON: {error!s:.200}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(content).__name__}.")
    return content


def _stored_weights(folder: Path) -> dict[str, tuple[list[int], str]]:
    """Return the shape and the type of the stored weights, by name."""
    paths = [folder / SAFE_WEIGHTS_NAME]
    if not paths[0].is_file():
        index = folder / SAFE_WEIGHTS_INDEX_NAME
        content = read_json(index)
        files = content.get("weight_map")
        if not isinstance(files, dict) or not isinstance(content.get("metadata"), dict):
            raise ValueError(f"{index} is damaged: it must have `metadata` and a `weight_map`.")
        paths = [folder / str(file) for file in files.values()]
    stored = {}
    for path in dict.fromkeys(paths):
        try:
            with safe_open(path, "pt") as weights:
                for key in weights.keys():
                    part = weights.get_slice(key)
                    stored[key] = part.get_shape(), part.get_dtype()
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error!s:.200}") from error
    return stored


def _check_weights(folder: Path, stored: dict[str, tuple[list[int], str]], described: TripsPreTrainedModel):
    """Raise a `ValueError` for stored weights of another shape, or not of floating point where the model's are."""
    for key, tensor in described.state_dict().items():
        shape, dtype = stored.get(key, (list(tensor.shape), None))
        if shape != list(tensor.shape):
            raise ValueError(f"`{key}` in {folder} must have the shape {list(tensor.shape)}, got {shape}.")
        if dtype is not None and tensor.is_floating_point() != (dtype in FLOATS):
            raise ValueError(f"`{key}` in {folder} has the type {dtype}, which is not the model's.")


def _check_configs(folder: Path, num_weights: int, num_parts: int):
    """Check the raw configurations: they count no more parts than there are, and name nothing that is not checked."""
    for name in CONFIGS:
        path = folder / name
        if name != CONFIGS[0] and not path.exists():
            continue
        content = read_json(path)
        parts = {key: value for key, value in content.items() if isinstance(value, dict)}
        for part, fields in {"": content, **parts}.items():
            if len(fields) > MAX_FIELDS:
                raise ValueError(f"{path} must have at most {MAX_FIELDS} fields in a part, got {len(fields):,}.")
            if part in ("id2label", "label2id"):
                continue
            for field, value in fields.items():
                if field in UNCHECKED or field.startswith("__") or callable(getattr(TripsConfig, field, None)):
                    raise ValueError(f"`{field:.50}` in {path} is not supported.")
                value = value.split(",") if field == "schedule" and isinstance(value, str) else value
                number: Any = len(value) if isinstance(value, list) else value
                most = num_weights
                if field in COUNTS:
                    most = num_parts
                if field in SEQUENCES:
                    most = MAX_SEQUENCES
                is_number = isinstance(number, int | float)
                if is_number and not number <= most or field in SEQUENCES and not isinstance(number, int | None):
                    raise ValueError(
                        f"`{field}` in {path} must be at most {most:,} with {num_weights:,} weights, "
                        f"got {number!r:.50}."
                    )


def _check_tokenizer(folder: Path, num_tokens: int):
    """Raise a `ValueError` for a tokenizer of more than `num_tokens`, or one that makes a short text very long."""
    files = [folder / name for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")]
    contents = [read_json(path) for path in files if path.exists()]
    tokenizer = read_json(folder / "tokenizer.json")
    with reading(folder):
        vocabulary = {name: tokenizer["model"].pop(name, ()) for name in ("vocab", "merges")}
        vocabulary["added_tokens"] = tokenizer.pop("added_tokens", ())
    growth = 1
    for part in _nested([tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")]):
        with reading(folder):
            growth *= 1 + len(part.get("content", ""))
            if part.get("type") == "ByteLevel":
                growth *= 4
            if "precompiled_charsmap" in part:
                charsmap = b64decode(part.pop("precompiled_charsmap"))
                end_of_trie = 4 + int.from_bytes(charsmap[:4], "little")
                growth *= 1 + max(map(len, charsmap[end_of_trie:].split(b"\0")))  # what follows it replaces characters
    values = [(value, num_tokens) for value in vocabulary.values()]
    for content in contents:  # fields, among them lists of tokens
        values += [(value, max(num_tokens, MAX_FIELDS)) for value in (content, *content.values())]
    for value, most in values:
        if isinstance(value, dict | list) and len(value) > most:
            raise ValueError(
                f"The tokenizer of {folder} has {len(value):,} tokens, more than the model's {num_tokens:,}."
            )
    num_characters = len(json.dumps(tokenizer))
    if num_characters > MAX_SETTINGS or growth > MAX_GROWTH:
        raise ValueError(
            f"{folder / 'tokenizer.json'} may have {MAX_SETTINGS:,} characters beside its vocabulary and make a text "
            f"{MAX_GROWTH:,} times as long, got {num_characters:,} and {growth:,}."
        )


def _nested(value: Any) -> Iterator[dict]:
    """Yield the dictionaries in a JSON value, at any depth."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from _nested(one)
