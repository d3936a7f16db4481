"""Training of retrieval."""

import torch
from datasets import Dataset
from transformers.integrations import is_deepspeed_zero3_enabled

from modeling_trips import TripsPreTrainedModel
from trips_examples.data.images import DecodedImages, column_of, first_rows
from trips_examples.metrics.retrieval import Ranking, RetrievalEvaluator
from trips_examples.training.files import write_predictions
from trips_examples.training.options import RetrievalArguments
from trips_examples.training.trainer import ImageGroupedTrainer


class RetrievalTrainer(ImageGroupedTrainer):
    """Trainer that evaluates retrieval, also during training. `task_args` has the options of reranking."""

    logged_losses: tuple[str, ...] = ("itc_loss", "itm_loss", "selection_loss")

    def __init__(self, *args, task_args: RetrievalArguments, **kwargs):
        super().__init__(*args, **kwargs)
        self.task_args = task_args
        if self.args.do_eval and (self.is_fsdp_enabled or is_deepspeed_zero3_enabled()):
            raise ValueError(
                "Evaluation is not supported under FSDP or ZeRO-3. Train with --do_eval False, and evaluate the saved "
                "model without them: --model OUTPUT --do_train False."
            )

    def model_to_evaluate(self) -> TripsPreTrainedModel:
        """Return the unwrapped model on the device, in half precision with --bf16_full_eval or --fp16_full_eval."""
        model = self.accelerator.unwrap_model(self.model).eval()
        if self.is_in_train:
            return model
        model = model.to(self.args.device)  # `Trainer` may not have moved it
        if self.args.fp16_full_eval or self.args.bf16_full_eval:
            model = model.to(torch.float16 if self.args.fp16_full_eval else torch.bfloat16)
        return model

    def search(self, dataset: Dataset) -> tuple[dict[str, float], dict[str, Ranking]]:
        """Search among all images and captions of a data set, in both directions."""
        args = self.args
        model = self.model_to_evaluate()
        evaluator = RetrievalEvaluator(
            model,
            self.processing_class,
            batch_size=args.per_device_eval_batch_size,
            num_workers=args.dataloader_num_workers,
            progress=not args.disable_tqdm,
            schedule=self.schedule,
        )
        image_rows, image_of_text = first_rows(column_of(dataset, "image_id"))
        with self.accelerator.autocast():
            return evaluator.evaluate(
                DecodedImages(dataset.select(image_rows)),
                column_of(dataset, "caption"),
                torch.tensor(image_of_text),
                self.task_args.rerank_k if model.config.itm_weight > 0 else 0,  # without loss, the head is untrained
            )

    def metrics_of(self, dataset: Dataset) -> dict[str, float]:
        """
        Return the metrics. Unless the training goes on, write the ten best images of each caption, and the rank of the
        first correct one, to `predictions.jsonl`.
        """
        metrics, rankings = self.search(dataset)
        if not self.is_in_train:
            image_ids = list(dict.fromkeys(column_of(dataset, "image_id")))
            ranking = rankings["t2i"]
            predictions = []
            for best, rank in zip(ranking.candidates[:, :10].tolist(), ranking.first_right.tolist()):
                found = [image_ids[number] for number in best]
                predictions.append({"found": found, "first_right": rank + 1})
            write_predictions(self.args.output_dir, dataset, ["source", "caption"], predictions)
        return {**metrics, "samples": len(dataset), "images": len(rankings["i2t"].candidates)}

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        metrics = self.metrics_of(self.eval_dataset if eval_dataset is None else eval_dataset)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
