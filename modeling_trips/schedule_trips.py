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
The schedule of the patch selection: which layers select, what scores the patches, and how many are kept.

It needs the standard library alone: scripts check a schedule before they import what takes seconds.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple


GUIDANCES = ("text", "image", "random")
SCORE = "score"  # in place of a keep rate


class LayerSelection(NamedTuple):
    """
    Settings of one selection layer.

    Args:
        guidance (`str`, *optional*, defaults to `"text"`): What scores the candidates: `"text"`, `"image"` or
            `"random"`.
        keep_rate (`float`, *optional*, defaults to 0.7): Share of the candidates that is kept, in (0, 1].
        only_scores (`bool`, *optional*, defaults to `False`): Whether the layer scores the candidates and keeps all.
            Its keep rate is 1.0.
    """

    guidance: str = "text"
    keep_rate: float = 0.7
    only_scores: bool = False

    @classmethod
    def parse(cls, text: str) -> "LayerSelection":
        """Read `guidance:keep_rate` or `guidance:score`; what is left out has its default."""
        guidance, _, rate = text.partition(":")
        settings: dict[str, Any] = {}
        if guidance:
            settings["guidance"] = guidance
        if rate == SCORE:
            settings |= {"keep_rate": 1.0, "only_scores": True}
        elif rate:
            settings["keep_rate"] = float(rate)
        return cls(**settings)

    def __str__(self) -> str:
        return f"{self.guidance}:{SCORE if self.only_scores else self.keep_rate}"

    def check(self):
        """Raise a `ValueError` if a setting is out of its range."""
        if self.guidance not in GUIDANCES:
            raise ValueError(f"`guidance` must be one of {', '.join(map(repr, GUIDANCES))}, got {self.guidance!r}.")
        is_number = isinstance(self.keep_rate, (int, float)) and not isinstance(self.keep_rate, bool)
        if not is_number or not 0 < self.keep_rate <= 1:
            raise ValueError(f"`keep_rate` must be a number in (0, 1], got {self.keep_rate!r}.")
        if self.only_scores and (self.guidance == "random" or self.keep_rate < 1):
            raise ValueError(f"A layer that only scores needs 'text' or 'image' and keep rate 1.0, got {self}.")


@dataclass(frozen=True, slots=True)
class SelectionSchedule:
    """
    The layers that select patches, what scores the patches, and how many are kept. `SelectionSchedule()` keeps all.

    Its text form is one entry per layer, `layer:guidance:keep_rate`, as in `5:image:0.7,12:text:0.3`. `str` prints it
    and `parse` reads it. A layer `6:text:score` scores the patches and keeps all.

    Args:
        layers (`tuple[int, ...]`): Numbers of the layers, from 1, ascending. One with a keep rate of 1.0 is left out,
            unless it only scores.
        selections (`tuple[LayerSelection, ...]`): Settings of each of them.

    Attributes:
        by_layer (`dict[int, LayerSelection]`): The settings by layer.

    Raises:
        ValueError: Layers are not ascending, a setting is out of its range, or only some of the layers select.
    """

    layers: tuple[int, ...] = ()
    selections: tuple[LayerSelection, ...] = ()
    by_layer: dict[int, LayerSelection] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        layers = list(self.layers)
        is_ascending = layers == sorted(set(layers))
        if not is_ascending or min(layers, default=1) < 1 or len(layers) != len(self.selections):
            raise ValueError(f"The layers of a schedule must be numbers from 1, ascending, each once, got {layers}.")
        by_layer = {}
        for layer, selection in zip(layers, self.selections):
            selection.check()
            if selection.keep_rate < 1 or selection.only_scores:
                by_layer[layer] = selection
        if len({selection.only_scores for selection in by_layer.values()}) > 1:
            raise ValueError(
                f"All layers of a schedule only score, or none, got {','.join(map(str, self.selections))}."
            )
        object.__setattr__(self, "layers", tuple(by_layer))
        object.__setattr__(self, "selections", tuple(by_layer.values()))
        object.__setattr__(self, "by_layer", by_layer)

    @classmethod
    def parse(cls, text: "str | SelectionSchedule") -> "SelectionSchedule":
        """
        Args:
            text (`str` or `SelectionSchedule`): The text form. `"5,10"` and `"5:image,10"` leave out the guidance
                `"text"` or the keep rate 0.7. `"unpruned"` selects nothing. A schedule is returned as it is.

        Raises:
            TypeError: It is neither.
            ValueError: An entry has another form, or a setting is out of its range.
        """
        if not isinstance(text, str):
            # By its name, as code from the Hub is loaded once for each class of a folder.
            if type(text).__name__ != cls.__name__:
                raise TypeError(f"A schedule is a text such as '5:image:0.7' or 'unpruned', got {text!r}.")
            return text
        if text == str(UNPRUNED):
            return UNPRUNED
        layers = []
        selections = []
        for entry in text.split(","):
            layer, _, settings = entry.strip().partition(":")
            try:
                layers.append(int(layer))
                selections.append(LayerSelection.parse(settings))
            except ValueError as error:
                raise ValueError(
                    f"A schedule has entries layer:guidance:keep_rate, as in 5:image:0.7,12:text:0.3, got {entry!r}."
                ) from error
        return cls(tuple(layers), tuple(selections))

    def __str__(self) -> str:
        entries = [f"{layer}:{selection}" for layer, selection in self.by_layer.items()]
        return ",".join(entries) or "unpruned"

    def check_fits(self, num_layers: int):
        """Raise a `ValueError` if a layer is behind the last one of a tower with `num_layers`."""
        if max(self.layers, default=1) > num_layers:
            raise ValueError(f"The layers of this schedule must be in 1..{num_layers}, got {self}.")

    @property
    def text_layers(self) -> tuple[int, ...]:
        """Numbers of the layers that a text scores."""
        return tuple(layer for layer, selection in self.by_layer.items() if selection.guidance == "text")

    @property
    def first_text_layer(self) -> int | None:
        """Number of the first layer that a text scores, where the text-independent part ends; `None` without one."""
        return min(self.text_layers, default=None)

    @property
    def scores_only(self) -> bool:
        """Whether there are layers, which only score."""
        return bool(self.layers) and all(selection.only_scores for selection in self.selections)

    def scoring(self) -> "SelectionSchedule":
        """The schedule whose layers score by the same text or image, and keep all. Random scores are left out."""
        by_layer = {}
        for layer, selection in self.by_layer.items():
            if selection.guidance != "random":
                by_layer[layer] = selection._replace(keep_rate=1.0, only_scores=True)
        return SelectionSchedule(tuple(by_layer), tuple(by_layer.values()))

    def before(self, layer: int | None) -> "SelectionSchedule":
        """The part of the schedule below a layer; all of it for `None`."""
        if layer is None:
            return self
        num_below = sum(selection_layer < layer for selection_layer in self.layers)
        return SelectionSchedule(layers=self.layers[:num_below], selections=self.selections[:num_below])

    def with_keep_rate(self, keep_rate: float) -> "SelectionSchedule":
        """
        Return the schedule with another keep rate in its only layer. 1.0 is unpruned.

        Raises:
            ValueError: There are several layers or none, or the rate is not in (0, 1].
        """
        if len(self.layers) != 1:
            raise ValueError(f"`keep_rate` needs a schedule of one selection layer, got {self}. Give a schedule.")
        selection = self.selections[0]._replace(keep_rate=keep_rate)
        return SelectionSchedule(layers=self.layers, selections=(selection,))


UNPRUNED = SelectionSchedule()
