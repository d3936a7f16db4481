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
"""Vision-language models whose `forward` and `generate` prune their own inputs."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps

import torch
from torch import nn

from ...configuration_trips import SelectionSchedule
from ...modeling_trips_text import CACHE_NAME
from ...modeling_trips_vision import TripsSelection
from ...patch_selection import PADDING
from ..layers import check_layer
from .families import Family
from .guide import TextGuide
from .pruning import ExitSelection, TowerSelection, prune
from .tower import Tower, TowerLayer, selecting_layers


# Attribute of the model that holds its selection. It is not a module, so no parameter is added.
ATTRIBUTE = "_patch_selection"
PRUNING_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


@dataclass
class VlmSelection:
    """Selection that `apply_vlm_selection` adds to a model of `own_class`, with the `handles` of its hooks."""

    own_class: type[nn.Module]
    family: Family
    exit: ExitSelection
    in_tower: TowerSelection | None
    handles: list
    recorded: list[TripsSelection] | None = None

    def prune(self, model: nn.Module, inputs: dict) -> dict:
        pruned, kept = prune(model, self.family, inputs, self.exit, self.in_tower)
        if self.recorded is not None:
            kept = nn.utils.rnn.pad_sequence(kept, batch_first=True, padding_value=PADDING)
            self.recorded.append(TripsSelection(kept_indices=kept))
        return pruned


def selection_of(model: nn.Module) -> VlmSelection | None:
    return vars(model).get(ATTRIBUTE)


def check_vlm_schedule(model: nn.Module, family: Family, schedule: SelectionSchedule, guide: TextGuide | None):
    """
    Raises:
        TypeError: Selection inside the tower is not supported for the model or one of its layers.
        ValueError: The schedule or the guide does not fit the model, or they do not fit each other.
    """
    name = type(model).__name__
    if schedule.layers and not family.layer_classes:
        raise TypeError(f"Selection inside the tower of {name} is not supported. Use only `visual_tokens`.")
    if schedule.layers and max(schedule.layers) > family.num_selectable_layers:
        raise ValueError(
            f"Selection layers of {name} must be in 1..{family.num_selectable_layers}, got {list(schedule.layers)}."
        )
    if any(selection.mass is not None for selection in schedule.selections):
        raise ValueError(f"Top-p selection is not supported inside other models, got {schedule}.")
    by_text = [layer for layer, selection in schedule.by_layer.items() if selection.guidance == "text"]
    if len(by_text) > 1:
        raise ValueError(f"At most one layer can be scored by the text, got layers {by_text}.")
    if by_text and guide is None:
        raise ValueError(f"Layer {by_text[0]} is scored by the text, but `guide` is None. Pass a trained `guide`.")
    if guide is not None and not by_text:
        raise ValueError(f"`guide` needs a layer that is scored by the text, such as 2:text:0.3, got {schedule}.")
    if guide is not None and (guide.num_heads, guide.head_dim) != family.heads:
        raise ValueError(
            f"The heads of `guide` must match those of the tower of {name}, (number, width) = {family.heads}, got "
            f"{(guide.num_heads, guide.head_dim)}."
        )
    for number in _changed_layers(family, schedule):
        check_layer(family.layers[number - 1], number, family.layer_classes)


def _changed_layers(family: Family, schedule: SelectionSchedule) -> Sequence[int]:
    """Return the numbers of the layers to wrap: selection layers, and later layers that must shorten arguments."""
    if family.layers_follow and schedule.layers:
        return range(schedule.first_layer, len(family.layers) + 1)
    return schedule.layers


def apply_vlm_selection(
    model: nn.Module, family: Family, schedule: SelectionSchedule, exit: ExitSelection, guide: TextGuide | None
):
    """Apply a checked schedule to a model without selection."""
    in_tower, handles = None, []
    if schedule.layers:
        in_tower, handles = _put_into_tower(family, schedule, guide)
    model.__dict__[ATTRIBUTE] = VlmSelection(type(model), family, exit, in_tower, handles)
    model.__class__ = _pruning_class(type(model))


def remove_vlm_selection(model: nn.Module):
    """Remove the hooks and the pruning class. `remove_patch_selection` restores the layers."""
    selection = selection_of(model)
    if selection is None:
        return
    for handle in selection.handles:
        handle.remove()
    model.__class__ = selection.own_class
    del model.__dict__[ATTRIBUTE]


@contextmanager
def record_vlm_selection(model: nn.Module) -> Iterator[list[TripsSelection]]:
    """Record each selection layer in units of patches, then the visual tokens that the language model reads."""
    selection = selection_of(model)
    recorded: list[TripsSelection] = []

    def record(layer: TowerLayer, args, output):
        if layer.tower.current is not None:
            recorded.append(layer.recorded())

    handles = [layer.register_forward_hook(record) for layer in selecting_layers(model)]
    selection.recorded = recorded
    try:
        yield recorded
    finally:
        selection.recorded = None
        for handle in handles:
            handle.remove()
    if not recorded:
        raise RuntimeError("Nothing was recorded. Call the model with an image inside `record_patch_selection`.")


def _put_into_tower(family: Family, schedule: SelectionSchedule, guide: TextGuide | None):
    tower, layers = Tower(family.unit, family.has_class_token), family.layers
    for number in _changed_layers(family, schedule):
        layer = layers[number - 1]
        layers[number - 1] = family.layer_classes[type(layer)].of(
            layer, tower=tower, number=number, selection=schedule.by_layer.get(number)
        )
    handles = [family.tower.register_forward_pre_hook(tower.begin), *family.add_restoring_hooks(tower)]
    return TowerSelection(tower, guide), handles


def _pruning_class(own_class: type[nn.Module]) -> type[nn.Module]:
    """
    Return a class whose `forward` and `generate` prune their inputs. Its name does not change, because Transformers
    uses the name for `architectures` and in pipelines.
    """
    if own_class not in PRUNING_CLASSES:
        PRUNING_CLASSES[own_class] = _make_pruning_class(own_class)
    return PRUNING_CLASSES[own_class]


def _make_pruning_class(own_class: type[nn.Module]) -> type[nn.Module]:
    parameters = inspect.signature(own_class.forward)

    @wraps(own_class.forward)
    def forward(self, *args, **kwargs):
        if args:
            bound = parameters.bind(self, *args, **kwargs).arguments
            kwargs = {**bound, **bound.get("kwargs", {})}
            del kwargs["self"]
            kwargs.pop("kwargs", None)
        selection = selection_of(self)  # None in other models loaded with this class
        if selection is not None and kwargs.get("pixel_values") is not None:
            kwargs = selection.prune(self, kwargs)
        return own_class.forward(self, **kwargs)

    members = {"forward": forward, "__module__": own_class.__module__, "__qualname__": own_class.__qualname__}
    if hasattr(own_class, "generate"):
        members["generate"] = _pruning_generate(own_class)
    return type(own_class.__name__, (own_class,), members)


def _pruning_generate(own_class: type[nn.Module]):
    @wraps(own_class.generate)
    def generate(self, inputs: torch.Tensor | None = None, generation_config=None, *args, **kwargs):
        if inputs is not None and kwargs.get("input_ids") is None:
            inputs, kwargs["input_ids"] = None, inputs
        selection = selection_of(self)
        if selection is None or kwargs.get("pixel_values") is None:
            return own_class.generate(self, inputs, generation_config, *args, **kwargs)
        if kwargs.get("input_ids") is None:
            raise ValueError("`generate` needs `input_ids` with patch selection, got None.")
        past = kwargs.get(CACHE_NAME)
        if past is not None and past.get_seq_length() > 0:
            raise ValueError(
                f"`{CACHE_NAME}` must be empty with patch selection, got {past.get_seq_length()} tokens. Pass the "
                "whole conversation without a cache."
            )
        ids = kwargs["input_ids"]
        with torch.no_grad():
            kwargs = selection.prune(self, kwargs)
        length = kwargs["input_ids"].shape[1]
        for name in ("max_length", "min_length"):  # both count the caller's prompt
            value = kwargs.get(name) or getattr(generation_config, name, None)
            if value:
                kwargs[name] = value - ids.shape[1] + length
        outputs = own_class.generate(self, inputs, generation_config, *args, **kwargs)
        sequences = outputs if isinstance(outputs, torch.Tensor) else outputs.sequences
        prompts = ids.repeat_interleave(len(sequences) // len(ids), dim=0)
        sequences = torch.cat([prompts, sequences[:, length:].to(prompts.device)], dim=1)
        if isinstance(outputs, torch.Tensor):
            return sequences
        outputs.sequences = sequences
        return outputs

    return generate


__all__ = [
    "apply_vlm_selection",
    "check_vlm_schedule",
    "record_vlm_selection",
    "remove_vlm_selection",
    "selection_of",
]
