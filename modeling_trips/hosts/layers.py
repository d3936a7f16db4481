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
"""What every host of patch selection shares: modules that stand in for the host's own, and the selecting layer."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from ..modeling_trips_vision import TripsSelection
from ..patch_selection import fuse_tokens, gather_tokens, keep_topk, num_kept_tokens, score_tokens


class SelectionSettings(NamedTuple):
    """What one selection layer is to do."""

    keep_rate: float
    guidance: str  # "text" or "image"
    takes_text: bool  # whether a text is to guide any of the model's layers
    needs_text: bool  # whether this layer is guided by a text that the caller has to give
    fuse_inattentive_tokens: bool
    num_prefix_tokens: int  # [CLS], registers: they come first and always stay
    has_class_token: bool  # whether token 0 is [CLS], which guides where no text does


class StandIn(nn.Module):
    """
    A module in the place of one of the host's. It holds the very dictionaries of parameters, buffers, sub-modules and
    hooks that the host's module holds, so that names and objects in `state_dict`, in optimizers and in adapters stay
    what they are. It is of the host module's class too, by inheritance: hooks and wrapping policies that go by the
    class find it.

    Transformers' own patching (`transformers.monkey_patching`) swaps classes while a model is built, for all models
    and all layers; here single layers of a model that exists are replaced.
    """

    @classmethod
    def of(cls, host_module: nn.Module, **attributes) -> "StandIn":
        """Stands in for `host_module`, with `attributes` of its own."""
        stand_in = cls.__new__(cls)
        stand_in.__dict__.update(vars(host_module))
        # Not registered as a sub-module, or every parameter would appear twice.
        stand_in.__dict__.update(attributes, host_module=host_module, own_attributes=tuple(attributes))
        return stand_in

    def give_back(self) -> nn.Module:
        """The host's module, with what has been set meanwhile, such as train or eval."""
        own = {*self.own_attributes, "own_attributes", "host_module", "_compiled_call_impl"}
        self.host_module.__dict__.update((name, value) for name, value in vars(self).items() if name not in own)
        return self.host_module


def host_module_of(module: nn.Module) -> nn.Module:
    return module.host_module if isinstance(module, StandIn) else module


def check_layer(layer: nn.Module, number: int, classes: Collection[type[nn.Module]]):
    """
    Raises:
        TypeError: The layer is of another class than those that selection knows.
        ValueError: A compiler or Accelerate has taken over its forward pass.
    """
    layer = host_module_of(layer)
    if type(layer) not in classes:
        names = " or ".join(known.__name__ for known in classes)
        raise TypeError(f"Layer {number} is of class {type(layer).__name__}; patch selection knows {names}.")
    taken_over = {"forward", "_compiled_call_impl"} & vars(layer).keys()
    if taken_over:
        raise ValueError(
            f"Layer {number} does not run its own code any more (it has {', '.join(taken_over)}). Apply patch "
            "selection before compiling layers and before Accelerate adds its hooks."
        )


@dataclass
class Host:
    """Where a model keeps what patch selection needs of it. `layers` are those of its vision tower, in order."""

    layers: nn.ModuleList | nn.Sequential
    layer_class: type[nn.Module]
    selection_layer_class: type["SelectionLayer"]
    num_selectable_layers: int
    num_prefix_tokens: int = 1
    has_class_token: bool = True
    # Why `guidance="text"` is impossible. None: it is possible.
    no_text: str | None = None
    # Whether the model is to pass its own text to its vision tower, by the hook of `blip.py`.
    passes_its_text: bool = False
    # Further modules that need a stand-in: (parent, name, class of the stand-in).
    stand_ins: tuple[tuple[nn.Module, str, type[StandIn]], ...] = ()


def project_rows(linear: nn.Linear, states: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """
    Outputs `start` to `stop` of a linear layer, without the work for the others. What is more than a plain linear
    layer (an adapter, a quantized layer) is called as a whole.
    """
    if type(linear) is not nn.Linear:
        return linear(states)[..., start:stop]
    bias = None if linear.bias is None else linear.bias[start:stop]
    return nn.functional.linear(states, linear.weight[start:stop], bias)


def score_states(query: torch.Tensor, states: torch.Tensor, key_layer: nn.Linear, rows: slice, scaling: float):
    """
    `score_tokens` without the keys: q (W x) = (q W) x, so that the query goes through the layer in place of every
    token. The bias of the keys adds the same to all tokens, which softmax ignores.

    Args:
        query (`torch.Tensor` of shape `(batch_size, num_heads, head_dim)`): The guiding query.
        states (`torch.Tensor` of shape `(batch_size, num_candidates, hidden_size)`): What the keys are projected from.
        key_layer (`nn.Linear`), rows (`slice`): The layer that projects the keys, and its rows that do.
        scaling (`float`): Factor of the dot products.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_candidates)`, float32 or wider: each row is positive and sums to 1.
    """
    dtype = torch.promote_types(states.dtype, torch.float32)
    with torch.autocast(states.device.type, enabled=False):  # rounding would tie patches
        weight = key_layer.weight[rows].to(dtype).unflatten(0, (query.shape[1], -1))
        directions = torch.einsum("bhd,hdc->bhc", query.to(dtype) * scaling, weight)
        logits = directions @ states.to(dtype).transpose(1, 2)
    return logits.softmax(dim=-1).mean(dim=1)


class SeparateProjections(StandIn):
    """A layer of CLIP's form: queries and keys come from linear layers of their own in `self_attn`."""

    def normed_tokens(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.layer_norm1(hidden_states)

    def project_query(self, states: torch.Tensor) -> torch.Tensor:
        return self.self_attn.q_proj(states).unflatten(-1, (-1, self.self_attn.head_dim))

    def project_key(self, states: torch.Tensor) -> torch.Tensor:
        return self.self_attn.k_proj(states).unflatten(-1, (-1, self.self_attn.head_dim)).transpose(1, 2)

    @property
    def scaling(self) -> float:
        return self.self_attn.scale


class SelectionLayer(StandIn):
    """
    A pre-norm layer of a host with patch selection between its attention half and its MLP half (paper, section 3.2).

    Attention is the host's own module, called as the host calls it, on whatever kernel it runs. It doesn't hand out
    its keys: those of the candidates are projected once more, a twelfth of what a layer's linear maps cost.

    A subclass says where the host's layer keeps its parts. Shapes are those of batches first, whatever the host's.
    """

    def normed_tokens(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """LN1(X), which queries and keys are projected from: `(batch_size, seq_length, hidden_size)`."""
        return self.layer_norm1(hidden_states)

    def project_query(self, states: torch.Tensor) -> torch.Tensor:
        """`(batch_size, hidden_size)` -> `(batch_size, num_heads, head_dim)`."""
        raise NotImplementedError

    def project_key(self, states: torch.Tensor) -> torch.Tensor:
        """`(batch_size, n, hidden_size)` -> `(batch_size, num_heads, n, head_dim)`."""
        raise NotImplementedError

    @property
    def scaling(self) -> float:
        return self.self_attn.scale

    def guide(self, normed: torch.Tensor, text_embeds: torch.Tensor | None) -> torch.Tensor:
        """The state, of shape `(batch_size, hidden_size)`, whose query scores the candidates."""
        if text_embeds is not None:
            self._check_text(normed, text_embeds)
        # Vision towers hand a text to all of their layers.
        if text_embeds is not None and self.selection.guidance == "text":
            return text_embeds
        if self.selection.needs_text:
            raise ValueError(
                "Patch selection was applied with guidance='text', but the vision tower got no `text_embeds`. Pass "
                "them to `get_image_features` or to the tower, or apply it with guidance='image'."
            )
        if self.selection.has_class_token:
            return normed[:, 0]
        # Without a [CLS] the mean of all tokens' queries asks (the projection is linear: it is the query of the mean).
        # VisionZip (https://arxiv.org/abs/2412.04467) takes the mean of all tokens' attention for SigLIP, which would
        # need the full map.
        return normed.mean(dim=1)

    def _check_text(self, normed: torch.Tensor, text_embeds: torch.Tensor):
        if not self.selection.takes_text:
            raise ValueError(
                "Got `text_embeds`, but patch selection was applied with guidance='image'. Apply it with "
                'guidance="text", or with "text" for the layers that it is to guide.'
            )
        expected = (normed.shape[0], normed.shape[2])
        if text_embeds.shape != expected:
            raise ValueError(
                f"`text_embeds` must have shape {expected}, one vector per image and as wide as the vision tower, got "
                f"{tuple(text_embeds.shape)}."
            )

    def score(self, normed: torch.Tensor, text_embeds: torch.Tensor | None) -> torch.Tensor:
        """Scores of the candidates, of shape `(batch_size, num_candidates)`."""
        query = self.project_query(self.guide(normed, text_embeds))
        key = self.project_key(normed[:, self.selection.num_prefix_tokens :])
        return score_tokens(query, key, self.scaling)

    def kept_positions(self, scores: torch.Tensor) -> torch.Tensor | None:
        """Positions of the kept candidates in order, of shape `(batch_size, num_kept)`; None if all are kept."""
        num_kept = num_kept_tokens(scores.shape[1], self.selection.keep_rate)
        return None if num_kept == scores.shape[1] else keep_topk(scores, num_kept)

    def select(self, tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`(batch_size, seq_length, hidden_size)` -> prefix, kept candidates and fused token."""
        kept_positions = self.kept_positions(scores)
        if kept_positions is None:
            return tokens
        return self.shorten(tokens, scores, kept_positions, self.selection.num_prefix_tokens)

    def shorten(
        self, tokens: torch.Tensor, scores: torch.Tensor, kept_positions: torch.Tensor, num_prefix_tokens: int
    ) -> torch.Tensor:
        candidates = tokens[:, num_prefix_tokens:]
        parts = [tokens[:, :num_prefix_tokens], gather_tokens(candidates, kept_positions)]
        if self.selection.fuse_inattentive_tokens:
            parts.append(fuse_tokens(candidates, scores, kept_positions))
        return torch.cat(parts, dim=1)

    def selection_of(
        self, args: tuple, kwargs: dict, output: torch.Tensor, candidate_indices: torch.Tensor | None
    ) -> TripsSelection | None:
        """
        What a call of this layer selected, worked out once more from its input; None if nothing was dropped.
        `candidate_indices` of shape `(batch_size, num_candidates)` are None where no layer before has dropped any.
        """
        scores = self.score(self.normed_tokens(args[0]), kwargs.get("text_embeds"))
        kept_positions = self.kept_positions(scores)
        if kept_positions is None:
            return None
        if candidate_indices is None:
            candidate_indices = torch.arange(scores.shape[1], device=scores.device).expand(scores.shape)
        return TripsSelection(candidate_indices.gather(1, kept_positions), scores, candidate_indices)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        text_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """As the layers of CLIP, SigLIP and BLIP, whose parts have the same names. The vision towers never mask."""
        normed = self.normed_tokens(hidden_states)
        if attention_mask is not None:  # attention in BLIP-2 takes none
            kwargs["attention_mask"] = attention_mask
        attn_output, _ = self.self_attn(hidden_states=normed, **kwargs)
        hidden_states = self.select(hidden_states + attn_output, self.score(normed, text_embeds))
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


__all__ = [
    "Host",
    "SelectionLayer",
    "SelectionSettings",
    "SeparateProjections",
    "StandIn",
    "check_layer",
    "host_module_of",
    "project_rows",
    "score_states",
]
