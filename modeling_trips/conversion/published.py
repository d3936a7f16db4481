# Copyright 2026 The TRIPS for Transformers authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Published checkpoints -> TRIPS models with their processors: ALBEF's files; BLIP and ViLT by name or folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoImageProcessor, BlipForQuestionAnswering, PreTrainedConfig, PreTrainedModel
from transformers.models.vilt import modeling_vilt

from ..modeling_trips import TripsForQuestionAnswering, TripsModel
from ..modeling_trips_grounding import TripsForVisualGrounding
from ..modeling_trips_pretraining import TripsForPreTraining, TripsForRetrieval
from ..modeling_trips_text import TripsPreTrainedModel
from ..processing_trips import TripsProcessor
from .albef import ALBEF_DEPTHS, albef_plan
from .blip import blip_plan, check_blip_architecture
from .files import WEIGHT_FILES, read_weights
from .processors import load_albef_tokenizer, load_tokenizer, make_processor
from .rules import ConversionError, ConversionPlan, ConversionReport, make_converted
from .vilt import vilt_plan


class Converted(NamedTuple):
    """A model, what prepares images and texts for it, and what became of every weight."""

    model: TripsPreTrainedModel
    processor: TripsProcessor
    report: ConversionReport


class _Source(NamedTuple):
    """The weights of another model, how they become those of TRIPS, and what prepares images and texts for them."""

    weights: dict[str, torch.Tensor]
    plan: ConversionPlan
    processor: TripsProcessor


def convert_published(checkpoint: str, **options) -> Converted:
    """
    Args:
        checkpoint (`str`): a file of ALBEF, or the name on the Hub or folder of a BLIP or ViLT.
        options:
            - **tokenizer** (`str`, *optional*): name or folder of another tokenizer than bert-base-uncased for ALBEF
              and the checkpoint's own for the others.
            - **image_size** (`int`, *optional*): another resolution than the checkpoint's.
            - **task**, **num_attention_heads**, **depths**: as in [`albef_plan`], for ALBEF alone.
            - the fields of [`TripsConfig`] that set the selection.

    Raises:
        ConversionError: if the checkpoint is unknown or damaged, or its weights do not fit. It is named.
        ValueError: if an option or the tokenizer does not suit the checkpoint.
    """
    with _named_in_errors(checkpoint):
        weights, plan, processor = _read(checkpoint)(checkpoint, **options)
        num_tokens, vocab_size = len(processor.tokenizer), plan.config.text_config.vocab_size
        if num_tokens != vocab_size:
            raise ConversionError(
                f"The tokenizer has {num_tokens} tokens, but the checkpoint was trained with {vocab_size}: give its "
                "own as `tokenizer`."
            )
        model, report = make_converted(MODEL_CLASSES[plan.model_class], weights, plan)
    return Converted(model, processor, report)


@contextmanager
def _named_in_errors(checkpoint: str) -> Iterator[None]:
    try:
        yield
    except ConversionError as error:
        if str(checkpoint) in str(error):
            raise
        raise ConversionError(f"{checkpoint}: {error}") from error


def _read(checkpoint: str):
    """A file is ALBEF's; what a model of Transformers is, its configuration says."""
    if Path(checkpoint).is_file():
        return _read_albef
    model_type = PreTrainedConfig.get_config_dict(checkpoint)[0].get("model_type")
    if model_type not in READERS:
        raise ConversionError(
            f"{checkpoint} is a model of type {model_type!r}. What is known: files of ALBEF "
            f"({', '.join(WEIGHT_FILES)}), and models of type {', '.join(READERS)}."
        )
    return READERS[model_type]


def _read_albef(
    checkpoint: str,
    task: str | None = None,
    tokenizer: str | None = None,
    image_size: int | None = None,
    num_attention_heads: int | None = None,
    depths: tuple[int, int, int, int] = ALBEF_DEPTHS,
    **selection,
) -> _Source:
    weights = read_weights(checkpoint)
    own_tokenizer = load_albef_tokenizer(tokenizer or "bert-base-uncased")
    plan = albef_plan(
        weights,
        task,
        image_size,
        num_attention_heads,
        depths,
        pad_token_id=own_tokenizer.pad_token_id,
        bos_token_id=own_tokenizer.cls_token_id,
        eos_token_id=own_tokenizer.sep_token_id,
        **selection,
    )
    text_cleaning = "albef_question" if plan.model_class == "TripsForQuestionAnswering" else "albef_caption"
    return _Source(weights, plan, make_processor(own_tokenizer, plan.config, text_cleaning))


def _read_blip(
    checkpoint: str, task: str | None = None, tokenizer: str | None = None, image_size: int | None = None, **options
) -> _Source:
    _check_not_for_albef(options, "BLIP's configuration has both.")
    if task not in (None, "question-answering"):
        raise ValueError(f"`task` cannot be {task!r}: a BLIP for question answering becomes a TRIPS for it.")
    config = AutoConfig.from_pretrained(checkpoint)
    check_blip_architecture((config.architectures or [type(config).__name__])[0])
    weights, unexpected = _load(BlipForQuestionAnswering, checkpoint)
    if unexpected:
        raise ConversionError(f"{checkpoint} has weights of no BLIP: {unexpected}.")
    own_tokenizer = load_tokenizer(tokenizer or checkpoint)
    plan = blip_plan(weights, config, image_size, **options)
    return _Source(weights, plan, make_processor(own_tokenizer, plan.config))


def _read_vilt(checkpoint: str, tokenizer: str | None = None, image_size: int | None = None, **options) -> _Source:
    _check_not_for_albef(options, "ViLT's configuration has the rest, and what it becomes serves every task.")
    own_tokenizer = load_tokenizer(tokenizer or checkpoint)
    config = AutoConfig.from_pretrained(checkpoint, pad_token_id=own_tokenizer.pad_token_id)
    # "ViltForPreTraining", for one, stands in checkpoints but not in Transformers.
    model_class = getattr(modeling_vilt, (config.architectures or ["ViltModel"])[0], modeling_vilt.ViltModel)
    weights, unexpected = _load(model_class, checkpoint)
    weights |= {key: torch.empty(0) for key in unexpected}  # an error, unless the plan leaves them out by name
    ends = {"bos_token_id": own_tokenizer.cls_token_id, "eos_token_id": own_tokenizer.sep_token_id}
    plan = vilt_plan(weights, config, image_size=image_size, decoder_config=ends, **options)
    processor, own = make_processor(own_tokenizer, plan.config), AutoImageProcessor.from_pretrained(checkpoint)
    processor.image_processor.image_mean, processor.image_processor.image_std = own.image_mean, own.image_std
    return _Source(weights, plan, processor)


MODEL_CLASSES = {
    model_class.__name__: model_class
    for model_class in (
        TripsModel,
        TripsForPreTraining,
        TripsForQuestionAnswering,
        TripsForRetrieval,
        TripsForVisualGrounding,
    )
}
READERS = {"blip": _read_blip, "vilt": _read_vilt}


def _check_not_for_albef(options: dict, why: str):
    given = [name for name in ("task", "num_attention_heads", "depths") if name in options]
    if given:
        raise ValueError(f"`{'`, `'.join(given)}`: for ALBEF alone, whose file does not tell. {why}")


def _load(model_class: type[PreTrainedModel], checkpoint: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Those weights of a class of Transformers that a checkpoint has, and the keys that it has beyond them."""
    model, loaded = model_class.from_pretrained(checkpoint, use_safetensors=True, output_loading_info=True)
    weights = {key: value for key, value in model.state_dict().items() if key not in loaded["missing_keys"]}
    return weights, sorted(loaded["unexpected_keys"])
