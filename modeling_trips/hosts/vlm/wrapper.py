"""Vision-language models whose `forward` and `generate` prune their own inputs."""

import copy
import inspect
from dataclasses import dataclass, field
from functools import cache, wraps

import torch
from torch import nn
from transformers.cache_utils import Cache

from ...modeling_trips_vision import TripsSelection
from ...schedule_trips import SelectionSchedule
from ..layers import check_forward, pad_units, selecting_layers
from .families import Family
from .guide import TextGuide
from .pruning import select_visual_tokens
from .visual_tokens import ExitSelection


# Attribute of the model that holds its selection. It is not a module, so no parameter is added.
ATTRIBUTE = "_patch_selection"


@dataclass
class VlmSelection:
    """Selection of a patched model whose own class is `own_class`, with the `handles` of its hooks."""

    own_class: type[nn.Module]
    family: Family
    schedule: SelectionSchedule
    at_exit: ExitSelection
    guide: TextGuide | None
    handles: list
    records: list[list[TripsSelection]] = field(default_factory=list)  # of open `record_patch_selection`

    def prune_call(self, inputs: dict) -> dict:
        past = cache_of(inputs)
        num_past = 0 if past is None else past.get_seq_length()
        if num_past > 0:
            raise ValueError(
                f"The cache must be empty with patch selection, got {num_past} tokens. Pass the whole conversation "
                "without a cache."
            )
        pruned, kept, current = select_visual_tokens(
            self.family,
            inputs,
            self.at_exit,
            in_tower=bool(self.schedule.layers),
            guide=self.guide,
        )
        if self.records and kept:
            layers = selecting_layers(self.family.model) if current is not None else []  # videos alone: no pass
            selections = [layer.recorded(current) for layer in layers]
            at_exit = TripsSelection(kept_indices=pad_units(kept))
            for recorded in self.records:
                recorded += [*selections, at_exit]
        return pruned

    def remove(self, model: nn.Module):
        """Remove the hooks and the pruning class. `remove_patch_selection` restores the layers."""
        for handle in self.handles:
            handle.remove()
        model.__class__ = self.own_class
        del model.__dict__[ATTRIBUTE]


def selection_of(model: nn.Module) -> VlmSelection | None:
    return vars(model).get(ATTRIBUTE)


def check_generative(family: Family, schedule: SelectionSchedule, at_exit: ExitSelection, guide: TextGuide | None):
    """
    Check what `Host.check_schedule` does not. Raise a TypeError if selection inside the tower is not supported for the
    model, a ValueError if the number of visual tokens or the guide does not fit.
    """
    model = family.model
    name = type(model).__name__
    check_forward(model, name)
    family.check_exit(at_exit, in_tower=bool(schedule.layers))
    if schedule.layers and not family.layer_classes:
        tower = type(getattr(family.base, "vision_tower", model)).__name__
        raise TypeError(
            f"Selection inside the tower of {name} ({tower}) is not supported. Use `visual_tokens` or `keep_rate`,"
            " without a schedule."
        )
    by_text = [layer for layer, selection in schedule.by_layer.items() if selection.guidance == "text"]
    if len(by_text) > 1:
        raise ValueError(f"At most one layer can be scored by the text, got layers {by_text}.")
    if by_text and guide is None:
        raise ValueError(f"Layer {by_text[0]} is scored by the text, but `guide` is None. Pass a trained `guide`.")
    if guide is None:
        return
    if not by_text:
        raise ValueError(f"`guide` needs a layer that is scored by the text, such as 2:text:0.3, got {schedule}.")
    expected = (model.get_input_embeddings().embedding_dim, *family.heads)
    sizes = (guide.text_hidden_size, guide.num_heads, guide.head_dim)
    if sizes != expected:
        raise ValueError(
            f"`guide` must have the (text_hidden_size, num_heads, head_dim) of {name}, {expected}, got {sizes}."
        )
    if guide.layer not in (None, *by_text):
        raise ValueError(f"`guide` is trained for layer {guide.layer}, got {schedule}.")


def prune_calls(family: Family, schedule: SelectionSchedule, at_exit: ExitSelection, guide: TextGuide | None):
    """Let `forward` and `generate` of a model with wrapped layers prune their inputs."""
    model = family.model
    if guide is not None:
        guide.to(model.device)
    model.__dict__[ATTRIBUTE] = VlmSelection(
        own_class=type(model),
        family=family,
        schedule=schedule,
        at_exit=at_exit,
        guide=guide,
        handles=family.add_hooks() if schedule.layers else [],
    )
    model.__class__ = _pruning_class(type(model))  # type: ignore[arg-type]


def cache_of(inputs: dict) -> Cache | None:
    """Return the cache among the inputs, under its name or that before Transformers 5.24."""
    return inputs.get("cache", inputs.get("past_key_values"))


def _has_pixels(inputs: dict) -> bool:
    """Whether there are images or videos to prune."""
    return inputs.get("pixel_values") is not None or inputs.get("pixel_values_videos") is not None


def _check_mask(inputs: dict):
    """Raise a ValueError if the attention mask continues the caller's prompt, but the cache holds a pruned one."""
    past = cache_of(inputs)
    mask = inputs.get("attention_mask")
    new = inputs.get("inputs_embeds")
    if new is None:
        new = inputs.get("input_ids")
    if past is None or new is None or not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        return
    num_past = past.get_seq_length()
    if not isinstance(num_past, int) or num_past == 0:  # in a static cache, it is a tensor on the device
        return
    num_new = new.shape[1]
    if mask.shape[1] != num_past + num_new:
        raise ValueError(
            f"`attention_mask` must cover {num_past} tokens of the pruned prompt and {num_new} new ones, got "
            f"{mask.shape[1]}. Use `generate`, or continue the mask that `prune_inputs` returns."
        )


def _by_name(signature: inspect.Signature, model: nn.Module, args: tuple, kwargs: dict) -> dict:
    """Return the arguments of a call by their names, without `self`."""
    if not args:
        return kwargs
    _, *bound = signature.bind(model, *args, **kwargs).arguments.items()
    named = dict(bound)
    return {**named, **named.pop("kwargs", {})}


@cache
def _pruning_class(own_class: type[nn.Module]) -> type[nn.Module]:
    """
    Return a class whose `forward` and `generate` prune their inputs. Its name does not change, because Transformers
    uses the name for `architectures` and in pipelines.
    """
    signature = inspect.signature(own_class.forward)

    class PruningModel(own_class):
        @wraps(own_class.forward)
        def forward(self, *args, **kwargs):
            kwargs = _by_name(signature, self, args, kwargs)
            selection = selection_of(self)  # None in other models loaded with this class
            if selection is not None and _has_pixels(kwargs):
                kwargs = selection.prune_call(kwargs)
            elif selection is not None:
                _check_mask(kwargs)
            return own_class.forward(self, **kwargs)

        def __reduce_ex__(self, protocol):
            return _new_pruning_model, (own_class,), vars(self)

    if hasattr(own_class, "generate"):
        PruningModel.generate = _pruning_generate(own_class)
    for name in ("__name__", "__qualname__", "__module__"):
        setattr(PruningModel, name, getattr(own_class, name))
    return PruningModel


def _new_pruning_model(own_class: type[nn.Module]) -> nn.Module:
    """Return an empty model. Pickle and `copy.deepcopy` make patched models by it."""
    return nn.Module.__new__(_pruning_class(own_class))  # type: ignore[arg-type]


def _count_pruned_prompt(model: nn.Module, generation_config, options: dict, length: int, pruned_length: int):
    """
    Lower `max_length` and `min_length`, which count the caller's prompt of `length` tokens, in the options of a call.
    Raise a ValueError if `max_length` leaves no token to generate.
    """
    own = options if generation_config is None else vars(generation_config)

    def setting(name: str) -> int | None:
        for part in (options, own, vars(model.generation_config)):
            if part.get(name) is not None:
                return part[name]
        return None

    longest = setting("max_length")
    if longest and longest <= length and setting("max_new_tokens") is None:
        raise ValueError(f"`max_length` must be larger than {length}, the length of the prompt, got {longest}.")
    for name in ("max_length", "min_length"):
        if value := setting(name):
            options.pop(name, None)
            own[name] = max(1, value - length + pruned_length)


def _pruning_generate(own_class: type[nn.Module]):
    signature = inspect.signature(own_class.generate)

    @wraps(own_class.generate)
    def generate(self, *args, **kwargs):
        kwargs = _by_name(signature, self, args, kwargs)
        if kwargs.get("inputs") is not None and kwargs.get("input_ids") is None:
            kwargs["input_ids"] = kwargs.pop("inputs")
        selection = selection_of(self)
        if selection is None or not _has_pixels(kwargs):
            return own_class.generate(self, **kwargs)
        if kwargs.get("input_ids") is None:
            raise ValueError("`generate` needs `input_ids` with patch selection, got None.")
        ids = kwargs["input_ids"]
        with torch.no_grad():
            kwargs = selection.prune_call(kwargs)
        length = kwargs["input_ids"].shape[1]
        generation_config = copy.deepcopy(kwargs.pop("generation_config", None))
        _count_pruned_prompt(self, generation_config, kwargs, ids.shape[1], length)
        outputs = own_class.generate(self, generation_config=generation_config, **kwargs)
        sequences = outputs if isinstance(outputs, torch.Tensor) else outputs.sequences
        prompts = ids.repeat_interleave(len(sequences) // len(ids), dim=0)
        new_tokens = sequences[:, length:].to(prompts.device)
        sequences = torch.cat([prompts, new_tokens], dim=1)
        if isinstance(outputs, torch.Tensor):
            return sequences
        outputs.sequences = sequences
        return outputs

    return generate
