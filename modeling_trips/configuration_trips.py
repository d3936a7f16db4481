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
"""
Configurations of TRIPS: the whole model, and its vision tower, text encoder, fusion encoder and decoder.

Every use of a checkpoint begins with this module, which checks the release of Transformers before it imports what old
releases lack. Old releases copy only the siblings of this first module, so the one that it imports has none.
"""

# ruff: noqa: E402
from transformers.utils.versions import require_version


TRANSFORMERS = "transformers>=5.20,<6"  # as in pyproject.toml
require_version(TRANSFORMERS, f'Run `pip install -U "{TRANSFORMERS}"`.')

import copy
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.utils import auto_docstring, logging
from transformers.utils.type_validators import activation_fn_key, interval, probability

from .schedule_trips import UNPRUNED, LayerSelection, SelectionSchedule


logger = logging.get_logger(__name__)

# Kinds of validated fields.
positive = interval(min=1)
not_negative = interval(min=0, exclude_max=True)  # neither infinite nor NaN


def _validate_heads(config: PreTrainedConfig):
    if config.hidden_size % config.num_attention_heads != 0:
        raise ValueError(
            f"`hidden_size` ({config.hidden_size}) must be divisible by `num_attention_heads` "
            f"({config.num_attention_heads})."
        )


def _as_pair(field: str, size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"`{field}` must be a positive number or a pair (height, width) of them, got {size}.")
    return pair


SCHEDULE = "5:text:0.7,10:text:0.7"  # of the paper
# A configuration takes the text form, too, and always has the schedule.
if TYPE_CHECKING:
    GivenSchedule = SelectionSchedule
else:
    GivenSchedule = str | SelectionSchedule


def _part_of_schedule(name: str) -> property:
    """Return the property in the place of a field of earlier versions."""

    def refuse(config, value=None):
        raise ValueError(f"`{name}` is a part of `schedule`, as in schedule={SCHEDULE!r}.")

    return property(refuse, refuse)


def _schedule_of_lists(selection_layers=(5, 10), keep_rate=0.7, selection_guidance="text") -> SelectionSchedule:
    """Return the schedule of a configuration of earlier versions: values for all layers, or one for each."""
    layers = tuple(selection_layers)
    columns = []
    for values in (selection_guidance, keep_rate):
        columns.append(values if isinstance(values, (list, tuple)) else [values] * len(layers))
    if any(len(values) != len(layers) for values in columns):
        raise ValueError(f"`selection_guidance` and `keep_rate` must be one value or {len(layers)}, one per layer.")
    selections = tuple(LayerSelection(*settings) for settings in zip(*columns))
    return SelectionSchedule(layers, selections)


@strict
class StoredConfig(PreTrainedConfig):  # trf-ignore: TRF057 (no model's own)
    """Base of the configurations, which names no code."""

    selection_layers = _part_of_schedule("selection_layers")
    keep_rate = _part_of_schedule("keep_rate")
    selection_guidance = _part_of_schedule("selection_guidance")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """
        As in Transformers, which downloads and runs an attention with a name on the Hub.

        Raises:
            ValueError: A stored field names one. Give `attn_implementation` as an argument.
        """
        for fields in (config_dict, *config_dict.values()):
            named = fields.items() if isinstance(fields, dict) else ()
            for name, value in named:
                if name.endswith(("_implementation", "_implementation_internal")) and "/" in str(value):
                    raise ValueError(
                        f"`{name}` of a configuration must not be code of the Hub, got {value!r:.100}. Give it as an "
                        "argument if you trust it."
                    )
        return super().from_dict(config_dict, **kwargs)


@auto_docstring(custom_intro="Configuration of a [`TripsVisionModel`]: a ViT with text-relevant patch selection.")
@strict
class TripsVisionConfig(StoredConfig):
    r"""
    patch_embedding_type (`str`, *optional*, defaults to `"linear"`):
        `"linear"`: one convolution of kernel and stride `patch_size` (ViT). `"convolutional"`: a stack of 3x3
        convolutions of stride 2 with doubling channels and one 1x1 convolution (https://arxiv.org/abs/2106.14881);
        `patch_size` must then be a power of two. The stem is batch-normalised: in training, its outputs depend on
        the other images of the batch. A stem whose weights are frozen (`requires_grad=False`) uses its running
        statistics in training, too, and keeps them.
    patch_bias (`bool`, *optional*, defaults to `True`):
        Whether the patch embedding has a bias. CLIP has none.
    use_pre_layernorm (`bool`, *optional*, defaults to `False`):
        Whether the embeddings are normalised before the first layer, as in CLIP.
    schedule (`str` or [`SelectionSchedule`], *optional*, defaults to the paper's):
        Layers that select patches, numbered from 1, ascending, what scores the patches there, and the share of the
        candidate tokens that is kept, in (0, 1]. `"text"` is the text's [CLS], `"image"` the ViT's own; `"random"`
        draws from PyTorch's generator for each image, in evaluation as well. All texts of an image share its
        computation up to the first layer that a text scores. `"unpruned"` is a plain ViT, and the paper's is
        `"5:text:0.7,10:text:0.7"`. It is read as a [`SelectionSchedule`]. The lists of earlier versions
        (`selection_layers`, `keep_rate`, `selection_guidance`) are still read.
    fuse_inattentive_tokens (`bool`, *optional*, defaults to `True`):
        Whether the tokens that are not kept become one fused token, or are dropped.
    trained_keep_rates (`list[float]`, *optional*):
        Keep rates that the model was trained with. A call with a `keep_rate` outside of them is a warning, once.
    guidance_hidden_size (`int`, *optional*):
        Width of the text guidance. A `selection_projection` layer is added only if it differs from `hidden_size`.
        `None` means `hidden_size`; [`TripsConfig`] sets it to the width of its text encoder.

    Example:

    ```python
    >>> from modeling_trips import TripsVisionConfig, TripsVisionModel

    >>> configuration = TripsVisionConfig(schedule="2:image:0.7,8:text:0.3")
    >>> model = TripsVisionModel(configuration)
    ```"""

    model_type = "trips_vision"
    base_config_key = "vision_config"

    hidden_size: int = positive(default=768)
    num_hidden_layers: int = not_negative(default=12)
    num_attention_heads: int = positive(default=12)
    intermediate_size: int = positive(default=3072)
    hidden_act: str = activation_fn_key(default="gelu")
    hidden_dropout_prob: float | int = probability(default=0.0)
    attention_probs_dropout_prob: float | int = probability(default=0.0)
    initializer_range: float = not_negative(default=0.02)
    layer_norm_eps: float = not_negative(default=1e-6)
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    num_channels: int = positive(default=3)
    qkv_bias: bool = True
    patch_embedding_type: Literal["linear", "convolutional"] = "linear"
    patch_bias: bool = True
    use_pre_layernorm: bool = False
    schedule: GivenSchedule = SCHEDULE  # type: ignore[assignment]
    fuse_inattentive_tokens: bool = True
    trained_keep_rates: list[float | int] | None = None
    guidance_hidden_size: int | None = None

    def __post_init__(self, **kwargs):
        old_names = kwargs.keys() & {"selection_layers", "keep_rate", "selection_guidance"}
        old_fields = {name: kwargs.pop(name) for name in old_names}
        if old_fields and str(self.schedule) != SCHEDULE:
            raise ValueError(f"Give `schedule` without {' and '.join(sorted(old_fields))}, which are a part of it.")
        if old_fields:
            self.schedule = _schedule_of_lists(**old_fields)
        self.architectures = self.architectures or []  # the Auto classes search it for the one of two models
        super().__post_init__(**kwargs)

    def __setattr__(self, name: str, value):
        if name == "schedule" and isinstance(value, str):
            value = SelectionSchedule.parse(value)
        super().__setattr__(name, value)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "schedule": str(self.schedule)}

    @property
    def patch_shape(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""
        return _as_pair("patch_size", self.patch_size)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patches (down, across) at the configured `image_size`."""
        height, width = _as_pair("image_size", self.image_size)
        patch_height, patch_width = self.patch_shape
        return height // patch_height, width // patch_width

    def validate_architecture(self):
        self.schedule.check_fits(self.num_hidden_layers)
        _validate_heads(self)
        if not all(0 < rate <= 1 for rate in self.trained_keep_rates or []):
            raise ValueError(f"`trained_keep_rates` must be in (0, 1], got {self.trained_keep_rates}.")
        height, width = _as_pair("image_size", self.image_size)
        patch_height, patch_width = self.patch_shape
        if height % patch_height or width % patch_width:
            raise ValueError(
                f"`image_size` ({self.image_size}) must be a multiple of `patch_size` ({self.patch_size})."
            )
        is_power_of_two = patch_height == patch_width > 1 and patch_height & (patch_height - 1) == 0
        if self.patch_embedding_type == "convolutional" and not is_power_of_two:
            raise ValueError(
                "`patch_size` must be a power of two above 1 with `patch_embedding_type='convolutional'`, "
                f"got {self.patch_size}."
            )


@strict
class TripsLayersConfig(StoredConfig):  # trf-ignore: TRF057 (no model's own)
    """What text encoder, fusion encoder and decoder share: the fields of BERT's embeddings and layers."""

    vocab_size: int = positive(default=30522)
    hidden_size: int = positive(default=768)
    num_hidden_layers: int = not_negative(default=6)
    num_attention_heads: int = positive(default=12)
    intermediate_size: int = positive(default=3072)
    hidden_act: str = activation_fn_key(default="gelu")
    hidden_dropout_prob: float | int = probability(default=0.1)
    attention_probs_dropout_prob: float | int = probability(default=0.1)
    max_position_embeddings: int = positive(default=512)
    type_vocab_size: int = positive(default=2)
    initializer_range: float = not_negative(default=0.02)
    layer_norm_eps: float = not_negative(default=1e-12)
    pad_token_id: int | None = 0
    is_decoder: bool = False

    def validate_architecture(self):
        _validate_heads(self)


@auto_docstring(custom_intro="Configuration of a [`TripsTextModel`]: the BERT layers that see only the text.")
@strict
class TripsTextConfig(TripsLayersConfig):
    r"""
    pooling_mode (`str`, *optional*, defaults to `"cls"`):
        Representation of a text, for selection and retrieval: `"cls"` (the output of its first token, [CLS]) or
        `"mean"` (the mean of its tokens, as in sentence encoders such as MiniLM).

    Example:

    ```python
    >>> from modeling_trips import TripsTextConfig, TripsTextModel

    >>> model = TripsTextModel(TripsTextConfig(num_hidden_layers=6))
    ```"""

    model_type = "trips_text"
    base_config_key = "text_config"

    pooling_mode: Literal["cls", "mean"] = "cls"


@strict
class TripsCrossAttentionConfig(TripsLayersConfig):  # trf-ignore: TRF057 (no model's own)
    """What fusion encoder and decoder share: layers that attend to other states, too."""

    encoder_hidden_size: int | None = None

    @property
    def cross_attention_hidden_size(self) -> int:
        """Width of the states that cross-attention reads."""
        return self.encoder_hidden_size or self.hidden_size


@auto_docstring(custom_intro="Configuration of a [`TripsFusionModel`]: text layers that attend to the image tokens.")
@strict
class TripsFusionConfig(TripsCrossAttentionConfig):
    r"""
    encoder_hidden_size (`int`, *optional*):
        Width of the image tokens that the layers attend to. `None` means `hidden_size`; [`TripsConfig`] sets it to
        the width of its vision tower.
    fusion_type (`str`, *optional*, defaults to `"cross_attention"`):
        How text and image are fused. `"cross_attention"`: the text attends to the image tokens in every layer (ALBEF).
        `"skip_connected"`: after each `skip_stride` such layers, one attends over text and image tokens joined and
        changes both (mPLUG, https://arxiv.org/abs/2205.12005). `"single_stream"`: text and patches go through the
        vision tower together, without a fusion encoder (ViLT, https://arxiv.org/abs/2102.03334); the text encoder of
        [`TripsConfig`] then consists of its embeddings.
    skip_stride (`int`, *optional*, defaults to 3):
        Number of layers that the image tokens skip before each joined layer, if `"skip_connected"`.
    """

    model_type = "trips_fusion"
    base_config_key = "fusion_encoder_config"

    fusion_type: Literal["cross_attention", "skip_connected", "single_stream"] = "cross_attention"
    skip_stride: int = positive(default=3)

    @property
    def connected_layers(self) -> list[int]:
        """Numbers (from 1) of the layers over text and image tokens joined."""
        if self.fusion_type != "skip_connected":
            return []
        return list(range(self.skip_stride + 1, self.num_hidden_layers + 1, self.skip_stride + 1))

    @property
    def cross_attention_hidden_size(self) -> int:
        """Width of the states that cross-attention reads. Image tokens that join the text have its width."""
        return self.hidden_size if self.fusion_type == "skip_connected" else super().cross_attention_hidden_size

    def validate_skip_stride(self):
        if self.fusion_type == "skip_connected" and not self.connected_layers:
            raise ValueError(
                f"`skip_stride` ({self.skip_stride}) must be below the `num_hidden_layers` ({self.num_hidden_layers}) "
                "of the fusion encoder."
            )


@auto_docstring(
    custom_intro="Configuration of a [`TripsDecoder`]: causal text layers that attend to the fused states."
)
@strict
class TripsDecoderConfig(TripsCrossAttentionConfig):
    r"""
    encoder_hidden_size (`int`, *optional*):
        Width of the states that the layers attend to. `None` means `hidden_size`; [`TripsConfig`] sets it to the
        width of its fusion encoder.
    """

    model_type = "trips_decoder"
    base_config_key = "decoder_config"

    bos_token_id: int | None = 101
    eos_token_id: int | list[int] | None = 102
    is_decoder: bool = True
    use_cache: bool = True
    tie_word_embeddings: bool = True


# Fields whose values in the text encoder are no defaults of the fusion encoder and the decoder.
OWN_TEXT_FIELDS = {"num_hidden_layers", "is_decoder"}
# Fields of parts that are also fields of the whole.
PART_FIELDS = {
    "schedule": "vision_config",
    "fuse_inattentive_tokens": "vision_config",
    "image_size": "vision_config",
    "fusion_type": "fusion_encoder_config",
    "skip_stride": "fusion_encoder_config",
}


def _part_field(name: str) -> property:
    """Return the property of the whole that reads and sets a field of a part."""
    part = PART_FIELDS[name]
    return property(
        lambda config: getattr(getattr(config, part), name),
        lambda config, value: setattr(getattr(config, part), name, value),
    )


@auto_docstring(
    custom_intro="""
    Configuration of a [`TripsModel`] and of the models with a head. The defaults are the paper's: a ViT-B/16 that
    keeps 70% of its tokens after layers 5 and 10, and a BERT-base split into 6 text and 6 fusion layers.
    """
)
@strict
class TripsConfig(StoredConfig):
    r"""
    fusion_encoder_config (`dict` or `TripsFusionConfig`, *optional*):
        The fusion encoder. Its defaults, except `num_hidden_layers`, come from `text_config`.
    decoder_config (`dict` or `TripsDecoderConfig`, *optional*):
        The text decoder of the generative heads. Its defaults, except `num_hidden_layers`, come from `text_config`.
    projection_dim (`int`, *optional*, defaults to 256):
        Width of the features of images and texts in retrieval.
    itc_weight (`float`, *optional*, defaults to 1.0):
        Weight of image-text contrast, in retrieval and pre-training. 0 skips an objective.
    itm_weight (`float`, *optional*, defaults to 1.0):
        Weight of image-text matching, in retrieval and pre-training.
    mlm_weight (`float`, *optional*, defaults to 1.0):
        Weight of masked language modelling in pre-training.
    prefix_lm_weight (`float`, *optional*, defaults to 1.0):
        Weight of prefix language modelling in pre-training.
    answer_ranking (`str`, *optional*, defaults to `"likelihood"`):
        Score of [`TripsForQuestionAnswering.rank_answers`]: `"likelihood"`, or `"albef"`, where the first token's
        log-probability counts twice, as in ALBEF's models/model_vqa.py and in its converted checkpoints.
    confidence_temperature (`float`, *optional*, defaults to 1.0):
        Divides the decoder's logits in the scores of answers that [`TripsVisualQuestionAnsweringPipeline`] writes, so
        that they are probabilities to be right. The scripts fit it on the validation split.
    question_tokens (`str`, *optional*):
        Ids of the tokens of the training questions. The pipeline marks questions with other ones.
    selection_loss_weight (`float`, *optional*, defaults to 0.5):
        Weight of the selection supervision in training, if regions are given: of a text's scores by its region, of an
        image's scores by the union of the regions of its texts. 0 turns it off.
    learns_relevance (`bool`, *optional*, defaults to `False`):
        Whether a pruned pass in training teaches the scores of its last layer *relevance* ([`RelevanceGradient`]):
        those of the kept patches each, of the others together, by the fused token. A pass whose layers only score
        always does. With a fusion encoder only.
    num_images (`int`, *optional*, defaults to 2):
        Images per text of [`TripsForImagesAndTextClassification`].
    attention_loss_weight (`float`, *optional*, defaults to 0.0):
        Weight of the attention supervision of the box head of [`TripsForVisualGrounding`] in training. 0 turns it off.
    kwargs:
        Fields of [`TripsVisionConfig`] about the selection, and its `image_size`, and `fusion_type` and `skip_stride`
        of [`TripsFusionConfig`]. They belong to the parts, and can be given, read and set here, too.

    Example:

    ```python
    >>> from modeling_trips import TripsConfig, TripsModel

    >>> configuration = TripsConfig.from_preset("tiny", schedule="2:text:0.1")
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
        "attention_loss",
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
    projection_dim: int = positive(default=256)
    itc_weight: float | int = not_negative(default=1.0)
    itm_weight: float | int = not_negative(default=1.0)
    mlm_weight: float | int = not_negative(default=1.0)
    prefix_lm_weight: float | int = not_negative(default=1.0)
    answer_ranking: Literal["likelihood", "albef"] = "likelihood"
    confidence_temperature: float | int = interval(min=0, exclude_min=True, exclude_max=True)(default=1.0)
    question_tokens: str | None = None
    selection_loss_weight: float | int = not_negative(default=0.5)
    learns_relevance: bool = False
    num_images: int = positive(default=2)
    attention_loss_weight: float | int = not_negative(default=0.0)
    initializer_range: float = not_negative(default=0.02)
    is_encoder_decoder: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    decoder_start_token_id: int | None = None

    schedule = _part_field("schedule")
    fuse_inattentive_tokens = _part_field("fuse_inattentive_tokens")
    image_size = _part_field("image_size")
    fusion_type = _part_field("fusion_type")
    skip_stride = _part_field("skip_stride")

    @classmethod
    def from_preset(cls, name: str, **kwargs) -> "TripsConfig":
        """
        Return a configuration of a named size.

        Args:
            name (`str`): `"tiny"` (64 px, trains on a laptop's CPU), `"small"` (384 wide) or `"base"` (ViT-B/16 and
                BERT-base split 6/6, decoder of 6).
            kwargs: Fields that override the preset. Sub-configurations are merged field by field.

        Raises:
            ValueError: There is no preset of that name.
        """
        if name not in PRESETS:
            raise ValueError(f"`preset` must be one of {sorted(PRESETS)}, got {name!r}.")
        fields = copy.deepcopy(PRESETS[name])
        for key, value in kwargs.items():
            nested = isinstance(value, dict) and isinstance(fields.get(key), dict)
            fields[key] = {**fields[key], **value} if nested else value
        return cls(**fields)

    def __post_init__(self, **kwargs):
        for name in PART_FIELDS.keys() & kwargs.keys():
            part = getattr(self, PART_FIELDS[name])
            if isinstance(part, PreTrainedConfig):
                part = part.to_dict()
            setattr(self, PART_FIELDS[name], {**(part or {}), name: kwargs.pop(name)})
        self.vision_config = self._part("vision_config")
        self.text_config = self._part("text_config")
        shared_names = TripsLayersConfig.__annotations__.keys() - OWN_TEXT_FIELDS
        shared = {name: getattr(self.text_config, name) for name in shared_names}
        self.fusion_encoder_config = self._part("fusion_encoder_config", **shared)
        self.decoder_config = self._part("decoder_config", **shared)
        if self.fusion_encoder_config.fusion_type == "single_stream":
            self.text_config.num_hidden_layers = 0
        # Widths of what a part reads of another one.
        self.vision_config.guidance_hidden_size = self.text_config.hidden_size
        self.fusion_encoder_config.encoder_hidden_size = self.vision_config.hidden_size
        self.decoder_config.encoder_hidden_size = self.fusion_encoder_config.hidden_size
        if self.pad_token_id is None:
            self.pad_token_id = self.decoder_config.pad_token_id
        if self.decoder_start_token_id is None:
            self.decoder_start_token_id = self.decoder_config.bos_token_id
        self.architectures = self.architectures or []  # the Auto classes search it for the one of several heads
        super().__post_init__(**kwargs)

    def _part(self, name: str, **defaults) -> PreTrainedConfig:
        value = getattr(self, name)
        if isinstance(value, PreTrainedConfig):
            return copy.deepcopy(value)  # its widths are set, but not those of the argument
        return self.sub_configs_defaults[name].config_class(**{**defaults, **(value or {})})

    def validate_parts(self):
        text = self.text_config
        vision = self.vision_config
        fusion = self.fusion_encoder_config
        fields: list[tuple] = [("fusion_encoder_config.hidden_size", fusion.hidden_size, text.hidden_size)]
        if fusion.fusion_type == "single_stream":
            fields += [
                ("text_config.num_hidden_layers", text.num_hidden_layers, 0),
                ("text_config.hidden_size", text.hidden_size, vision.hidden_size),
                ("text_config.pooling_mode", text.pooling_mode, "cls"),
                ("vision_config.use_pre_layernorm", vision.use_pre_layernorm, False),
            ]
        for name, value, needed in fields:
            if value != needed:
                raise ValueError(f"`{name}` must be {needed} with `fusion_type={fusion.fusion_type!r}`, got {value}.")

    def check_start_token(self):
        """Raise a `ValueError` if the start token of the heads that write is outside of the decoder's vocabulary."""
        start = self.decoder_start_token_id
        vocab_size = self.decoder_config.vocab_size
        if start is not None and not 0 <= start < vocab_size:
            raise ValueError(
                f"`decoder_start_token_id` ({start}) is outside of the vocabulary of {vocab_size} tokens. Give the "
                "tokenizer's [CLS] and [SEP] as `bos_token_id` and `eos_token_id` in `decoder_config`; a checkpoint "
                "needs the former as `decoder_start_token_id`, too."
            )

    def get_text_config(self, decoder=None, encoder=None) -> PreTrainedConfig:
        return self.decoder_config if decoder else self.text_config


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
            "schedule": "2:text:0.5,3:text:0.5",
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

__all__ = [
    "UNPRUNED",
    "LayerSelection",
    "SelectionSchedule",
    "TripsConfig",
    "TripsDecoderConfig",
    "TripsFusionConfig",
    "TripsTextConfig",
    "TripsVisionConfig",
]
