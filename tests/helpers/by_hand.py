"""Logits of a generative model for a prompt of which some visual tokens are dropped by hand."""

import torch
from tiny_vlms import IMAGE, VIDEO


def logits_of_rest(model, inputs, stays, features, deepstack=()):
    """
    Args:
        inputs: a prompt without padding, whose positions are those before tokens are dropped.
        stays: mask `(num_tokens,)` of the tokens that stay.
        features: visual tokens that stay, in their order; `deepstack` those for the lower layers.
    """
    base = model.base_model
    ids = inputs["input_ids"]
    shorter = ids[:, stays]
    is_visual = (shorter == IMAGE) | (shorter == VIDEO)
    embeddings = model.get_input_embeddings()(shorter.masked_fill(is_visual, 0))
    embeddings[is_visual] = features.to(embeddings.dtype)
    arguments = {"inputs_embeds": embeddings, "attention_mask": torch.ones_like(shorter)}
    if "token_type_ids" in inputs:
        arguments["token_type_ids"] = inputs["token_type_ids"][:, stays]
    if hasattr(base, "get_rope_index"):
        base.rope_deltas = None  # of an earlier call
        types = inputs.get("mm_token_type_ids", (ids == IMAGE).int())
        grids = {name: inputs[name] for name in ("image_grid_thw", "video_grid_thw") if name in inputs}
        positions, _ = base.get_rope_index(ids, mm_token_type_ids=types, **grids)
        arguments["position_ids"] = positions[..., stays]
    if len(deepstack):
        arguments["visual_pos_masks"] = is_visual
        arguments["deepstack_visual_embeds"] = deepstack
        language_model = getattr(base, "language_model", None) or base.text_model
        return model.lm_head(language_model(**arguments).last_hidden_state)
    return model(**arguments).logits


def logits_of_even(model, inputs, encoded, groups):
    """
    Return the logits of a prompt without the odd visual tokens of each image or tile.

    Args:
        encoded: image features of the prompt, and `groups` those of each image or tile.
    """
    kept = []
    start = 0
    for group in groups:
        end = start + len(group)
        kept += range(start, end, 2)
        start = end
    ids = inputs["input_ids"][0]
    stays = ids != IMAGE
    stays[(ids == IMAGE).nonzero()[kept, 0]] = True
    features = torch.cat([*groups])[kept]
    deepstack = [torch.cat([*layer])[kept] for layer in encoded.get("deepstack_features") or ()]
    return logits_of_rest(model, inputs, stays, features, deepstack)
