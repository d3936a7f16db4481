"""
The head for statements about several images, against its three parts called for one image at a time; shared
computation; and independence of a statement's class from the rest of the batch.
"""

import pytest
import torch
from tiny_models import gradients_of, kept_by, make_config

from modeling_trips import UNPRUNED, use_schedule
from modeling_trips.modeling_trips_classification import TripsForImagesAndTextClassification


STATEMENTS = torch.tensor([[1, 5, 7, 9, 2], [1, 8, 2, 0, 0], [1, 4, 6, 2, 0], [1, 9, 9, 2, 0]])
MASK = (STATEMENTS != 0).long()
LABELS = torch.tensor([1, 0, 0, 1])
# Four statements about three images. The third is about one image twice.
PAIRS = torch.tensor([[1, 0], [0, 1], [2, 2], [1, 0]])
WIDTH = 48


def make_model(attn_implementation="sdpa", num_images=2, num_labels=2, **vision):
    torch.manual_seed(0)
    config = make_config(**vision)
    config.num_images, config.num_labels = num_images, num_labels
    return TripsForImagesAndTextClassification._from_config(config, attn_implementation=attn_implementation).eval()


def images(count=3):
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))[:count]


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


# ---------------------------------------------------------------------------------------------------------------------
# Against the parts


@torch.no_grad()
@pytest.mark.parametrize("guidance", ["text", "image", "random"])
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


@pytest.mark.parametrize("as_cache", [False, True], ids=["pixels", "image_cache"])
@pytest.mark.parametrize("selection", [{}, {"selection_guidance": "image"}, {"keep_rate": 1.0}], ids=str)
def test_shared_images_equal_repeated_ones(selection, as_cache):
    results = []
    for shared in (True, False):
        model = make_model(**selection).double()
        pixel_values = images().double().requires_grad_()
        batch = {"input_ids": STATEMENTS, "attention_mask": MASK, "labels": LABELS}
        if not shared:
            output = model(**batch, pixel_values=pixel_values[PAIRS])
        elif as_cache:
            output = model(**batch, image_cache=model.model.encode_images(pixel_values), image_index=PAIRS)
        else:
            output = model(**batch, pixel_values=pixel_values, image_index=PAIRS)
        output.loss.backward()
        results.append((output, pixel_values.grad, gradients_of(model)))
    (output, *gradients), (expected, *expected_gradients) = results
    torch.testing.assert_close(output.logits, expected.logits)
    assert kept_by(output) == kept_by(expected)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-6)


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


# ---------------------------------------------------------------------------------------------------------------------
# Inputs that determine the class


@torch.no_grad()
@pytest.mark.parametrize("shared", [False, True])
def test_padding_batch_and_order_of_the_statements_change_nothing(shared):
    model = make_model()
    expected = model(**inputs())
    order = torch.tensor([3, 1, 0, 2])
    batch = shared_inputs() if shared else inputs()
    batch = {name: value[order] if len(value) == 4 else value for name, value in batch.items()}
    batch |= {name: torch.nn.functional.pad(batch[name], (0, 4)) for name in ("input_ids", "attention_mask")}
    output = model(**batch)
    torch.testing.assert_close(output.logits, expected.logits[order], rtol=1e-4, atol=1e-5)
    rows = [2 * row + image for row in order.tolist() for image in range(2)]
    for layer, layer_expected in zip(kept_by(output), kept_by(expected)):
        assert layer == [layer_expected[row] for row in rows]
    alone = {name: value[1:2] for name, value in inputs().items()}
    torch.testing.assert_close(model(**alone).logits, expected.logits[1:2], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_statement_and_each_of_three_images_decide():
    model = make_model(num_images=3)
    index = torch.tensor([[0, 1, 2]] * 4)
    expected = model(**inputs(index)).logits
    for place in range(3):
        other = index.clone()
        other[:, place] = 3
        differences = (model(**inputs(other)).logits - expected).abs().amax(1)
        assert (differences > 1e-3).all(), place
    other = model(**{**inputs(index), "input_ids": STATEMENTS.where(STATEMENTS != 9, 3)}).logits
    assert ((other - expected).abs().amax(1) > 1e-3).tolist() == [True, False, False, True]


@torch.no_grad()
def test_only_the_head_knows_which_image_is_first():
    model = make_model()
    expected, swapped = model(**inputs()).logits, model(**inputs(PAIRS.flip(1))).logits
    # The third statement is about the same image twice.
    assert ((swapped - expected).abs().amax(1) > 1e-3).tolist() == [True, True, False, True]
    weight = model.classifier.dense.weight
    weight.copy_(torch.cat((weight[:, WIDTH:], weight[:, :WIDTH]), dim=1))
    torch.testing.assert_close(model(**inputs(PAIRS.flip(1))).logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_keep_rate_of_one_is_the_unpruned_model():
    unpruned, pruned = make_model(selection_layers=[]), make_model()
    expected = unpruned(**inputs()).logits
    assert (pruned(**inputs()).logits - expected).abs().max() > 1e-3
    with use_schedule(pruned, UNPRUNED):
        output = pruned(**inputs())
    assert output.selection == ()
    torch.testing.assert_close(output.logits, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Loss and training


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


def test_gradient_accumulation_equals_the_larger_batch():
    gradients = []
    for parts in ([slice(0, 4)], [slice(0, 1), slice(1, 4)]):
        model = make_model().double()
        for part in parts:
            batch = {name: value[part] for name, value in inputs().items()}
            batch["pixel_values"] = batch["pixel_values"].double()
            model(**batch, labels=LABELS[part], num_items_in_batch=4).loss.backward()
        gradients.append(gradients_of(model))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_every_parameter_is_trained():
    model = make_model()
    model(**shared_inputs(), labels=LABELS).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    for part in (model.model.text_model, model.model.vision_model, model.model.fusion_model, model.classifier):
        assert sum(parameter.grad.norm() for parameter in part.parameters()) > 1e-3


def test_order_of_the_images_can_be_learned():
    """The class says which image is brighter. Each pair comes in both orders, with a statement about either side."""
    model = make_model(selection_layers=[2], keep_rate=0.5)
    left_is_brighter, right_is_brighter = [1, 5, 2], [1, 6, 2]
    brightness = torch.tensor([-1.0, 0.0, 1.0])
    pairs = [(a, b) for a in range(3) for b in range(3) if a != b]
    batch = {
        "input_ids": torch.tensor([left_is_brighter] * 6 + [right_is_brighter] * 6),
        "pixel_values": brightness.view(3, 1, 1, 1).expand(-1, 3, 32, 32) + 0.1 * images(),
        "image_index": torch.tensor(pairs * 2),
    }
    labels = torch.tensor([a > b for a, b in pairs] + [a < b for a, b in pairs]).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(60):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1
    assert torch.equal(model(**batch).logits.argmax(-1), labels)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints, kernels, dtypes


@torch.no_grad()
def test_captured_outputs_have_one_row_per_statement_and_image():
    output = make_model("eager")(**inputs(), output_attentions=True, output_hidden_states=True)
    assert [tuple(states.shape) for states in output.hidden_states] == [(8, 5, WIDTH)] * 2
    assert [tuple(weights.shape) for weights in output.attentions] == [(8, 3, 5, 5)]
    assert [tuple(weights.shape) for weights in output.cross_attentions] == [(8, 3, 5, 1 + 24 + 1)]
    # No token attends to padding.
    hidden = MASK.repeat_interleave(2, dim=0)[:, None, None].expand(-1, 3, 5, -1) == 0
    assert (output.attentions[0][hidden] == 0).all()


@torch.no_grad()
def test_bfloat16_is_close_and_its_loss_is_in_full_precision():
    model = make_model()
    expected = model(**inputs(), labels=LABELS)
    batch = {**inputs(), "pixel_values": inputs()["pixel_values"].bfloat16()}
    output = model.bfloat16()(**batch, labels=LABELS)
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, expected.loss, rtol=0.1, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Bad inputs


def test_bad_inputs_are_refused():
    model = make_model()
    five = torch.zeros(4, 3, 3, 32, 32)
    with pytest.raises(ValueError, match="pixel_values"):
        model(STATEMENTS, five, MASK)
    with pytest.raises(ValueError, match="image_index"):
        model(STATEMENTS, five[:, :2], MASK, image_index=PAIRS)
    for index in (PAIRS[:, 0], PAIRS[:3], PAIRS.flatten()):
        with pytest.raises(ValueError, match="image_index"):
            model(STATEMENTS, images(), MASK, image_index=index)
    with pytest.raises(ValueError, match="image_index"):
        model(STATEMENTS, images(), MASK)
    with pytest.raises(ValueError, match="image_index"):
        model(STATEMENTS, attention_mask=MASK, image_cache=model.model.encode_images(images()))
