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
"""Configurations of the parts of TRIPS: vision tower, text encoder, fusion encoder, decoder."""

import math
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import PushToHubMixin, auto_docstring


GUIDANCES = ("text", "image", "random")

# Fields in which the files of a checkpoint name code to load.
CODE_FIELDS = ("auto_map", "_auto_map", "custom_pipelines", "custom_generate")

# The least value that a number may have, in any configuration that has such a field.
LEAST_VALUES = {
    "hidden_size": 1,
    "num_hidden_layers": 0,
    "num_attention_heads": 1,
    "intermediate_size": 1,
    "num_channels": 1,
    "vocab_size": 1,
    "max_position_embeddings": 1,
    "type_vocab_size": 1,
    "hidden_dropout_prob": 0,
    "attention_probs_dropout_prob": 0,
    "layer_norm_eps": 0,
    "initializer_range": 0,
    "projection_dim": 1,
    "num_images": 1,
    "itc_weight": 0,
    "itm_weight": 0,
    "mlm_weight": 0,
    "prefix_lm_weight": 0,
    "selection_loss_weight": 0,
    "bbox_loss_coefficient": 0,
    "giou_loss_coefficient": 0,
    "pointing_loss_coefficient": 0,
}


def remove_code_references(part):
    """
    Delete the `CODE_FIELDS` at any depth of dictionaries, lists, configurations, image processors and tokenizers.

    A checkpoint may name code of other repositories there. Loading does not run it, but saving would pass it on.
    """
    values = vars(part) if isinstance(part, PushToHubMixin) else part  # the base of all that Transformers saves
    if isinstance(values, dict):
        for name in CODE_FIELDS:
            values.pop(name, None)
        values = values.values()
    elif not isinstance(values, (list, tuple)):
        return
    for value in values:
        remove_code_references(value)


def validate_numbers(config: PreTrainedConfig):
    """Raises a `ValueError` on a field that is below its `LEAST_VALUES`, infinite, or not a number."""
    for name, least in LEAST_VALUES.items():
        value = getattr(config, name, least)
        if not least <= value < math.inf:  # NaN is not either
            raise ValueError(f"`{name}` must be a number of at least {least}, got {value}.")


def _validate_layers(config: PreTrainedConfig):
    """What all kinds of layers have: widths, heads, dropout, and an activation."""
    validate_numbers(config)
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        if getattr(config, name) > 1:
            raise ValueError(f"`{name}` must lie in [0, 1], got {getattr(config, name)}.")
    if config.hidden_act not in ACT2FN:
        raise ValueError(f"`hidden_act` must be one of {', '.join(ACT2FN)}, got {config.hidden_act!r}.")
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


@auto_docstring(custom_intro="Configuration of a [`TripsVisionModel`]: a ViT with text-relevant patch selection.")
@strict
class TripsVisionConfig(PreTrainedConfig):
    r"""
    patch_embedding_type (`str`, *optional*, defaults to `"linear"`):
        `"linear"`: one convolution of kernel and stride `patch_size` (ViT). `"convolutional"`: a stack of 3x3
        convolutions of stride 2 with doubling channels and one 1x1 convolution (https://arxiv.org/abs/2106.14881);
        `patch_size` must then be a power of two. The stem is batch-normalised: in training, its outputs depend on
        the other images of the batch, unless it is frozen.
    patch_bias (`bool`, *optional*, defaults to `True`):
        Whether the patch embedding has a bias. CLIP has none.
    use_pre_layernorm (`bool`, *optional*, defaults to `False`):
        Whether the embeddings are normalised before the first layer, as in CLIP.
    selection_layers (`list[int]`, *optional*, defaults to `[5, 10]`):
        Layers that select patches, numbered from 1, ascending. An empty list is a plain ViT.
    keep_rate (`float` or `list[float]`, *optional*, defaults to 0.7):
        Share of the candidate tokens that goes on after a selection layer, in (0, 1]: one rate, or one per layer.
        1.0 turns a layer's selection off.
    selection_mode (`str`, *optional*, defaults to `"topk"`):
        How many tokens go on. `"topk"`: the share `keep_rate` of the candidates. `"mass"`: in each row the smallest
        set of candidates whose scores sum to at least `selection_mass`, of them at most the share `keep_rate` and at
        least the share `min_keep_rate`. Rows of a batch are padded to the longest; to know it, each such layer waits
        for the device once. Compiled and exported models pad to `keep_rate`.
    selection_mass (`float` or `list[float]`, *optional*, defaults to 0.9):
        The sum of scores that is kept if `selection_mode="mass"`, in (0, 1]: one, or one per layer.
    min_keep_rate (`float` or `list[float]`, *optional*, defaults to 0.0):
        The least share of the candidates that is kept if `selection_mode="mass"`, in [0, keep_rate], and at least one
        of them: one, or one per layer.
    selection_guidance (`str` or `list[str]`, *optional*, defaults to `"text"`):
        What ranks the patches: `"text"` (the text's [CLS]), `"image"` (the ViT's own [CLS]), or `"random"`; one for
        all selection layers, or one per layer. All texts of an image share its computation up to the first layer that
        a text guides.
    fuse_inattentive_tokens (`bool`, *optional*, defaults to `True`):
        Whether the tokens that are not kept go on as one fused token, or are dropped.
    normalize_fusion_weights (`bool`, *optional*, defaults to `False`):
        Whether the weights of the fused token are rescaled to sum to 1.
    selection_seed (`int`, *optional*, defaults to 0):
        Seed of `"random"` guidance in evaluation; in training it draws from PyTorch's generator.
    guidance_hidden_size (`int`, *optional*):
        Width of the text guidance. A `selection_projection` layer is added only if it differs from `hidden_size`.
        `None` means `hidden_size`; [`TripsConfig`] fills in the width of its text encoder.

    Example:

    ```python
    >>> from modeling_trips import TripsVisionConfig, TripsVisionModel

    >>> configuration = TripsVisionConfig(selection_layers=[2, 4, 8], keep_rate=0.7)
    >>> model = TripsVisionModel(configuration)
    ```"""

    model_type = "trips_vision"
    base_config_key = "vision_config"

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    num_channels: int = 3
    qkv_bias: bool = True
    patch_embedding_type: Literal["linear", "convolutional"] = "linear"
    patch_bias: bool = True
    use_pre_layernorm: bool = False
    selection_layers: list[int] | tuple[int, ...] = (5, 10)
    keep_rate: float | int | list[float | int] | tuple[float | int, ...] = 0.7
    selection_mode: Literal["topk", "mass"] = "topk"
    selection_mass: float | int | list[float | int] | tuple[float | int, ...] = 0.9
    min_keep_rate: float | int | list[float | int] | tuple[float | int, ...] = 0.0
    selection_guidance: str | list[str] | tuple[str, ...] = "text"
    fuse_inattentive_tokens: bool = True
    normalize_fusion_weights: bool = False
    selection_seed: int = 0
    guidance_hidden_size: int | None = None

    def __post_init__(self, **kwargs):
        self.selection_layers = list(self.selection_layers)
        self.architectures = self.architectures or []  # the Auto classes search it for the one of two models
        super().__post_init__(**kwargs)

    def _by_layer(self, field: str) -> list:
        """One value per entry of `selection_layers`, of a field that has one for all of them or one for each."""
        value = getattr(self, field)
        return list(value) if isinstance(value, (list, tuple)) else [value] * len(self.selection_layers)

    @property
    def keep_rates(self) -> list[float]:
        """One keep rate per entry of `selection_layers`."""
        return self._by_layer("keep_rate")

    @property
    def selection_schedule(self) -> dict[int, float]:
        """Keep rate by layer number (from 1), of the layers that drop something: a rate of 1.0 selects nothing."""
        return {layer: rate for layer, rate in zip(self.selection_layers, self.keep_rates) if rate < 1.0}

    @property
    def selection_guidances(self) -> list[str]:
        """One guidance per entry of `selection_layers`."""
        return self._by_layer("selection_guidance")

    @property
    def guidance_schedule(self) -> dict[int, str]:
        """Guidance by layer number (from 1), of the layers that drop something."""
        guidances = dict(zip(self.selection_layers, self.selection_guidances))
        return {layer: guidances[layer] for layer in self.selection_schedule}

    @property
    def selection_options(self) -> dict[int, dict]:
        """What each layer that drops something is told of it, by layer number (from 1)."""
        guidances, by_layer = self.guidance_schedule, {}
        bounds = dict(
            zip(self.selection_layers, zip(self._by_layer("selection_mass"), self._by_layer("min_keep_rate")))
        )
        for layer, rate in self.selection_schedule.items():
            by_layer[layer] = {"keep_rate": rate, "guidance": guidances[layer]}
            # CODEPATH: "topk" keeps as many in every row, "mass" as many as its scores ask for.
            if self.selection_mode == "mass":
                by_layer[layer] |= dict(zip(("mass", "min_keep_rate"), bounds[layer]))
        return by_layer

    @property
    def first_selection_layer(self) -> int | None:
        """Number of the first layer that drops something; None without one."""
        return min(self.selection_schedule, default=None)

    @property
    def first_text_layer(self) -> int | None:
        """Number of the first layer that a text guides, where the text-independent prefix ends; None without one."""
        layers = [layer for layer, guidance in self.guidance_schedule.items() if guidance == "text"]
        return layers[0] if layers else None

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
        _validate_layers(self)
        height, width = _as_pair("image_size", self.image_size)
        patch_height, patch_width = self.patch_shape
        if height % patch_height or width % patch_width:
            raise ValueError(
                f"`image_size` ({self.image_size}) must be a multiple of `patch_size` ({self.patch_size})."
            )
        if self.patch_embedding_type == "convolutional":
            self._validate_stem()

    def _validate_stem(self):
        height, width = self.patch_shape
        if height != width or height == 1 or height & (height - 1) != 0:
            raise ValueError(
                "`patch_size` must be a power of two above 1 with `patch_embedding_type='convolutional'`, "
                f"got {self.patch_size}."
            )
        if self.hidden_size < height // 2:
            raise ValueError(
                f"`hidden_size` must be at least {height // 2} with `patch_embedding_type='convolutional'` and "
                f"`patch_size={self.patch_size}`, got {self.hidden_size}."
            )

    def validate_selection_layers(self):
        layers = list(self.selection_layers)
        outside = [layer for layer in layers if not 1 <= layer <= self.num_hidden_layers]
        if outside:
            raise ValueError(
                f"`selection_layers` must lie in 1..{self.num_hidden_layers} (numbered from 1), got {layers}."
            )
        if layers != sorted(set(layers)):
            raise ValueError(f"`selection_layers` must be ascending without repetition, got {layers}.")

    def validate_selection_guidance(self):
        single = [self.selection_guidance] if isinstance(self.selection_guidance, str) else []
        # A single one is checked even if no layer uses it.
        if any(guidance not in GUIDANCES for guidance in single + self.selection_guidances):
            raise ValueError(
                f"`selection_guidance` must be one of {', '.join(map(repr, GUIDANCES))}, or a list of them, got "
                f"{self.selection_guidance!r}."
            )
        if len(self.selection_guidances) != len(self.selection_layers):
            raise ValueError(
                f"`selection_guidance` must be one for all or one per selection layer: got {self.selection_guidance} "
                f"for the `selection_layers` {self.selection_layers}."
            )

    def validate_keep_rate(self):
        self._validate_shares("keep_rate")

    def validate_selection_mass(self):
        self._validate_shares("selection_mass")

    def validate_min_keep_rate(self):
        self._validate_shares("min_keep_rate", may_be_zero=True)
        for layer, rate, least in zip(self.selection_layers, self.keep_rates, self._by_layer("min_keep_rate")):
            if self.selection_mode == "mass" and least > rate:
                raise ValueError(
                    f"`min_keep_rate` ({least}) must be at most the `keep_rate` ({rate}) of selection layer {layer}: "
                    "the one is the least share that goes on, the other the largest."
                )

    def _validate_shares(self, field: str, may_be_zero: bool = False):
        value, shares = getattr(self, field), self._by_layer(field)
        if len(shares) != len(self.selection_layers):
            raise ValueError(
                f"`{field}` must be one number or one per selection layer: got {len(shares)} values ({value}) for "
                f"{len(self.selection_layers)} `selection_layers` ({self.selection_layers})."
            )
        shares = shares or [value]  # a single one is checked even if no layer uses it
        numbers = [share for share in shares if not isinstance(share, (list, tuple))]
        if not all(0.0 < share <= 1.0 or (may_be_zero and share == 0) for share in numbers):
            raise ValueError(f"`{field}` must lie in {'[' if may_be_zero else '('}0, 1], got {value}.")


@auto_docstring(custom_intro="Configuration of a [`TripsTextModel`]: the BERT layers that see only the text.")
@strict
class TripsTextConfig(PreTrainedConfig):
    r"""
    pooling_mode (`str`, *optional*, defaults to `"cls"`):
        What of a text guides the selection and is compared with images: `"cls"` (the output of its first token, [CLS])
        or `"mean"` (the mean of all its tokens, as sentence encoders such as MiniLM are trained).

    Example:

    ```python
    >>> from modeling_trips import TripsTextConfig, TripsTextModel

    >>> model = TripsTextModel(TripsTextConfig(num_hidden_layers=6))
    ```"""

    model_type = "trips_text"
    base_config_key = "text_config"

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    is_decoder: bool = False
    pooling_mode: Literal["cls", "mean"] = "cls"

    def validate_architecture(self):
        _validate_layers(self)

    def validate_token_ids(self):
        """Only padding is refused: no model can be made with it. The rest is a warning, as in Transformers."""
        if self.pad_token_id is not None and self.pad_token_id >= self.vocab_size:
            raise ValueError(f"`pad_token_id` ({self.pad_token_id}) must be below `vocab_size` ({self.vocab_size}).")
        super().validate_token_ids()


@auto_docstring(custom_intro="Configuration of a [`TripsFusionModel`]: text layers that attend to the image tokens.")
@strict
class TripsFusionConfig(TripsTextConfig):
    r"""
    encoder_hidden_size (`int`, *optional*):
        Width of the image tokens that the layers attend to. `None` means `hidden_size`; [`TripsConfig`] fills in the
        width of its vision tower.
    fusion_type (`str`, *optional*, defaults to `"cross_attention"`):
        How text and image meet. `"cross_attention"`: every layer changes the text alone, which attends to the image
        tokens (ALBEF). `"skip_connected"`: so do `skip_stride` layers, then one attends over text and image tokens
        joined and changes both, and so on (mPLUG, https://arxiv.org/abs/2205.12005). `"single_stream"`: there is no
        fusion encoder; text and patches go through the vision tower's layers together, from the first one on (ViLT,
        https://arxiv.org/abs/2102.03334). [`TripsConfig`] then leaves the text encoder nothing but its embeddings.
    pooling_mode (`str`, *optional*, defaults to `"cls"`):
        Of the text encoder; not used here.
    skip_stride (`int`, *optional*, defaults to 3):
        How many layers the image tokens skip before each layer that they go through, if `"skip_connected"`.
    """

    model_type = "trips_fusion"
    base_config_key = "fusion_encoder_config"

    encoder_hidden_size: int | None = None
    fusion_type: Literal["cross_attention", "skip_connected", "single_stream"] = "cross_attention"
    skip_stride: int = 3

    @property
    def connected_layers(self) -> list[int]:
        """Numbers (from 1) of the layers that text and image tokens go through together."""
        if self.fusion_type != "skip_connected":
            return []
        return list(range(self.skip_stride + 1, self.num_hidden_layers + 1, self.skip_stride + 1))

    @property
    def cross_attention_hidden_size(self) -> int:
        """Width of the states that cross-attention reads: image tokens that join the text are made as wide as it."""
        return (self.encoder_hidden_size if self.fusion_type != "skip_connected" else None) or self.hidden_size

    def validate_skip_stride(self):
        if self.skip_stride < 1:
            raise ValueError(f"`skip_stride` must be at least 1, got {self.skip_stride}.")
        if self.fusion_type == "skip_connected" and not self.connected_layers:
            raise ValueError(
                f"`skip_stride` ({self.skip_stride}) must be below the `num_hidden_layers` ({self.num_hidden_layers}) "
                "of the fusion encoder, or text and image are never joined."
            )


@auto_docstring(
    custom_intro="Configuration of a [`TripsDecoder`]: causal text layers that attend to the fused states."
)
@strict
class TripsDecoderConfig(TripsTextConfig):
    r"""
    encoder_hidden_size (`int`, *optional*):
        Width of the states that the layers attend to. `None` means `hidden_size`; [`TripsConfig`] fills in the width
        of its fusion encoder.
    pooling_mode (`str`, *optional*, defaults to `"cls"`):
        Of the text encoder; not used here.
    """

    model_type = "trips_decoder"
    base_config_key = "decoder_config"

    encoder_hidden_size: int | None = None
    bos_token_id: int | None = 101
    eos_token_id: int | list[int] | None = 102
    is_decoder: bool = True
    use_cache: bool = True
    tie_word_embeddings: bool = True

    @property
    def cross_attention_hidden_size(self) -> int:
        """Width of the states that cross-attention reads."""
        return self.encoder_hidden_size or self.hidden_size
