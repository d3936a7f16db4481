r"""
Evaluate methods that drop visual tokens on a small LLaVA, and write a row for each.

    OMP_NUM_THREADS=1 python compare.py SEED FOLDER OUTPUT.json [--guides]
"""

import json
import sys
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path

import torch
from small import *
from torch import nn
from transformers import DynamicCache, LlavaForConditionalGeneration
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from modeling_trips.hosts import TextGuide, apply_patch_selection, remove_patch_selection
from modeling_trips.inspection.provenance import provenance
from modeling_trips.patch_selection import gather_tokens, keep_topk, score_tokens

torch.set_num_threads(1)
LEVELS = (21, 7, 3)
KINDS = ("color", "shape", "presence")
ATTENTION_LAYER = 2  # decoder layer of FastV's rule
TEST_SCENES = 100
BATCH = 64


@dataclass(frozen=True)
class Contestant:
    selection: str
    level: int
    kept: int = NUM_PATCHES
    schedule: str | None = None
    layer: int | None = None
    scorer: str | None = None
    side: int | None = None
    fastv: bool = False
    guide: str | None = None


def questions_of(split, num_scenes, seed):
    rows = []
    for number in range(num_scenes):
        scene = draw_scene(split, number, seed)
        pixels = pixels_of(scene.image)
        rows += [(pixels, encode(q.text), encode(q.answer)[0], q.kind) for q in scene.questions if q.kind != "place"]
    return rows


def fastv_logits(model, features, prompt, kept):
    """FastV: visual tokens leave after layer 2 of the decoder, by the last token's attention (commit f838ffd)."""
    decoder = model.model.language_model
    embed = model.get_input_embeddings()
    states = torch.cat([embed(torch.full_like(prompt[:, :1], BOS)), features, embed(prompt)], dim=1)
    num_visual = features.shape[1]
    positions = torch.arange(states.shape[1])[None].expand(len(states), -1)

    def run(layers, states, positions):
        mask = create_causal_mask(decoder.config, states, None, None, position_ids=None)
        rotary = decoder.rotary_emb(states, positions)
        for layer in layers:
            states = layer(states, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
        return states

    layers = list(decoder.layers)
    states = run(layers[: ATTENTION_LAYER - 1], states, positions)
    ranking = layers[ATTENTION_LAYER - 1]
    attention = ranking.self_attn
    cos, sin = decoder.rotary_emb(states, positions)
    normed = ranking.input_layernorm(states)
    query = attention.q_proj(normed[:, -1:]).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    key = attention.k_proj(normed[:, : 1 + num_visual]).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    query = apply_rotary_pos_emb(query, query, cos[:, -1:], sin[:, -1:])[0]
    key = apply_rotary_pos_emb(key, key, cos[:, : 1 + num_visual], sin[:, : 1 + num_visual])[0]
    weights = score_tokens(query[:, :, 0], key[:, :, 1:], attention.scaling)
    states = run([ranking], states, positions)
    kept = 1 + keep_topk(weights, kept)
    others = torch.arange(1 + num_visual, states.shape[1]).expand(len(states), -1)
    kept = torch.cat([torch.zeros_like(kept[:, :1]), kept, others], dim=1)
    states = run(layers[ATTENTION_LAYER:], gather_tokens(states, kept), kept)
    return model.lm_head(decoder.norm(states[:, -1]))


def scorer_macs(scorer, kept, prompt_length, hidden, width):
    every = NUM_PATCHES**2 * hidden  # all cosines
    words = NUM_PATCHES * prompt_length * hidden
    if scorer == "prompt":
        return words + every
    if scorer == "divprune":
        return every
    if scorer == "cdpruner":
        return words + every + NUM_PATCHES * kept * (kept - 1) // 2
    if scorer == "vispruner":
        macs = (NUM_PATCHES + 1) * width  # one row of the attention
        others = NUM_PATCHES - kept // 2
        while others > kept - kept // 2:
            macs += (others - others // 2) * (others // 2) * hidden
            others -= min(8, others - (kept - kept // 2))
        return macs
    return 0  # random, pooling


def total_mmacs(config, own, prompt_length=6):
    """Multiply-accumulates of a question with an answer of two tokens, in millions (as at commit f838ffd)."""
    vision, text = config.vision_config, config.text_config
    width, inner, hidden = vision.hidden_size, vision.intermediate_size, text.hidden_size
    patches = NUM_PATCHES if own.side is None else own.side**2
    tokens, tower = patches + 1, patches * 3 * PATCH_SIZE**2 * width
    for number in range(1, vision.num_hidden_layers + 1):
        tower += 4 * tokens * width**2 + 2 * tokens**2 * width
        if number == own.layer:
            tower += tokens * width
            if own.guide is not None:
                tower += prompt_length * 2 * hidden + hidden * width
            tokens = own.kept + 1
        tower += 2 * tokens * width * inner
    left = tokens - 1
    tower += left * (width * hidden + hidden**2)
    if own.scorer is not None:
        tower += scorer_macs(own.scorer, own.kept, prompt_length, hidden, width)
        left = own.kept
    decoder, length, cached = 0, 1 + left + prompt_length, 0
    for number in range(1, text.num_hidden_layers + 1):
        if own.fastv and number == ATTENTION_LAYER + 1:
            length = 1 + own.kept + prompt_length
        decoder += (
            4 * length * hidden**2 + length * (length + 1) * hidden + 3 * length * hidden * text.intermediate_size
        )
        cached += length
    decoder += hidden * text.vocab_size
    decoding = text.num_hidden_layers * (4 * hidden**2 + 3 * hidden * text.intermediate_size)
    decoding += 2 * hidden * (cached + text.num_hidden_layers) + hidden * text.vocab_size
    return (tower + decoder + decoding) / 1e6


def tower(name, level, layer, kept, guidance="image", guide=None):
    return Contestant(name, level, kept, f"{layer}:{guidance}:{kept / NUM_PATCHES:.9f}", layer, guide=guide)


def contestants_of(config, guides):
    if guides:
        return [tower(f"guide from {name}", level, 3, level, "text", name) for level in LEVELS for name in guides]
    found = [Contestant("unpruned", LEVELS[0])]
    for level in LEVELS:
        exits = [
            Contestant(f"{name}, exit", level, level, scorer=name)
            for name in ("random", "pooling", "divprune", "cdpruner", "vispruner", "prompt")
        ]
        limit = total_mmacs(config, exits[2])
        rivals = [tower("image in layer 3 at an exit's cost", level, 3, kept) for kept in range(1, NUM_PATCHES)]
        sides = [
            Contestant("fewer pixels at an exit's cost, frozen", level, side**2, side=side) for side in range(2, GRID)
        ]
        found += [
            *exits,
            tower("image in the last layer", level, 6, level),
            tower("image in layer 3", level, 3, level),
            [one for one in rivals if total_mmacs(config, one) <= limit][-1],
            [one for one in sides if total_mmacs(config, one) <= limit][-1],
            Contestant("FastV", level, level, fastv=True),
        ]
    return found


@torch.no_grad()
def measure(model, own, questions, guides, prepared):
    remove_patch_selection(model)
    if own.scorer is not None:
        apply_patch_selection(model, visual_tokens=own.kept, scorer=own.scorer)
    elif own.schedule is not None:
        apply_patch_selection(model, own.schedule, guide=guides.get(own.guide))
    torch.manual_seed(0)
    correct = torch.zeros(len(questions))
    for numbers, pixels, prompts in prepared:
        if own.side is not None:
            size = own.side * PATCH_SIZE
            pixels = nn.functional.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True)
        if own.fastv:
            logits = fastv_logits(model, features_of(model, pixels)[0], torch.tensor(prompts), own.kept)
        elif own.side is not None:
            inputs = llava_inputs(pixels, prompts, own.side**2)
            logits = model(**inputs, logits_to_keep=1, interpolate_pos_encoding=True).logits[:, -1]
        else:
            logits = model(**llava_inputs(pixels, prompts), logits_to_keep=1).logits[:, -1]
        correct[numbers] = (logits.argmax(-1) == torch.tensor([questions[n][2] for n in numbers])).float()
    remove_patch_selection(model)
    kinds = [row[3] for row in questions]
    return {f"accuracy_{kind}": correct[[own_kind == kind for own_kind in kinds]].mean().item() for kind in KINDS}


def main(seed, folder, output, *options):
    folder, output = Path(folder), Path(output)
    model = LlavaForConditionalGeneration.from_pretrained(folder / "llava").eval().requires_grad_(False)
    guides = {p.name: TextGuide.from_pretrained(p) for p in sorted((folder / "guides").glob("*"))} if options else {}
    questions = questions_of("test", TEST_SCENES, seed)
    prepared = []
    order = sorted(range(len(questions)), key=lambda n: len(questions[n][1]))
    for _, group in groupby(order, key=lambda n: len(questions[n][1])):
        for numbers in torch.tensor([*group]).split(BATCH):
            rows = [questions[n] for n in numbers]
            prepared.append((numbers, torch.stack([row[0] for row in rows]), [row[1] for row in rows]))
    rows = json.loads(output.read_text()) if output.exists() else []
    for own in contestants_of(model.config, guides):
        accuracies = measure(model, own, questions, guides, prepared)
        row = {
            **asdict(own),
            "total_mmacs": total_mmacs(model.config, own),
            **accuracies,
            "questions": len(questions),
            "precision": "float32",
            **provenance(seed=seed),
        }
        rows.append(row)
        print(
            f"{own.selection:40} {own.level:3} {own.kept:3} {row['total_mmacs']:7.2f} {100 * sum(accuracies.values()) / 3:5.1f}",
            flush=True,
        )
        output.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
