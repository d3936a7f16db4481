r"""
Train the small LLaVA on busy scenes without regions, from scratch, on one thread.

    OMP_NUM_THREADS=1 python benchmarks/vlm_small/train.py --seed 0 --folder outputs/vlm_small/seed0

Three stages, each in its folder: the tower learns at [CLS] which shapes are in scenes of 2 x 2 cells, as a tower that
is trained with captions would; the whole model learns to answer questions about such scenes, and then about scenes of
4 x 4 cells. Questions about an image share its image tokens, and a block mask separates them. The same command goes on
after an interruption: finished stages are left out, and a stage resumes from its last checkpoint. The training loop is
Transformers' `Trainer`, whose options are options here.
"""

import trips_examples  # noqa: F401  # isort: skip

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from small_model import BOS, NAMES, encode, features_of, make_model, pixels_of
from torch import nn
from torch.utils.data import SequentialSampler

from trips_examples.data.busy_scenes import draw_scene
from trips_examples.training.options import RunArguments
from trips_examples.training.parser import make_parser, run_script
from trips_examples.training.runs import parse_arguments, train_and_evaluate
from trips_examples.training.trainer import FiniteTrainer


@dataclass
class FolderArguments:
    folder: str = field(metadata={"help": "Folder of the stages' folders."})


@dataclass(frozen=True)
class Stage:
    """
    Args:
        grid (`int`): Cells along each side of the scenes.
        steps, scenes (`int`): Steps, and scenes of each.
        asks (`bool`): Whether the questions of the scenes take part.
        side (`int`, *optional*): Patches along each side of the images. Default: as they are.
    """

    grid: int
    steps: int
    scenes: int
    asks: bool = True
    side: int | None = None


STAGES = {
    "names": Stage(grid=2, steps=900, scenes=64, asks=False),
    "small": Stage(grid=2, steps=900, scenes=40),
    "base": Stage(grid=4, steps=600, scenes=24),
}


def make_batch(numbers: Iterable[int], seed: int, grid: int) -> dict[str, torch.Tensor]:
    """Make a batch of training scenes. Rows are [bos, image tokens, question, question, ...]."""
    scenes = [draw_scene("train", number, seed, grid) for number in numbers]
    pixels = torch.stack([pixels_of(scene.image) for scene in scenes])
    content = torch.zeros(len(scenes), len(NAMES))
    for row, scene in zip(content, scenes):
        row[[NAMES.index(item.name) for item in scene.items]] = 1.0
    asked = [[(encode(question.text), encode(question.answer)[0]) for question in scene.questions] for scene in scenes]
    length = max(sum(len(words) for words, _ in questions) for questions in asked)
    ids = torch.zeros(len(scenes), length, dtype=torch.long)
    block, positions = torch.full_like(ids, -1), torch.zeros_like(ids)
    ends, answers = [], []
    for row, questions in enumerate(asked):
        at = 0
        for number, (words, answer) in enumerate(questions):
            own = slice(at, at := at + len(words))
            ids[row, own], block[row, own] = torch.tensor(words), number
            positions[row, own] = torch.arange(len(words))
            ends.append((row, at - 1))
            answers.append(answer)
    batch = {"pixels": pixels, "content": content, "ids": ids, "block": block, "positions": positions}
    return batch | {"ends": torch.tensor(ends), "answers": torch.tensor(answers)}


def answer_logits(model: nn.Module, batch: dict[str, torch.Tensor], features: torch.Tensor) -> torch.Tensor:
    """Return logits of the answer to each question, `(num_questions, vocab_size)`, from the images' visual tokens."""
    embed, num_visual = model.get_input_embeddings(), 1 + features.shape[1]
    first = embed(torch.full_like(batch["ids"][:, :1], BOS))
    states = torch.cat([first, features.to(first.dtype), embed(batch["ids"])], dim=1)
    length = states.shape[1]
    block = nn.functional.pad(batch["block"], (num_visual, 0), value=-2)
    is_seen = (block[:, :, None] == block[:, None, :]) | (block[:, None, :] == -2)
    is_seen &= torch.ones(length, length, dtype=torch.bool).tril()
    # Eager attention needs an additive mask.
    mask = torch.zeros(is_seen.shape).masked_fill(~is_seen, torch.finfo(torch.float32).min)[:, None]
    positions = torch.cat([torch.arange(num_visual).expand(len(block), -1), num_visual + batch["positions"]], dim=1)
    dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else mask.dtype
    hidden = model.model.language_model(
        inputs_embeds=states, attention_mask=mask.to(dtype), position_ids=positions, use_cache=False
    ).last_hidden_state
    row, end = batch["ends"].unbind(-1)
    return model.lm_head(hidden[row, num_visual + end])


class SceneTrainer(FiniteTrainer):
    """Trainer of the small LLaVA and of its head for names on the scenes of its data set's numbers, in order."""

    def __init__(self, model: nn.ModuleDict, stage: Stage, **kwargs):
        super().__init__(model, **kwargs)
        self.stage, self.parts = stage, {}

    def _get_train_sampler(self, *args) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        with self.accelerator.autocast():
            features, class_states = features_of(model["llava"], inputs["pixels"], self.stage.side)
            names = model["names"](class_states).float()
            logits = answer_logits(model["llava"], inputs, features).float() if self.stage.asks else None
        content = inputs["content"]
        loss = nn.functional.binary_cross_entropy_with_logits(names, content, reduction="sum") / content.sum()
        self.parts = {"names_loss": loss.detach()}
        if logits is not None:
            answer_loss = nn.functional.cross_entropy(logits, inputs["answers"])
            accuracy = (logits.argmax(-1) == inputs["answers"]).float().mean()
            self.parts |= {"answer_loss": answer_loss.detach(), "accuracy": accuracy}
            loss = loss + answer_loss
        return loss

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


def make_trained_model(seed: int, folder: Path | None) -> nn.ModuleDict:
    """Return the small LLaVA (`llava`) and its head for names (`names`), with the weights of a stage's folder."""
    llava = make_model(seed)
    model = nn.ModuleDict({"llava": llava, "names": nn.Linear(llava.config.vision_config.hidden_size, len(NAMES))})
    if folder is not None:
        load_model(model, folder / "model.safetensors")
    return model


def train_stage(
    name: str, stage: Stage, folder: Path, start: Path | None, options: Iterable[str], first_scene: int = 0
):
    """Train, or resume, a stage from the weights of `start` into `folder / name`, unless it is finished."""
    if (folder / name / "train_results.json").exists():
        return
    resume = ["--resume_from_checkpoint", "last"] if any((folder / name).glob("checkpoint-*")) else []
    _, args = parse_arguments(
        ["--folder", str(folder), *options, "--output_dir", str(folder / name), *resume],
        FolderArguments,
        RunArguments,
        description=__doc__,
        do_eval=False,
        max_steps=stage.steps,
        per_device_train_batch_size=stage.scenes,
        learning_rate=1e-3,
        warmup_steps=50,
        adam_beta2=0.98,
        weight_decay=0.05,
        logging_steps=50,
        save_steps=200,
    )
    model = make_trained_model(args.seed, start)
    model["llava"].set_attn_implementation("eager")  # faster than sdpa on one thread with a mask
    trainer = SceneTrainer(
        model,
        stage,
        args=args,
        train_dataset=range(first_scene, first_scene + args.max_steps * args.per_device_train_batch_size),
        data_collator=lambda numbers: make_batch(numbers, args.seed, stage.grid),
    )
    print(f"{name}: {folder / name}")
    train_and_evaluate(trainer, trainer.evaluate)


def main(argv: list[str] | None = None):
    argv = sys.argv[1:] if argv is None else argv
    args, _ = make_parser(FolderArguments, RunArguments, description=__doc__).parse_args_into_dataclasses(argv)
    folder, start = Path(args.folder), None
    for name, stage in STAGES.items():
        train_stage(name, stage, folder, start, argv)
        start = folder / name


if __name__ == "__main__":
    run_script(main)
