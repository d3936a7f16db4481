"""Patch selection in ViLT, where the text's [CLS] scores the patches in the joint layers."""

import torch
from torch import nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput

from ..patch_selection import (
    first_true,
    gather_tokens,
    num_kept_tokens,
    positions_of,
    score_tokens,
    shorten_tokens,
)
from ..schedule_trips import SelectionSchedule
from .host import Host
from .layers import LayerRecord, ModuleWrapper, Projections, SelectionLayer, SelectionPass


# Token numbers replace the 0/1 padding mask: 0 is padding, 1 a token that is not a patch (text, [CLS], fused), 2 + i
# is patch i in the grid of the padded image.
PADDING = 0
NO_PATCH = 1
FIRST_PATCH = 2


class ViltSelectionEmbeddings(ModuleWrapper):
    """
    Embeddings that number the tokens and sort the patches by the grid, because ViLT's own order is random.

    ViltModel does not pass the text length to its encoder, but it passes a mask of four dimensions unchanged. The
    numbers are such a mask, `(batch_size, 1, text_length, seq_length)`, with the same row for each text token.
    """

    def visual_embed(self, pixel_values, pixel_mask, max_image_length=200):
        states, mask, (patch_index, grid) = super().visual_embed(pixel_values, pixel_mask, max_image_length)
        num_rows, num_columns = grid
        class_token, patches = states.tensor_split([1], dim=1)
        class_mask, patch_mask = mask.tensor_split([1], dim=1)
        row, column = patch_index.unbind(dim=-1)  # (batch_size, num_patches) each
        numbers = FIRST_PATCH + row * num_columns + column
        last = FIRST_PATCH + num_rows * num_columns  # padding goes to the end
        places = numbers.masked_fill(patch_mask == 0, last)
        order = places.argsort(dim=1, stable=True)
        numbers = numbers * patch_mask
        numbers = numbers.gather(1, order)
        patches = gather_tokens(patches, order)
        states = torch.cat([class_token, patches], dim=1)
        token_numbers = torch.cat([class_mask, numbers], dim=1)
        return states, token_numbers, (patch_index, grid)

    def forward(self, input_ids, attention_mask, *args, **kwargs):
        # In half precision the numbers would be rounded.
        embeddings, numbers = super().forward(input_ids, attention_mask.long(), *args, **kwargs)
        numbers = numbers.long()  # (batch_size, seq_length)
        text_length = attention_mask.shape[1]
        *_, image_embeds = args
        if image_embeds is not None:  # ViLT uses the given mask for embedded images
            others, patch_mask = numbers.tensor_split([text_length + 1], dim=1)
            patches = torch.arange(patch_mask.shape[1], device=numbers.device) + FIRST_PATCH
            patches = patches * (patch_mask != 0)
            numbers = torch.cat([others, patches], dim=1)
        mask = numbers[:, None, None].expand(-1, 1, text_length, -1)
        return embeddings, mask


class ViltSelectionEncoder(ModuleWrapper):
    """Encoder that shortens the mask together with the sequence."""

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        output_attentions=False,
        output_hidden_states=False,
        return_dict=True,
    ):
        text_length = attention_mask.shape[2]
        token_numbers = attention_mask[:, 0, 0]  # (batch_size, seq_length)
        mask = self.make_mask(hidden_states, token_numbers)
        all_hidden_states = [hidden_states]
        all_attentions = []
        for layer in self.layer:
            if isinstance(layer, ViltSelectionLayer):
                hidden_states, *attentions, token_numbers = layer(
                    hidden_states, mask, output_attentions, token_numbers, text_length
                )
                mask = self.make_mask(hidden_states, token_numbers)
            else:
                hidden_states, *attentions = layer(hidden_states, mask, output_attentions)
            all_hidden_states.append(hidden_states)
            all_attentions += attentions
        return BaseModelOutput(  # ViltModel indexes and slices it for tuple outputs
            last_hidden_state=hidden_states,
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
            attentions=tuple(all_attentions) if output_attentions else None,
        )

    def make_mask(self, hidden_states: torch.Tensor, token_numbers: torch.Tensor) -> torch.Tensor:
        return create_bidirectional_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=token_numbers != PADDING,
            allow_is_bidirectional_skip=False,  # the check reads the mask, a host sync
        )


class PaddedSelector:
    """
    Choice of tokens for rows with padding. The number of kept candidates of a row depends on the size of its image,
    not on the padding. The longest row sets the shape, and padding, not dropped patches, fills rows that keep fewer.

    Args:
        is_padding (`torch.BoolTensor` of shape `(batch_size, num_candidates)`)
    """

    def __init__(self, is_padding: torch.Tensor):
        self.is_padding = is_padding
        self.num_candidates = (~is_padding).sum(dim=1, keepdim=True)  # (batch_size, 1)

    def num_kept(self, keep_rate: float) -> torch.Tensor:
        """Return `num_kept_tokens` of each row, `(batch_size, 1)`."""
        # In fixed point: float32 is too coarse, and not all devices have float64.
        unit = 2**40
        product = self.num_candidates * round(keep_rate * unit) - round(1e-6 * unit)
        return (product + unit - 1).div(unit, rounding_mode="floor").clamp(min=1)

    def choose(self, scores: torch.Tensor, keep_rate: float) -> torch.Tensor:
        """Return the positions of the kept candidates and of padding, `(batch_size, longest)`."""
        num_kept = self.num_kept(keep_rate)
        scores_of_patches = scores.masked_fill(self.is_padding, -1.0)
        order = scores_of_patches.argsort(dim=-1, descending=True, stable=True)
        rank = order.argsort(dim=-1)
        is_kept = rank < num_kept
        longest = num_kept_tokens(scores.shape[1], keep_rate)
        is_filling = first_true(self.is_padding & ~is_kept, longest - num_kept)
        return positions_of(is_kept | is_filling, longest)


class ViltSelectionLayer(SelectionLayer):
    """Selection layer that always keeps the text and the image's [CLS]."""

    norms = ("layernorm_before", "layernorm_after")

    def projections(self) -> Projections:
        attention = self.attention.attention
        return Projections(attention.query, attention.key, attention.num_attention_heads)

    def score_patches(self, normed: torch.Tensor, numbers: torch.Tensor, text_length: int) -> torch.Tensor:
        """Score the candidates, whose token numbers have shape `(batch_size, num_candidates)`; padding scores 0."""
        guiding_position = 0 if self.selection.guidance == "text" else text_length  # [CLS] of the text or of the image
        query = self.project_query(normed[:, guiding_position])  # (batch_size, num_heads, head_dim)
        patches = normed[:, text_length + 1 :]
        key = self.project_key(patches)  # (batch_size, num_heads, num_candidates, head_dim)
        scaling = query.shape[-1] ** -0.5
        # One more dimension masks padding: the query is 1 there, and the key of padding is very negative.
        is_padding = numbers == PADDING
        lowest = torch.finfo(key.dtype).min
        mask = torch.zeros_like(key[..., :1])
        mask = mask.masked_fill(is_padding[:, None, :, None], lowest)
        key = torch.cat([key, mask], dim=-1)
        one = torch.ones_like(query[..., :1])
        query = torch.cat([query, one], dim=-1)  # (batch_size, num_heads, head_dim + 1)
        return score_tokens(query, key, scaling)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        output_attentions: bool,
        token_numbers: torch.Tensor,
        text_length: int,
        selection_pass: SelectionPass | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Return hidden states, attention weights if requested, and the numbers of the remaining tokens."""
        normed = self.normed_tokens(hidden_states)
        attn_output, *attentions = self.attention(normed, attention_mask, output_attentions=output_attentions)
        hidden_states = attn_output + hidden_states
        num_others = text_length + 1
        numbers = token_numbers[:, num_others:]
        scores = self.score_patches(normed, numbers, text_length)
        selector = PaddedSelector(numbers == PADDING)
        positions = selector.choose(scores, self.selection.keep_rate)
        if selection_pass is not None:
            candidates = numbers - FIRST_PATCH
            kept = candidates.gather(1, positions)
            selection_pass.records[self.number] = LayerRecord(kept, candidates, scores)
        hidden_states = shorten_tokens(hidden_states, scores, positions)
        if positions.shape[1] < numbers.shape[1]:
            drops = selector.num_candidates > selector.num_kept(self.selection.keep_rate)
            fused = torch.where(drops, NO_PATCH, PADDING)  # padding in rows that drop nothing
            others = token_numbers[:, :num_others]
            kept_numbers = numbers.gather(1, positions)
            token_numbers = torch.cat([others, kept_numbers, fused], dim=1)
        layer_output = self.layernorm_after(hidden_states)
        layer_output = self.intermediate(layer_output)
        return self.output(layer_output, hidden_states), *attentions, token_numbers


class Vilt(Host):
    layer_classes = {"ViltLayer": ViltSelectionLayer}

    @property
    def layers(self) -> nn.ModuleList:
        return self.base.encoder.layer

    def wrap_layers(self, schedule: SelectionSchedule):
        super().wrap_layers(schedule)
        if schedule.layers:
            self.base.embeddings = ViltSelectionEmbeddings.of(self.base.embeddings)
            self.base.encoder = ViltSelectionEncoder.of(self.base.encoder)
