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
Patch selection inside models of Transformers and timm: ViLT, BLIP, BridgeTower, CLIP, SigLIP, VisionTransformer.

    apply_patch_selection(model, selection_layers=[5, 10], keep_rate=0.7)
    outputs = model(**inputs)                      # as before, with fewer image tokens from layer 5 on

    with record_patch_selection(model) as selections:
        model(**inputs)
    selections[0].kept_indices                     # what layer 5 kept

    remove_patch_selection(model)

No parameter is added, renamed or copied: checkpoints saved under selection load without it, and the other way round.
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Real

import torch
from torch import nn
from transformers import (
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
    SiglipModel,
    SiglipVisionModel,
)
from transformers.models.vilt.modeling_vilt import ViltPreTrainedModel

from ..modeling_trips_vision import TripsSelection, next_candidates
from .blip import (
    describe_blip_captioner,
    describe_blip_with_text,
    install_text_guidance,
    remove_text_guidance,
)
from .layers import Host, SelectionLayer, SelectionSettings, StandIn, host_module_of
from .vilt import describe_vilt
from .vision import describe_blip, describe_bridgetower, describe_clip, describe_siglip


# What is not here is left out for a reason: CLIPForImageClassification and the like average the patches, models of
# the LLaVA kind count on a fixed number of image tokens.
HOSTS: dict[Callable[[nn.Module], Host], tuple[type[nn.Module], ...]] = {
    describe_vilt: (ViltPreTrainedModel,),
    describe_blip_with_text: (BlipForQuestionAnswering, BlipForImageTextRetrieval),
    describe_blip_captioner: (BlipForConditionalGeneration,),
    describe_blip: (BlipModel, BlipVisionModel),
    describe_bridgetower: (
        BridgeTowerModel,
        BridgeTowerForMaskedLM,
        BridgeTowerForImageAndTextRetrieval,
        BridgeTowerForContrastiveLearning,
    ),
    describe_clip: (CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection),
    describe_siglip: (SiglipModel, SiglipVisionModel),
}
TIMM_HOST = ("timm.models.vision_transformer", "VisionTransformer")


def apply_patch_selection(
    model: nn.Module,
    selection_layers: Sequence[int],
    keep_rate: float | Sequence[float] = 0.7,
    guidance: str | Sequence[str] = "text",
    fuse_inattentive_tokens: bool = True,
):
    """
    Puts patch selection into a model, in place. Applied again, it replaces what was applied before. A layer whose rate
    is 1.0 stays as it is.

    Do this after loading and before wrapping: before `torch.compile`, DDP or FSDP, and Accelerate's device hooks.
    Activation checkpointing works as Transformers sets it by default, `use_reentrant=False`.

    Args:
        model (`torch.nn.Module`):
            A ViLT model (`ViltModel` or any of its heads); `BlipForQuestionAnswering`, `BlipForImageTextRetrieval`,
            `BlipForConditionalGeneration`, `BlipModel`, `BlipVisionModel`; `BridgeTowerModel` or a head of it;
            `CLIPModel`, `CLIPVisionModel`, `CLIPVisionModelWithProjection`; `SiglipModel`, `SiglipVisionModel`; timm's
            `VisionTransformer`.
        selection_layers (`Sequence[int]`):
            Numbers of the vision layers that select (of the joint layers in ViLT), from 1, ascending. In BridgeTower
            they must come before the first bridge to the cross-modal layers.
        keep_rate (`float` or `Sequence[float]`, *optional*, defaults to 0.7):
            Share of the candidates that goes on, in (0, 1]: one for all selection layers, or one each.
        guidance (`str` or `Sequence[str]`, *optional*, defaults to `"text"`):
            Who scores the patches: one for all selection layers, or one each. `"image"`: the image's own [CLS], or the
            mean of all tokens where there is none (SigLIP). `"text"`: in ViLT the text's [CLS]; in BLIP for question
            answering and for retrieval by matching the [CLS] of the text encoder without cross-attention, which costs
            another pass of the text encoder; in CLIP, SigLIP, `BlipModel` and lone vision towers a vector per image,
            `text_embeds` of shape `(batch_size, hidden_size)`, which the vision tower and `get_image_features` take as
            a keyword. A forward pass without it raises a ValueError: an index of images needs `"image"`.
        fuse_inattentive_tokens (`bool`, *optional*, defaults to `True`):
            Whether the tokens that are not kept go on as one fused token, or are dropped.

    Raises:
        TypeError: the model, or a layer of it, is none that selection knows.
        ValueError: layers, rates or guidance do not fit the model; or a layer's forward pass has been taken over by
            a compiler or by Accelerate.
    """
    host = find_host(model)
    layers = _checked_layers(host, selection_layers)
    rates = _checked_rates(layers, keep_rate)
    guidances = _checked_guidances(model, host, layers, guidance)
    schedule = {layer: (rate, who) for layer, rate, who in zip(layers, rates, guidances) if rate < 1.0}
    for number in schedule:
        _check_layer(host, number)

    remove_patch_selection(model)
    if not schedule:
        return
    for number, (rate, who) in schedule.items():
        settings = SelectionSettings(
            rate,
            who,
            takes_text="text" in guidances,
            needs_text=who == "text" and not host.passes_its_text,
            fuse_inattentive_tokens=fuse_inattentive_tokens,
            num_prefix_tokens=host.num_prefix_tokens,
            has_class_token=host.has_class_token,
        )
        host.layers[number - 1] = host.selection_layer_class.of(host.layers[number - 1], selection=settings)
    for parent, name, stand_in_class in host.stand_ins:
        setattr(parent, name, stand_in_class.of(getattr(parent, name)))
    if host.passes_its_text and any(who == "text" for _, who in schedule.values()):
        install_text_guidance(model)


def remove_patch_selection(model: nn.Module):
    """
    Puts the model's own modules back, in place; a model without selection stays as it is. Whatever has been trained or
    set in the modules stays.

    Raises:
        ValueError: Accelerate's hooks have been put on top of a selection layer.
    """
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, StandIn)
    ]
    for _, name, stand_in in places:
        if "forward" in vars(stand_in):
            raise ValueError(f"Module {name} has a hook of Accelerate around its forward pass: remove that first.")
    for parent, name, stand_in in places:
        setattr(parent, name, stand_in.give_back())
    remove_text_guidance(model)


@contextmanager
def record_patch_selection(model: nn.Module) -> Iterator[list[TripsSelection]]:
    """
    Records what is selected while it is open: one [`TripsSelection`] per selection layer and pass, in order. The
    scores are worked out twice for it. Call the model itself, not a compiled one, and leave before the backward pass.

    In ViLT `kept_indices` number the patches of the padded image, and -2 stands for padding.

    Raises:
        ValueError: the model has no selection layers.
        RuntimeError: no selection layer was run while it was open.
    """
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
        raise RuntimeError("Nothing was recorded: the model was not called, or only in a compiled form.")


class _Recorder:
    """A forward hook of all selection layers of a model."""

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
        num_fused = int(layer.selection.fuse_inattentive_tokens)
        self.candidate_indices = next_candidates(selection, selection.kept_indices.shape[1] + num_fused)


def find_host(model: nn.Module) -> Host:
    """Raises TypeError with the list of supported models if this is none of them."""
    for describe, classes in HOSTS.items():
        if isinstance(model, classes):
            return describe(model)
    # By name: timm is an extra, and a model of its own class cannot be there without it.
    if any((base.__module__, base.__name__) == TIMM_HOST for base in type(model).__mro__):
        from .timm import describe_timm

        return describe_timm(model)
    names = ", ".join(base.__name__ for classes in HOSTS.values() for base in classes)
    names = names.replace(ViltPreTrainedModel.__name__, "ViltModel and all of its heads")
    raise TypeError(
        f"Patch selection does not support {type(model).__name__}. It supports {names} and timm's VisionTransformer."
    )


def _checked_layers(host: Host, selection_layers: Sequence[int]) -> list[int]:
    try:
        layers = [operator.index(layer) for layer in selection_layers]
    except TypeError as error:
        raise ValueError(f"`selection_layers` must be a list of integers, got {selection_layers!r}.") from error
    last = host.num_selectable_layers
    if layers != sorted(set(layers)) or not all(1 <= layer <= last for layer in layers):
        raise ValueError(
            f"`selection_layers` must be ascending without repetition and lie in 1..{last}, got {layers}."
            + ("" if last == len(host.layers) else f" Layers {last + 1} on are tied, token by token, to others.")
        )
    return layers


def _one_per_layer(name: str, value, layers: list[int]) -> list:
    """One value for all layers, or one each, as one each."""
    several = isinstance(value, Sequence) and not isinstance(value, str)
    values = list(value) if several else [value] * len(layers)
    if len(values) != len(layers):
        raise ValueError(f"`{name}` must be one for all or one per selection layer: got {values} for {layers}.")
    return values


def _checked_rates(layers: list[int], keep_rate: float | Sequence[float]) -> list[float]:
    rates = _one_per_layer("keep_rate", keep_rate, layers)
    if not all(isinstance(rate, Real) and 0.0 < float(rate) <= 1.0 for rate in rates):
        raise ValueError(f"`keep_rate` must lie in (0, 1], got {keep_rate!r}.")
    return rates


def _checked_guidances(model: nn.Module, host: Host, layers: list[int], guidance: str | Sequence[str]) -> list[str]:
    guidances = _one_per_layer("guidance", guidance, layers)
    single = [guidance] if isinstance(guidance, str) else []  # one for all is checked even if there is no layer
    if any(who not in ("text", "image") for who in single + guidances):
        raise ValueError(f'`guidance` must be "text" or "image", or a list of them, got {guidance!r}.')
    if "text" in single + guidances and host.no_text is not None:
        raise ValueError(f'The text cannot guide {type(model).__name__}: {host.no_text}. Use guidance="image".')
    return guidances


def _check_layer(host: Host, number: int):
    layer = host_module_of(host.layers[number - 1])
    if type(layer) is not host.layer_class:
        raise TypeError(
            f"Layer {number} is of class {type(layer).__name__}; patch selection knows {host.layer_class.__name__}."
        )
    taken_over = {"forward", "_compiled_call_impl"} & vars(layer).keys()
    if taken_over:
        raise ValueError(
            f"Layer {number} does not run its own code any more (it has {', '.join(taken_over)}). Apply patch "
            "selection before compiling layers and before Accelerate adds its hooks."
        )


__all__ = ["apply_patch_selection", "record_patch_selection", "remove_patch_selection"]
