"""
Selection layers inside the vision towers of vision-language models.

The connector after the tower pools, shuffles or merges units of neighboring patches and needs a whole grid. A layer
therefore keeps or drops whole units, and kept units are restored to their places before or after the connector.
Dropped units are zero, and their visual tokens are removed before the language model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import accumulate

import torch
from torch import nn

from ...modeling_trips_vision import TripsSelection
from ...patch_selection import choose_tokens, shorten_tokens
from ..layers import LayerRecord, Projections, SelectionLayer, SelectionPass, pad_units
from ..vision import ClipLayer


# The pass of the images that this thread encodes. Without one, the layers do not select.
CURRENT_PASS: ContextVar[SelectionPass | None] = ContextVar("trips_selection_pass", default=None)


@contextmanager
def selecting(current: SelectionPass | None) -> Iterator[None]:
    """Let the tower select in this pass; `None`: not at all."""
    token = CURRENT_PASS.set(current)
    try:
        yield
    finally:
        CURRENT_PASS.reset(token)


def restore_units(tokens: torch.Tensor, unit: int, current: SelectionPass) -> torch.Tensor:
    """
    Restore kept patches to their places in the grid, with zeros elsewhere: `(num_images, p + num_kept_patches, width)`
    -> `(num_images, p + num_patches, width)`. The p prefix tokens do not change.
    """
    kept = current.kept_before()  # (num_images, num_kept)
    num_images, num_kept = kept.shape
    num_units = current.grid_size
    num_others = tokens.shape[1] - num_kept * unit**2
    others, patches = tokens.tensor_split([num_others], dim=1)
    units = patches.unflatten(1, (num_kept, unit**2)).flatten(2)  # (num_images, num_kept, unit ** 2 * width)
    places = kept.unsqueeze(-1).expand_as(units)
    whole = units.new_zeros(num_images, num_units, units.shape[2])
    whole = whole.scatter(1, places, units)  # (num_images, num_units, unit ** 2 * width)
    if unit > 1:
        side = round(num_units**0.5)
        whole = whole.unflatten(1, (side, side))
        whole = whole.unflatten(3, (unit, unit, -1))  # (num_images, side, side, unit, unit, width)
        whole = whole.transpose(2, 3)  # row by row of patches
    patches = whole.reshape(num_images, num_units * unit**2, -1)
    return torch.cat([others, patches], dim=1)


class TowerLayer(SelectionLayer):
    """Layer that selects only in the pass that `CURRENT_PASS` holds."""

    def __call__(self, *args, **kwargs):
        # Activation checkpointing runs `forward` again with the same arguments, so the pass is one of them.
        current = CURRENT_PASS.get()
        if current is not None and current.selects:
            kwargs["selection_pass"] = current
        return super().__call__(*args, **kwargs)

    def forward(self, *args, **kwargs) -> torch.Tensor:
        if "selection_pass" not in kwargs:
            return type(self.wrapped_module).forward(self, *args, **kwargs)
        return super().forward(*args, **kwargs)


class ClipTowerLayer(TowerLayer, ClipLayer):
    pass


class InternvlLayer(TowerLayer):
    norms = ("layernorm_before", "layernorm_after")

    def projections(self) -> Projections:
        attention = self.attention
        return Projections(query=attention.q_proj, key=attention.k_proj, num_heads=attention.num_heads)

    def project_query(self, states: torch.Tensor) -> torch.Tensor:
        query = super().project_query(states)  # (num_images, num_heads, head_dim)
        normed = self.attention.q_norm(query.flatten(-2))
        return normed.view_as(query)

    def project_key(self, states: torch.Tensor) -> torch.Tensor:
        key = super().project_key(states).transpose(1, 2)  # (num_images, n, num_heads, head_dim)
        normed = self.attention.k_norm(key.flatten(-2))
        return normed.view_as(key).transpose(1, 2)

    @property
    def keys_are_linear(self) -> bool:
        return isinstance(self.attention.k_norm, nn.Identity)

    def attend(self, normed: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs) -> torch.Tensor:
        attn_output, _ = self.attention(normed, attention_mask=attention_mask, **kwargs)
        return self.lambda_1 * attn_output

    def feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = super().feed_forward(hidden_states)
        return self.lambda_2 * self.dropout(hidden_states)


class PackedLayer(TowerLayer):
    """
    Layer of a Qwen-VL tower. The patches of all images are one sequence of shape `(length, width)`, unit by unit, and
    attention stays within the segments of `cu_seqlens`.

    Scores do not use rotary embeddings, because a prompt or a mean of tokens has no position in the image.
    """

    def projections(self) -> Projections:
        return Projections.stacked(self.attn.qkv, self.attn.dim, self.attn.num_heads)

    def attend(self, normed: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs) -> torch.Tensor:
        return self.attn(normed, **kwargs)

    def shorten_arguments(self, current: SelectionPass, kept: torch.Tensor, arguments: dict) -> dict:
        def once_per_pass(shorten, value: torch.Tensor) -> torch.Tensor:
            key = (id(value), id(kept))
            if key not in current.shortened:
                current.shortened[key] = (value, shorten(value, kept))  # holding the value keeps its id unique
            return current.shortened[key][1]

        tables = arguments["position_embeddings"]
        return {
            **arguments,
            "cu_seqlens": once_per_pass(self.shorten_segments, arguments["cu_seqlens"]),
            "position_embeddings": tuple(once_per_pass(self.shorten_table, table) for table in tables),
        }

    def shorten_table(self, table: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """Return the rows of the kept units in a table with one row per patch."""
        units = table.unflatten(0, (-1, self.unit**2))
        return units[kept].flatten(0, 1)

    def shorten_segments(self, cu_seqlens: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """Return the boundaries of the segments after units are dropped, without empty segments."""
        size = self.unit**2
        units = cu_seqlens.to(kept.dtype) // size
        boundaries = torch.searchsorted(kept, units) * size
        boundaries = torch.unique_consecutive(boundaries)
        return boundaries.to(cu_seqlens.dtype)

    def select(
        self,
        current: SelectionPass,
        hidden_states: torch.Tensor,
        normed: torch.Tensor,
        query: torch.Tensor | None,
    ) -> torch.Tensor:
        num_units = current.counts_before(self.number)
        scores = self.score_images(normed, query, num_units)
        kept = []  # positions in the sequence of all units
        for scores_of_image, start in zip(scores, accumulate(num_units, initial=0)):
            (kept_of_image,) = choose_tokens(scores_of_image, self.selection.keep_rate)
            kept.append(start + kept_of_image)
        positions = torch.cat(kept)
        candidates = current.kept_before(self.number)
        if candidates is None:
            candidates = torch.arange(sum(num_units), device=positions.device)
        current.records[self.number] = LayerRecord(
            kept=candidates[positions],
            candidates=candidates,
            scores=scores,
            num_kept=[len(positions_of_image) for positions_of_image in kept],
        )
        units = hidden_states.unflatten(0, (-1, self.unit**2))  # (sum of num_units, unit ** 2, width)
        units = units.flatten(1)[None]  # (1, sum of num_units, unit ** 2 * width)
        all_scores = torch.cat(scores, dim=1)  # (1, sum of num_units)
        units = shorten_tokens(units, all_scores, positions[None], fuse=False)
        patches = units[0].unflatten(1, (self.unit**2, -1))
        return patches.flatten(0, 1)

    def attention_to_units(self, current: SelectionPass, hidden_states: torch.Tensor) -> list[torch.Tensor]:
        """Return the scores of all units of each image in row-major order, `(num_units,)`, 0 for those dropped."""
        num_units = current.counts_before(self.number)
        normed = self.normed_tokens(hidden_states)
        scores_of_images = self.score_images(normed, None, num_units)
        scores = torch.cat(scores_of_images, dim=1)[0]
        units = current.kept_before(self.number)
        if units is None:
            units = torch.arange(len(scores), device=scores.device)
        if current.unit_order is not None:
            units = current.unit_order[units]
        whole = scores.new_zeros(sum(current.num_units))
        whole = whole.index_copy(0, units, scores)
        return [*whole.split(current.num_units)]

    def score_images(
        self,
        normed: torch.Tensor,
        query: torch.Tensor | None,
        num_units: list[int],
    ) -> list[torch.Tensor]:
        """Score the units of each image: `(1, num_units)`."""
        if len({*num_units}) == 1:  # images of one size form a batch
            images = normed.unflatten(0, (len(num_units), -1))
            scores = self.score_units(images, query, None, is_whole=False)
            return [*scores.split(1)]
        num_patches = [number * self.unit**2 for number in num_units]
        images = normed.split(num_patches)
        queries = [None] * len(images) if query is None else query.split(1)
        scores_of_images = []
        for image, query_of_image in zip(images, queries):
            scores_of_images.append(self.score_units(image[None], query_of_image, None, is_whole=False))
        return scores_of_images

    def recorded(self, current: SelectionPass) -> TripsSelection:
        """Return the selection in row-major units of each image; -2 is padding."""
        record = current.records[self.number]
        scores = [scores_of_image[0] for scores_of_image in record.scores]
        candidates = current.units_by_image(record.candidates, current.counts_before(self.number))
        kept = current.units_by_image(record.kept, record.num_kept)
        return TripsSelection(
            kept_indices=pad_units(kept),
            scores=nn.utils.rnn.pad_sequence(scores, batch_first=True),
            candidate_indices=pad_units(candidates),
        )
