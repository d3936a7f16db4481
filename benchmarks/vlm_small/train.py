r"""
Train the small LLaVA on busy scenes, from scratch, on one thread.

    OMP_NUM_THREADS=1 python benchmarks/vlm_small/train.py --seed 0 --output_dir outputs/vlm_small/seed0

Questions about an image share its image tokens, and a block mask separates them. Attention supervision starts at the
first word that names the item. Two more losses replace the pretraining of a tower: patches learn color, shape and
quarter of their item, and [CLS] learns the names of all items, so that selection scored by the image is a fair
baseline. An interrupted run resumes from its last checkpoint.
"""

import json
import math
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from busy_scenes import COLORS, IMAGE_SIZE, PLACES, SHAPES, draw_scene
from small_model import ATTENTION_LAYER, BOS, EOS, GRID, IMAGE, NUM_PATCHES, PATCH_SIZE, encode, make_model, pixels_of
from torch import nn
from tqdm.auto import tqdm
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from trips_examples.training.parser import make_parser


ATTRIBUTES = [*COLORS, *SHAPES]
NAMES = [f"{color} {shape}" for color in COLORS for shape in SHAPES]


@dataclass
class TrainArguments:
    output_dir: str = field(metadata={"help": "Folder of the model and of the checkpoint to resume from."})
    seed: int = field(default=0, metadata={"help": "Seed of the initialization and of the training scenes."})
    max_steps: int = field(default=1600, metadata={"help": "Number of steps."})
    batch_size: int = field(default=16, metadata={"help": "Images per step."})
    questions: int = field(default=12, metadata={"help": "Questions per image."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate; cosine schedule."})
    warmup_steps: int = field(default=200, metadata={"help": "Steps of linear warmup."})
    save_steps: int = field(default=200, metadata={"help": "Steps between checkpoints."})
    bf16: bool = field(default=True, metadata={"help": "Use bfloat16 autocast."})


def region_target(region: tuple[int, int, int, int] | None) -> torch.Tensor:
    """Return the share of each patch in the region, summing to 1, or zeros without a region."""
    target = torch.zeros(GRID, GRID)
    if region is not None:
        edges = torch.arange(GRID + 1) * (IMAGE_SIZE / GRID)

        def overlap(start: int, end: int) -> torch.Tensor:
            return (edges[1:].clamp(max=end) - edges[:-1].clamp(min=start)).clamp(min=0)

        target = overlap(region[1], region[3])[:, None] * overlap(region[0], region[2])[None]
        target = target / target.sum()
    return target.flatten()


def patch_attributes(scene) -> torch.Tensor:
    """
    Return the indices of color and shape of the item that covers at least half of each patch (or -100), and of the
    patch's quarter of the image.
    """
    attributes = torch.full((NUM_PATCHES, 3), -100)
    for item in scene.items:
        x0, y0, x1, y1 = item.box
        covered = region_target(item.box) * (x1 - x0) * (y1 - y0) >= PATCH_SIZE**2 / 2
        attributes[covered, :2] = torch.tensor([list(COLORS).index(item.color), SHAPES.index(item.shape)])
    half = (torch.arange(GRID) >= GRID // 2).long()
    attributes[:, 2] = (2 * half[:, None] + half[None]).flatten()
    return attributes


def attribute_loss(logits: torch.Tensor, attributes: torch.Tensor) -> torch.Tensor:
    parts = logits.split((len(COLORS), len(SHAPES), len(PLACES)), dim=-1)
    losses = [
        nn.functional.cross_entropy(part.flatten(0, 1), attributes[..., i].flatten()) for i, part in enumerate(parts)
    ]
    return sum(losses)


def choose_questions(scene, count: int, rng: random.Random) -> list:
    """Draw a set with balanced kinds and balanced "yes" and "no"."""
    by_kind: dict[tuple[str, bool], list] = {}
    for question in scene.questions:
        by_kind.setdefault((question.kind, question.answer == "no"), []).append(question)
    for group in by_kind.values():
        rng.shuffle(group)
    chosen = []
    while len(chosen) < count and any(by_kind.values()):
        chosen += [group.pop() for group in by_kind.values() if group]
    return rng.sample(chosen, min(count, len(chosen)))


def make_batch(args: TrainArguments, step: int) -> dict[str, torch.Tensor]:
    """Make the batch of a step. Rows are [bos, image tokens, question and answer, question and answer, ...]."""
    rows, pixels, contents, attributes, most = [], [], [], [], 0
    for number in range(step * args.batch_size, (step + 1) * args.batch_size):
        scene = draw_scene("train", number, args.seed)
        pixels.append(pixels_of(scene.image))
        attributes.append(patch_attributes(scene))
        present = {item.name for item in scene.items}
        contents.append(torch.tensor([float(name in present) for name in NAMES]))
        questions = choose_questions(scene, args.questions, random.Random(number))
        rows.append(questions)
        most = max(most, sum(len(question.text.split()) + 2 for question in questions))
    prefix = 1 + NUM_PATCHES
    length = prefix + most
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    ids[:, 0], ids[:, 1:prefix] = BOS, IMAGE
    labels, block = torch.full_like(ids, -100), torch.zeros_like(ids)
    positions = torch.arange(length).repeat(len(rows), 1)
    ends, targets, guided = [], [], []
    for row, questions in enumerate(rows):
        at = prefix
        for number, question in enumerate(questions, 1):
            words = [*encode(question.text), *encode(question.answer), EOS]
            end = at + len(words)
            ids[row, at:end] = torch.tensor(words)
            labels[row, end - 3 : end - 1] = torch.tensor(words[-2:])  # shifted by one
            positions[row, at:end] = torch.arange(prefix, prefix + len(words))
            block[row, at:end] = number
            ends.append((row, end - 3))
            targets.append(region_target(question.region))
            first = next(index for index, word in enumerate(question.text.split()) if word in ATTRIBUTES)
            guided += [(row, token, len(ends) - 1) for token in range(at + first, end - 2)]
            at = end
        block[row, at:] = -1
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same = (block[:, :, None] == block[:, None, :]) | (block[:, None, :] == 0)
    # Eager attention needs an additive mask.
    mask = torch.zeros(same.shape).masked_fill(~(causal & same), torch.finfo(torch.float32).min)[:, None]
    return {
        "pixel_values": torch.stack(pixels),
        "input_ids": ids,
        "labels": labels,
        "position_ids": positions,
        "attention_mask": mask,
        "ends": torch.tensor(ends),
        "guided": torch.tensor(guided),
        "targets": torch.stack(targets),
        "content": torch.stack(contents),
        "attributes": torch.stack(attributes),
    }


class AttentionRows:
    """Hook that computes the attention from given tokens to the image tokens in `ATTENTION_LAYER`, mean over heads."""

    def __init__(self, decoder: nn.Module):
        self.rows, self.weights = None, None
        self.handle = decoder.layers[ATTENTION_LAYER - 1].self_attn.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, attention: nn.Module, args: tuple, kwargs: dict):
        states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        cos, sin = kwargs["position_embeddings"]
        batch, token = self.rows.unbind(-1)
        dim = attention.head_dim

        def turned(states, cos, sin):
            return apply_rotary_pos_emb(states, states, cos, sin, unsqueeze_dim=2)[0]

        image = slice(1, 1 + NUM_PATCHES)
        key = turned(attention.k_proj(states[:, image]).unflatten(-1, (-1, dim)), cos[:, image], sin[:, image])
        query = attention.q_proj(states[batch, token]).unflatten(-1, (-1, dim))[:, None]
        query = turned(query, cos[batch, token][:, None], sin[batch, token][:, None])
        logits = torch.einsum("rhd,rphd->rhp", query[:, 0].float(), key.float()[batch]) * attention.scaling
        self.weights = logits.softmax(dim=-1).mean(dim=1)


def main(argv: list[str] | None = None):
    (args,) = make_parser(TrainArguments, description=__doc__).parse_args_into_dataclasses(argv)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    model = make_model(args.seed)
    model.set_attn_implementation("eager")  # faster than sdpa on one thread with a mask
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    recorder = AttentionRows(model.model.language_model)
    content_head = nn.Linear(model.config.vision_config.hidden_size, len(NAMES))
    patch_head = nn.Linear(model.config.vision_config.hidden_size, len(ATTRIBUTES) + len(PLACES))
    tower_states = []
    model.model.vision_tower.register_forward_hook(
        lambda _, __, output: tower_states.append((output.pooler_output, output.last_hidden_state[:, 1:]))
    )
    parameters = [*model.parameters(), *content_head.parameters(), *patch_head.parameters()]
    decay = [p for p in parameters if p.ndim > 1]
    others = [p for p in parameters if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=args.learning_rate,
        betas=(0.9, 0.98),
    )

    def rate(step: int) -> float:
        warm = min(1.0, (step + 1) / args.warmup_steps)
        return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / args.max_steps))))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    start, checkpoint = 0, folder / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        content_head.load_state_dict(state["content_head"])
        patch_head.load_state_dict(state["patch_head"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        start = state["step"]
    model.train()
    log = (folder / "log.jsonl").open("a")
    begin = time.perf_counter()
    for step in tqdm(range(start, args.max_steps), initial=start, total=args.max_steps, mininterval=10):
        batch = make_batch(args, step)
        recorder.rows, question_of_row = batch["guided"].split((2, 1), dim=-1)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            logits = model(
                input_ids=batch["input_ids"],
                pixel_values=batch["pixel_values"],
                attention_mask=batch["attention_mask"].to(torch.bfloat16 if args.bf16 else torch.float32),
                position_ids=batch["position_ids"],
                use_cache=False,
            ).logits
            class_states, patch_states = tower_states.pop()
            content_logits, patch_logits = content_head(class_states), patch_head(patch_states)
        labels = batch["labels"]
        is_label = labels != -100
        loss = nn.functional.cross_entropy(logits[is_label].float(), labels[is_label])
        weights, targets = recorder.weights, batch["targets"][question_of_row.squeeze(-1)]
        inside = (weights * (targets > 0)).sum(-1)
        has_region = targets.sum(-1) > 0
        attention_loss = -inside[has_region].clamp(min=1e-6).log().mean()
        content = batch["content"]
        content_loss = nn.functional.binary_cross_entropy_with_logits(content_logits.float(), content, reduction="sum")
        content_loss = content_loss / content.sum()
        patch_loss = attribute_loss(patch_logits.float(), batch["attributes"])
        optimizer.zero_grad()
        (loss + attention_loss + (content_loss + patch_loss)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if (step + 1) % 20 == 0:
            ends = batch["ends"]
            predicted = logits[ends[:, 0], ends[:, 1]].argmax(-1)
            accuracy = (predicted == labels[ends[:, 0], ends[:, 1]]).float().mean()
            row = {
                "step": step + 1,
                "loss": loss.item(),
                "attention_loss": attention_loss.item(),
                "content_loss": content_loss.item(),
                "patch_loss": patch_loss.item(),
                "accuracy": accuracy.item(),
                "patch_precision": inside[has_region].mean().item(),
                "seconds": time.perf_counter() - begin,
            }
            log.write(json.dumps(row) + "\n")
            log.flush()
        if (step + 1) % args.save_steps == 0 or step + 1 == args.max_steps:
            state = {
                "model": model.state_dict(),
                "content_head": content_head.state_dict(),
                "patch_head": patch_head.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "step": step + 1,
            }
            torch.save(state, folder / "checkpoint.tmp")
            (folder / "checkpoint.tmp").replace(checkpoint)
    model.save_pretrained(folder)


if __name__ == "__main__":
    main()
