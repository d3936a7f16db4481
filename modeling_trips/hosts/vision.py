"""Patch selection in the vision towers of CLIP, SigLIP, BLIP, BridgeTower and timm."""

import torch
from torch import nn

from .host import Host
from .layers import Projections, SelectionLayer, library_name


class ClipLayer(SelectionLayer):
    """Layer of CLIP, SigLIP, SmolVLM or Idefics3, with separate linear maps for queries and keys."""

    norms = ("layer_norm1", "layer_norm2")

    def projections(self) -> Projections:
        attention = self.self_attn
        return Projections(attention.q_proj, attention.k_proj, attention.num_heads)

    def attend(self, normed: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs) -> torch.Tensor:
        if attention_mask is not None:  # attention in BLIP-2 takes none
            kwargs["attention_mask"] = attention_mask
        attn_output, *_ = self.self_attn(hidden_states=normed, **kwargs)
        return attn_output


class BlipLayer(ClipLayer):
    """Layer of BLIP, BLIP-2 or InstructBLIP, with one linear map for queries, keys and values."""

    def projections(self) -> Projections:
        return Projections.stacked(self.self_attn.qkv, self.self_attn.embed_dim, self.self_attn.num_heads)


class BridgeTowerLayer(SelectionLayer):
    """Layer for sequence-first states: `(seq_length, num_images, hidden_size)`."""

    norms = ("ln_1", "ln_2")
    keys_are_linear = False  # in a parameter, which `score_states` does not read

    def project(self, states: torch.Tensor, part: int) -> torch.Tensor:
        attention = self.attn
        weight = attention.in_proj_weight.chunk(3)[part]
        bias = attention.in_proj_bias.chunk(3)[part]
        projected = nn.functional.linear(states, weight, bias)
        return projected.unflatten(-1, (attention.num_heads, attention.head_dim))

    def project_query(self, states: torch.Tensor) -> torch.Tensor:
        return self.project(states, 0)

    def project_key(self, states: torch.Tensor) -> torch.Tensor:
        return self.project(states, 1).transpose(1, 2)

    def attend(self, normed: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs) -> torch.Tensor:
        attn_output = self.attention(normed.transpose(0, 1), attention_mask)  # (seq_length, num_images, hidden_size)
        return attn_output.transpose(0, 1)

    def feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.ln_2(hidden_states)
        for layer in self.mlp.values():
            hidden_states = layer(hidden_states)
        return hidden_states

    def forward(self, hidden_state: torch.Tensor, attention_mask=None, **kwargs) -> torch.Tensor:
        hidden_states = hidden_state.transpose(0, 1)
        hidden_states = super().forward(hidden_states, attention_mask, **kwargs)
        return hidden_states.transpose(0, 1)


class TimmLayer(SelectionLayer):
    def projections(self) -> Projections:
        attention = self.attn
        return Projections.stacked(attention.qkv, attention.num_heads * attention.head_dim, attention.num_heads)

    def project_query(self, states: torch.Tensor) -> torch.Tensor:
        return self.attn.q_norm(super().project_query(states))

    def project_key(self, states: torch.Tensor) -> torch.Tensor:
        return self.attn.k_norm(super().project_key(states))

    @property
    def keys_are_linear(self) -> bool:
        return isinstance(self.attn.k_norm, nn.Identity)

    def attend(self, normed, attention_mask, attn_mask=None, is_causal: bool = False) -> torch.Tensor:
        if attention_mask is not None or attn_mask is not None or is_causal:
            raise ValueError("`attn_mask` and `is_causal` are not supported with patch selection.")
        attn_output = self.attn(normed)
        attn_output = self.ls1(attn_output)
        return self.drop_path1(attn_output)

    def feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = super().feed_forward(hidden_states)
        hidden_states = self.ls2(hidden_states)
        return self.drop_path2(hidden_states)


class VisionTower(Host):
    """A vision tower of CLIP, SigLIP or BLIP that gets its text from the caller, or a model that holds one."""

    layer_classes = {
        "CLIPEncoderLayer": ClipLayer,
        "SiglipEncoderLayer": ClipLayer,
        "BlipEncoderLayer": BlipLayer,
        "Blip2EncoderLayer": BlipLayer,
        "InstructBlipEncoderLayer": BlipLayer,
    }

    @property
    def layers(self) -> nn.ModuleList:
        return getattr(self.model, "vision_model", self.model).encoder.layers

    @property
    def has_class_token(self) -> bool:
        return library_name(type(self.layers[0])) != "SiglipEncoderLayer"

    @property
    def no_text(self) -> str | None:
        config = self.model.config
        text_config = getattr(config, "text_config", None)
        vision_config = getattr(config, "vision_config", config)
        if text_config is None or text_config.hidden_size == vision_config.hidden_size:  # a bare tower has no check
            return None
        return (
            f"its text encoder has width {text_config.hidden_size} and its vision tower width "
            f"{vision_config.hidden_size}"
        )


class BridgeTower(Host):
    layer_classes = {"BridgeTowerResidualAttention": BridgeTowerLayer}
    no_text = "its vision layers get only image tokens"

    @property
    def layers(self) -> nn.ModuleList:
        return self.base.vision_model.visual.transformer.resblocks

    @property
    def num_selectable_layers(self) -> int:
        # From the first bridge on, image tokens are added to those of the cross-modal layers, token by token.
        return len(self.base.text_model.encoder.layer) - self.base.config.num_hidden_layers + 1


class Timm(Host):
    layer_classes = {"Block": TimmLayer}
    no_text = "its forward pass takes only pixels"

    def __init__(self, model: nn.Module):
        super().__init__(model)
        for number, block in enumerate(model.blocks, start=1):
            attention = type(getattr(block, "attn", None))
            if library_name(type(block)) == "Block" and library_name(attention) != "Attention":
                raise TypeError(
                    f"The attention of layer {number} must be timm.layers.Attention, got {attention.__name__}."
                )

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.blocks

    @property
    def num_prefix_tokens(self) -> int:
        return self.model.num_prefix_tokens

    @property
    def has_class_token(self) -> bool:
        return self.model.has_class_token
