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
"""TRIPS configuration: a vision, a text, a fusion and a decoder part. Patch selection belongs to the vision part."""

from .versions_trips import check_release as check_release  # isort: skip

import copy
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.utils import auto_docstring

from .configuration_trips_parts import (
    TripsDecoderConfig,
    TripsFusionConfig,
    TripsTextConfig,
    TripsVisionConfig,
    validate_numbers,
)


SELECTION_FIELDS = (
    "selection_layers",
    "keep_rate",
    "selection_mode",
    "selection_mass",
    "min_keep_rate",
    "selection_guidance",
    "fuse_inattentive_tokens",
    "normalize_fusion_weights",
    "selection_seed",
)
FUSION_FIELDS = ("fusion_type", "skip_stride")

# Fields of a part that are fields of `TripsConfig` too.
FORWARDED_FIELDS = {"vision_config": (*SELECTION_FIELDS, "image_size"), "fusion_encoder_config": FUSION_FIELDS}

# Fields that configurations of version 0.1.0 have, and the values that changed nothing but training.
FORMER_FIELDS = {
    "honest_negatives": (True, False),
    "honest_masking": (True, False),
    "contrastive_selection": ("image", "text"),
}

# What the fusion encoder and the decoder take from the text encoder unless they are told otherwise.
FIELDS_SHARED_WITH_TEXT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "max_position_embeddings",
    "type_vocab_size",
    "layer_norm_eps",
    "initializer_range",
    "pad_token_id",
)


@auto_docstring(
    custom_intro="""
    Configuration of a [`TripsModel`] and of the models with a head. The defaults are the paper's: ViT-B/16 that keeps
    70% of its tokens after layers 5 and 10, and a BERT-base split into 6 text and 6 fusion layers.
    """
)
@strict
class TripsConfig(PreTrainedConfig):
    r"""
    fusion_encoder_config (`dict` or `TripsFusionConfig`, *optional*):
        The fusion encoder. What is not given is taken from `text_config` (but for `num_hidden_layers`).
    decoder_config (`dict` or `TripsDecoderConfig`, *optional*):
        The text decoder of the generative heads. What is not given is taken from `text_config` (but for
        `num_hidden_layers`).
    projection_dim (`int`, *optional*, defaults to 256):
        Width of the features of images and texts that retrieval compares.
    itc_weight (`float`, *optional*, defaults to 1.0):
        Weight of image-text contrast, in retrieval and pre-training. 0 turns an objective off and skips its compute.
    itm_weight (`float`, *optional*, defaults to 1.0):
        Weight of image-text matching, in retrieval and pre-training.
    mlm_weight (`float`, *optional*, defaults to 1.0):
        Weight of masked language modelling in pre-training.
    prefix_lm_weight (`float`, *optional*, defaults to 1.0):
        Weight of prefix language modelling in pre-training.
    answer_ranking (`str`, *optional*, defaults to `"likelihood"`):
        What [`TripsForQuestionAnswering.rank_answers`] ranks by: `"likelihood"`, or `"albef"`, where the first token's
        log-probability counts twice, as in ALBEF's `rank_answer` (its models/model_vqa.py), with which its accuracies
        were measured. Converted checkpoints of ALBEF have the latter.
    selection_loss_weight (`float`, *optional*, defaults to 0.5):
        Weight of the loss that teaches texts to choose their patches, in training, where regions or the targets of a
        teacher are given. 0 turns it off.
    num_images (`int`, *optional*, defaults to 2):
        Images per text of [`TripsForImagesAndTextClassification`].
    bbox_loss_coefficient (`float`, *optional*, defaults to 5.0):
        Weight of the L1 loss of [`TripsForVisualGrounding`].
    giou_loss_coefficient (`float`, *optional*, defaults to 2.0):
        Weight of its generalised IoU loss.
    pointing_loss_coefficient (`float`, *optional*, defaults to 0.0):
        Weight of the loss that teaches where to look, in training: the head of [`TripsForVisualGrounding`] at the
        patches of the box; where text is written about `regions`, the [CLS] of what was asked at their patches, in the
        last cross-attention of the fusion. 0 turns it off.
    kwargs:
        `selection_layers`, `keep_rate`, `selection_mode`, `selection_mass`, `min_keep_rate`, `selection_guidance`,
        `fuse_inattentive_tokens`, `normalize_fusion_weights`, `selection_seed` and `image_size` are passed on to
        `vision_config`, `fusion_type` and `skip_stride` to `fusion_encoder_config` (where they are documented), here
        and in `from_pretrained`.

    Example:

    ```python
    >>> from modeling_trips import TripsConfig, TripsModel

    >>> configuration = TripsConfig.from_preset("tiny", keep_rate=0.5)
    >>> model = TripsModel(configuration)
    ```"""

    model_type = "trips"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "vision_config": SubConfigSpec(TripsVisionConfig),
        "text_config": SubConfigSpec(TripsTextConfig),
        "fusion_encoder_config": SubConfigSpec(TripsFusionConfig),
        "decoder_config": SubConfigSpec(TripsDecoderConfig),
    }
    keys_to_ignore_at_inference = [
        "cache",
        "past_key_values",
        "selection",
        "encoder_last_hidden_state",
        "l1_loss",
        "giou_loss",
        "pointing_loss",
        "itc_loss",
        "itm_loss",
        "mlm_loss",
        "prefix_lm_loss",
        "selection_loss",
        "text_model_output",
        "vision_model_output",
    ]

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    fusion_encoder_config: dict | PreTrainedConfig | None = None
    decoder_config: dict | PreTrainedConfig | None = None
    projection_dim: int = 256
    itc_weight: float | int = 1.0
    itm_weight: float | int = 1.0
    mlm_weight: float | int = 1.0
    prefix_lm_weight: float | int = 1.0
    answer_ranking: Literal["likelihood", "albef"] = "likelihood"
    selection_loss_weight: float | int = 0.5
    num_images: int = 2
    bbox_loss_coefficient: float | int = 5.0
    giou_loss_coefficient: float | int = 2.0
    pointing_loss_coefficient: float | int = 0.0
    initializer_range: float = 0.02
    is_encoder_decoder: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    decoder_start_token_id: int | None = None

    @classmethod
    def from_preset(cls, name: str, **kwargs) -> "TripsConfig":
        """
        A configuration of a named size, with random weights when a model is made from it.

        Args:
            name (`str`): one of [`TripsConfig.presets`]: `"tiny"` (64 px, trains on a laptop's CPU), `"small"` (384
                wide), `"base"` (ViT-B/16 + BERT-base split 6/6, decoder of 6).
            kwargs: fields that override the preset. Sub-configurations are merged field by field.

        Raises:
            ValueError: if there is no preset of that name.
        """
        if name not in PRESETS:
            raise ValueError(f"`preset` must be one of {sorted(PRESETS)}, got {name!r}.")
        fields = copy.deepcopy(PRESETS[name])
        for key, value in kwargs.items():
            nested = isinstance(value, dict) and isinstance(fields.get(key), dict)
            fields[key] = {**fields[key], **value} if nested else value
        return cls(**fields)

    @classmethod
    def presets(cls) -> list[str]:
        """The names that [`TripsConfig.from_preset`] knows."""
        return sorted(PRESETS)

    def __post_init__(self, **kwargs):
        kwargs = {name: value for name, value in kwargs.items() if value not in FORMER_FIELDS.get(name, ())}
        for part, names in FORWARDED_FIELDS.items():
            self._forward_fields(part, {name: kwargs.pop(name) for name in names if name in kwargs})
        self.vision_config = self._sub_config("vision_config", {})
        self.text_config = self._sub_config("text_config", {})
        shared = {name: getattr(self.text_config, name) for name in FIELDS_SHARED_WITH_TEXT}
        self.fusion_encoder_config = self._sub_config("fusion_encoder_config", shared)
        self.decoder_config = self._sub_config("decoder_config", shared)
        if self.fusion_type == "single_stream":
            self.text_config.num_hidden_layers = 0
        self._fill_width("vision_config", "guidance_hidden_size", self.text_config.hidden_size)
        self._fill_width("fusion_encoder_config", "encoder_hidden_size", self.vision_config.hidden_size)
        self._fill_width("decoder_config", "encoder_hidden_size", self.fusion_encoder_config.hidden_size)
        if self.pad_token_id is None:
            self.pad_token_id = self.decoder_config.pad_token_id
        if self.decoder_start_token_id is None:
            self.decoder_start_token_id = self.decoder_config.bos_token_id
        self.architectures = self.architectures or []  # the Auto classes search it for the one of several heads
        super().__post_init__(**kwargs)

    def _forward_fields(self, part: str, fields: dict):
        config = getattr(self, part)
        if fields:
            config = config.to_dict() if isinstance(config, PreTrainedConfig) else config or {}
            setattr(self, part, {**config, **fields})

    def _sub_config(self, name: str, defaults: dict) -> PreTrainedConfig:
        value = getattr(self, name)
        if value is None or isinstance(value, dict):
            value, _ = self.sub_configs_defaults[name].create_subconfig(name, {**defaults, **(value or {})})
            return value
        return copy.deepcopy(value)  # widths are filled in below: what was passed in stays as it is

    def _fill_width(self, part: str, field: str, width: int):
        config = getattr(self, part)
        if getattr(config, field) is None:
            setattr(config, field, width)
        elif getattr(config, field) != width:
            raise ValueError(f"`{part}.{field}` ({getattr(config, field)}) must be {width}, the width of its source.")

    def validate_numbers(self):
        validate_numbers(self)

    def validate_fusion_width(self):
        if self.fusion_encoder_config.hidden_size != self.text_config.hidden_size:
            raise ValueError(
                f"`fusion_encoder_config.hidden_size` ({self.fusion_encoder_config.hidden_size}) must equal "
                f"`text_config.hidden_size` ({self.text_config.hidden_size}): the fusion layers go on with its states."
            )

    def validate_single_stream(self):
        if self.fusion_type != "single_stream":
            return
        text, vision = self.text_config, self.vision_config
        for field, value, needed in (
            ("text_config.num_hidden_layers", text.num_hidden_layers, 0),
            ("text_config.hidden_size", text.hidden_size, vision.hidden_size),
            ("text_config.pooling_mode", text.pooling_mode, "cls"),
            ("vision_config.use_pre_layernorm", vision.use_pre_layernorm, False),
        ):
            if value != needed:
                raise ValueError(
                    f"`{field}` must be {needed} with `fusion_type='single_stream'`, where text and patches go "
                    f"through the vision tower's layers together, got {value}."
                )

    def check_start_token(self):
        """
        For the heads that write; all others may have any start token, as the defaults of the decoder are BERT's.

        Raises:
            ValueError: if the start token is outside of the decoder's vocabulary.
        """
        start, vocab_size = self.decoder_start_token_id, self.decoder_config.vocab_size
        if start is not None and not 0 <= start < vocab_size:
            raise ValueError(
                f"`decoder_start_token_id` ({start}) is outside of the vocabulary of {vocab_size} tokens. Give the "
                "tokenizer's [CLS] and [SEP] as `bos_token_id` and `eos_token_id` in `decoder_config`; a checkpoint "
                "needs the former as `decoder_start_token_id`, too."
            )

    def get_text_config(self, decoder=None, encoder=None) -> PreTrainedConfig:
        return self.decoder_config if decoder else self.text_config


def _forwarded(part: str, name: str) -> property:
    """A field of a part that can be read and set on the composite configuration too."""

    def get_field(self):
        return getattr(getattr(self, part), name)

    def set_field(self, value):
        setattr(getattr(self, part), name, value)

    return property(get_field, set_field, doc=f"`{part}.{name}`.")


for _part, _names in FORWARDED_FIELDS.items():
    for _name in _names:
        setattr(TripsConfig, _name, _forwarded(_part, _name))


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "vision_config": {
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 512,
            "image_size": 64,
            "patch_size": 8,
            "patch_embedding_type": "convolutional",
            "selection_layers": [2, 3],
            "keep_rate": 0.5,
            "initializer_range": 0.08,  # about 128 ** -0.5; 0.02 suits widths of about 768 and is far slower here
        },
        "text_config": {
            "vocab_size": 128,
            "hidden_size": 128,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "intermediate_size": 512,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "max_position_embeddings": 64,
            "initializer_range": 0.08,
        },
        "fusion_encoder_config": {"num_hidden_layers": 2, "skip_stride": 1},
        "decoder_config": {"num_hidden_layers": 1, "bos_token_id": 2, "eos_token_id": 3},
        "initializer_range": 0.08,
    },
    "small": {
        "vision_config": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
        "text_config": {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536},
        "decoder_config": {"num_hidden_layers": 3},
    },
    "base": {},
}


TripsVisionConfig.register_for_auto_class()
TripsTextConfig.register_for_auto_class()
TripsConfig.register_for_auto_class()

__all__ = ["TripsConfig", "TripsDecoderConfig", "TripsFusionConfig", "TripsTextConfig", "TripsVisionConfig"]
