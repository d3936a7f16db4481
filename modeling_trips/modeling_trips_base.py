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
"""The base class of all models, and what the towers share: attention and its masks."""

from typing import ClassVar

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.pipelines import Pipeline
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring

from .configuration_trips import TripsConfig
from .patch_selection import gather_tokens


# Name of the keys and values in `generate` and in outputs: "cache" since Transformers 5.24.
CACHE_NAME = "cache" if "cache" in Seq2SeqLMOutput.__dataclass_fields__ else "past_key_values"


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    attn_weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        attn_weights = attn_weights + attention_mask
    attn_weights = nn.functional.softmax(attn_weights, dim=-1, dtype=torch.float32).to(query.dtype)
    attn_weights = nn.functional.dropout(attn_weights, p=dropout, training=module.training)
    attn_output = torch.matmul(attn_weights, value).transpose(1, 2).contiguous()
    return attn_output, attn_weights


def bidirectional_mask(config: PreTrainedConfig, attention_mask: torch.Tensor | None, **kwargs):
    """
    Return Transformers' `create_bidirectional_mask`. A given padding mask is always used, since a look at its values
    would sync with the host.
    """
    return create_bidirectional_mask(
        config=config, attention_mask=attention_mask, allow_is_bidirectional_skip=attention_mask is None, **kwargs
    )


def joint_padding_mask(attention_mask: torch.Tensor | None, num_image_tokens: int) -> torch.Tensor | None:
    """Return the padding mask of texts joined with image tokens, which have no padding; `None` stays `None`."""
    return None if attention_mask is None else nn.functional.pad(attention_mask, (0, num_image_tokens), value=1)


def first_positions(attention_mask: torch.Tensor) -> torch.LongTensor:
    """Return the position of each text's first token, [CLS], `(num_texts,)`: 0 unless texts are padded on the left."""
    return attention_mask.long().argmax(dim=-1)


def class_states(hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Return the state of each text's [CLS]: `(num_texts, text_length, hidden_size)` -> `(num_texts, hidden_size)`."""
    if attention_mask is None:
        return hidden_states[:, 0]
    return gather_tokens(hidden_states, first_positions(attention_mask).to(hidden_states.device)[:, None])[:, 0]


@auto_docstring
class TripsPreTrainedModel(PreTrainedModel):
    config: TripsConfig
    base_model_prefix = "model"
    input_modalities: tuple[str, ...] = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = [
        "TripsVisionEmbeddings",
        "TripsTextEmbeddings",
        "TripsVisionLayer",
        "TripsTextLayer",
        "TripsCrossLayer",
        "TripsConnectedLayer",
    ]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    # The Auto classes that load this class from its checkpoint.
    auto_classes: ClassVar[tuple[str, ...]] = ()
    # The pipeline that runs it.
    pipeline_class: ClassVar[type[Pipeline] | None] = None

    def save_pretrained(self, save_directory, **kwargs):
        """As in Transformers. The configuration names this class, and for `AutoModel` the bare model, but no other."""
        # FSDP2 makes a class of its own for a sharded model, whose code no checkpoint has.
        model_class = next(base for base in type(self).__mro__ if not base.__module__.startswith("torch."))
        model = object.__new__(model_class)
        model.__dict__ = self.__dict__
        name = name_in_checkpoint(model_class)
        bare = {"AutoModel": "modeling_trips.TripsModel"} if model_class.config_class is TripsConfig else {}
        self.config.auto_map = {**bare, **dict.fromkeys(model_class.auto_classes, name)}
        self.config.__dict__.pop("custom_pipelines", None)
        if (pipeline := model_class.pipeline_class) is not None:
            pipeline_info = {"impl": name_in_checkpoint(pipeline), "pt": [model_class.auto_classes[0]]}
            self.config.custom_pipelines = {pipeline.default_task: {**pipeline_info, "type": "multimodal"}}
        # A part of a whole model is saved under its own names.
        super(TripsPreTrainedModel, model).save_pretrained(save_directory, **{"save_original_format": False, **kwargs})


def name_in_checkpoint(cls: type) -> str:
    """Return the name of a class in the code of a checkpoint: `"modeling_trips.TripsModel"`."""
    return f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}"
