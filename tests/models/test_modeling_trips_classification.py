"""The head for statements about several images, against its three parts called for one image at a time."""

import pytest
import torch
from tiny_models import IMAGES, TEXTS, kept_by, make_config

from modeling_trips.modeling_trips_classification import TripsForImagesAndTextClassification


STATEMENTS = TEXTS[:4]
MASK = (STATEMENTS != 0).long()
LABELS = torch.tensor([1, 0, 0, 1])
# Four statements about three images. The third is about one image twice.
PAIRS = torch.tensor([[1, 0], [0, 1], [2, 2], [1, 0]])
WIDTH = 48


def make_model(num_images=2, num_labels=2, **vision):
    torch.manual_seed(0)
    config = make_config(**vision)
    config.num_images, config.num_labels = num_images, num_labels
    return TripsForImagesAndTextClassification(config).eval()


def images(count=3):
    return IMAGES[:count, 0]


def inputs(image_index=PAIRS):
    """The images of each statement, as (4, num_images, 3, 32, 32)."""
    return {"input_ids": STATEMENTS, "attention_mask": MASK, "pixel_values": images(4)[image_index]}


def shared_inputs():
    """The same with each image given once."""
    return {"input_ids": STATEMENTS, "attention_mask": MASK, "pixel_values": images(), "image_index": PAIRS}


def composed(model, row, statement_images):
    """Return logits and kept indices of one statement from the three parts, called for one image at a time."""
    input_ids = STATEMENTS[row : row + 1, : int(MASK[row].sum())]
    class_states, kept = [], []
    for image in statement_images:
        text = model.model.text_model(input_ids).last_hidden_state
        vision = model.model.vision_model(image[None], text[:, 0])
        class_states.append(model.model.fusion_model(text, vision.last_hidden_state).last_hidden_state[:, 0])
        kept.append([rows[0] for rows in kept_by(vision)])
    return model.classifier(torch.cat(class_states, dim=1))[0], kept


@torch.no_grad()
@pytest.mark.parametrize("guidance", ["text", "image"])
@pytest.mark.parametrize("num_images", [1, 2, 3])
def test_it_is_its_parts_for_one_image_at_a_time(guidance, num_images):
    model = make_model(num_images=num_images, num_labels=3, selection_guidance=guidance)
    index = torch.tensor([[1, 0, 2], [0, 1, 2], [2, 2, 0], [1, 0, 1]])[:, :num_images]
    output = model(**inputs(index))
    assert output.logits.shape == (4, 3)
    for row in range(4):
        logits, kept = composed(model, row, images()[index[row]])
        torch.testing.assert_close(output.logits[row], logits, rtol=1e-4, atol=1e-5)
        for rows, rows_expected in zip(kept_by(output), zip(*kept), strict=True):
            assert rows[row * num_images : (row + 1) * num_images] == list(rows_expected)


def test_the_head_is_vilts():
    model = make_model(num_labels=3)
    states = torch.randn(5, 2 * WIDTH)
    head = model.classifier
    normed = torch.nn.functional.layer_norm(
        states @ head.dense.weight.T + head.dense.bias, (2 * WIDTH,), head.LayerNorm.weight, head.LayerNorm.bias
    )
    expected = torch.nn.functional.gelu(normed) @ head.out_proj.weight.T + head.out_proj.bias
    torch.testing.assert_close(head(states), expected)
    assert head.dense.weight.shape == (2 * WIDTH, 2 * WIDTH)
    assert head.dense.weight.std().item() == pytest.approx(model.config.initializer_range, rel=0.05)


@torch.no_grad()
def test_a_flat_batch_holds_the_images_of_each_statement_in_order():
    model = make_model()
    expected = model(**inputs()).logits
    pixel_values = inputs()["pixel_values"].flatten(0, 1)
    torch.testing.assert_close(model(STATEMENTS, pixel_values, MASK).logits, expected)
    image_cache = model.model.encode_images(pixel_values)
    torch.testing.assert_close(model(STATEMENTS, attention_mask=MASK, image_cache=image_cache).logits, expected)


@torch.no_grad()
def test_a_statement_is_encoded_once_and_so_is_an_image():
    model = make_model()
    rows = {}
    for name, layer in {
        "text": model.model.text_model.encoder.layer[0],
        "image_cache": model.model.vision_model.embeddings,
        "selected": model.model.vision_model.layers[-1],
        "fused": model.model.fusion_model.encoder.layer[0],
    }.items():
        layer.register_forward_pre_hook(lambda _, args, name=name: rows.setdefault(name, []).append(len(args[0])))
    model(**shared_inputs())
    assert rows == {"text": [4], "image_cache": [3], "selected": [8], "fused": [8]}


def test_loss_is_the_cross_entropy_per_statement():
    model = make_model()
    output = model(**inputs(), labels=LABELS)
    nll = -output.logits.double().log_softmax(-1)[range(4), LABELS]
    torch.testing.assert_close(output.loss.double(), nll.mean())
    ignored = model(**inputs(), labels=LABELS.masked_fill(torch.arange(4) == 1, -100)).loss
    torch.testing.assert_close(ignored.double(), nll[[0, 2, 3]].mean())
    per_batch = model(**inputs(), labels=LABELS, num_items_in_batch=torch.tensor(10)).loss
    torch.testing.assert_close(per_batch.double(), nll.sum() / 10)
    assert "loss" not in model(**inputs())
