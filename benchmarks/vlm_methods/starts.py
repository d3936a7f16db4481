"""Train one start: python starts.py SEED FOLDER. The tower learns, for each patch, which shape is there, then the whole model answers."""

import random, sys, time
from pathlib import Path
import torch
from torch import nn
from small import *

torch.set_num_threads(1)
# cells along a side, steps, scenes a step, draws of questions per scene
STAGES = {"names": (4, 350, 12, 0), "small": (2, 700, 16, 3), "base": (4, 1100, 8, 3)}


def draw(number, seed, grid, draws):
    scene = draw_scene("train", number, seed, grid)
    rng = random.Random(f"more {seed} {number}")
    questions = list(scene.questions) if draws else []
    for _ in range(draws - 1):
        questions += old_scenes._questions(scene.items, grid, rng)
    questions = {q.text: q for q in questions if q.kind != "place"}
    return scene, list(questions.values())


def patch_labels(items, grid):
    side = 2 * grid
    labels = torch.zeros(2, side, side, dtype=torch.long)  # color and shape, 0 is the background
    for item in items:
        x0, y0, x1, y1 = item.box
        for row in range(side):
            for column in range(side):
                x, y = (column + 0.5) * PATCH_SIZE, (row + 0.5) * PATCH_SIZE
                if x0 <= x < x1 and y0 <= y < y1:
                    labels[0, row, column] = 1 + list(COLORS).index(item.color)
                    labels[1, row, column] = 1 + SHAPES.index(item.shape)
    return labels.flatten(1)


def make_batch(numbers, seed, grid, draws):
    drawn = [draw(n, seed, grid, draws) for n in numbers]
    pixels = torch.stack([pixels_of(scene.image) for scene, _ in drawn])
    content = torch.zeros(len(drawn), len(NAMES))
    for row, (scene, _) in zip(content, drawn):
        row[[NAMES.index(item.name) for item in scene.items]] = 1.0
    labels = torch.stack([patch_labels(scene.items, grid) for scene, _ in drawn])
    batch = {"pixels": pixels, "content": content, "labels": labels}
    if not draws:
        return batch
    asked = [[(encode(q.text), encode(q.answer)[0]) for q in questions] for _, questions in drawn]
    length = max(sum(len(w) for w, _ in qs) for qs in asked)
    ids = torch.zeros(len(drawn), length, dtype=torch.long)
    block, positions = torch.full_like(ids, -1), torch.zeros_like(ids)
    ends, answers = [], []
    for row, qs in enumerate(asked):
        at = 0
        for number, (words, answer) in enumerate(qs):
            own = slice(at, at := at + len(words))
            ids[row, own], block[row, own] = torch.tensor(words), number
            positions[row, own] = torch.arange(len(words))
            ends.append((row, at - 1))
            answers.append(answer)
    return batch | {
        "ids": ids,
        "block": block,
        "positions": positions,
        "ends": torch.tensor(ends),
        "answers": torch.tensor(answers),
    }


def answer_logits(model, batch, features):
    embed, num_visual = model.get_input_embeddings(), 1 + features.shape[1]
    first = embed(torch.full_like(batch["ids"][:, :1], BOS))
    states = torch.cat([first, features, embed(batch["ids"])], 1)
    length = states.shape[1]
    block = nn.functional.pad(batch["block"], (num_visual, 0), value=-2)
    seen = (block[:, :, None] == block[:, None, :]) | (block[:, None, :] == -2)
    seen &= torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]
    positions = torch.cat([torch.arange(num_visual).expand(len(block), -1), num_visual + batch["positions"]], 1)
    hidden = model.model.language_model(
        inputs_embeds=states, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state
    row, end = batch["ends"].unbind(-1)
    return model.lm_head(hidden[row, num_visual + end])


def patch_loss_of(features, heads, labels):
    """Colors and shapes of patches, 0 is the background."""
    loss = 0
    for number, head in enumerate(heads):
        loss = loss + nn.functional.cross_entropy(head(features).flatten(0, 1), labels[:, number].flatten())
    return loss / 2


def main(seed, folder):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    llava = make_model(seed)
    llava.set_attn_implementation("eager")
    names = nn.Linear(128, len(NAMES))
    heads = nn.ModuleList([nn.Linear(128, 1 + len(COLORS)), nn.Linear(128, 1 + len(SHAPES))])
    parts = nn.ModuleList([llava, names, heads])
    log = open(folder / "log.txt", "w")
    for number_of_stage, (stage, (grid, steps, scenes, draws)) in enumerate(STAGES.items()):
        if (folder / f"{stage}.pt").exists():
            parts.load_state_dict(torch.load(folder / f"{stage}.pt"))
            continue
        optimizer = torch.optim.AdamW(parts.parameters(), 1e-3, betas=(0.9, 0.98), weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda s: min((s + 1) / 50, 2 * (steps - s) / steps, 1.0)
        )
        sums = torch.zeros(4)
        n = 0
        begun = time.process_time()
        first = 100_000 * number_of_stage
        for step in range(steps):
            b = make_batch(range(first + step * scenes, first + (step + 1) * scenes), seed, grid, draws)
            features, cls = features_of(llava, b["pixels"])
            names_loss = (
                nn.functional.binary_cross_entropy_with_logits(names(cls), b["content"], reduction="sum")
                / b["content"].sum()
            )
            patch_loss = patch_loss_of(features, heads, b["labels"])
            loss = names_loss / 4 + patch_loss
            part = [names_loss.item(), patch_loss.item(), 0, 0]
            if draws:
                logits = answer_logits(llava, b, features)
                answer_loss = nn.functional.cross_entropy(logits, b["answers"])
                part[2:] = [answer_loss.item(), (logits.argmax(-1) == b["answers"]).float().mean().item()]
                loss = loss + answer_loss
            loss.backward()
            nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            sums += torch.tensor(part)
            n += 1
            if n == 50:
                line = f"{stage} {step + 1} names {sums[0] / n:.3f} patches {sums[1] / n:.3f} answers {sums[2] / n:.3f} accuracy {sums[3] / n:.3f} cpu {time.process_time() - begun:.0f}"
                print(line, flush=True)
                print(line, file=log, flush=True)
                sums.zero_()
                n = 0
        torch.save(parts.state_dict(), folder / f"{stage}.pt")
    llava.save_pretrained(folder / "llava")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
