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
"""Wrapper modules and the selection layer that all patched models share."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from ..configuration_trips import LayerSelection
from ..modeling_trips_vision import TripsSelection
from ..patch_selection import fuse_tokens, gather_tokens, keep_topk, num_kept_tokens, score_tokens


class ModuleWrapper(nn.Module):
    """
    Wrapper that replaces one module of a patched model. It shares the module's dictionaries of parameters, buffers,
    sub-modules and hooks, so names and objects in `state_dict`, optimizers and adapters do not change. It inherits
    from the module's class, so hooks and wrapping policies that look for the class find it.

    `transformers.monkey_patching` swaps classes while a model is built, for all models and layers. This class replaces
    single layers of an existing model.
    """

    @classmethod
    def of(cls, wrapped_module: nn.Module, **attributes) -> "ModuleWrapper":
        """Wrap `wrapped_module` and add `attributes`."""
        wrapper = cls.__new__(cls)
        wrapper.__dict__.update(vars(wrapped_module))
        # `wrapped_module` is not registered as a sub-module, so no parameter appears twice.
        wrapper.__dict__.update(attributes, wrapped_module=wrapped_module, own_attributes=tuple(attributes))
        return wrapper

    def restore(self) -> nn.Module:
        """Return the wrapped module with attributes that were set meanwhile, such as `training`."""
        own = {*self.own_attributes, "own_attributes", "wrapped_module", "_compiled_call_impl"}
        self.wrapped_module.__dict__.update((name, value) for name, value in vars(self).items() if name not in own)
        return self.wrapped_module


def unwrapped(module: nn.Module) -> nn.Module:
    return module.wrapped_module if isinstance(module, ModuleWrapper) else module


def check_layer(layer: nn.Module, number: int, classes: Collection[type[nn.Module]]):
    """
    Raises:
        TypeError: The layer is of an unsupported class.
        ValueError: A compiler or Accelerate has replaced its forward pass.
    """
    layer = unwrapped(layer)
    if type(layer) not in classes:
        names = " or ".join(known.__name__ for known in classes)
        raise TypeError(f"Layer {number} must be of class {names}, got {type(layer).__name__}.")
    check_forward(layer, f"layer {number}")


def check_forward(module: nn.Module, name: str):
    """
    Raises:
        ValueError: A compiler or Accelerate has replaced the module's forward pass.
    """
    taken_over = {"forward", "_compiled_call_impl"} & vars(module).keys()
    if taken_over:
        raise ValueError(
            f"The forward pass of {name} must be its own, got a replaced one ({', '.join(taken_over)}). Load without "
            "`device_map`, apply patch selection, then compile or call `accelerate.dispatch_model`."
        )


@dataclass
class ModelParts:
    """Parts and properties of a model that patch selection needs. `layers` are the layers of its vision tower."""

    layers: nn.ModuleList | nn.Sequential
    layer_class: type[nn.Module]
    selection_layer_class: type["SelectionLayer"]
    num_selectable_layers: int
    num_prefix_tokens: int = 1
    has_class_token: bool = True
    # Reason why `guidance="text"` is not supported, if so.
    no_text: str | None = None
    # The hook of `blip.py` passes the model's text to its vision tower.
    passes_its_text: bool = False
    # Further modules to wrap: (parent, name, class of the wrapper).
    wrappers: tuple[tuple[nn.Module, str, type[ModuleWrapper]], ...] = ()


def is_plain_linear(module: nn.Module) -> bool:
    """
    Whether rows of the weight can be used. Adapters are other modules, torchao has other tensors, and the hooks of
    Accelerate load a weight for the forward pass.
    """
    is_plain = type(module) is nn.Linear and "forward" not in vars(module)
    return is_plain and type(module.weight) in (nn.Parameter, torch.Tensor)


def project_part(attention: nn.Module, states: torch.Tensor, part: int) -> torch.Tensor:
    """
    Return the queries (part 0) or the keys (part 1) of an attention whose layer `qkv` computes all three:
    `(..., num_heads, head_dim)`. Only a plain `nn.Linear` skips the other parts; adapters and quantized layers are
    called as a whole.
    """
    linear, width = attention.qkv, attention.num_heads * attention.head_dim
    rows = slice(part * width, (part + 1) * width)
    if is_plain_linear(linear):
        bias = None if linear.bias is None else linear.bias[rows]
        projected = nn.functional.linear(states, linear.weight[rows], bias)
    else:
        projected = linear(states)[..., rows]
    return projected.unflatten(-1, (attention.num_heads, attention.head_dim))


def score_states(query: torch.Tensor, states: torch.Tensor, key_layer: nn.Linear, rows: slice, scaling: float):
    """
    Compute `score_tokens` without the keys: q (W x) = (q W) x, so the layer projects the query instead of every token.
    The bias of the keys adds a constant to all tokens, which softmax ignores.

    Args:
        query (`torch.Tensor` of shape `(batch_size, num_heads, head_dim)`): The guiding query.
        states (`torch.Tensor` of shape `(batch_size, num_candidates, hidden_size)`): Inputs of the key projection.
        key_layer (`nn.Linear`), rows (`slice`): The layer that projects the keys, and the rows of its weight.
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


class SeparateProjections(ModuleWrapper):
    """Layer of CLIP's form: `self_attn` has separate linear layers for queries and keys."""

    def normed_tokens(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return LN1(X), the input of queries and keys: `(batch_size, seq_length, hidden_size)`."""
        return self.layer_norm1(hidden_states)

    def project_query(self, states: torch.Tensor) -> torch.Tensor:
        """Project `(batch_size, hidden_size)` to `(batch_size, num_heads, head_dim)`."""
        return self.self_attn.q_proj(states).unflatten(-1, (-1, self.self_attn.head_dim))

    def project_key(self, states: torch.Tensor) -> torch.Tensor:
        """Project `(batch_size, n, hidden_size)` to `(batch_size, num_heads, n, head_dim)`."""
        return self.self_attn.k_proj(states).unflatten(-1, (-1, self.self_attn.head_dim)).transpose(1, 2)

    @property
    def scaling(self) -> float:
        return self.self_attn.scale


class SelectionLayer(ModuleWrapper):
    """
    Pre-norm layer of a patched model with patch selection between attention and MLP (paper, section 3.2).

    Attention is the model's own module and kernel. It does not return its keys, so the keys of the candidates are
    projected a second time, at a twelfth of the cost of a layer's linear maps.

    Subclasses define `normed_tokens`, `project_query`, `project_key` and `scaling`, as [`SeparateProjections`]. Shapes
    are batch first, whatever the layout of the model.
    """

    selection: LayerSelection
    takes_text: bool  # some layer of the model is scored by the text
    needs_text: bool  # this layer is scored by a text that the caller passes
    num_prefix_tokens: int  # leading [CLS] and registers, which are always kept
    has_class_token: bool  # token 0 is [CLS]

    def guide(self, normed: torch.Tensor, text_embeds: torch.Tensor | None) -> torch.Tensor:
        """Return the states whose query scores the candidates: `(batch_size, hidden_size)`."""
        if text_embeds is not None:
            self._check_text(normed, text_embeds)
        # Vision towers pass the text to all layers.
        if text_embeds is not None and self.selection.guidance == "text":
            return text_embeds
        if self.needs_text:
            raise ValueError(
                "Guidance 'text' needs `text_embeds`, got None. Pass them to `get_image_features` or to the vision "
                "tower, or apply patch selection with guidance 'image'."
            )
        if self.has_class_token:
            return normed[:, 0]
        # Without a [CLS], use the mean of all queries, which is the query of the mean. VisionZip
        # (https://arxiv.org/abs/2412.04467) uses the mean attention of all tokens, which needs the full map.
        return normed.mean(dim=1)

    def _check_text(self, normed: torch.Tensor, text_embeds: torch.Tensor):
        if not self.takes_text:
            raise ValueError(
                "Got `text_embeds`, but no selection layer is scored by the text. Apply patch selection with guidance "
                "'text'."
            )
        expected = (normed.shape[0], normed.shape[2])
        if text_embeds.shape != expected:
            raise ValueError(
                f"`text_embeds` must have shape {expected}, one vector per image with the width of the vision tower, "
                f"got {tuple(text_embeds.shape)}."
            )

    def score(self, normed: torch.Tensor, text_embeds: torch.Tensor | None) -> torch.Tensor:
        """Score the candidates: `(batch_size, num_candidates)`."""
        query = self.project_query(self.guide(normed, text_embeds))
        key = self.project_key(normed[:, self.num_prefix_tokens :])
        return score_tokens(query, key, self.scaling)

    def kept_positions(self, scores: torch.Tensor) -> torch.Tensor | None:
        """Return positions of the kept candidates in order, `(batch_size, num_kept)`, or None if all are kept."""
        num_kept = num_kept_tokens(scores.shape[1], self.selection.keep_rate)
        return None if num_kept == scores.shape[1] else keep_topk(scores, num_kept)

    def select(self, tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Reduce `(batch_size, seq_length, hidden_size)` to prefix, kept candidates and fused token."""
        kept_positions = self.kept_positions(scores)
        if kept_positions is None:
            return tokens
        return self.shorten(tokens, scores, kept_positions, self.num_prefix_tokens)

    def shorten(
        self, tokens: torch.Tensor, scores: torch.Tensor, kept_positions: torch.Tensor, num_prefix_tokens: int
    ) -> torch.Tensor:
        candidates = tokens[:, num_prefix_tokens:]
        parts = [tokens[:, :num_prefix_tokens], gather_tokens(candidates, kept_positions)]
        if self.selection.fuse:
            parts.append(fuse_tokens(candidates, scores, kept_positions))
        return torch.cat(parts, dim=1)

    def selection_of(
        self, args: tuple, kwargs: dict, output: torch.Tensor, candidate_indices: torch.Tensor | None
    ) -> TripsSelection | None:
        """
        Recompute the selection of a call from its input; None if nothing was dropped. `candidate_indices` of shape
        `(batch_size, num_candidates)` are None if no earlier layer dropped patches.
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
        """Forward pass of the layers of CLIP, SigLIP and BLIP, whose parts have the same names."""
        normed = self.normed_tokens(hidden_states)
        if attention_mask is not None:  # attention in BLIP-2 takes none
            kwargs["attention_mask"] = attention_mask
        attn_output, _ = self.self_attn(hidden_states=normed, **kwargs)
        hidden_states = self.select(hidden_states + attn_output, self.score(normed, text_embeds))
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))
