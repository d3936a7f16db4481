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
Patch selection inside models of Transformers and timm: ViLT, BLIP, BridgeTower, CLIP, SigLIP, VisionTransformer, and
generative vision-language models such as LLaVA and Qwen-VL.

    apply_patch_selection(vilt, "5:text:0.7,10:text:0.7")
    outputs = vilt(**inputs)                       # fewer image tokens from layer 5 on

    apply_patch_selection(llava, "8:image:0.33", visual_tokens=64)
    llava.generate(**inputs)                       # 64 visual tokens instead of 576

    with record_patch_selection(vilt) as selections:
        vilt(**inputs)
    selections[0].kept_indices                     # patches that layer 5 kept

    remove_patch_selection(vilt)

No parameter is added, renamed or copied: checkpoints saved with selection load without it, and vice versa.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import (
    Blip2VisionModel,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipModel,
    BlipVisionModel,
    BridgeTowerForContrastiveLearning,
    BridgeTowerForImageAndTextRetrieval,
    BridgeTowerForMaskedLM,
    BridgeTowerModel,
    CLIPModel,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    InstructBlipVisionModel,
    SiglipModel,
    SiglipVisionModel,
)
from transformers.models.vilt.modeling_vilt import ViltPreTrainedModel

from ..configuration_trips import SelectionSchedule
from ..modeling_trips_vision import TripsSelection, next_candidates
from .blip import (
    describe_blip_captioner,
    describe_blip_with_text,
    install_text_guidance,
    remove_text_guidance,
)
from .layers import ModelParts, ModuleWrapper, SelectionLayer, check_layer
from .vilt import describe_vilt
from .vision import describe_bridgetower, describe_tower
from .vlm.families import FAMILIES, find_family
from .vlm.guide import TextGuide
from .vlm.pruning import ExitSelection
from .vlm.scoring import Scorer
from .vlm.wrapper import (
    apply_vlm_selection,
    check_not_recording,
    check_vlm_schedule,
    record_vlm_selection,
    remove_vlm_selection,
    selection_of,
)


# CLIPForImageClassification and similar models average the patches, so they are not supported.
SUPPORTED_MODELS: dict[Callable[[nn.Module], ModelParts], tuple[type[nn.Module], ...]] = {
    describe_vilt: (ViltPreTrainedModel,),
    describe_blip_with_text: (BlipForQuestionAnswering, BlipForImageTextRetrieval),
    describe_blip_captioner: (BlipForConditionalGeneration,),
    describe_tower: (
        BlipModel,
        BlipVisionModel,
        CLIPModel,
        CLIPVisionModel,
        CLIPVisionModelWithProjection,
        SiglipModel,
        SiglipVisionModel,
        Blip2VisionModel,
        InstructBlipVisionModel,
    ),
    describe_bridgetower: (
        BridgeTowerModel,
        BridgeTowerForMaskedLM,
        BridgeTowerForImageAndTextRetrieval,
        BridgeTowerForContrastiveLearning,
    ),
}
TIMM_CLASS = ("timm.models.vision_transformer", "VisionTransformer")


def apply_patch_selection(
    model: nn.Module,
    schedule: SelectionSchedule | str | None = None,
    visual_tokens: int | None = None,
    scorer: str | Scorer = "prompt",
    guide: TextGuide | None = None,
):
    """
    Add patch selection to a model, in place. A second call replaces the first.

    Call it after loading and before wrapping: before `torch.compile`, DDP or FSDP, and Accelerate's device hooks. For
    several devices, load the model without `device_map`, apply the selection, then call `accelerate.dispatch_model`.
    Activation checkpointing needs `use_reentrant=False`, the default of Transformers.

    In a generative vision-language model, `forward` and `generate` encode the image, drop visual tokens, and shorten
    `input_ids`, masks, positions and `labels`. Logits have the shorter length. Sequences that `generate` returns begin
    with the caller's prompt. Dropped patches are not fused, because a fused token has no place in the grid that the
    connector needs.

    Args:
        model (`torch.nn.Module`):
            A ViLT model (`ViltModel` or any of its heads); `BlipForQuestionAnswering`, `BlipForImageTextRetrieval`,
            `BlipForConditionalGeneration`, `BlipModel`, `BlipVisionModel`; the `vision_model` of BLIP-2 and
            InstructBLIP; `BridgeTowerModel` or a head of it; `CLIPModel`, `CLIPVisionModel`,
            `CLIPVisionModelWithProjection`; `SiglipModel`, `SiglipVisionModel`; timm's `VisionTransformer`. Or a
            generative model: LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision, PaliGemma, Gemma 3, SmolVLM, Idefics3, InternVL,
            Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3-VL-MoE.
        schedule (`SelectionSchedule` or `str`, *optional*):
            Selection layers of the vision tower (in ViLT, of the joint layers), and what scores the patches:
            `"5:image:0.7,10:text:0.7"`, or `"unpruned"`. In BridgeTower they must come before the first bridge to the
            cross-modal layers, in LLaVA before the layer whose states the language model reads.

            - `image`: the image's [CLS], or the mean of all tokens where there is none.
            - `random`: a control, in generative models only.
            - `text`: in ViLT the text's [CLS]. In BLIP for question answering and for retrieval by matching, the [CLS]
              of the text encoder without cross-attention, which costs another pass of the text encoder. In generative
              models the query of `guide`. In CLIP, SigLIP, `BlipModel` and bare vision towers `text_embeds` of shape
              `(batch_size, hidden_size)`, a keyword of the vision tower and `get_image_features`. A forward pass
              without it raises a ValueError.
        visual_tokens (`int`, *optional*):
            Generative models only: number of visual tokens per image for the language model. Default: all tokens that
            the tower keeps.
        scorer (`str` or `Callable`, *optional*, defaults to `"prompt"`):
            Scorer of these tokens, as in [`prune_inputs`].
        guide (`TextGuide`, *optional*):
            Generative models only: turns the prompt into the query of the layer that is scored by the text.

    Raises:
        TypeError: The model or one of its layers is not supported, or `visual_tokens` is not an integer.
        ValueError: The schedule or the guide does not fit the model, or a compiler or Accelerate has replaced the
            forward pass of a generative model or of a layer.
        RuntimeError: `record_patch_selection` is open on a generative model.
    """
    if schedule is None and visual_tokens is None:
        raise ValueError("`apply_patch_selection` needs a `schedule`, such as '8:image:0.5', or `visual_tokens`.")
    if not isinstance(schedule, SelectionSchedule):
        schedule = SelectionSchedule.parse(schedule or "unpruned")
    family = find_family(model)
    if family is not None:
        check_vlm_schedule(model, family, schedule, guide)
        at_exit = ExitSelection(visual_tokens, scorer=scorer)
        at_exit.check_fits(family)
        remove_patch_selection(model)
        apply_vlm_selection(model, family, schedule, at_exit, guide)
        return
    if visual_tokens is not None or guide is not None:
        raise ValueError(f"`visual_tokens` and `guide` need a generative model, got {type(model).__name__}.")
    parts = find_parts(model)
    _check_schedule(model, parts, schedule)
    for number in schedule.layers:
        check_layer(parts.layers[number - 1], number, [parts.layer_class])
    remove_patch_selection(model)
    guidances = {selection.guidance for selection in schedule.selections}
    for number, selection in schedule.by_layer.items():
        parts.layers[number - 1] = parts.selection_layer_class.of(
            parts.layers[number - 1],
            selection=selection,
            takes_text="text" in guidances,
            needs_text=selection.guidance == "text" and not parts.passes_its_text,
            num_prefix_tokens=parts.num_prefix_tokens,
            has_class_token=parts.has_class_token,
        )
    if schedule.layers:
        for parent, name, wrapper_class in parts.wrappers:
            setattr(parent, name, wrapper_class.of(getattr(parent, name)))
    if parts.passes_its_text and "text" in guidances:
        install_text_guidance(model)


def remove_patch_selection(model: nn.Module):
    """
    Restore the model's own modules, in place. Trained weights and attributes set meanwhile are kept.

    Raises:
        RuntimeError: `record_patch_selection` is open on a generative model.
        ValueError: A selection layer has hooks of Accelerate.
    """
    check_not_recording(model)
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, ModuleWrapper)
    ]
    for _, name, wrapper in places:
        if "forward" in vars(wrapper):
            raise ValueError(f"Module {name} has a hook of Accelerate around its forward pass. Remove the hook first.")
    for parent, name, wrapper in places:
        setattr(parent, name, wrapper.restore())
    remove_text_guidance(model)
    remove_vlm_selection(model)


@contextmanager
def record_patch_selection(model: nn.Module) -> Iterator[list[TripsSelection]]:
    """
    Record one [`TripsSelection`] per selection layer and forward pass, in order. Recording computes the scores twice.
    Call the model itself, not a compiled one, and leave the context before the backward pass.

    In ViLT `kept_indices` number the patches of the padded image, and -2 marks padding. In a generative model they
    number the units of patches that become one visual token, row by row. Each pass ends with one more
    [`TripsSelection`] without scores: the visual tokens of each image that the language model reads.

    Raises:
        ValueError: The model has no selection layers.
        RuntimeError: No selection layer ran inside the context.
    """
    if selection_of(model) is not None:
        with record_vlm_selection(model) as selections:
            yield selections
        return
    layers = [module for module in model.modules() if isinstance(module, SelectionLayer)]
    if not layers:
        raise ValueError(f"This {type(model).__name__} has no selection layers: call `apply_patch_selection` first.")
    recorder = _Recorder(first_layer=layers[0])
    handles = [layer.register_forward_hook(recorder, with_kwargs=True) for layer in layers]
    try:
        yield recorder.selections
    finally:
        for handle in handles:
            handle.remove()
    if not recorder.was_called:
        raise RuntimeError("Nothing was recorded. Call the uncompiled model inside `record_patch_selection`.")


class _Recorder:
    """Forward hook that records all selection layers of a model."""

    def __init__(self, first_layer: SelectionLayer):
        self.first_layer = first_layer
        self.selections = []
        self.was_called = False
        self.candidate_indices = None

    @torch.no_grad()
    def __call__(self, layer: SelectionLayer, args: tuple, kwargs: dict, output):
        self.was_called = True
        if layer is self.first_layer:  # a new pass
            self.candidate_indices = None
        selection = layer.selection_of(args, kwargs, output, self.candidate_indices)
        if selection is None:
            return
        self.selections.append(selection)
        num_fused = int(layer.selection.fuse)
        self.candidate_indices = next_candidates(selection, selection.kept_indices.shape[1] + num_fused)


def find_parts(model: nn.Module) -> ModelParts:
    """
    Return the description of a model for patch selection.

    Raises:
        TypeError: The model is not supported.
    """
    for describe, classes in SUPPORTED_MODELS.items():
        if isinstance(model, classes):
            return describe(model)
    # By name, because timm is an optional dependency.
    if any((base.__module__, base.__name__) == TIMM_CLASS for base in type(model).__mro__):
        from .timm import describe_timm

        return describe_timm(model)
    if hasattr(model, "get_base_model"):  # PEFT
        raise TypeError(
            f"Patch selection does not support {type(model).__name__}. Apply it to `model.get_base_model()`."
        )
    names = ", ".join(base.__name__ for classes in SUPPORTED_MODELS.values() for base in classes)
    names = names.replace(ViltPreTrainedModel.__name__, "ViltModel and all of its heads")
    generative = ", ".join(base.__name__ for base in FAMILIES)
    raise TypeError(
        f"Patch selection does not support {type(model).__name__}. It supports {names}, timm's VisionTransformer, and "
        f"{generative} with their heads."
    )


def _check_schedule(model: nn.Module, parts: ModelParts, schedule: SelectionSchedule):
    last = parts.num_selectable_layers
    if max(schedule.layers, default=1) > last:
        raise ValueError(
            f"Selection layers of {type(model).__name__} must be in 1..{last}, got {list(schedule.layers)}."
            + ("" if last == len(parts.layers) else f" Layers from {last + 1} on need all tokens.")
        )
    for layer, selection in schedule.by_layer.items():
        if selection.guidance == "random":
            raise ValueError(
                f"Layer {layer} of {type(model).__name__} must be scored by the text or by the image, got {schedule}."
            )
        if selection.guidance == "text" and parts.no_text is not None:
            raise ValueError(f"{type(model).__name__} does not support guidance 'text': {parts.no_text}. Use 'image'.")
