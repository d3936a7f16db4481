"""
Training of text guides and of weights for lower resolutions.

Training scenes follow those of the model in the same split, and no scene is used twice.
"""

import copy
import random
from collections.abc import Callable

import torch
from busy_scenes import draw_scene
from contestants import low_resolution_features
from small_model import BOS, IMAGE, NUM_PATCHES, pixels_of
from small_model import encode as encode_text
from torch import nn
from train import AttentionRows, choose_questions, make_batch, targets_of
from transformers import LlavaForConditionalGeneration

from modeling_trips.hosts import TextGuide
from modeling_trips.patch_selection import gather_tokens, keep_topk, score_tokens, selection_loss


FIRST_SCENE = 10_000_000
STEPS = 300
RESOLUTION_STEPS = 200


def optimize(
    module: nn.Module, loss_of: Callable[[int], torch.Tensor], steps: int, learning_rate: float, weight_decay: float
):
    """Train all parameters of a module on the loss of each step, with AdamW and one cycle of the learning rate."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=learning_rate, weight_decay=weight_decay)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(step).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        scheduler.step()


def scenes_of(step: int, num_images: int) -> range:
    """Return the numbers of the scenes of a step."""
    return range(FIRST_SCENE + step * num_images, FIRST_SCENE + (step + 1) * num_images)


def draw_questions(seed: int, step: int, num_images: int, per_image: int) -> tuple[torch.Tensor, list[list]]:
    pixels, rows = [], []
    for number in scenes_of(step, num_images):
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
def states_and_keys(model: LlavaForConditionalGeneration, layer: int, pixel_values: torch.Tensor):
    """
    Return the states before a tower layer, `(num_images, 1 + num_patches, width)`, and the keys of all patches in it,
    `(num_images, num_heads, num_patches, head_dim)`.
    """
    tower = model.model.vision_tower
    states = tower.pre_layrnorm(tower.embeddings(pixel_values))
    for below in tower.encoder.layers[: layer - 1]:
        states = below(states, None)
    selecting = tower.encoder.layers[layer - 1]
    key = selecting.self_attn.k_proj(selecting.layer_norm1(states)[:, 1:])
    return states, key.unflatten(-1, (-1, selecting.self_attn.head_dim)).transpose(1, 2)


def train_guide(
    model: LlavaForConditionalGeneration, layer: int, teacher: str, seed: int, steps: int = STEPS, num_images: int = 16
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
    guide = TextGuide.for_model(model)
    per_image = 2 if teacher == "answers" else 12
    recorder = AttentionRows(model.model.language_model)

    def targets_of_step(step: int, questions: list) -> torch.Tensor:
        if teacher == "regions":
            return targets_of(question.region for question in questions)
        batch = make_batch(scenes_of(step, num_images), seed, per_image)
        recorder.rows = batch["ends"]
        names = ("input_ids", "pixel_values", "attention_mask", "position_ids")
        with torch.no_grad():
            model(**{name: batch[name] for name in names})
        return recorder.weights

    def loss_of(step: int) -> torch.Tensor:
        pixel_values, rows = draw_questions(seed, step, num_images, per_image)
        image = torch.tensor([row for row, questions in enumerate(rows) for _ in questions])
        questions = [question for row in rows for question in row]
        prompt, mask = padded([question.text for question in questions])
        states, key = states_and_keys(model, layer, pixel_values)
        query = guide(model.get_input_embeddings()(prompt), mask)
        scores = score_tokens(query, key[image], model.model.vision_tower.encoder.layers[layer - 1].self_attn.scale)
        if teacher == "answers":
            return answer_loss(model, layer, states, scores, image, prompt, mask, questions)
        targets = targets_of_step(step, questions)
        candidates = torch.arange(NUM_PATCHES).expand(len(scores), -1)
        return selection_loss(scores, candidates, targets)[targets.sum(-1) > 0].mean()

    optimize(guide, loss_of, steps, learning_rate=1e-2, weight_decay=0.01)
    recorder.handle.remove()
    return guide.eval()


def answer_loss(model, layer: int, states, scores, image, prompt, mask, questions: list) -> torch.Tensor:
    """Return the cross-entropy of the answers when the layer keeps a ninth of the patches by the guide's scores."""
    tower, embed = model.model.vision_tower, model.get_input_embeddings()
    selecting = tower.encoder.layers[layer - 1]
    with torch.no_grad():
        states = states + selecting.self_attn(selecting.layer_norm1(states))[0]
    logs = scores.clamp(min=1e-9).log()
    noise = -torch.log(-torch.log(torch.rand_like(scores).clamp(1e-9, 1 - 1e-7)))
    positions = keep_topk(logs.detach() + noise, NUM_PATCHES // 9)
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
    dropped = NUM_PATCHES - side * side

    def loss_of(step: int) -> torch.Tensor:
        batch = make_batch(scenes_of(step, 16), seed, 12)
        is_dropped = torch.zeros(batch["input_ids"].shape[1], dtype=torch.bool)
        is_dropped[1 : 1 + dropped] = True
        ids, labels = batch["input_ids"][:, ~is_dropped], batch["labels"][:, ~is_dropped]
        mask = batch["attention_mask"][:, :, ~is_dropped][..., ~is_dropped]
        positions = batch["position_ids"][:, ~is_dropped] - dropped
        positions[:, 0] = 0
        features = low_resolution_features(model, side, batch["pixel_values"])
        states = model.get_input_embeddings()(ids).masked_scatter((ids == IMAGE).unsqueeze(-1), features)
        hidden = model.model.language_model(
            inputs_embeds=states, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        is_label = labels != -100
        return nn.functional.cross_entropy(model.lm_head(hidden[is_label]), labels[is_label])

    optimize(model, loss_of, RESOLUTION_STEPS, learning_rate=3e-4, weight_decay=0.05)
    return model.eval().requires_grad_(False)
