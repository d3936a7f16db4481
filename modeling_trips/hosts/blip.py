"""
Text guidance of BLIP's vision tower. The tower runs first, so a hook encodes the text once more before it.

BLIP's image-grounded text encoder without its cross-attention is the unimodal text encoder, with the same weights
(https://arxiv.org/abs/2201.12086, section 3.1). Its [CLS] scores the patches. In `BlipForImageTextRetrieval` it is the
encoder of the contrastive loss. In `BlipForQuestionAnswering` fine-tuning has changed the weights for use with an
image, so fine-tune the model with selection and compare with guidance "image".
"""

import copy
from functools import partial
from inspect import signature

import torch
from transformers import PreTrainedModel

from ..schedule_trips import SelectionSchedule
from .vision import VisionTower


def text_guidance_of(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
) -> torch.Tensor:
    """Return the text's [CLS] from BLIP's unimodal text encoder: `(batch_size, hidden_size)`."""
    output = model.text_encoder(input_ids=input_ids, attention_mask=attention_mask)
    return output.last_hidden_state[:, 0]


class TextGuidance:
    """Forward pre-hook that encodes the text and passes it to the vision tower as `text_embeds`."""

    def __init__(self, model: PreTrainedModel):
        parameters = signature(type(model).forward).parameters
        self.parameters = list(parameters)[1:]  # without self
        self.handle = model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, model: PreTrainedModel, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        given = dict(zip(self.parameters, args))
        kwargs = {**given, **kwargs}
        # The contrastive score compares each image with all texts, so the image scores its own patches.
        is_contrastive = not kwargs.get("use_itm_head", True)
        if kwargs.get("input_ids") is not None and not is_contrastive:
            kwargs["text_embeds"] = text_guidance_of(model, kwargs["input_ids"], kwargs.get("attention_mask"))
        return (), kwargs


@torch.no_grad()
def generate_with_text_guidance(self, input_ids, pixel_values, attention_mask=None, **kwargs):
    # BLIP's generate passes only the pixels to the vision tower. A shallow copy of the model, whose vision tower has
    # the text bound, leaves the model unchanged and thread-safe.
    text_embeds = text_guidance_of(self, torch.as_tensor(input_ids), attention_mask)
    guided = copy.copy(self)
    vars(guided)["vision_model"] = partial(self.vision_model, text_embeds=text_embeds)
    return type(self).generate(guided, input_ids, pixel_values, attention_mask, **kwargs)


def remove_text_guidance(model: PreTrainedModel):
    for hook in list(model._forward_pre_hooks.values()):
        if isinstance(hook, TextGuidance):
            hook.handle.remove()
    if getattr(vars(model).get("generate"), "func", None) is generate_with_text_guidance:
        del model.generate


class BlipWithText(VisionTower):
    passes_its_text = True

    def wrap_layers(self, schedule: SelectionSchedule):
        super().wrap_layers(schedule)
        if any(selection.guidance == "text" for selection in schedule.selections):
            TextGuidance(self.model)
            if hasattr(self.model, "generate"):  # which is no module, so that no hook reaches it
                self.model.generate = partial(generate_with_text_guidance, self.model)


class BlipCaptioner(VisionTower):
    no_text = (
        "its only text model is a causal decoder, whose first token sees no other token, and in training its "
        "`input_ids` are the caption to predict"
    )
