"""Description of a model that patch selection patches."""

from collections.abc import Mapping, Sequence

from torch import nn

from ..schedule_trips import LayerSelection, SelectionSchedule
from .layers import SelectionLayer, check_forward, library_name


class Host:
    """
    Location and properties of a model's layers. Subclasses describe kinds of models; here are those of a ViT with a
    [CLS] whose text, if any, is passed by the caller.
    """

    # Selection layer for each class of the model's layers, by the name that Transformers or timm gives the class.
    layer_classes: Mapping[str, type[SelectionLayer]] = {}
    guidances: tuple[str, ...] = ("text", "image")
    # Reason why the text cannot score patches, if so.
    no_text: str | None = None
    # The model passes its own text to its layers.
    passes_its_text = False
    # Layers after a selection layer get arguments with one entry per patch, which they must shorten.
    layers_follow = False
    # Side of the square of patches that is kept or dropped as a whole.
    unit = 1
    has_class_token = True
    # The rest becomes a fused token, which no grid of patches has a place for.
    can_fuse = True

    def __init__(self, model: nn.Module):
        self.model = model
        self.base = getattr(model, "base_model", model)  # the model without its head

    @property
    def layers(self) -> nn.ModuleList:
        raise NotImplementedError

    @property
    def num_prefix_tokens(self) -> int:
        """Number of leading tokens that are always kept."""
        return int(self.has_class_token)

    @property
    def num_selectable_layers(self) -> int:
        return len(self.layers)

    def check_schedule(self, schedule: SelectionSchedule):
        """Raise a TypeError for layers of an unsupported class, a ValueError for a schedule that does not fit them."""
        if not schedule.layers:
            return
        name = type(self.model).__name__
        last = self.num_selectable_layers
        if max(schedule.layers) > last:
            raise ValueError(
                f"Selection layers of {name} must be in 1..{last}, got {list(schedule.layers)}."
                + ("" if last == len(self.layers) else f" Layers from {last + 1} on need all tokens.")
            )
        for selection in schedule.selections:
            if selection.only_scores:
                raise ValueError(f"Layers of {name} must have a keep rate, got {schedule}.")
            if selection.guidance not in self.guidances:
                raise ValueError(f"Layers of {name} must be scored by {' or '.join(self.guidances)}, got {schedule}.")
            if selection.guidance == "text" and self.no_text is not None:
                raise ValueError(f"{name} does not support guidance 'text': {self.no_text}. Use 'image'.")
        for number in self.changed_layers(schedule):
            layer = self.layers[number - 1]
            layer = getattr(layer, "wrapped_module", layer)
            if library_name(type(layer)) not in self.layer_classes:
                names = " or ".join(self.layer_classes)
                raise TypeError(f"Layer {number} must be of class {names}, got {type(layer).__name__}.")
            check_forward(layer, f"layer {number}")

    def changed_layers(self, schedule: SelectionSchedule) -> Sequence[int]:
        """Return the numbers of the layers to wrap: selection layers, and later layers that must shorten arguments."""
        if self.layers_follow and schedule.layers:
            return range(min(schedule.layers), len(self.layers) + 1)
        return schedule.layers

    def wrap_layers(self, schedule: SelectionSchedule):
        """Replace layers of a model without selection by selection layers."""
        takes_text = any(selection.guidance == "text" for selection in schedule.selections)
        for number in self.changed_layers(schedule):
            index = number - 1
            selection = schedule.by_layer.get(number)
            self.layers[index] = self.wrap(self.layers[index], number, selection, takes_text)

    def wrap(
        self,
        layer: nn.Module,
        number: int,
        selection: LayerSelection | None,
        takes_text: bool = False,
    ) -> SelectionLayer:
        """Return the selection layer of a layer; in a schedule with `takes_text` the caller may pass a text."""
        is_by_text = selection is not None and selection.guidance == "text"
        layer_class = self.layer_classes[library_name(type(layer))]
        return layer_class.of(
            layer,
            number=number,
            selection=selection,
            fuse=self.can_fuse,
            unit=self.unit,
            num_prefix_tokens=self.num_prefix_tokens,
            has_class_token=self.has_class_token,
            takes_text=takes_text,
            needs_text=is_by_text and not self.passes_its_text,
        )
