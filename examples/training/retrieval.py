"""Training and searching of retrieval, which pre-training goes on from."""

from collections import defaultdict
from dataclasses import dataclass, field

import PIL.Image
import torch
from datasets import Dataset
from transformers.integrations import is_deepspeed_zero3_enabled

from modeling_trips import TripsPreTrainedModel, convert_to_rgb
from trips_examples.data.collators import read_image
from trips_examples.metrics.retrieval import RetrievalEvaluator, RetrievalResults
from trips_examples.training.options import ModelArguments, TripsTrainingArguments
from trips_examples.training.trainer import ImageGroupedTrainer


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

    logged_losses: tuple[str, ...] = ("itc_loss", "itm_loss")

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
