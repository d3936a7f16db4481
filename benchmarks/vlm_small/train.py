r"""
Train the small LLaVA on busy scenes, from scratch, on one thread.

    OMP_NUM_THREADS=1 python benchmarks/vlm_small/train.py --seed 0 --output_dir outputs/vlm_small/seed0

Questions about an image share its image tokens, and a block mask separates them. Attention supervision starts at the
first word that names the item. Two more losses replace the pretraining of a tower: patches learn color, shape and
quarter of their item, and [CLS] learns the names of all items, so that selection scored by the image is a fair
baseline. The training loop is Transformers' `Trainer`, whose options are options here.
"""

import trips_examples  # noqa: F401  # isort: skip

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from busy_scenes import COLORS, IMAGE_SIZE, PLACES, SHAPES, Scene, draw_scene
from safetensors.torch import load_model, save_model
from small_model import ATTENTION_LAYER, BOS, EOS, GRID, IMAGE, NUM_PATCHES, PATCH_SIZE, encode, make_model, pixels_of
from torch import nn
from torch.utils.data import SequentialSampler
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from modeling_trips.patch_selection import region_targets
from trips_examples.training.options import RunArguments
from trips_examples.training.parser import run_script
from trips_examples.training.runs import parse_arguments, train_and_evaluate
from trips_examples.training.trainer import FiniteTrainer


ATTRIBUTES = [*COLORS, *SHAPES]
NAMES = [f"{color} {shape}" for color in COLORS for shape in SHAPES]


@dataclass
class SceneArguments:
    questions: int = field(default=12, metadata={"help": "Questions per image."})


def targets_of(boxes: Iterable[tuple[int, int, int, int] | None]) -> torch.Tensor:
    """Return the share of each box (x0, y0, x1, y1) in each patch: rows that sum to 1, or to 0 without a box."""
    x0, y0, x1, y1 = torch.tensor([box or (0, 0, 0, 0) for box in boxes]).unbind(-1)
    centers = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], dim=-1)
    return region_targets(centers / IMAGE_SIZE, (GRID, GRID))


def patch_attributes(scene: Scene) -> torch.Tensor:
    """
    Return the indices of color and shape of the item that covers at least half of each patch (or -100), and of the
    patch's quarter of the image.
    """
    attributes = torch.full((NUM_PATCHES, 3), -100)
    for item, share in zip(scene.items, targets_of(item.box for item in scene.items)):
        x0, y0, x1, y1 = item.box
        covered = share * (x1 - x0) * (y1 - y0) >= PATCH_SIZE**2 / 2 - 1e-3
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


def choose_questions(scene: Scene, count: int, rng: random.Random) -> list:
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


def make_batch(numbers: Iterable[int], seed: int, count: int) -> dict[str, torch.Tensor]:
    """
    Make a batch of training scenes with `count` questions each. Rows are [bos, image tokens, question and answer,
    question and answer, ...].
    """
    rows, pixels, contents, attributes, most = [], [], [], [], 0
    for number in numbers:
        scene = draw_scene("train", number, seed)
        pixels.append(pixels_of(scene.image))
        attributes.append(patch_attributes(scene))
        present = {item.name for item in scene.items}
        contents.append(torch.tensor([float(name in present) for name in NAMES]))
        questions = choose_questions(scene, count, random.Random(number))
        rows.append(questions)
        most = max(most, sum(len(question.text.split()) + 2 for question in questions))
    prefix = 1 + NUM_PATCHES
    length = prefix + most
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    ids[:, 0], ids[:, 1:prefix] = BOS, IMAGE
    labels, block = torch.full_like(ids, -100), torch.zeros_like(ids)
    positions = torch.arange(length).repeat(len(rows), 1)
    ends, regions, guided = [], [], []
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
            regions.append(question.region)
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
        "targets": targets_of(regions),
        "content": torch.stack(contents),
        "attributes": torch.stack(attributes),
    }


class AttentionRows:
    """Hook that computes the attention from given tokens to the image tokens in `ATTENTION_LAYER`, mean over heads."""

    def __init__(self, decoder: nn.Module):
        self.rows, self.weights = None, None
        self.handle = decoder.layers[ATTENTION_LAYER - 1].self_attn.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, attention: nn.Module, args: tuple, kwargs: dict):
        if self.rows is None:
            return
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


class SceneTrainer(FiniteTrainer):
    """
    Trainer of the small LLaVA (`llava`) on the scenes of its data set's numbers, in order. Attention supervision and
    two heads of the tower (`content` and `patch`) help it to learn.
    """

    def __init__(self, model: nn.ModuleDict, **kwargs):
        super().__init__(model, **kwargs)
        llava = model["llava"].model
        self.recorder, self.tower_states, self.parts = AttentionRows(llava.language_model), [], {}
        llava.vision_tower.register_forward_hook(
            lambda _, __, output: self.tower_states.append((output.pooler_output, output.last_hidden_state[:, 1:]))
        )

    def _get_train_sampler(self, *args) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        def rate(step: int) -> float:
            warm = min(1.0, (step + 1) / self.args.warmup_steps)
            return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / num_training_steps))))

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, rate)
        return self.lr_scheduler

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        self.recorder.rows, question_of_row = inputs["guided"].split((2, 1), dim=-1)
        mask = inputs["attention_mask"].to(torch.bfloat16 if self.args.bf16 else torch.float32)
        arguments = {name: inputs[name] for name in ("input_ids", "pixel_values", "position_ids")}
        with self.accelerator.autocast():
            logits = model["llava"](**arguments, attention_mask=mask, use_cache=False).logits
            class_states, patch_states = self.tower_states.pop()
            content_logits, patch_logits = model["content"](class_states), model["patch"](patch_states)
        labels, content, ends = inputs["labels"], inputs["content"], inputs["ends"]
        is_label = labels != -100
        is_inside = inputs["targets"][question_of_row.squeeze(-1)] > 0
        inside = (self.recorder.weights * is_inside).sum(-1)[is_inside.any(-1)]
        content_loss = nn.functional.binary_cross_entropy_with_logits(content_logits.float(), content, reduction="sum")
        losses = {
            "answer_loss": nn.functional.cross_entropy(logits[is_label].float(), labels[is_label]),
            "attention_loss": -inside.clamp(min=1e-6).log().mean(),
            "content_loss": content_loss / content.sum(),
            "patch_loss": attribute_loss(patch_logits.float(), inputs["attributes"]),
        }
        is_right = logits[ends[:, 0], ends[:, 1]].argmax(-1) == labels[ends[:, 0], ends[:, 1]]
        parts = {**losses, "accuracy": is_right.float().mean(), "patch_precision": inside.mean()}
        self.parts = {name: value.detach() for name, value in parts.items()}
        return sum(losses.values())

    def log(self, logs: dict[str, float], *args, **kwargs):
        if "loss" in logs:
            logs = {**logs, **{name: value.item() for name, value in self.parts.items()}}
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict=None):
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.model, folder / "model.safetensors")  # knows tied weights

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None):
        load_model(self.model, Path(resume_from_checkpoint) / "model.safetensors")


def main(argv: list[str] | None = None):
    scene_args, args = parse_arguments(
        argv,
        SceneArguments,
        RunArguments,
        description=__doc__,
        do_eval=False,
        seed=0,
        max_steps=1600,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        warmup_steps=200,
        adam_beta2=0.98,
        weight_decay=0.05,
        logging_steps=20,
        save_steps=200,
        bf16=True,
    )
    llava = make_model(args.seed)
    llava.set_attn_implementation("eager")  # faster than sdpa on one thread with a mask
    width = llava.config.vision_config.hidden_size
    content, patch = nn.Linear(width, len(NAMES)), nn.Linear(width, len(ATTRIBUTES) + len(PLACES))
    trainer = SceneTrainer(
        nn.ModuleDict({"llava": llava, "content": content, "patch": patch}),
        args=args,
        train_dataset=range(args.max_steps * args.per_device_train_batch_size),
        data_collator=lambda numbers: make_batch(numbers, args.seed, scene_args.questions),
    )
    train_and_evaluate(trainer, trainer.evaluate)
    llava.save_pretrained(args.output_dir)


if __name__ == "__main__":
    run_script(main)
