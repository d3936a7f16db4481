"""The head for statements about several images, against its three parts called for one image at a time."""

import pytest
import torch
from tiny_models import IMAGES, TEXTS, kept_by, make_config
from torch.testing import assert_close

from modeling_trips.modeling_trips_classification import TripsForImagesAndTextClassification


STATEMENTS = TEXTS[:4]
MASK = (STATEMENTS != 0).long()
LABELS = torch.tensor([1, 0, 0, 1])
# Four statements about three images. The third is about one image twice.
PAIRS = torch.tensor([[1, 0], [0, 1], [2, 2], [1, 0]])


def make_model(num_images=2, num_labels=2):
    torch.manual_seed(0)
    config = make_config()
    config.num_images = num_images
    config.num_labels = num_labels
    return TripsForImagesAndTextClassification(config).eval()


def inputs(image_index=PAIRS):
    """Return the images of each statement as (4, num_images, 3, 32, 32)."""
    return {"input_ids": STATEMENTS, "attention_mask": MASK, "pixel_values": IMAGES[image_index, 0]}


def composed(model, row, statement_images):
    """Return the logits of one statement, and the kept patches by image, from the three parts for one image each."""
    length = int(MASK[row].sum())
    text = model.model.text_model(STATEMENTS[row : row + 1, :length]).last_hidden_state
    class_states = []
    kept = []
    for image in statement_images:
        vision = model.model.vision_model(image[None], text[:, 0])
        fused = model.model.fusion_model(text, vision.last_hidden_state)
        class_states.append(fused.last_hidden_state[:, 0])
        kept.append(kept_by(vision))
    return model.classifier(torch.cat(class_states, dim=1))[0], kept


@torch.no_grad()
@pytest.mark.parametrize("num_images", [1, 3])
def test_it_is_its_parts_for_one_image_at_a_time(num_images):
    model = make_model(num_images=num_images, num_labels=3)
    image_index = torch.tensor([[1, 0, 2], [0, 1, 2], [2, 2, 0], [1, 0, 1]])[:, :num_images]
    output = model(**inputs(image_index))
    assert output.logits.shape == (4, 3)
    for row in range(4):
        logits, kept = composed(model, row, IMAGES[image_index[row], 0])
        assert_close(output.logits[row], logits, rtol=1e-4, atol=1e-5)
        for place, expected in enumerate(kept, start=row * num_images):
            assert [[rows[place]] for rows in kept_by(output)] == expected


@torch.no_grad()
def test_a_flat_batch_holds_the_images_of_each_statement_in_order():
    model = make_model()
    expected = model(**inputs()).logits
    pixel_values = inputs()["pixel_values"].flatten(0, 1)
    flat = model(STATEMENTS, pixel_values, MASK)
    assert_close(flat.logits, expected)
    cached = model(STATEMENTS, attention_mask=MASK, image_cache=model.model.encode_images(pixel_values))
    assert_close(cached.logits, expected)


def test_loss_is_the_cross_entropy_per_statement():
    model = make_model()
    output = model(**inputs(), labels=LABELS)
    nll = -output.logits.double().log_softmax(-1)[range(4), LABELS]
    assert_close(output.loss.double(), nll.mean())
    ignored = model(**inputs(), labels=torch.tensor([1, -100, 0, 1]))
    assert_close(ignored.loss.double(), nll[[0, 2, 3]].mean())
    per_batch = model(**inputs(), labels=LABELS, num_items_in_batch=torch.tensor(10))
    assert_close(per_batch.loss.double(), nll.sum() / 10)
    assert "loss" not in model(**inputs())


def test_bad_inputs_are_refused():
    model = make_model()
    pixel_values = torch.zeros(4, 3, 3, 32, 32)
    with pytest.raises(ValueError, match="pixel_values"):
        model(STATEMENTS, pixel_values, MASK)
    with pytest.raises(ValueError, match="image_index"):
        model(STATEMENTS, pixel_values[:, :2], MASK, image_index=PAIRS)
    for regions in (torch.rand(4, 4), torch.rand(8, 4), torch.rand(4, 2, 2)):
        with pytest.raises(ValueError, match="regions"):
            model(**inputs(), regions=regions)
    for index in (PAIRS[:, 0], PAIRS[:3], PAIRS.flatten()):
        with pytest.raises(ValueError, match="image_index"):
            model(STATEMENTS, IMAGES[:3, 0], MASK, image_index=index)
