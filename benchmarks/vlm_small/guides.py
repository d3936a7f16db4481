"""
Training of text guides and of weights for lower resolutions.

Training scenes follow those of the model in the same split, and no scene is used twice.
"""

import copy
import random

import torch
from busy_scenes import draw_scene
from contestants import low_resolution_features
from small_model import BOS, IMAGE, NUM_PATCHES, pixels_of
from small_model import encode as encode_text
from torch import nn
from train import AttentionRows, TrainArguments, choose_questions, make_batch, region_target
from transformers import LlavaForConditionalGeneration

from modeling_trips.hosts import TextGuide
from modeling_trips.patch_selection import gather_tokens, keep_topk, score_tokens, selection_loss


FIRST_SCENE = 10_000_000
STEPS = 300
RESOLUTION_STEPS = 200


def draw_questions(seed: int, step: int, num_images: int, per_image: int) -> tuple[torch.Tensor, list[list]]:
    pixels, rows = [], []
    for number in range(FIRST_SCENE + step * num_images, FIRST_SCENE + (step + 1) * num_images):
        scene = draw_scene("train", number, seed)
        pixels.append(pixels_of(scene.image))
        rows.append(choose_questions(scene, per_image, random.Random(number)))
    return torch.stack(pixels), rows


def padded(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [torch.tensor(encode_text(text)) for text in texts]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor([[len(row)] for row in rows])
    return ids, mask


@torch.no_grad()
def keys_of_layer(model: LlavaForConditionalGeneration, layer: int, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return the keys of all patches in a tower layer: `(num_images, num_heads, num_patches, head_dim)`."""
    tower = model.model.vision_tower
    states = tower.pre_layrnorm(tower.embeddings(pixel_values))
    for below in tower.encoder.layers[: layer - 1]:
        states = below(states, None)
    selecting = tower.encoder.layers[layer - 1]
    key = selecting.self_attn.k_proj(selecting.layer_norm1(states)[:, 1:])
    return key.unflatten(-1, (-1, selecting.self_attn.head_dim)).transpose(1, 2)


def train_guide(
    model: LlavaForConditionalGeneration,
    layer: int,
    teacher: str,
    seed: int = 0,
    steps: int = STEPS,
    num_images: int = 16,
) -> TextGuide:
    """
    Train a guide on the frozen model.

    Args:
        teacher (`str`): `"regions"` (boxes of the data), `"attention"` (attention of the unpruned model from the last
            token of the question to the image), or `"answers"` (loss of the answer at a ninth of the patches, with a
            straight-through factor on the kept patches and Gumbel noise on the scores).
    """
    model.requires_grad_(False)
    torch.manual_seed(seed)
    attention = model.model.vision_tower.encoder.layers[layer - 1].self_attn
    guide = TextGuide.for_model(model)
    optimizer = torch.optim.AdamW(guide.parameters(), lr=1e-2, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps, pct_start=0.1)
    embed = model.get_input_embeddings()
    per_image = 2 if teacher == "answers" else 12
    batches = TrainArguments(output_dir="", seed=seed, batch_size=num_images, questions=per_image)
    recorder = AttentionRows(model.model.language_model) if teacher == "attention" else None
    for step in range(steps):
        if teacher == "answers":
            loss = answer_loss(model, guide, layer, *draw_questions(seed, step, num_images, per_image))
        else:
            if teacher == "attention":
                batch = make_batch(batches, FIRST_SCENE // num_images + step)
                recorder.rows = batch["ends"]
                with torch.no_grad():
                    model(
                        **{
                            name: batch[name]
                            for name in ("input_ids", "pixel_values", "attention_mask", "position_ids")
                        }
                    )
            pixel_values, rows = draw_questions(seed, step, num_images, per_image)
            image = torch.tensor([row for row, questions in enumerate(rows) for _ in questions])
            questions = [question for row in rows for question in row]
            if teacher == "attention":
                targets = recorder.weights
            else:
                targets = torch.stack([region_target(question.region) for question in questions])
            prompt, mask = padded([question.text for question in questions])
            key = keys_of_layer(model, layer, pixel_values)[image]
            scores = score_tokens(guide(embed(prompt), mask), key, attention.scale)
            candidates = torch.arange(NUM_PATCHES).expand(len(scores), -1)
            has_target = targets.sum(-1) > 0
            loss = selection_loss(scores, candidates, targets)[has_target].mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(guide.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    if recorder is not None:
        recorder.handle.remove()
    return guide.eval()


def answer_loss(model, guide: TextGuide, layer: int, pixel_values: torch.Tensor, rows: list[list]):
    """Return the cross-entropy of the answers when the guide's layer keeps a ninth of the patches."""
    image = torch.tensor([row for row, questions in enumerate(rows) for _ in questions])
    questions = [question for row in rows for question in row]
    prompt, mask = padded([question.text for question in questions])
    embed, tower = model.get_input_embeddings(), model.model.vision_tower
    with torch.no_grad():
        states = tower.pre_layrnorm(tower.embeddings(pixel_values))
        for below in tower.encoder.layers[: layer - 1]:
            states = below(states, None)
        selecting = tower.encoder.layers[layer - 1]
        normed = selecting.layer_norm1(states)
        states = states + selecting.self_attn(normed)[0]
        key = (
            selecting.self_attn.k_proj(normed[:, 1:]).unflatten(-1, (-1, selecting.self_attn.head_dim)).transpose(1, 2)
        )
    scores = score_tokens(guide(embed(prompt), mask), key[image], selecting.self_attn.scale).clamp(min=1e-9)
    noise = -torch.log(-torch.log(torch.rand_like(scores).clamp(1e-9, 1 - 1e-7)))
    positions = keep_topk(scores.detach().log() + noise, NUM_PATCHES // 9)
    logs = scores.log()
    factor = torch.exp(logs - logs.detach()).gather(1, positions).unsqueeze(-1)
    states = states[image]
    states = torch.cat([states[:, :1], gather_tokens(states[:, 1:], positions) * factor], dim=1)
    states = states + selecting.mlp(selecting.layer_norm2(states))
    for above in tower.encoder.layers[layer:]:
        states = above(states, None)
    features = model.model.multi_modal_projector(states[:, 1:])
    # A causal mask ignores right padding.
    first = torch.full_like(prompt[:, :1], BOS)
    inputs = torch.cat([embed(first), features, embed(prompt)], dim=1)
    hidden = model.model.language_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
    last = features.shape[1] + mask.sum(-1)
    logits = model.lm_head(hidden[torch.arange(len(hidden)), last])
    answers = torch.tensor([encode_text(question.answer)[0] for question in questions])
    return nn.functional.cross_entropy(logits, answers)


def fine_tune_resolution(model: LlavaForConditionalGeneration, side: int, seed: int):
    """Return a copy of the model, fine-tuned on answers for images of `side` x `side` patches."""
    model = copy.deepcopy(model).requires_grad_(True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-4, total_steps=RESOLUTION_STEPS, pct_start=0.1)
    batches = TrainArguments(output_dir="", seed=seed, batch_size=16, questions=12)
    embed = model.get_input_embeddings()
    dropped = NUM_PATCHES - side * side
    for step in range(RESOLUTION_STEPS):
        batch = make_batch(batches, FIRST_SCENE // 16 + step)
        is_dropped = torch.zeros(batch["input_ids"].shape[1], dtype=torch.bool)
        is_dropped[1 : 1 + dropped] = True
        ids, labels = batch["input_ids"][:, ~is_dropped], batch["labels"][:, ~is_dropped]
        mask = batch["attention_mask"][:, :, ~is_dropped][..., ~is_dropped]
        positions = batch["position_ids"][:, ~is_dropped] - dropped
        positions[:, 0] = 0
        features = low_resolution_features(model, side, batch["pixel_values"])
        states = embed(ids).masked_scatter((ids == IMAGE).unsqueeze(-1), features)
        hidden = model.model.language_model(
            inputs_embeds=states, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        is_label = labels != -100
        loss = nn.functional.cross_entropy(model.lm_head(hidden[is_label]), labels[is_label])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    return model.eval().requires_grad_(False)
