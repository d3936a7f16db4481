r"""
Train a TextGuide: the prompt scores the patches inside the vision tower of a frozen vision-language model.

    accelerate launch examples/train_guide.py --model llava-hf/llava-1.5-7b-hf --layer 8 \
        --train_file train.jsonl --validation_file val.jsonl --image_root images --output_dir guide

Rows have the columns image, question, answer and region, as for run_vqa.py. With `--teacher regions`, the guide learns
from the region that a question is about; with `--teacher relevance`, from what each visual token takes off the loss of
the unpruned model's answer. Rows that teach nothing are counted: those without a region or with one outside the
processor's crop, and those without a relevant token. The output folder gets the guide alone.
"""

from dataclasses import MISSING, dataclass

from trips_examples.data.source import option
from trips_examples.training.options import DataArguments, RunOptions, make_parser, run_script


# Share of the targets in the kept patches, by teacher.
RECALLS = {"regions": "region_recall", "relevance": "relevance_recall"}
# Why a row teaches nothing.
UNUSED = {
    "regions": "have a region that the processor crops away",
    "relevance": "have no visual token that takes off the loss of the answer",
}


@dataclass
class GuideArguments:
    model: str = option(MISSING, "The vision-language model, with its processor.")
    layer: int = option(2, "Tower layer that selects, from 1.")
    keep_rate: float = option(0.11, "Keep rate of the evaluation, in (0, 1].")
    teacher: str | None = option(
        None,
        "What the guide learns from, by default regions if the rows have them, otherwise relevance.",
        choices=[*RECALLS],
    )
    dtype: str = option("auto", "Data type of the frozen model.")

    def __post_init__(self):
        if not 0 < self.keep_rate <= 1:
            raise ValueError(f"--keep_rate must be in (0, 1], got {self.keep_rate}.")


OPTIONS = make_parser(
    GuideArguments,
    DataArguments,
    RunOptions,
    description=__doc__,
    script=__name__,
    output_dir="outputs/guide",
    num_train_epochs=3.0,
    max_steps=300,
    per_device_train_batch_size=16,
    per_device_eval_batch_size=16,
    learning_rate=1e-2,
    lr_scheduler_type="cosine",
    weight_decay=0.01,
    save_steps=100,
    max_eval_samples=512,
)

import logging
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from accelerate import PartialState
from datasets import Dataset
from datasets.fingerprint import Hasher
from torch import nn
from torch.utils.data import DataLoader
from transformers import PaliGemmaProcessor, PreTrainedModel, ProcessorMixin

from modeling_trips.hosts import TextGuide, apply_patch_selection
from modeling_trips.hosts.vlm.supervision import (
    guided_selection,
    region_masks,
    rows_of_images,
    targets_of_masks,
    targets_of_relevance,
)
from modeling_trips.patch_selection import log_scores, selection_loss, targets_of_candidates
from trips_examples.data.images import column_of, read_image, regions_of
from trips_examples.data.loading import BUNDLED
from trips_examples.metrics.generation import VisionLanguageModel, encode
from trips_examples.training.runs import parse_arguments, train_and_evaluate
from trips_examples.training.start import load_data
from trips_examples.training.trainer import FiniteTrainer


logger = logging.getLogger(__name__)

# Options of the trainer that a resumed training must share.
SETTINGS = (
    *("seed", "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim", "bf16", "fp16"),
)


class GuideCollator:
    """Collator of prompts, and of what the teacher needs: masks of the regions, or prompts with answers."""

    def __init__(self, processor: ProcessorMixin, teacher: str):
        self.processor = processor
        self.teacher = teacher

    def __call__(self, rows: list[dict]) -> dict:
        images = [read_image(row) for row in rows]
        questions = [row["question"] for row in rows]
        sources = [row["source"] for row in rows]
        inputs = encode(self.processor, images, questions)
        batch: dict[str, Any] = {"sources": sources, "inputs": inputs}
        if self.teacher == "regions":
            regions = [row["region"] for row in rows]
            black_images = [PIL.Image.new("RGB", image.size) for image in images]
            batch["masks"] = encode(self.processor, region_masks(images, regions), questions)
            batch["blanks"] = encode(self.processor, black_images, questions)
            return batch
        answers = [row["answers"][0] for row in rows]
        answered = self.encode_answered(images, questions, answers)
        lengths = answered["attention_mask"].sum(dim=1)
        prompt_lengths = inputs["attention_mask"].sum(dim=1)
        num_answer_tokens = (lengths - prompt_lengths).clamp(min=1)
        batch["answered"] = answered
        batch["num_answer_tokens"] = num_answer_tokens.tolist()
        return batch

    def encode_answered(self, images: list[PIL.Image.Image], questions: list[str], answers: list[str]) -> dict:
        """Encode prompts with their answers behind them."""
        if not isinstance(self.processor, PaliGemmaProcessor):
            return encode(self.processor, images, questions, answers)
        # It takes answers as suffixes, and ends them with a token that is cut off.
        answered = encode(self.processor, images, questions, suffix=answers)
        del answered["labels"]
        shape = answered["input_ids"].shape
        for name, value in answered.items():
            if value.shape == shape:
                answered[name] = value[:, :-1]
        return answered


class GuidedModel(nn.Module):
    """A guide as the model that is trained. The vision-language model is frozen."""

    def __init__(self, guide: TextGuide, model: PreTrainedModel, args: GuideArguments):
        super().__init__()
        self.guide = guide
        self.args = args
        self.frozen = (model,)  # a tuple keeps it out of parameters, checkpoints and data parallelism

    def forward(
        self, inputs: dict, masks=None, blanks=None, answered=None, num_answer_tokens=None
    ) -> dict[str, torch.Tensor]:
        """
        Return `loss`, the mean over the images (or tiles) that have a target, and `sums`, `(5,)`: of their losses, of
        the kept shares of their targets, and the numbers of these images, of rows with one and of rows without.
        """
        (model,) = self.frozen
        apply_patch_selection(model, f"{self.args.layer}:text:{self.args.keep_rate}", guide=self.guide)
        selection = guided_selection(model, inputs)
        if self.args.teacher == "regions":
            targets = targets_of_masks(model, masks, blanks)
            losses = selection_loss(selection.scores, selection.candidate_indices, targets)
        else:
            targets = targets_of_relevance(model, answered, num_answer_tokens)
            shares = targets_of_candidates(targets, selection.candidate_indices)
            losses = -(shares * log_scores(selection.scores)).sum(dim=-1)
        has_target = targets.sum(dim=-1) > 0  # (num_images,)
        # A row is used if one of its images has a target.
        rows = torch.tensor(rows_of_images(model, inputs), device=targets.device)
        num_targets = targets.new_zeros(len(inputs["input_ids"]))
        num_targets = num_targets.index_add(0, rows, has_target.to(targets.dtype))
        is_used = num_targets > 0  # (num_rows,)
        loss = (losses * has_target).sum()
        num_images = has_target.sum()
        recalls = targets_of_candidates(targets, selection.kept_indices).sum(dim=-1)
        sums = (loss, recalls.sum(), num_images, is_used.sum(), (~is_used).sum())
        sums = torch.stack([value.detach().float() for value in sums])
        return {"loss": loss / num_images.clamp(min=1), "sums": sums}


class GuideTrainer(FiniteTrainer):
    """Trainer of a [`GuidedModel`]. Its folders hold the guide, and one that was trained otherwise is refused."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.sums = torch.zeros(5, device=self.args.device)

    def compute_loss(self, model, inputs, **kwargs):
        outputs = model(**inputs)
        self.sums += outputs["sums"]
        return outputs["loss"]

    def train(self, resume_from_checkpoint: str | None = None):
        output = super().train(resume_from_checkpoint=resume_from_checkpoint)
        output.metrics.update(self.results("train", self.sums))
        return output

    @torch.no_grad()
    def evaluate(self, metric_key_prefix: str = "eval", **kwargs) -> dict[str, float]:
        args = self.args
        rows = self.eval_dataset.shard(num_shards=args.world_size, index=args.process_index)
        sums = torch.zeros_like(self.sums)
        for batch in DataLoader(rows, batch_size=args.per_device_eval_batch_size, collate_fn=self.data_collator):
            del batch["sources"]
            sums += self.model(**self._prepare_inputs(batch))["sums"]
        metrics = self.results(metric_key_prefix, sums)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(args, self.state, self.control, metrics)
        return metrics

    def results(self, stage: str, sums: torch.Tensor) -> dict[str, float]:
        """Return the metrics of all processes; only numbers without a target. Warn of rows that teach nothing."""
        loss, recall, num_images, num_used, num_unused = self.accelerator.reduce(sums, "sum").tolist()
        teacher = self.model.args.teacher
        if num_unused and self.args.should_log:
            logger.warning("%s: %d of the %d rows %s.", stage, num_unused, num_used + num_unused, UNUSED[teacher])
        metrics: dict[str, float] = {f"{stage}_samples": int(num_used), f"{stage}_unused": int(num_unused)}
        if num_images:
            metrics[f"{stage}_loss"] = loss / num_images
            metrics[f"{stage}_{RECALLS[teacher]}"] = recall / num_images
        return metrics

    def _save(self, output_dir: str | None = None, state_dict=None):
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        (folder / "README.md").unlink(missing_ok=True)  # an older guide's
        self.model.guide.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None):
        guide = self.model.guide
        saved = TextGuide.from_pretrained(resume_from_checkpoint)
        before = {"layer": saved.layer, **(saved.trained_with or {})}
        now = {"layer": guide.layer, **(guide.trained_with or {})}
        changed = [name for name in now if before.get(name) != now[name]]
        changes = [f"{name} {before.get(name)}, now {now[name]}" for name in changed]
        if changes:
            raise ValueError(f"{resume_from_checkpoint} has {'; '.join(changes)}. Choose another --output_dir.")
        guide.load_state_dict(saved.state_dict())


def facts_of(args, data_args, training_args, data, model) -> dict:
    """Return what makes the weights of a guide, for its card and its checkpoints: model, data and options."""
    folder = Path(args.model)
    source = data_args.dataset_name or BUNDLED
    if data_args.train_file:
        source = Path(data_args.train_file).name
    columns = ("source", "image_id", "question", "answers", "region")
    fingerprint = Hasher.hash([column_of(data["train"], column) for column in columns])
    facts = {
        "base model": folder.resolve().name if folder.exists() else args.model,
        "commit": getattr(model.config, "_commit_hash", None),
        "dtype": str(model.dtype),
        "data": f"{source} ({fingerprint})",
        "teacher": args.teacher,
        "keep rate": args.keep_rate,
        "processes": training_args.world_size,
    }
    for name, value in training_args.to_dict().items():
        if name in SETTINGS:
            facts[name] = value
    return facts


def rows_with_region(split: str, rows: Dataset) -> Dataset:
    """Leave out rows without a region, with a warning. Raise a `ValueError` if there are no others."""
    known = [row for row, region in enumerate(regions_of(rows)) if region is not None]
    if not known:
        raise ValueError(f"No row of the {split} split has a region. Use --teacher relevance.")
    num_missing = len(rows) - len(known)
    if num_missing and PartialState().is_main_process:
        logger.warning("Left out %d of the %d rows of %s, which have no region.", num_missing, len(rows), split)
    return rows.select(known)


def main(argv: list[str] | None = None) -> dict[str, float]:
    args, data_args, training_args = parse_arguments(OPTIONS, argv)
    data = load_data("vqa", data_args, training_args)
    if args.teacher is None:
        has_regions = any(regions_of(next(iter(data.values()))))
        args.teacher = "regions" if has_regions else "relevance"
    if args.teacher == "regions":
        for split, rows in data.items():
            data[split] = rows_with_region(split, rows)
    vlm = VisionLanguageModel(args.model, device=training_args.device, dtype=args.dtype)
    model = vlm.model.requires_grad_(False)
    if training_args.do_train:
        facts = facts_of(args, data_args, training_args, data, model)
        guide = TextGuide.for_model(model, args.layer, trained_with=facts)
    else:
        guide = TextGuide.from_pretrained(training_args.output_dir)
    trainer = GuideTrainer(
        model=GuidedModel(guide, model, args),
        args=training_args,
        data=data,
        data_collator=GuideCollator(vlm.processor, args.teacher),
    )
    return train_and_evaluate(trainer)


if __name__ == "__main__":
    run_script(main)
