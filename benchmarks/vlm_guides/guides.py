"""Train text guides on a frozen start from each teacher, with equal scenes and steps, with the code of `examples/train_guide.py`."""

from pathlib import Path
import PIL.Image
import torch
from torch import nn
from small import *
from modeling_trips.hosts import TextGuide, apply_patch_selection, remove_patch_selection
from modeling_trips.hosts.vlm.supervision import (
    answer_losses,
    guided_selection,
    region_masks,
    targets_of_attention,
    targets_of_masks,
)
from modeling_trips.patch_selection import log_scores, selection_loss

FIRST_SCENE, STEPS, SCENES, LAYER, KEPT = 10_000_000, 300, 8, 3, 3
TEACHERS = ("answers", "relevance, squares", "regions", "attention", "relevance")


def rows_of(step, seed, teacher):
    first = FIRST_SCENE + step * SCENES
    rows = []
    for number in range(first, first + SCENES):
        scene = draw_scene("train", number, seed)
        rows += [
            (pixels_of(scene.image), q)
            for q in scene.questions
            if q.kind != "place" and (teacher != "regions" or q.region)
        ]
    return rows


def variants(model, answered, teacher):
    """As `targets_of_relevance`, for answers of one token, from embeddings minus their mean, or norms."""
    ids = answered["input_ids"]
    with torch.no_grad():
        features = model.model.get_image_features(answered["pixel_values"]).pooler_output
    if not isinstance(features, torch.Tensor):
        features = torch.stack(list(features))
    embeds = model.get_input_embeddings()(ids)
    is_image = (ids == IMAGE).unsqueeze(-1)
    embeds = embeds.masked_scatter(is_image, features).detach().requires_grad_()
    mask = answered["attention_mask"]
    hidden = model.model.language_model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
    loss = nn.functional.cross_entropy(model.lm_head(hidden[:, -2]), ids[:, -1], reduction="sum")
    (gradient,) = torch.autograd.grad(loss, embeds)
    h = embeds.detach()[is_image[..., 0]].view(len(ids), NUM_PATCHES, -1)
    g = gradient[is_image[..., 0]].view(len(ids), NUM_PATCHES, -1)
    centered = h - h.mean(dim=1, keepdim=True)
    if teacher == "relevance":
        relevance = -(g * h).sum(-1).clamp(max=0)
    elif teacher == "relevance, centered":
        relevance = -(g * centered).sum(-1).clamp(max=0)
    else:
        relevance = (g.norm(dim=-1) * centered.norm(dim=-1)) ** 2
    return relevance / relevance.sum(dim=-1, keepdim=True).clamp(min=1e-30)


def loss_of(model, rows, teacher, guide, schedule):
    pixels = torch.stack([p for p, _ in rows])
    prompts = [encode(q.text) for _, q in rows]
    answered = [[*words, encode(q.answer)[0]] for words, (_, q) in zip(prompts, rows)]
    answered = llava_inputs(pixels, answered)
    counts = [1] * len(rows)
    if teacher == "answers":
        return answer_losses(model, answered, counts, 0.2)[0].mean()
    inputs = llava_inputs(pixels, prompts)
    if teacher == "attention":
        remove_patch_selection(model)
        targets = targets_of_attention(model, answered, counts)
        apply_patch_selection(model, schedule, guide=guide)
    elif teacher == "regions":
        blank = PIL.Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE))
        masks = region_masks([blank] * len(rows), [q.region for _, q in rows])
        shown = {**inputs, "pixel_values": torch.stack([pixels_of(m) for m in masks])}
        black = {**inputs, "pixel_values": pixels_of(blank).expand_as(pixels)}
        targets = targets_of_masks(model, shown, black)
    else:
        targets = variants(model, answered, teacher)
    selection = guided_selection(model, inputs)
    if teacher.startswith("relevance"):
        losses = -(targets * log_scores(selection.scores)).sum(dim=-1)
    else:
        losses = selection_loss(selection.scores, selection.candidate_indices, targets)
    return losses.sum() / (targets.sum(dim=-1) > 0).sum().clamp(min=1)


def train_guide(model, seed, teacher, folder, steps=STEPS):
    torch.manual_seed(seed)
    guide = TextGuide.for_model(model, LAYER)
    schedule = f"{LAYER}:text:{KEPT / NUM_PATCHES:.9f}"
    apply_patch_selection(model, schedule, guide=guide)
    optimizer = torch.optim.AdamW(guide.parameters(), lr=1e-2, weight_decay=0.01)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        loss = loss_of(model, rows_of(step, seed, teacher), teacher, guide, schedule)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(guide.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        rates.step()
        if step % 25 == 0:
            print(teacher, step, round(loss.item(), 3), flush=True)
    remove_patch_selection(model)
    guide.eval().save_pretrained(Path(folder) / "guides" / teacher)
