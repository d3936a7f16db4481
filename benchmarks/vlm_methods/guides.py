"""Train text guides on a frozen start, from answers (the gate) and from regions, with the code of `examples/train_guide.py`."""

from pathlib import Path
import PIL.Image
import torch
from torch import nn
from small import *
from modeling_trips.hosts import TextGuide, apply_patch_selection, remove_patch_selection
from modeling_trips.hosts.vlm.supervision import answer_losses, guided_selection, region_masks, targets_of_masks
from modeling_trips.patch_selection import selection_loss

FIRST_SCENE, STEPS, SCENES, LAYER, KEPT = 10_000_000, 200, 5, 3, 3


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


def loss_of(model, rows, teacher):
    pixels = torch.stack([p for p, _ in rows])
    prompts = [encode(q.text) for _, q in rows]
    if teacher == "answers":
        answered = [[*words, encode(q.answer)[0]] for words, (_, q) in zip(prompts, rows)]
        return answer_losses(model, llava_inputs(pixels, answered), [1] * len(rows), 0.2)[0].mean()
    inputs = llava_inputs(pixels, prompts)
    blank = PIL.Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE))
    masks = region_masks([blank] * len(rows), [q.region for _, q in rows])
    shown = {**inputs, "pixel_values": torch.stack([pixels_of(m) for m in masks])}
    black = {**inputs, "pixel_values": pixels_of(blank).expand_as(pixels)}
    targets = targets_of_masks(model, shown, black)
    selection = guided_selection(model, inputs)
    return selection_loss(selection.scores, selection.candidate_indices, targets).mean()


def train_guide(model, seed, teacher, folder, steps=STEPS):
    torch.manual_seed(seed)
    guide = TextGuide.for_model(model, LAYER)
    apply_patch_selection(model, f"{LAYER}:text:{KEPT / NUM_PATCHES:.9f}", guide=guide)
    optimizer = torch.optim.AdamW(guide.parameters(), lr=1e-2, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        loss = loss_of(model, rows_of(step, seed, teacher), teacher)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(guide.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        schedule.step()
        if step % 25 == 0:
            print(teacher, step, round(loss.item(), 3), flush=True)
    remove_patch_selection(model)
    guide.eval().save_pretrained(Path(folder) / "guides" / teacher)
