r"""
Train a TextGuide: the prompt scores the patches inside the vision tower of a frozen vision-language model.

    accelerate launch examples/train_guide.py --model_name_or_path llava-hf/llava-1.5-7b-hf --layer 8 \
        --train_file train.jsonl --validation_file val.jsonl --image_root images --output_dir guide
    python examples/train_guide.py ... --teacher attention   # data without regions

Rows have the columns image, question, answer and region, as for run_vqa.py. With `--teacher regions`, the guide learns
from the region that a question is about; with `--teacher attention`, from the attention of the unpruned model's
answer.
The output folder gets the guide alone, a safetensors file; an interrupted run resumes from its last checkpoint.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import PIL.Image
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PaliGemmaProcessor,
    get_cosine_schedule_with_warmup,
)

from modeling_trips.hosts import TextGuide, apply_patch_selection, remove_patch_selection
from modeling_trips.hosts.vlm.supervision import (
    guided_selection,
    region_masks,
    targets_of_attention,
    targets_of_masks,
)
from modeling_trips.inspection import provenance
from modeling_trips.patch_selection import selection_loss, targets_of_candidates
from trips_examples.data.faults import BadRows
from trips_examples.data.loading import load_task_dataset
from trips_examples.data.rows import read_image, without_decoding
from trips_examples.data.source import DataSource
from trips_examples.training.files import write_json
from trips_examples.training.parser import make_parser, run_script


TEACHERS = ("regions", "attention")


@dataclass
class GuideArguments(DataSource):
    model_name_or_path: str = field(default="", metadata={"help": "The vision-language model, with its processor."})
    output_dir: str = field(default="outputs/guide", metadata={"help": "Folder of the guide and of its checkpoint."})
    layer: int = field(default=2, metadata={"help": "Tower layer that selects, from 1."})
    keep_rate: float = field(default=0.11, metadata={"help": "Keep rate of the evaluation."})
    teacher: str = field(default="regions", metadata={"help": f"What the guide learns from: {' or '.join(TEACHERS)}."})
    max_steps: int = field(default=300, metadata={"help": "Number of steps."})
    batch_size: int = field(default=16, metadata={"help": "Questions per process and step."})
    learning_rate: float = field(default=1e-2, metadata={"help": "Peak learning rate; cosine schedule."})
    warmup_steps: int = field(default=30, metadata={"help": "Steps of linear warmup."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of AdamW."})
    save_steps: int = field(default=100, metadata={"help": "Steps between checkpoints."})
    max_eval_samples: int = field(default=512, metadata={"help": "Questions of the validation split that are used."})
    dtype: str = field(default="auto", metadata={"help": "Data type of the frozen model."})
    skip_bad_rows: bool = field(default=False, metadata={"help": "Skip rows that cannot be used."})
    seed: int = field(default=0, metadata={"help": "Seed of the guide and of the order of the data."})

    def __post_init__(self):
        if not self.model_name_or_path:
            raise ValueError("--model_name_or_path is required.")
        if self.teacher not in TEACHERS:
            raise ValueError(f"--teacher must be {' or '.join(TEACHERS)}, got {self.teacher}.")


class GuideCollator:
    """Rows to the inputs of prompts, and to what the teacher needs: masks of the regions, or prompts with answers."""

    def __init__(self, processor, teacher: str):
        self.processor, self.teacher = processor, teacher
        processor.tokenizer.padding_side = "left"

    def prompt(self, question: str) -> str:
        if getattr(self.processor, "chat_template", None) is None:
            return f"{self.processor.image_token}{question}"
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def encode(self, images: list[PIL.Image.Image], texts: list[str], **options) -> dict[str, torch.Tensor]:
        images = [[image] for image in images]
        return dict(self.processor(images=images, text=texts, padding=True, return_tensors="pt", **options))

    def __call__(self, rows: list[dict]) -> dict:
        images = [read_image(row) for row in rows]
        prompts = [self.prompt(row["question"]) for row in rows]
        batch: dict = {"inputs": self.encode(images, prompts)}
        if self.teacher == "regions":
            blanks = [PIL.Image.new("RGB", image.size) for image in images]
            batch["masks"] = self.encode(region_masks(images, [row["region"] for row in rows]), prompts)
            batch["blanks"] = self.encode(blanks, prompts)
        else:
            answers = [row["answers"][0] for row in rows]
            if isinstance(self.processor, PaliGemmaProcessor):  # it ends the prompt, and then the answer
                answered = self.encode(images, prompts, suffix=answers)
                del answered["labels"]
                shape = answered["input_ids"].shape
                batch["answered"] = {
                    name: value[:, :-1] if value.shape == shape else value for name, value in answered.items()
                }
            else:
                batch["answered"] = self.encode(images, [f"{prompt} {own}" for prompt, own in zip(prompts, answers)])
            lengths = (part["attention_mask"].sum(dim=1) for part in (batch["answered"], batch["inputs"]))
            batch["num_answer_tokens"] = [max(1, int(one - other)) for one, other in zip(*lengths)]
        return batch


class GuideTrainer:
    """The frozen model with its guide: losses of batches."""

    def __init__(self, model, guide: TextGuide, args: GuideArguments):
        self.model, self.guide, self.args = model, guide, args
        self.schedule = f"{args.layer}:text:{args.keep_rate}"

    def inputs(self, part: dict) -> dict:
        return {**part, "pixel_values": part["pixel_values"].to(self.model.dtype)}

    def targets(self, batch: dict) -> torch.Tensor:
        if self.args.teacher == "regions":
            return targets_of_masks(self.model, batch["masks"], batch["blanks"])
        remove_patch_selection(self.model)
        return targets_of_attention(self.model, self.inputs(batch["answered"]), batch["num_answer_tokens"])

    def loss_and_recall(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sum of the losses, sum of the shares of the targets that are kept, and number of images with a target."""
        targets = self.targets(batch)
        apply_patch_selection(self.model, self.schedule, guide=self.guide)
        selection = guided_selection(self.model, self.inputs(batch["inputs"]))
        losses = selection_loss(selection.scores, selection.candidate_indices, targets)
        kept = targets_of_candidates(targets, selection.kept_indices).sum(dim=-1)
        has_target = targets.sum(dim=-1) > 0
        return (losses * has_target).sum(), kept.sum(), has_target.sum()

    @torch.no_grad()
    def evaluate(self, batches: Iterable[dict], accelerator: Accelerator) -> dict[str, float]:
        sums = torch.zeros(3, device=accelerator.device)
        for batch in tqdm(batches, desc="evaluate", disable=not accelerator.is_main_process):
            sums += torch.stack([*self.loss_and_recall(batch)])
        loss, recall, number = accelerator.reduce(sums, "sum").tolist()
        return {
            "eval_loss": loss / max(number, 1),
            "eval_region_recall": recall / max(number, 1),
            "eval_samples": number,
        }


def shuffled_rows(num_rows: int, num_samples: int, seed: int) -> list[int]:
    """Numbers of rows in the order of training: each epoch has its own."""
    generator = torch.Generator().manual_seed(seed)
    epochs = [torch.randperm(num_rows, generator=generator) for _ in range(0, num_samples, num_rows)]
    return torch.cat(epochs)[:num_samples].tolist()


def main(argv: list[str] | None = None) -> dict[str, float]:
    (args,) = make_parser(GuideArguments, description=__doc__).parse_args_into_dataclasses(args=argv)
    accelerator = Accelerator()
    set_seed(args.seed)
    data = load_task_dataset("vqa", args, BadRows(skip=args.skip_bad_rows), seed=args.seed)
    data = {split: without_decoding(dataset) for split, dataset in data.items()}
    if "train" not in data:
        raise ValueError("There is no train split: give --train_file.")
    if args.teacher == "regions":
        data = {split: rows.filter(lambda row: row["region"] is not None) for split, rows in data.items()}
        if not len(data["train"]):
            raise ValueError("No row of the train split has a region: use --teacher attention.")
    model = AutoModelForImageTextToText.from_pretrained(args.model_name_or_path, dtype=args.dtype)
    model = model.to(accelerator.device).eval().requires_grad_(False)
    collator = GuideCollator(AutoProcessor.from_pretrained(args.model_name_or_path), args.teacher)
    guide = TextGuide.for_model(model, args.layer)
    optimizer = torch.optim.AdamW(guide.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    # The scheduler counts the steps of all processes.
    scale = accelerator.num_processes
    scheduler = get_cosine_schedule_with_warmup(optimizer, args.warmup_steps * scale, args.max_steps * scale)
    guide, optimizer, scheduler = accelerator.prepare(guide, optimizer, scheduler)
    # Of a guide that DistributedDataParallel wraps.
    for name in ("text_hidden_size", "num_heads", "head_dim", "layer"):
        setattr(guide, name, getattr(accelerator.unwrap_model(guide), name))
    trainer = GuideTrainer(model, guide, args)
    step, checkpoint = 0, Path(args.output_dir) / "checkpoint"
    if (checkpoint / "step.json").exists():
        accelerator.load_state(checkpoint)
        step = json.loads((checkpoint / "step.json").read_text())["step"]
    per_step = args.batch_size * accelerator.num_processes
    order = shuffled_rows(len(data["train"]), args.max_steps * per_step, args.seed)[step * per_step :]
    loader = accelerator.prepare(DataLoader(data["train"], args.batch_size, sampler=order, collate_fn=collator))
    is_silent = not accelerator.is_main_process
    bar = tqdm(loader, initial=step, total=args.max_steps, desc="train", disable=is_silent)
    for batch in bar:
        loss, recall, number = trainer.loss_and_recall(batch)
        accelerator.backward(loss / number.clamp(min=1))
        accelerator.clip_grad_norm_(guide.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        step += 1
        if step % args.save_steps == 0 or step == args.max_steps:
            images = max(number.item(), 1)  # cropping may leave none with a region
            bar.set_postfix(loss=loss.item() / images, region_recall=recall.item() / images)
            accelerator.save_state(checkpoint)
            if accelerator.is_main_process:
                write_json(checkpoint / "step.json", {"step": step})
    remove_patch_selection(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(guide).save_pretrained(args.output_dir)
    metrics: dict[str, float] = {}
    if "validation" in data:
        rows = data["validation"].select(range(min(args.max_eval_samples, len(data["validation"]))))
        loader = accelerator.prepare(DataLoader(rows, args.batch_size, collate_fn=collator))
        metrics = trainer.evaluate(loader, accelerator)
        remove_patch_selection(model)
        if accelerator.is_main_process:
            rows = {**metrics, **provenance(accelerator.device.type, args.seed)}
            write_json(Path(args.output_dir) / "eval_results.json", rows)
            print(json.dumps(metrics))
    accelerator.end_training()
    return metrics


if __name__ == "__main__":
    run_script(main)
