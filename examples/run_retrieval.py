"""
Train and evaluate TRIPS on image-text retrieval: texts find images, images find texts.

    accelerate launch examples/run_retrieval.py                  # scenes of easy-VQA, the tiny preset: on a laptop
    accelerate launch examples/run_retrieval.py --keep_rate 1.0 --output_dir unpruned  # its twin
    accelerate launch examples/run_retrieval.py --train_file train.jsonl --validation_file val.jsonl \
        --image_root images --model_name_or_path albef_trips --rerank_k 128 --learning_rate 1e-5

Two losses are added: contrast (ITC) of each image and text with all of the batch, of all processes, and matching
(ITM) on hard negatives, which each process draws from its own part of the batch. Accumulating gradients enlarges
neither: the loss is then the mean of the losses of smaller batches. The training loop is Transformers' `Trainer`: see
`--help` for all of its options.
"""

import hashlib
import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import PIL.Image
import torch
from datasets import Dataset
from example_collators import ImageBatchCollator, read_image, shift, without_long_texts
from example_training import (
    DataArguments,
    ImageGroupedTrainer,
    ModelArguments,
    TripsTrainingArguments,
    end_processes,
    load_data,
    load_model,
    parse_arguments,
    train_and_evaluate,
    write_whole,
)
from retrieval_evaluation import RECALL_AT, Ranking, RetrievalEvaluator, RetrievalResults
from transformers.integrations import is_deepspeed_zero3_enabled

from modeling_trips import TripsForRetrieval, TripsPreTrainedModel, convert_to_rgb


@dataclass
class RetrievalModelArguments(ModelArguments):
    itc_weight: float | None = field(
        default=None, metadata={"help": "Weight of the contrastive loss. Default: the model's, 1."}
    )
    itm_weight: float | None = field(
        default=None, metadata={"help": "Weight of the matching loss. Default: the model's, 1."}
    )
    honest_negatives: bool | None = field(
        default=None,
        metadata={
            "help": "Whether the patches of a negative pair are selected by its own text (the default), or are those "
            "of the image's true pair."
        },
    )
    contrastive_selection: str | None = field(
        default=None,
        metadata={
            "help": "What selects the patches of the image features that are compared: image (its own [CLS]; the "
            "default), none (all patches go on), or text (the caption, in training only)."
        },
    )

    def config_overrides(self) -> dict:
        names = ("itc_weight", "itm_weight", "honest_negatives", "contrastive_selection")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return {**super().config_overrides(), **given}


@dataclass
class RetrievalTrainingArguments(TripsTrainingArguments):
    num_train_epochs: float = field(default=5.0, metadata={"help": "How often to train on each caption."})
    per_device_train_batch_size: int = field(default=48, metadata={"help": "Captions per device and step."})
    per_device_eval_batch_size: int = field(
        default=128, metadata={"help": "Images, captions or pairs per device and step of the evaluation."}
    )
    texts_per_image: int = field(
        default=1,
        metadata={"help": "How many captions of an image stand in a training batch together; they share its prefix."},
    )
    rerank_k: int = field(
        default=16,
        metadata={"help": "How many candidates of each query are matched and ranked again in evaluation. 0: none."},
    )
    rerank_by: str = field(
        default="both",
        metadata={
            "help": "What ranks them: both (log-odds of a match plus similarity over temperature) or matching (the "
            "log-odds alone)."
        },
    )


@dataclass
class RetrievalCollator(ImageBatchCollator):
    """
    Rows of the task "captions" -> inputs of [`TripsForRetrieval`] with its losses. Images are augmented by shifts
    alone: captions may say what is left and what is right.
    """

    def encode(self, images: list[PIL.Image.Image], image_index: list[int], rows: list[dict]) -> dict:
        captions = [row["caption"] for row in rows]
        inputs = self.processor(images=images, text=captions, image_index=image_index, return_tensors="pt")
        image_ids = [number_of(image_id) for image_id in dict.fromkeys(row["image_id"] for row in rows)]
        return {**inputs, "image_ids": torch.tensor(image_ids)}

    def augmented(self, images: list[PIL.Image.Image], image_index: list[int], rows: list[dict]):
        return [shift(image) for image in images], rows


def number_of(image_id: str) -> int:
    """A number below 2^63 for an image, the same in every process; those of two images differ but for a freak."""
    return int.from_bytes(hashlib.blake2b(image_id.encode(), digest_size=8).digest(), "big") >> 1


class DecodedImages(torch.utils.data.Dataset):
    """The images of rows, decoded when they are asked for."""

    def __init__(self, rows: Dataset):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> PIL.Image.Image:
        return convert_to_rgb(read_image(self.rows[row]))


class RetrievalTrainer(ImageGroupedTrainer):
    """A trainer that evaluates by searching, also during training, and logs both losses."""

    logged_losses = ("itc_loss", "itm_loss")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.losses = defaultdict(list)
        if self.args.do_eval and (self.is_fsdp_enabled or is_deepspeed_zero3_enabled()):
            raise ValueError(
                "The evaluation needs the whole model in each process. Train with --do_eval False, and evaluate what "
                "was saved without FSDP or ZeRO-3: --model_name_or_path OUTPUT --do_train False."
            )

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        for name in self.logged_losses:
            if outputs.get(name) is not None:
                self.losses[name].append(outputs[name].detach())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args, **kwargs):
        if "loss" in logs:
            means = {name: torch.stack(values).mean() for name, values in self.losses.items()}
            logs = {**logs, **{name: self.accelerator.gather(mean).mean().item() for name, mean in means.items()}}
            self.losses.clear()
        super().log(logs, *args, **kwargs)

    def model_to_evaluate(self) -> TripsPreTrainedModel:
        """The model itself, on the device and, with --bf16_full_eval or --fp16_full_eval, in half precision."""
        model = self.accelerator.unwrap_model(self.model).eval()
        if self.is_in_train:
            return model
        model = model.to(self.args.device)  # `Trainer` leaves it where it was loaded if there is more to do
        return model if self.full_eval_dtype is None else model.to(self.full_eval_dtype)

    @property
    def full_eval_dtype(self) -> torch.dtype | None:
        return torch.float16 if self.args.fp16_full_eval else torch.bfloat16 if self.args.bf16_full_eval else None

    def search(self, dataset: Dataset) -> RetrievalResults:
        """Searches among all images and captions of a data set, in both directions."""
        args, model = self.args, self.model_to_evaluate()
        evaluator = RetrievalEvaluator(
            model,
            self.processing_class,
            batch_size=args.per_device_eval_batch_size,
            num_workers=args.dataloader_num_workers,
            dtype=self.full_eval_dtype or torch.float32,
            progress=not args.disable_tqdm,
        )
        image_rows, image_of_text = images_of(dataset)
        with self.accelerator.autocast():
            return evaluator.evaluate(
                DecodedImages(dataset.select(image_rows)),
                dataset["caption"],
                image_of_text,
                args.rerank_k if model.config.itm_weight > 0 else 0,  # or the matching head knows nothing
                args.rerank_by,
            )

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        results = self.search(self.eval_dataset if eval_dataset is None else eval_dataset)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in results.metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def images_of(dataset: Dataset) -> tuple[list[int], torch.LongTensor]:
    """The first row of each image, and for each row the position of its image among them."""
    rows = {}
    for row, image_id in enumerate(dataset["image_id"]):
        rows.setdefault(image_id, row)
    position = {image_id: index for index, image_id in enumerate(rows)}
    return list(rows.values()), torch.tensor([position[image_id] for image_id in dataset["image_id"]])


def write_rankings(folder: Path, dataset: Dataset, results: RetrievalResults, num_shown: int = 10):
    """
    Writes `found_images.jsonl`, an object per caption, and `found_texts.jsonl`, one per image: the best that it found,
    and the place of the first right one, from 1.
    """
    rows, _ = images_of(dataset)
    sources, image_ids = dataset["source"], [dataset["image_id"][row] for row in rows]

    def write(name: str, queries: list[dict], ranking: Ranking, candidates: list[str]):
        lines = (
            {**query, "found": [candidates[number] for number in best[:num_shown]], "first_right": first + 1}
            for query, best, first in zip(queries, ranking.candidates.tolist(), ranking.first_right.tolist())
        )
        write_whole(folder / name, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    captions = [{"source": source, "caption": caption} for source, caption in zip(sources, dataset["caption"])]
    write("found_images.jsonl", captions, results.found_images, image_ids)
    write("found_texts.jsonl", [{"image_id": image_id} for image_id in image_ids], results.found_texts, list(sources))


def describe(metrics: dict[str, float]) -> str:
    """The recalls as a table."""
    columns = [f"{direction}_r{k}" for direction in ("i2t", "t2i") for k in RECALL_AT] + ["r_mean"]
    lines = [" " * 14 + "".join(f"{column:>10}" for column in columns)]
    for title, prefix in (("by features", "features_"), ("matched again", "")):
        if f"{prefix}r_mean" in metrics:
            lines.append(f"{title:<14}" + "".join(f"{metrics[prefix + column]:10.2%}" for column in columns))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, float]:
    model_args, data_args, training_args = parse_arguments(
        argv, RetrievalModelArguments, DataArguments, RetrievalTrainingArguments, description=__doc__
    )
    data = load_data("captions", data_args, training_args)
    texts, side = data_args.vocabulary(data, "caption"), data_args.half_scene_size("captions")
    model, processor = load_model(TripsForRetrieval, model_args, texts, image_size=side)
    data = without_long_texts(data, "caption", processor, skip=data_args.skip_bad_rows)
    trainer = RetrievalTrainer(
        model=model,
        args=training_args,
        train_dataset=data.get("train"),
        eval_dataset=data.get("validation"),
        data_collator=RetrievalCollator(processor),
        train_collator=RetrievalCollator(processor, training=True, augment=data_args.augments),
        processing_class=processor,
    )

    def evaluate_search() -> dict[str, float]:
        results = trainer.search(trainer.eval_dataset)
        if trainer.is_world_process_zero():
            write_rankings(Path(training_args.output_dir), trainer.eval_dataset, results)
            print(describe(results.metrics))
        samples = {"samples": len(trainer.eval_dataset), "images": len(results.found_texts.candidates)}
        return {f"eval_{name}": value for name, value in {**results.metrics, **samples}.items()}

    return train_and_evaluate(trainer, evaluate_search)


if __name__ == "__main__":
    main()
    end_processes()
