"""Batches: sampling by image, shared images, weighted answers and regions."""

from itertools import groupby

import pytest
import torch
from toy_pairs import encoded

from modeling_trips import TripsConfig
from trips_examples.data.collators import ImageGroupedSampler, VqaCollator
from trips_examples.data.vocabulary import train_tokenizer
from trips_examples.training.models import make_processor


QUESTIONS = ["what color is it?", "is it red?", "what shape is it?"]
ANSWERS = ["red", "yes", "no", "circle"]


@pytest.fixture(scope="module")
def processor():
    return make_processor(train_tokenizer([*QUESTIONS, *ANSWERS]), TripsConfig.from_preset("tiny"))


def row(image_id, question, answers, color="red"):
    return {
        "image": {"bytes": encoded(color), "path": None},
        "image_id": image_id,
        "question": QUESTIONS[question],
        "answers": answers,
        "source": f"toy row {image_id}-{question}",
    }


def test_sampler_draws_each_row_once_and_keeps_groups_of_an_image_together():
    image_ids = [f"image {i % 7}" for i in range(40)]
    order = list(ImageGroupedSampler(image_ids, group_size=3))
    assert sorted(order) == list(range(40))
    # Images 0 to 4 have 6 rows, 5 and 6 have 5: two groups each, so that the image changes at most 13 times.
    changes = sum(image_ids[a] != image_ids[b] for a, b in zip(order, order[1:]))
    assert changes <= 13


@pytest.mark.parametrize("num_rows, sizes", [(5, [5]), (6, [3, 3]), (11, [3, 4, 4])])
def test_the_groups_of_an_image_are_balanced(num_rows, sizes):
    others = [f"other {number}" for number in range(200)]  # which separate the groups
    order = list(ImageGroupedSampler(["image"] * num_rows + others, group_size=5))
    groups = groupby(order, key=lambda row: row < num_rows)
    assert sorted(len(list(rows)) for is_of_image, rows in groups if is_of_image) == sizes


def test_collator_computes_an_image_once_for_all_of_its_questions(processor):
    rows = [
        row("a", 0, ["red"], "red"),
        row("b", 1, ["no"], "blue"),
        row("a", 2, ["circle"], "red"),
    ]
    batch = VqaCollator(processor)(rows)
    assert batch["image_index"].tolist() == [0, 1, 0]
    assert batch["pixel_values"].shape == (2, 3, 64, 64)
    red, blue = batch["pixel_values"].mean(dim=(2, 3))
    assert red[0] > red[2]
    assert blue[2] > blue[0]
    assert batch["input_ids"].shape[0] == 3


def test_training_labels_are_the_distinct_answers_with_their_shares(processor):
    rows = [row("a", 0, ["red", "red", "yes", "red"]), row("b", 1, ["no"])]
    batch = VqaCollator(processor, training=True)(rows)
    assert torch.equal(batch["labels"], processor.encode_answers(["red", "yes", "no"]))
    assert batch["text_index"].tolist() == [0, 0, 1]
    assert batch["loss_weights"].tolist() == [0.75, 0.25, 1.0]


def test_evaluation_label_is_the_most_common_answer(processor):
    batch = VqaCollator(processor)([row("a", 0, ["yes", "red", "red"])])
    assert torch.equal(batch["labels"], processor.encode_answers(["red"]))
    assert "text_index" not in batch
    assert "loss_weights" not in batch


def test_errors_name_the_row(processor):
    good = row("b", 1, ["no"])
    torn = row("a", 0, ["red"])
    torn["image"]["bytes"] = torn["image"]["bytes"][:60]
    with pytest.raises(ValueError, match="^toy row a-0: unreadable image"):
        VqaCollator(processor)([good, torn])
    long = row("a", 0, ["red"])
    long["question"] = "red " * 100
    with pytest.raises(ValueError, match=r"text\[1\].*toy row b-1, toy row a-0"):
        VqaCollator(processor)([good, long])


def test_training_is_told_where_a_question_is_about(processor):
    rows = [
        {**row("a", 0, ["red"]), "region": [0, 0, 32, 16]},
        {**row("a", 1, ["yes"]), "region": None},
        {**row("b", 2, ["circle"]), "region": [16, 16, 48, 48]},
    ]
    collator = VqaCollator(processor, training=True)
    regions = collator(rows)["regions"]
    assert regions.tolist() == [[0.25, 0.125, 0.5, 0.25], [0, 0, 0, 0], [0.5, 0.5, 0.5, 0.5]]
    assert "regions" not in collator([row("a", 0, ["red"])])
    assert "regions" not in VqaCollator(processor)(rows)
