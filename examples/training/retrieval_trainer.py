"""The trainer of retrieval, which that of pre-training is made from."""

import torch
from datasets import Dataset
from transformers.integrations import is_deepspeed_zero3_enabled

from modeling_trips import TripsPreTrainedModel
from trips_examples.data.rows import DecodedImages, column_of, images_of
from trips_examples.metrics.retrieval import RetrievalEvaluator, RetrievalResults
from trips_examples.training.trainer import ImageGroupedTrainer


class RetrievalTrainer(ImageGroupedTrainer):
    """A trainer that evaluates by searching, also during training, and logs each loss."""

    logged_losses: tuple[str, ...] = ("itc_loss", "itm_loss", "selection_loss")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.do_eval and (self.is_fsdp_enabled or is_deepspeed_zero3_enabled()):
            raise ValueError(
                "The evaluation needs the whole model in each process. Train with --do_eval False, and evaluate what "
                "was saved without FSDP or ZeRO-3: --model_name_or_path OUTPUT --do_train False."
            )

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
                column_of(dataset, "caption"),
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
