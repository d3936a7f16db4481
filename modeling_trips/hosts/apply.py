"""Patch selection inside models of Transformers and timm."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..modeling_trips_vision import TripsSelection
from ..schedule_trips import SelectionSchedule
from .blip import BlipCaptioner, BlipWithText, remove_text_guidance
from .host import Host
from .layers import ModuleWrapper, SelectionLayer, SelectionPass, lookup, selecting_layers
from .vilt import Vilt
from .vision import BridgeTower, Timm, VisionTower
from .vlm.families import FAMILIES, Family, find_family
from .vlm.guide import TextGuide
from .vlm.scoring import Scorer
from .vlm.tower import TowerLayer
from .vlm.visual_tokens import ExitSelection
from .vlm.wrapper import check_generative, prune_calls, selection_of


# By name, so that no model module is imported. CLIPForImageClassification and similar models average the patches, so
# they are not supported.
HOSTS: dict[str, type[Host]] = {
    "ViltPreTrainedModel": Vilt,
    "BlipForQuestionAnswering": BlipWithText,
    "BlipForImageTextRetrieval": BlipWithText,
    "BlipForConditionalGeneration": BlipCaptioner,
    "BlipModel": VisionTower,
    "BlipVisionModel": VisionTower,
    "Blip2VisionModel": VisionTower,
    "InstructBlipVisionModel": VisionTower,
    "CLIPModel": VisionTower,
    "CLIPVisionModel": VisionTower,
    "CLIPVisionModelWithProjection": VisionTower,
    "SiglipModel": VisionTower,
    "SiglipVisionModel": VisionTower,
    "BridgeTowerModel": BridgeTower,
    "BridgeTowerForMaskedLM": BridgeTower,
    "BridgeTowerForImageAndTextRetrieval": BridgeTower,
    "BridgeTowerForContrastiveLearning": BridgeTower,
    "VisionTransformer": Timm,
}


def apply_patch_selection(
    model: nn.Module,
    schedule: SelectionSchedule | str | None = None,
    visual_tokens: int | None = None,
    keep_rate: float | None = None,
    scorer: str | Scorer = "divprune",
    guide: TextGuide | None = None,
):
    """
    Add patch selection to a model, in place. A second call replaces the first. No parameter is added, renamed or
    copied: checkpoints saved with selection load without it, and vice versa.

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
            generative model with visual tokens in its prompt; in the towers of LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision,
            PaliGemma, Gemma 3, SmolVLM, Idefics3, InternVL, Qwen2-VL to Qwen3.5 and GLM-4.1V to GLM-4.6V, too.
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
            Generative models only: number of visual tokens per image (or tile) for the language model. Default: all
            tokens that the tower keeps.
        keep_rate (`float`, *optional*):
            Generative models only: share of an image's visual tokens for the language model, in (0, 1], instead of a
            number. Take it where images differ in size, as in Qwen-VL.
        scorer (`str` or `Callable`, *optional*, defaults to `"divprune"`):
            Scorer of these tokens, as in [`prune_inputs`].
        guide (`TextGuide`, *optional*):
            Generative models only: turns the prompt into the query of the layer that is scored by the text.

    Raises:
        TypeError: The model or one of its layers is not supported, `visual_tokens` is not an integer, or `schedule` is
            neither a text nor a `SelectionSchedule`.
        ValueError: The schedule or the guide does not fit the model, both a number and a rate are given or one of
            them is out of range, or a compiler or Accelerate has replaced the forward pass of a generative model or
            of a layer.
        RuntimeError: `record_patch_selection` is open on a generative model.
    """
    selects_at_exit = visual_tokens is not None or keep_rate is not None
    if schedule is None and not selects_at_exit:
        raise ValueError(
            "`apply_patch_selection` needs a `schedule`, such as '8:image:0.5', or `visual_tokens` or `keep_rate`."
        )
    if scorer != "divprune" and not selects_at_exit:
        raise ValueError(f"`scorer` needs `visual_tokens` or `keep_rate`, got {scorer!r} alone.")
    schedule = SelectionSchedule.parse("unpruned" if schedule is None else schedule)
    host = find_host(model)
    if isinstance(host, Family):
        at_exit = ExitSelection(visual_tokens=visual_tokens, keep_rate=keep_rate, scorer=scorer)
        check_generative(host, schedule, at_exit, guide)
    elif selects_at_exit or guide is not None:
        raise ValueError(
            f"`visual_tokens`, `keep_rate` and `guide` need a model with visual tokens in its prompt, got "
            f"{type(model).__name__}. Use a `schedule`."
        )
    host.check_schedule(schedule)
    remove_patch_selection(model)
    host.wrap_layers(schedule)
    if isinstance(host, Family):
        prune_calls(host, schedule, at_exit, guide)


def remove_patch_selection(model: nn.Module):
    """
    Restore the model's own modules, in place. Trained weights and attributes set meanwhile are kept.

    Raises:
        RuntimeError: `record_patch_selection` is open on a generative model.
        ValueError: The model is a part of a generative model with selection, or a selection layer has hooks of
            Accelerate.
    """
    generative = [module for module in model.modules() if selection_of(module) is not None]
    if not generative and any(isinstance(layer, TowerLayer) for layer in model.modules()):
        raise ValueError(
            f"This {type(model).__name__} is a part of a model with patch selection. Call `apply_patch_selection` or "
            "`remove_patch_selection` with the whole model."
        )
    if any(selection_of(module).records for module in generative):
        raise RuntimeError("Patch selection cannot change inside `record_patch_selection`. Leave it first.")
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
    for module in generative:
        selection_of(module).remove(module)


@contextmanager
def record_patch_selection(model: nn.Module) -> Iterator[list[TripsSelection]]:
    """
    Record one [`TripsSelection`] per selection layer and forward pass, in order. Call the model itself, not a compiled
    one, and leave the context before the backward pass.

    In ViLT `kept_indices` number the patches of the padded image, and -2 marks padding. In a generative model they
    number the units of patches that become one visual token, row by row. Each pass ends with one more
    [`TripsSelection`] without scores: the visual tokens of each image that the language model reads.

    Raises:
        ValueError: The model has no selection layers.
        RuntimeError: No selection layer ran inside the context.
    """
    recorded: list[TripsSelection] = []
    generative = selection_of(model)
    layers = selecting_layers(model)
    if generative is None and not layers:
        raise ValueError(f"This {type(model).__name__} has no selection layers: call `apply_patch_selection` first.")
    handles = _record_layers(layers, recorded) if generative is None else []
    if generative is not None:
        generative.records.append(recorded)
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()
        if generative is not None:
            generative.records = [other for other in generative.records if other is not recorded]
    if not recorded:
        raise RuntimeError("Nothing was recorded. Call the uncompiled model inside `record_patch_selection`.")


def _record_layers(layers: list[SelectionLayer], recorded: list[TripsSelection]) -> list:
    """Add hooks that give the layers a pass and record it, and return the handles."""
    current = SelectionPass()

    def start(layer: SelectionLayer, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        nonlocal current
        if layer is layers[0]:
            current = SelectionPass()
        return args, {"selection_pass": current, **kwargs}

    def end(layer: SelectionLayer, args: tuple, kwargs: dict, output):
        recorded.append(layer.recorded(kwargs["selection_pass"]))

    handles = []
    for layer in layers:
        handles.append(layer.register_forward_pre_hook(start, with_kwargs=True))
        handles.append(layer.register_forward_hook(end, with_kwargs=True))
    return handles


def find_host(model: nn.Module) -> Host:
    """Return the description of a model for patch selection. Raise a TypeError if the model is not supported."""
    family = find_family(model)
    if family is not None:
        return family
    host_class = lookup(HOSTS, type(model))
    if host_class is not None:
        return host_class(model)
    raise TypeError(
        f"Patch selection does not support {type(model).__name__}. It supports {', '.join(HOSTS)} (of timm), and "
        f"{', '.join(FAMILIES)} with their heads. In a PEFT model, apply it to `model.get_base_model()`."
    )
