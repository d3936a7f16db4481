"""
Calibration of the confidence in answers (Guo et al. 2017, arXiv 1706.04599): a temperature that is fitted to the
validation split, and the expected calibration error.
"""

import logging

import numpy as np
import torch
from datasets import Dataset
from torch.nn.functional import binary_cross_entropy

from modeling_trips import TripsProcessor
from modeling_trips.modeling_trips import token_nll
from modeling_trips.pipeline_trips import without_rest
from trips_examples.data.images import texts_of_column
from trips_examples.training.trainer import ImageGroupedTrainer


logger = logging.getLogger(__name__)

TEMPERATURES = torch.logspace(-1, 1, 61).round(decimals=3)  # 0.1 to 10
NUM_BINS = 10
NUM_ROWS = 1000  # rows that are measured
MOST_TOKENS = 5000  # a data set with more kinds of tokens in its questions has all usual words


def calibration_error(confidences: torch.Tensor, scores: torch.Tensor) -> float:
    """
    Return the expected calibration error: the distance between mean confidence and mean score of the rows in each of
    ten equal intervals of confidence, averaged over all rows. Both arguments have shape `(num_rows,)`, in [0, 1].
    """
    bins = (confidences * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    total = 0.0
    for each in bins.unique():
        inside = bins == each
        total += (confidences[inside] - scores[inside]).sum().abs().item()
    return total / len(scores)


def best_temperature(confidences: torch.Tensor, scores: torch.Tensor) -> int:
    """
    Return the column of the temperature under which the scores `(num_rows,)` are most likely, of confidences
    `(num_rows, num_temperatures)` to be right. As of Platt 1999, a few rows that are all right do not make it certain.
    """
    num_right = scores.sum()
    most = (num_right + 1) / (num_right + 2)
    least = 1 / (len(scores) - num_right + 2)
    targets = least + scores * (most - least)
    losses = binary_cross_entropy(
        confidences.clamp(1e-6, 1 - 1e-6),
        targets[:, None].expand_as(confidences),
        reduction="none",
    )  # (num_rows, num_temperatures)
    return int(losses.mean(dim=0).argmin())


@torch.no_grad()
def confidences_of(trainer: ImageGroupedTrainer, sequences: np.ndarray, temperatures: torch.Tensor) -> torch.Tensor:
    """Return the probability of generated answers at each temperature, `(num_rows, num_temperatures)`."""
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    batch_size = trainer.args.per_device_eval_batch_size
    confidences = []
    for start in range(0, len(sequences), batch_size):
        labels = torch.as_tensor(sequences[start : start + batch_size, 1:], device=model.device)
        labels = without_rest(labels, model.generation_config.eos_token_id)
        collated = trainer.data_collator([trainer.eval_dataset[start + row] for row in range(len(labels))])
        names = ("input_ids", "attention_mask", "pixel_values", "image_index")
        inputs = {name: collated[name].to(model.device) for name in names}
        logits = model(
            attention_mask=inputs["attention_mask"],
            encoder_outputs=model.get_encoder()(**inputs),
            decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels),
        ).logits
        scores = [-token_nll(logits / temperature, labels).sum(dim=-1) for temperature in temperatures.tolist()]
        confidences.append(torch.stack(scores, dim=-1).exp().cpu())
    return torch.cat(confidences)


def question_tokens(rows: Dataset, processor: TripsProcessor) -> str | None:
    """Return the ids of the tokens of questions, or None if they are very many."""
    texts = processor.clean_texts(list(dict.fromkeys(texts_of_column(rows, "question"))))
    token_ids = {token for row in processor.tokenizer(texts)["input_ids"] for token in row}
    return " ".join(map(str, sorted(token_ids))) if len(token_ids) <= MOST_TOKENS else None


def calibrate(trainer: ImageGroupedTrainer, sequences: np.ndarray, scores: list[float]) -> dict[str, float]:
    """
    Measure how far confidence is from accuracy, on the first rows of the evaluated split. At the end of a training, on
    the validation split, fit the temperature and store it in the model's configuration, with the tokens of the
    training questions.

    Args:
        sequences (`np.ndarray` of shape `(num_rows, answer_length)`): The answers, as `generate` returns them.
        scores (`list[float]`): Their accuracies in [0, 1].

    Returns:
        `dict[str, float]`: `confidence_temperature`, and the expected `calibration_error` with it and without it.
    """
    config = trainer.accelerator.unwrap_model(trainer.model).config
    truths = torch.tensor(scores[:NUM_ROWS])
    is_fitted = trainer.split == "validation" and trainer.args.do_train
    candidates = TEMPERATURES if is_fitted else torch.tensor([config.confidence_temperature])
    temperatures = torch.cat((candidates, torch.ones(1)))
    confidences = confidences_of(trainer, sequences[:NUM_ROWS], temperatures)
    chosen = 0
    if is_fitted:
        chosen = best_temperature(confidences[:, :-1], truths)
        config.confidence_temperature = round(TEMPERATURES[chosen].item(), 3)
        config.question_tokens = question_tokens(trainer.train_dataset, trainer.processing_class)
        if trainer.is_world_process_zero():  # the model was saved before it was evaluated
            config.save_pretrained(trainer.args.output_dir)
    return {
        "confidence_temperature": config.confidence_temperature,
        "calibration_error": calibration_error(confidences[:, chosen], truths),
        "calibration_error_uncalibrated": calibration_error(confidences[:, -1], truths),
    }
