"""The trainer of retrieval and its batches."""

import pytest
import torch
from datasets import Dataset
from toy_pairs import make_rows

from modeling_trips import TripsConfig, TripsForRetrieval
from trips_examples.data.collators import RetrievalCollator, number_of
from trips_examples.training.options import RetrievalArguments
from trips_examples.training.retrieval import RetrievalTrainer
from trips_examples.training.runs import TripsTrainingArguments


def test_image_ids_are_deterministic():
    numbers = [number_of(f"image {number}") for number in range(1000)]
    assert len(set(numbers)) == 1000
    assert 0 <= min(numbers)
    assert max(numbers) < 2**63
    assert numbers[7] == 6143380914683439687


@pytest.mark.parametrize("steps", [1, 2])
def test_accumulated_batches_are_averaged(processor, tmp_path, steps):
    """Each batch has its own contrastive loss, and the losses have equal weights."""
    config = TripsConfig.from_preset("tiny", text_config={"vocab_size": len(processor.tokenizer)}, itm_weight=0.0)
    config.vision_config.patch_embedding_type = "linear"  # deterministic without BatchNorm and dropout
    model = TripsForRetrieval(config)
    collator = RetrievalCollator(processor)
    batches = []
    gradients = []

    def collate(rows):
        batch = collator(rows)
        sources = batch.pop("sources")
        batches.append(batch)
        return {**batch, "sources": sources}

    def note_gradient(weight):
        gradients.append(weight.grad.clone())

    trainer = RetrievalTrainer(
        model=model,
        args=TripsTrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=3,
            gradient_accumulation_steps=steps,
            max_steps=1,
            max_grad_norm=0.0,
            learning_rate=0.0,
            do_eval=False,
            texts_per_image=1,
            save_strategy="no",
            disable_tqdm=True,
        ),
        task_args=RetrievalArguments(),
        data={"train": Dataset.from_list(make_rows(6))},
        train_collator=collate,
        processing_class=processor,
    )
    weight = model.text_proj.weight
    weight.register_post_accumulate_grad_hook(note_gradient)
    trainer.train()
    losses = [model(**batch).loss for batch in batches]
    model.zero_grad()
    (sum(losses[:steps]) / steps).backward()
    torch.testing.assert_close(gradients[steps - 1], weight.grad, rtol=1e-4, atol=1e-6)
