"""
Metrics of pre-training besides retrieval: matching, masked words and continuations.

- Matching (`itm_accuracy`): accuracy on each text with its image, and with a hard negative image of its batch, drawn
  as in training. Chance is 0.5.
- Words (`mlm_accuracy`, `prefix_lm_accuracy`): share of masked words that are predicted correctly, and of next words
  of a caption given the words before. `..._majority` is the accuracy of always predicting the most frequent word.
"""

from collections import Counter

import torch
from datasets import Dataset
from tqdm.auto import tqdm

from modeling_trips import SelectionSchedule, TripsForPreTraining
from modeling_trips.modeling_trips_pretraining import hard_negative_indices, similarity


@torch.no_grad()
def word_and_matching_metrics(trainer, dataset: Dataset) -> dict[str, float]:
    """Compute the metrics above for the objectives with a weight, in all processes. Rows are ordered by image."""
    model = trainer.model_to_evaluate()
    accelerator, loader = trainer.accelerator, trainer.get_eval_dataloader(dataset)
    rows, is_quiet = [], trainer.args.disable_tqdm or not trainer.args.should_log
    for batch in tqdm(loader, desc="Words and matching", disable=is_quiet):
        batch.pop("sources")
        with accelerator.autocast():
            rows.append(accelerator.gather_for_metrics(results_by_text(model, batch, trainer.schedule)))
    columns = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    metrics = {}
    if "itm_right" in columns:
        metrics["itm_accuracy"] = columns["itm_right"].sum().item() / max(1, columns["itm_pairs"].sum().item())
    for name in ("mlm", "prefix_lm"):
        if f"{name}_right" in columns:
            labels = columns[f"{name}_labels"]
            counts = Counter(labels[labels != -100].tolist())
            total = max(1, counts.total())
            metrics[f"{name}_accuracy"] = columns[f"{name}_right"].sum().item() / total
            metrics[f"{name}_majority"] = max(counts.values(), default=0) / total
    return metrics


def results_by_text(
    model: TripsForPreTraining, batch: dict[str, torch.Tensor], schedule: SelectionSchedule | None = None
) -> dict[str, torch.Tensor]:
    """
    Return correct predictions and totals for each text of a batch, as tensors with a row per text, at a schedule or at
    the model's.
    """
    image_cache = model.model.encode_images(batch["pixel_values"], schedule=schedule)
    images, results = {"image_index": batch["image_index"], "image_cache": image_cache, "schedule": schedule}, {}
    if model.config.itm_weight > 0:
        results |= _matched(model, batch, image_cache, schedule)
    if model.config.mlm_weight > 0:
        token_type_ids = batch.get("token_type_ids")
        logits = model.masked_token_logits(batch["mlm_input_ids"], batch["attention_mask"], token_type_ids, **images)
        results |= _guessed("mlm", logits, batch["mlm_labels"], model)
    if model.config.prefix_lm_weight > 0:
        logits = model.continuation_logits(
            batch["prompt_input_ids"], batch["prompt_attention_mask"], labels=batch["labels"], **images
        )
        results |= _guessed("prefix_lm", logits, batch["labels"], model)
    return results


def _matched(model, batch: dict[str, torch.Tensor], image_cache, schedule) -> dict[str, torch.Tensor]:
    texts = model.get_text_features(batch["input_ids"], batch["attention_mask"], batch.get("token_type_ids"))
    images = model.get_image_features(image_cache=image_cache, schedule=schedule)
    logits = similarity(texts.pooler_output, images.pooler_output, model.temp())
    image_index, image_ids = batch["image_index"], batch["image_ids"]
    same_image = image_ids[image_index][:, None] == image_ids
    generator = torch.Generator(model.device).manual_seed(0)  # the pairs do not depend on the number of processes
    negatives, found = hard_negative_indices(logits, same_image, generator)
    text_index = torch.arange(len(image_index), device=image_index.device).repeat(2)
    says_match = model.match(
        attention_mask=batch["attention_mask"],
        image_index=torch.cat((image_index, negatives)),
        image_cache=image_cache,
        text_states=texts.last_hidden_state,
        text_index=text_index,
        schedule=schedule,
    ).itm_logits.argmax(dim=-1)
    of_true, of_negative = says_match.chunk(2)
    return {"itm_right": (of_true + (1 - of_negative)) * found, "itm_pairs": 2 * found}


def _guessed(name: str, logits: torch.Tensor, labels: torch.LongTensor, model) -> dict[str, torch.Tensor]:
    """Return correct predictions and labels, padded to one length for all batches and processes."""
    right = (logits.argmax(dim=-1) == labels).sum(dim=-1)
    length = 1 + model.config.text_config.max_position_embeddings
    labels = torch.nn.functional.pad(labels, (0, length - labels.shape[1]), value=-100)
    return {f"{name}_right": right, f"{name}_labels": labels}
