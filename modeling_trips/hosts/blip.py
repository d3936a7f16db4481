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
How BLIP's own text guides its vision tower: the tower runs first, so the text is encoded before it, once more.

BLIP's text model is a mixture of encoder and decoder (https://arxiv.org/abs/2201.12086, section 3.1): without its
cross-attention, the image-grounded text encoder is the unimodal text encoder, whose [CLS] summarises the text; the
weights of both are the same. That [CLS] guides. For `BlipForImageTextRetrieval` it is the very encoder of the
contrastive loss. For `BlipForQuestionAnswering` fine-tuning has since moved the weights for use with an image, so
there it is a start that training must confirm: compare it with guidance "image".
"""

import copy
from functools import partial, wraps
from inspect import signature
from types import MethodType

import torch
from transformers import (
    BlipForConditionalGeneration,
    BlipForQuestionAnswering,
    PreTrainedModel,
)

from .layers import Host
from .vision import describe_blip


def text_guidance_of(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """[CLS] of the text as BLIP's unimodal text encoder sees it: `(batch_size, hidden_size)`."""
    return model.text_encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]


class TextGuidance:
    """A forward pre-hook: encodes the text and gives it to the vision tower, as the keyword `text_embeds`."""

    def __init__(self, model: PreTrainedModel):
        self.parameters = list(signature(type(model).forward).parameters)[1:]  # without self
        self.handle = model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, model: PreTrainedModel, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        kwargs = {**dict(zip(self.parameters, args)), **kwargs}
        # The contrastive score compares each image with all texts: there the image is to guide itself.
        is_contrastive = not kwargs.get("use_itm_head", True)
        if kwargs.get("input_ids") is not None and not is_contrastive:
            kwargs["text_embeds"] = text_guidance_of(model, kwargs["input_ids"], kwargs.get("attention_mask"))
        return (), kwargs


@wraps(BlipForQuestionAnswering.generate)
@torch.no_grad()
def generate_with_text_guidance(self, input_ids, pixel_values, attention_mask=None, **kwargs):
    # BLIP's generate calls the vision tower with the pixels only. Here it runs on a shallow copy of the model, whose
    # vision tower has got the text: nothing is left behind in the model, and threads may share it.
    text_embeds = text_guidance_of(self, torch.as_tensor(input_ids), attention_mask)
    guided = copy.copy(self)
    vars(guided)["vision_model"] = partial(self.vision_model, text_embeds=text_embeds)
    return type(self).generate(guided, input_ids, pixel_values, attention_mask, **kwargs)


def install_text_guidance(model: PreTrainedModel):
    TextGuidance(model)
    if isinstance(model, BlipForQuestionAnswering):
        # No module stands between the caller and `generate`; this is the one attribute that the model itself gets.
        model.generate = MethodType(generate_with_text_guidance, model)


def remove_text_guidance(model: PreTrainedModel):
    for hook in list(model._forward_pre_hooks.values()):
        if isinstance(hook, TextGuidance):
            hook.handle.remove()
    if getattr(vars(model).get("generate"), "__func__", None) is generate_with_text_guidance:
        del model.generate


def describe_blip_with_text(model: PreTrainedModel) -> Host:
    host = describe_blip(model)
    host.passes_its_text = True
    return host


def describe_blip_captioner(model: BlipForConditionalGeneration) -> Host:
    host = describe_blip(model)
    host.no_text = (
        "its only text model is a causal decoder, whose first token has seen no other, and in training its "
        "`input_ids` are the caption that it is to predict"
    )
    return host


__all__ = [
    "describe_blip_captioner",
    "describe_blip_with_text",
    "install_text_guidance",
    "remove_text_guidance",
]
