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
Selection layers inside the vision towers of vision-language models.

The connector after the tower pools, shuffles or merges units of neighboring patches and needs a whole grid. A layer
therefore keeps or drops whole units, and kept units are restored to their places before or after the connector.
Dropped units are zero, and their visual tokens are removed before the language model.
"""

from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import torch
from torch import nn

from ...configuration_trips import LayerSelection
from ...modeling_trips_vision import TripsSelection
from ...patch_selection import gather_tokens, keep_topk, num_kept_tokens, random_scores, score_tokens
from ..layers import ModuleWrapper, SeparateProjections, is_plain_linear, project_part, score_states


PADDING = -2  # index of a unit that a shorter row of a record lacks


# Not a dataclass: FSDP copies dataclasses among the arguments of a layer.
class TowerPass:
    """
    Selections of all layers in one pass of images through the tower.

    Args:
        num_units (`list[int]`, *optional*): Number of units of each image in a packed sequence.
        is_image (`torch.BoolTensor` of shape `(num_images, num_patches)`, *optional*): False marks padding patches.
    """

    def __init__(self, num_units: list[int] | None = None, is_image: torch.Tensor | None = None):
        self.num_units = num_units
        self.is_image = is_image
        # In a tower that permutes units by windows: row-major number of each unit, and the boundaries of the windows.
        self.unit_order: torch.Tensor | None = None
        self.segments: torch.Tensor | None = None
        # The query of the prompt: `(num_images, num_heads, head_dim)`.
        self.query: torch.Tensor | None = None
        # By layer. Grid: units of shape `(num_images, num_kept)`. Packed: units of all images in one row.
        self.kept: dict[int, torch.Tensor] = {}
        self.candidates: dict[int, torch.Tensor] = {}
        # By layer. Grid: `(num_images, num_candidates)`. Packed: one tensor of shape `(1, num_candidates)` per image.
        self.scores: dict[int, torch.Tensor | list[torch.Tensor]] = {}
        self.num_kept: dict[int, list[int]] = {}  # packed: per image
        self.shortened: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def last_before(self, layer: float) -> int | None:
        """Return the last selection layer before this one."""
        return max((own for own in self.kept if own < layer), default=None)

    @property
    def grid_size(self) -> int:
        """Number of units in the grid of one image, after the first selection."""
        return self.candidates[min(self.candidates)].shape[-1]

    def kept_before(self, layer: float = float("inf")) -> torch.Tensor | None:
        """Return the units kept before a layer, by default at the end; `None` if none was dropped."""
        return self.kept.get(self.last_before(layer))


# The pass of the images that this thread encodes. Without one, the layers do not select.
CURRENT_PASS: ContextVar[TowerPass | None] = ContextVar("trips_tower_pass", default=None)


@dataclass(frozen=True)
class Tower:
    """Properties that the selection layers of one tower share."""

    unit: int
    has_class_token: bool

    def to_units(self, patches: torch.Tensor, is_whole: bool) -> torch.Tensor:
        """
        Group patches by unit: `(num_images, num_patches, ...)` -> `(num_images, num_units, unit * unit, ...)`. A whole
        grid is row-major; patches kept by an earlier layer are already grouped.
        """
        size = self.unit**2
        if size == 1 or not is_whole:
            return patches.unflatten(1, (-1, size))
        side = round(patches.shape[1] ** 0.5) // self.unit
        grid = patches.unflatten(1, (side, self.unit, side, self.unit))
        return grid.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def restore(self, tokens: torch.Tensor, current: TowerPass) -> torch.Tensor:
        """
        Restore kept patches to their places in the grid, with zeros elsewhere: `(num_images, p + num_kept_patches,
        width)` -> `(num_images, p + num_patches, width)`. The p prefix tokens do not change.
        """
        kept, num_units = current.kept_before(), current.grid_size
        unit = self.unit
        num_others = tokens.shape[1] - kept.shape[1] * unit**2
        units = tokens[:, num_others:].unflatten(1, (-1, unit**2)).flatten(2)
        whole = units.new_zeros(len(tokens), num_units, units.shape[2])
        whole = whole.scatter(1, kept.unsqueeze(-1).expand_as(units), units)
        if unit > 1:
            side = round(num_units**0.5)
            whole = whole.unflatten(1, (side, side)).unflatten(3, (unit, unit, -1)).transpose(2, 3)
        return torch.cat([tokens[:, :num_others], whole.reshape(len(tokens), num_units * unit**2, -1)], dim=1)


class TowerLayer(ModuleWrapper):
    """
    Layer of a tower from the first selection layer on. `selection` is `None` if the layer only shortens its arguments.

    Subclasses define where the layer keeps its parts.
    """

    tower: Tower
    number: int
    selection: LayerSelection | None

    def __call__(self, *args, **kwargs):
        # Activation checkpointing runs `forward` again with the same arguments, so the pass is one of them.
        if (current := CURRENT_PASS.get()) is not None:
            kwargs["tower_pass"] = current
        return super().__call__(*args, **kwargs)

    def forward(self, *args, tower_pass: TowerPass | None = None, **kwargs) -> torch.Tensor:
        if tower_pass is None:
            return type(self.wrapped_module).forward(self, *args, **kwargs)
        return self.forward_in_pass(tower_pass, *args, **kwargs)

    def forward_in_pass(self, current: TowerPass, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """The layer's forward pass with the tokens that earlier layers have kept, and its own selection."""
        raise NotImplementedError

    def guiding_query(
        self,
        current: TowerPass,
        normed: torch.Tensor,
        images: slice = slice(None),
        is_image: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the query that scores the patches of these images: `(num_images, num_heads, head_dim)`."""
        if self.selection.guidance == "text":
            query = current.query[images]
            if len(query) != len(normed):
                raise ValueError(
                    f"`input_ids` must have placeholders for {len(normed)} images or tiles, got {len(query)}."
                )
            return query.to(normed.dtype)
        if self.tower.has_class_token:
            return self.project_query(normed[:, 0])
        # Without a [CLS], use the mean of all queries, which is the query of the mean.
        if is_image is None:
            return self.project_query(normed.mean(dim=1))
        weights = is_image.unsqueeze(-1).to(normed.dtype)
        return self.project_query((normed * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1))

    def score(self, query: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Score patches with states of shape `(num_images, num_patches, width)`: `(num_images, num_patches)`."""
        layer, rows = self.key_layer
        if is_plain_linear(layer):
            return score_states(query, states, layer, rows, self.scaling)
        return score_tokens(query, self.project_key(states), self.scaling)

    def recorded(self, current: TowerPass) -> TripsSelection:
        """Return the layer's selection in a pass, in units."""
        raise NotImplementedError


def selecting_layers(model: nn.Module) -> list[TowerLayer]:
    """Return the selection layers of a model's tower in order."""
    return [layer for layer in model.modules() if isinstance(layer, TowerLayer) and layer.selection is not None]


class GridLayer(TowerLayer):
    """Tower layer for images with the same square grid of patches: `(num_images, length, width)`."""

    def attend(self, normed: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs) -> torch.Tensor:
        return self.self_attn(hidden_states=normed, attention_mask=attention_mask, **kwargs)[0]

    def feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.layer_norm2(hidden_states))

    def forward_in_pass(
        self, current: TowerPass, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> torch.Tensor:
        attention_mask = self.shorten_mask(current, attention_mask)
        normed = self.normed_tokens(hidden_states)
        hidden_states = hidden_states + self.attend(normed, attention_mask, **kwargs)
        if self.selection is not None:
            hidden_states = self.select(current, hidden_states, normed)
        return hidden_states + self.feed_forward(hidden_states)

    def select(self, current: TowerPass, hidden_states: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        num_others = int(self.tower.has_class_token)
        before = current.kept_before(self.number)
        is_image = self.shorten_mask(current, current.is_image)
        if self.selection.guidance == "random":
            num_units = (normed.shape[1] - num_others) // self.tower.unit**2
            scores = random_scores(len(normed), num_units, False, normed.device, self.selection.seed)
            if is_image is not None:
                scores = scores * self.tower.to_units(is_image, before is None).any(dim=-1)
        else:
            query = self.guiding_query(current, normed, is_image=is_image)
            scores = self.score(query, normed[:, num_others:])
            if is_image is not None:
                scores = scores * is_image
            scores = self.tower.to_units(scores, before is None).sum(dim=-1)
        positions = keep_topk(scores, num_kept_tokens(scores.shape[1], self.selection.keep_rate))
        candidates = before
        if candidates is None:
            candidates = torch.arange(scores.shape[1], device=scores.device).expand(scores.shape)
        kept = candidates.gather(1, positions)
        current.kept[self.number], current.candidates[self.number] = kept, candidates
        current.scores[self.number] = scores
        units = self.tower.to_units(hidden_states[:, num_others:], before is None)
        patches = gather_tokens(units.flatten(2), positions).unflatten(2, units.shape[2:]).flatten(1, 2)
        return torch.cat([hidden_states[:, :num_others], patches], dim=1)

    def recorded(self, current: TowerPass) -> TripsSelection:
        return TripsSelection(*(part[self.number] for part in (current.kept, current.scores, current.candidates)))

    def shorten_mask(self, current: TowerPass, mask: torch.Tensor | None) -> torch.Tensor | None:
        """Shorten a patch mask, `(num_images, length)` or `(num_images, 1, length, length)`, to the kept patches."""
        kept = current.kept_before(self.number)
        if mask is None or kept is None:
            return mask
        num_patches = mask.shape[-1]
        numbers = self.tower.to_units(torch.arange(num_patches, device=mask.device)[None], True)[0]
        patches = numbers[kept].flatten(1)
        if mask.dim() == 2:
            return mask.gather(1, patches)
        mask = mask.expand(len(patches), *mask.shape[1:])
        mask = mask.gather(3, patches[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1))
        if mask.shape[2] == num_patches:
            mask = mask.gather(2, patches[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
        return mask


class ClipLayer(SeparateProjections, GridLayer):
    """Layer of CLIP, SigLIP, SmolVLM or Idefics3."""

    @property
    def key_layer(self) -> tuple[nn.Module, slice]:
        return self.self_attn.k_proj, slice(None)


class InternvlLayer(GridLayer):
    def normed_tokens(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.layernorm_before(hidden_states)

    def project_query(self, states: torch.Tensor) -> torch.Tensor:
        query = self.attention.q_norm(self.attention.q_proj(states))
        return query.unflatten(-1, (-1, self.attention.head_dim))

    @property
    def key_layer(self) -> tuple[nn.Module | None, slice]:
        is_linear = isinstance(self.attention.k_norm, nn.Identity)
        return self.attention.k_proj if is_linear else None, slice(None)

    def project_key(self, states: torch.Tensor) -> torch.Tensor:
        key = self.attention.k_norm(self.attention.k_proj(states))
        return key.unflatten(-1, (-1, self.attention.head_dim)).transpose(1, 2)

    @property
    def scaling(self) -> float:
        return self.attention.scale

    def attend(self, normed: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs) -> torch.Tensor:
        return self.lambda_1 * self.attention(normed, attention_mask=attention_mask, **kwargs)[0]

    def feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.lambda_2 * self.dropout(self.mlp(self.layernorm_after(hidden_states)))


class PackedLayer(TowerLayer):
    """
    Layer of a Qwen-VL tower. The patches of all images are one sequence of shape `(length, width)`, unit by unit, and
    attention stays within the segments of `cu_seqlens`.

    Scores do not use rotary embeddings, because a prompt or a mean of tokens has no position in the image.
    """

    def normed_tokens(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.norm1(hidden_states)

    def project_query(self, states: torch.Tensor) -> torch.Tensor:
        return project_part(self.attn, states, 0)

    @property
    def key_layer(self) -> tuple[nn.Module, slice]:
        return self.attn.qkv, slice(self.attn.dim, 2 * self.attn.dim)

    def project_key(self, states: torch.Tensor) -> torch.Tensor:
        return project_part(self.attn, states, 1).transpose(1, 2)

    @property
    def scaling(self) -> float:
        return self.attn.scaling

    def forward_in_pass(
        self,
        current: TowerPass,
        hidden_states: torch.Tensor,
        cu_seqlens: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        **kwargs,
    ) -> torch.Tensor:
        kept = current.kept_before(self.number)
        if kept is not None:
            cu_seqlens = self.shorten(current, cu_seqlens, kept, self.shorten_segments)
            position_embeddings = tuple(
                self.shorten(current, table, kept, self.shorten_table) for table in position_embeddings
            )
        normed = self.normed_tokens(hidden_states)
        hidden_states = hidden_states + self.attn(
            normed, cu_seqlens=cu_seqlens, position_embeddings=position_embeddings, **kwargs
        )
        if self.selection is not None:
            hidden_states = self.select(current, hidden_states, normed)
        return hidden_states + self.mlp(self.norm2(hidden_states))

    def shorten(self, current: TowerPass, value: torch.Tensor, kept: torch.Tensor, how) -> torch.Tensor:
        """Shorten a tensor that many layers share, once per pass."""
        key = (id(value), id(kept))
        if key not in current.shortened:
            current.shortened[key] = (value, how(value, kept))  # holding the value keeps its id unique
        return current.shortened[key][1]

    def shorten_table(self, table: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """Return the rows of the kept units in a table with one row per patch."""
        return table.unflatten(0, (-1, self.tower.unit**2))[kept].flatten(0, 1)

    def shorten_segments(self, cu_seqlens: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """Return the boundaries of the segments after units are dropped, without empty segments."""
        size = self.tower.unit**2
        boundaries = torch.searchsorted(kept, cu_seqlens.to(kept.dtype) // size) * size
        return torch.unique_consecutive(boundaries).to(cu_seqlens.dtype)

    def select(self, current: TowerPass, hidden_states: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        before = current.kept_before(self.number)
        num_units = current.num_kept.get(current.last_before(self.number), current.num_units)
        size = self.tower.unit**2
        if len({*num_units}) == 1:
            scores = self.scores(current, normed.unflatten(0, (len(num_units), -1)))
            rows = [*scores.split(1)]
        else:
            sequences = normed.split([number * size for number in num_units])
            rows = [
                self.scores(current, sequence[None], slice(image, image + 1))
                for image, sequence in enumerate(sequences)
            ]
        num_kept = [num_kept_tokens(number, self.selection.keep_rate) for number in num_units]
        firsts = accumulate(num_units, initial=0)
        positions = torch.cat(
            [first + keep_topk(row, number)[0] for first, row, number in zip(firsts, rows, num_kept)]
        )
        candidates = torch.arange(sum(num_units), device=positions.device) if before is None else before
        current.kept[self.number], current.candidates[self.number] = candidates[positions], candidates
        current.scores[self.number], current.num_kept[self.number] = rows, num_kept
        return hidden_states.unflatten(0, (-1, size))[positions].flatten(0, 1)

    def scores(self, current: TowerPass, normed: torch.Tensor, images: slice = slice(None)) -> torch.Tensor:
        """Score the units of images with equal numbers of units: `(num_images, num_units)`."""
        size = self.tower.unit**2
        if self.selection.guidance == "random":
            return random_scores(len(normed), normed.shape[1] // size, False, normed.device, self.selection.seed)
        return self.score(self.guiding_query(current, normed, images), normed).unflatten(1, (-1, size)).sum(dim=-1)

    def recorded(self, current: TowerPass) -> TripsSelection:
        """Return the selection in row-major units of each image; -2 is padding."""
        firsts = [*accumulate(current.num_units, initial=0)]
        rows = current.scores[self.number]

        def by_image(units: torch.Tensor, counts: list[int]) -> torch.Tensor:
            if current.unit_order is not None:
                units = current.unit_order[units]
            parts = [part - first for part, first in zip(units.split(counts), firsts)]
            return nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=PADDING)

        return TripsSelection(
            by_image(current.kept[self.number], current.num_kept[self.number]),
            nn.utils.rnn.pad_sequence([row[0] for row in rows], batch_first=True),
            by_image(current.candidates[self.number], [row.shape[1] for row in rows]),
        )


@cache
def selecting_class(kind: type[TowerLayer], own_class: type[nn.Module]) -> type[TowerLayer]:
    """Return `own_class` with selection. Its name does not change, because Accelerate looks for layers by name."""
    return type(own_class.__name__, (kind, own_class), {"__module__": own_class.__module__})
