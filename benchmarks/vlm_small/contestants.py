"""
Methods that reduce visual tokens, and their costs.

A contestant is a tower schedule, a selection after the tower, a lower resolution, FastV's rule, or several of them.
"""

from dataclasses import dataclass

import torch
from small_model import ATTENTION_LAYER, BOS, NUM_PATCHES, PATCH_SIZE, features_of, llava_inputs
from torch import nn
from transformers import DynamicCache, LlavaForConditionalGeneration
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from modeling_trips.hosts import apply_patch_selection, remove_patch_selection
from modeling_trips.hosts.vlm.wrapper import selection_of
from modeling_trips.patch_selection import gather_tokens, keep_topk, score_tokens


@dataclass(frozen=True)
class Contestant:
    """
    Args:
        variant (`str`): Name of the row.
        kept (`int`): Visual tokens in the decoder; with `fastv`, in its later layers.
        layer (`int`, *optional*): Selection layer of the tower, from 1.
        guidance (`str`, *optional*): Guidance of this layer: `"image"`, `"random"` or the name of a guide.
        tower_kept (`int`, *optional*): Patches kept by this layer. Default: `kept`.
        scorer (`str`, *optional*): Scorer after the tower: a name in `SCORERS`.
        side (`int`, *optional*): Patches along each side of a smaller image.
        fastv (`bool`): Drop tokens in the decoder after `ATTENTION_LAYER` by the last token's attention.
        weights (`str`, *optional*): Name of weights that were trained for a lower resolution.
    """

    variant: str
    kept: int = NUM_PATCHES
    layer: int | None = None
    guidance: str | None = None
    tower_kept: int | None = None
    scorer: str | None = None
    side: int | None = None
    fastv: bool = False
    weights: str | None = None

    @property
    def kept_in_tower(self) -> int:
        return self.tower_kept or self.kept


def set_contestant(model: LlavaForConditionalGeneration, contestant: Contestant, guides: dict):
    """Replace the selection of the model by the contestant's."""
    remove_patch_selection(model)
    if contestant.layer is None and contestant.scorer is None:
        return
    schedule, guide = "unpruned", None
    if contestant.layer is not None:
        is_scored = contestant.guidance in ("image", "random")
        guide = None if is_scored else guides[contestant.guidance]
        rate = contestant.kept_in_tower / NUM_PATCHES
        schedule = f"{contestant.layer}:{contestant.guidance if is_scored else 'text'}:{rate:.9f}"
    visual_tokens = None if contestant.scorer is None else contestant.kept
    apply_patch_selection(model, schedule, visual_tokens, contestant.scorer or "prompt", guide)


def next_token(
    model: LlavaForConditionalGeneration, contestant: Contestant, pixel_values: torch.Tensor, prompts: list[list[int]]
) -> torch.Tensor:
    """
    Return logits of the answer's first token: `(batch_size, vocab_size)`. Call `set_contestant` first.

    Args:
        pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`): Images at full resolution.
        prompts (`list[list[int]]`): Questions of equal length, one per image.
    """
    if contestant.side is None and not contestant.fastv:
        return model(**llava_inputs(pixel_values, prompts), logits_to_keep=1).logits[:, -1]
    if contestant.layer is None:
        features, _ = features_of(model, pixel_values, contestant.side)
    else:
        pruned = selection_of(model).prune(llava_inputs(pixel_values, prompts))
        features = torch.stack([*pruned["mm_encoder_outputs"]["image"].pooler_output])
    fastv_kept = contestant.kept if contestant.fastv else None
    return prefill(model, features, torch.tensor(prompts), fastv_kept)[0]


def prefill(
    model: LlavaForConditionalGeneration, features: torch.Tensor, prompt: torch.Tensor, fastv_kept: int | None = None
) -> tuple[torch.Tensor, DynamicCache]:
    """Return the logits of the next token and the cache."""
    decoder = model.model.language_model
    first = torch.full_like(prompt[:, :1], BOS)
    embed = model.get_input_embeddings()
    states = torch.cat([embed(first), features, embed(prompt)], dim=1)
    cache = DynamicCache(config=decoder.config)
    if fastv_kept is None:
        states = decoder(inputs_embeds=states, cache=cache, use_cache=True).last_hidden_state
        return model.lm_head(states[:, -1]), cache
    num_visual = features.shape[1]
    positions = torch.arange(states.shape[1])[None].expand(len(states), -1)

    def run(layers, states, positions):
        mask = create_causal_mask(decoder.config, states, None, None, position_ids=None)
        rotary = decoder.rotary_emb(states, positions)
        for layer in layers:
            states = layer(
                states, attention_mask=mask, position_ids=positions, cache=cache, position_embeddings=rotary
            )
        return states

    layers = list(decoder.layers)
    states = run(layers[: ATTENTION_LAYER - 1], states, positions)
    ranking = layers[ATTENTION_LAYER - 1]
    weights = last_token_attention(ranking, states, decoder.rotary_emb(states, positions), num_visual)
    states = run([ranking], states, positions)
    kept = 1 + keep_topk(weights, fastv_kept)
    others = torch.arange(1 + num_visual, states.shape[1]).expand(len(states), -1)
    kept = torch.cat([torch.zeros_like(kept[:, :1]), kept, others], dim=1)
    states = run(layers[ATTENTION_LAYER:], gather_tokens(states, kept), kept)
    return model.lm_head(decoder.norm(states[:, -1])), cache


def last_token_attention(layer: nn.Module, states: torch.Tensor, rotary, num_visual: int) -> torch.Tensor:
    """Compute the attention from the last token to the visual tokens, averaged over heads, without the full map."""
    attention, (cos, sin) = layer.self_attn, rotary
    normed = layer.input_layernorm(states)
    query = attention.q_proj(normed[:, -1:]).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    key = attention.k_proj(normed[:, : 1 + num_visual]).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    query = apply_rotary_pos_emb(query, query, cos[:, -1:], sin[:, -1:])[0]
    key = apply_rotary_pos_emb(key, key, cos[:, : 1 + num_visual], sin[:, : 1 + num_visual])[0]
    return score_tokens(query[:, :, 0], key[:, :, 1:], attention.scaling)


def costs(config, contestant: Contestant, prompt_length: int) -> dict[str, float]:
    """
    Count the MACs of one question with an answer of two tokens in millions, by part, and the bytes of the key-value
    cache in float32.

    All matrix products are counted: projections, attention (causal in the decoder), feed-forward, scoring, selection.
    """
    vision, text = config.vision_config, config.text_config
    width, inner = vision.hidden_size, vision.intermediate_size
    num_patches = NUM_PATCHES if contestant.side is None else contestant.side**2
    tokens, tower = num_patches + 1, num_patches * 3 * PATCH_SIZE**2 * width
    for number in range(1, vision.num_hidden_layers + 1):
        tower += 4 * tokens * width**2 + 2 * tokens**2 * width
        if number == contestant.layer:
            tower += tokens * width  # one query row
            if contestant.guidance not in ("image", "random"):
                tower += prompt_length * 2 * text.hidden_size + text.hidden_size * width  # the guide
            tokens = contestant.kept_in_tower + 1
        tower += 2 * tokens * width * inner
    left, hidden = tokens - 1, text.hidden_size
    tower += left * (width * hidden + hidden**2)
    if contestant.scorer is not None and left > contestant.kept:
        if contestant.scorer == "prompt":
            tower += left * prompt_length * hidden + left**2 * hidden
        elif contestant.scorer == "diversity":
            tower += left * contestant.kept * hidden
        left = contestant.kept
    decoder, length, cached = 0, 1 + left + prompt_length, 0
    for number in range(1, text.num_hidden_layers + 1):
        if contestant.fastv and number == ATTENTION_LAYER + 1:
            length = 1 + contestant.kept + prompt_length
        decoder += (
            4 * length * hidden**2 + length * (length + 1) * hidden + 3 * length * hidden * text.intermediate_size
        )
        cached += length
    decoder += hidden * text.vocab_size
    decoding = text.num_hidden_layers * (4 * hidden**2 + 3 * hidden * text.intermediate_size)
    decoding += 2 * hidden * (cached + text.num_hidden_layers) + hidden * text.vocab_size
    parts = {"tower_mmacs": tower / 1e6, "prefill_mmacs": decoder / 1e6, "decoding_mmacs": decoding / 1e6}
    return {**parts, "total_mmacs": sum(parts.values()), "kv_bytes": 2 * cached * hidden * 4}
