r"""
Train a TextGuide: the prompt scores the patches inside the vision tower of a frozen vision-language model.

    accelerate launch examples/train_guide.py --model llava-hf/llava-1.5-7b-hf --layer 8 \
        --train_file train.jsonl --validation_file val.jsonl --image_root images --output_dir guide

Rows have the columns image, question and answer, as for run_vqa.py. The guide learns relevance: what the unpruned
model's answer depends on. Images without a relevant token teach nothing and are counted. The output folder gets
the guide alone.
"""

from dataclasses import MISSING, dataclass

from trips_examples.data.source import option
from trips_examples.training.options import DataArguments, RunOptions, make_parser, run_script


@dataclass
class GuideArguments:
    model: str = option(MISSING, "The vision-language model, with its processor.")
    layer: int = option(2, "Tower layer that selects, from 1.")
    keep_rate: float = option(0.11, "Keep rate of the evaluation, in (0, 1].")
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

import PIL.Image
import torch
from datasets.fingerprint import Hasher
from torch import nn
from torch.utils.data import DataLoader
from transformers import PaliGemmaProcessor, PreTrainedModel, ProcessorMixin

from modeling_trips.hosts import TextGuide, apply_patch_selection
from modeling_trips.hosts.vlm.supervision import guided_selection, targets_of_relevance
from modeling_trips.patch_selection import log_scores, targets_of_candidates
from trips_examples.data.images import column_of, read_image
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
    """Collator of prompts, without answers and with them."""

    def __init__(self, processor: ProcessorMixin):
        self.processor = processor

    def __call__(self, rows: list[dict]) -> dict:
        images = [read_image(row) for row in rows]
        questions = [row["question"] for row in rows]
        sources = [row["source"] for row in rows]
        inputs = encode(self.processor, images, questions)
        answers = [row["answers"][0] for row in rows]
        answered = self.encode_answered(images, questions, answers)
        lengths = answered["attention_mask"].sum(dim=1)
        prompt_lengths = inputs["attention_mask"].sum(dim=1)
        num_answer_tokens = (lengths - prompt_lengths).clamp(min=1)
        return {
            "sources": sources,
            "inputs": inputs,
            "answered": answered,
            "num_answer_tokens": num_answer_tokens.tolist(),
        }

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

    def forward(self, inputs: dict, answered: dict, num_answer_tokens: list[int]) -> dict[str, torch.Tensor]:
        """
        Return `loss`, the mean over the images (or tiles) that have a target, and `sums`, `(4,)`: of their losses, of
        the kept shares of their targets, and the numbers of these images and of the others.
        """
        (model,) = self.frozen
        apply_patch_selection(model, f"{self.args.layer}:text:{self.args.keep_rate}", guide=self.guide)
        selection = guided_selection(model, inputs)
        targets = targets_of_relevance(model, answered, num_answer_tokens)
        shares = targets_of_candidates(targets, selection.candidate_indices)
        losses = -(shares * log_scores(selection.scores)).sum(dim=-1)
        has_target = targets.sum(dim=-1) > 0  # (num_images,)
        loss = (losses * has_target).sum()
        num_images = has_target.sum()
        recalls = targets_of_candidates(targets, selection.kept_indices).sum(dim=-1)
        sums = (loss, recalls.sum(), num_images, (~has_target).sum())
        sums = torch.stack([value.detach().float() for value in sums])
        return {"loss": loss / num_images.clamp(min=1), "sums": sums}


class GuideTrainer(FiniteTrainer):
    """Trainer of a [`GuidedModel`]. Its folders hold the guide, and one that was trained otherwise is refused."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.sums = torch.zeros(4, device=self.args.device)

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
        """Return the metrics of all processes; only numbers without a target. Warn of images without one."""
        loss, recall, num_images, num_unused = self.accelerator.reduce(sums, "sum").tolist()
        if num_unused and self.args.should_log:
            num_all = num_images + num_unused
            logger.warning("%s: %d of %d images have no relevant visual token.", stage, num_unused, num_all)
        metrics: dict[str, float] = {f"{stage}_samples": int(num_images), f"{stage}_unused": int(num_unused)}
        if num_images:
            metrics[f"{stage}_loss"] = loss / num_images
            metrics[f"{stage}_relevance_recall"] = recall / num_images
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
    columns = ("source", "image_id", "question", "answers")
    fingerprint = Hasher.hash([column_of(data["train"], column) for column in columns])
    facts = {
        "base model": folder.resolve().name if folder.exists() else args.model,
        "commit": getattr(model.config, "_commit_hash", None),
        "dtype": str(model.dtype),
        "data": f"{source} ({fingerprint})",
        "keep rate": args.keep_rate,
        "processes": training_args.world_size,
    }
    for name, value in training_args.to_dict().items():
        if name in SETTINGS:
            facts[name] = value
    return facts


def main(argv: list[str] | None = None) -> dict[str, float]:
    args, data_args, training_args = parse_arguments(OPTIONS, argv)
    data = load_data("vqa", data_args, training_args)
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
        data_collator=GuideCollator(vlm.processor),
    )
    return train_and_evaluate(trainer)


if __name__ == "__main__":
    run_script(main)
