"""Selection and attention supervision of the heads: parts of the loss, learning, and reduction over batches."""

import pytest
import torch
from tiny_models import ANSWERS, BOXES, IMAGES, TEXTS, enable_checkpointing, gradients_of, make_config

from modeling_trips import (
    TripsForImagesAndTextClassification,
    TripsForQuestionAnswering,
    TripsForVisualGrounding,
    patch_selection,
)
from modeling_trips.patch_selection import region_targets, selection_loss


def make_model(model_class, **fields):
    torch.manual_seed(0)
    config = make_config(selection_layers=[1, 3], **fields)
    return model_class._from_config(config, attn_implementation="sdpa").train()


def batch(rows=slice(0, 4)):
    inputs = {"input_ids": TEXTS, "attention_mask": (TEXTS != 0).long(), "pixel_values": IMAGES[:, 0]}
    return {name: value[rows] for name, value in {**inputs, "labels": ANSWERS, "regions": BOXES}.items()}


def test_it_is_a_part_of_the_loss_in_training_alone():
    model = make_model(TripsForQuestionAnswering)
    with_regions = model(**batch())
    without = model(**{**batch(), "regions": None})
    assert without.selection_loss is None and with_regions.selection_loss > 0
    difference = (with_regions.loss - without.loss) / model.config.selection_loss_weight
    torch.testing.assert_close(difference, with_regions.selection_loss)
    assert model.eval()(**batch()).selection_loss is None
    model.train().config.selection_loss_weight = 0
    assert model(**batch()).selection_loss is None


def test_random_layers_have_no_loss():
    assert make_model(TripsForQuestionAnswering, selection_guidance="random")(**batch()).selection_loss is None
    outputs = make_model(TripsForQuestionAnswering, selection_guidance=["random", "text"])(**batch())
    scores, candidates = outputs.selection[1].scores, outputs.selection[1].candidate_indices
    expected = selection_loss(scores, candidates, region_targets(BOXES[:4], (8, 8)))
    num_tokens = (ANSWERS[:4] != -100).sum(dim=1)
    torch.testing.assert_close(outputs.selection_loss, (expected * num_tokens).sum() / num_tokens.sum())


def test_the_image_is_supervised_by_all_regions_of_its_texts():
    """The targets of two texts are the left and right half: the layer scored by the image should keep both."""
    halves = torch.tensor([[0.25, 0.5, 0.5, 1.0], [0.75, 0.5, 0.5, 1.0]])
    model = make_model(TripsForQuestionAnswering, selection_guidance=["image", "text"])
    shared = {"pixel_values": IMAGES[:1, 0], "image_index": torch.tensor([0, 0]), "regions": halves}
    outputs = model.model(TEXTS[:2], attention_mask=(TEXTS[:2] != 0).long(), **shared)
    by_image, by_text = outputs.selection
    everywhere = torch.full((2, 64), 1 / 64)
    expected = selection_loss(by_image.scores, by_image.candidate_indices, everywhere)
    expected += selection_loss(by_text.scores, by_text.candidate_indices, region_targets(halves, (8, 8)))
    torch.testing.assert_close(outputs.selection_losses, expected / 2)


def test_a_cached_image_is_supervised_too():
    fields = {"selection_guidance": ["image", "text"], "patch_embedding_type": "linear"}
    model = make_model(TripsForQuestionAnswering, **fields)
    texts = {"input_ids": TEXTS[:4], "attention_mask": (TEXTS[:4] != 0).long(), "regions": BOXES[:4]}
    index = torch.tensor([0, 0, 1, 2])
    direct = model.model(pixel_values=IMAGES[:3, 0], image_index=index, **texts)
    image_cache = model.model.encode_images(IMAGES[:3, 0])
    cached = model.model(image_cache=image_cache, image_index=index, **texts)
    torch.testing.assert_close(direct.selection_losses, cached.selection_losses)


@pytest.mark.parametrize("fields", [{}, {"selection_guidance": "image"}, {"fusion_type": "single_stream"}], ids=str)
def test_selection_learns_to_keep_the_regions(fields):
    """Attention moves into the region. The gradient through the fused token alone does little."""
    model, inside = make_model(TripsForQuestionAnswering, **fields), region_targets(BOXES[:4], (8, 8)) > 0
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    attention = []
    for _ in range(60):
        outputs = model(**batch())
        attention.append((outputs.selection[0].scores * inside).sum(dim=1).mean().item())
        optimizer.zero_grad()
        outputs.selection_loss.backward()
        optimizer.step()
    assert attention[0] < 0.4 and attention[-1] > 0.9


def test_parts_of_a_batch_add_up_to_its_loss():
    model = make_model(TripsForQuestionAnswering, patch_embedding_type="linear")
    num_items = (ANSWERS[:4] != -100).sum()
    whole = model(**batch()).loss
    parts = [model(**batch(rows), num_items_in_batch=num_items).loss for rows in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(sum(parts), whole)


def test_the_box_to_be_found_is_the_region():
    model = make_model(TripsForVisualGrounding)
    inputs = {**batch(), "labels": BOXES[:4]}
    del inputs["regions"]
    outputs = model(**inputs)
    targets = region_targets(BOXES[:4], (8, 8))
    by_layer = [selection_loss(layer.scores, layer.candidate_indices, targets) for layer in outputs.selection]
    torch.testing.assert_close(outputs.selection_loss, torch.stack(by_layer).mean())
    losses = 5 * outputs.l1_loss + 2 * outputs.giou_loss + 0.5 * outputs.selection_loss
    torch.testing.assert_close(outputs.loss, losses)
    parts = [
        model(**{name: value[rows] for name, value in inputs.items()}, num_items_in_batch=4 * 4).selection_loss
        for rows in (slice(0, 1), slice(1, 4))
    ]
    assert sum(parts) > 0 and model.eval()(**inputs).selection_loss is None


def test_a_text_without_region_is_not_taught():
    model = make_model(TripsForQuestionAnswering)
    some = BOXES[:4].clone()
    some[1:3, 2:] = 0  # texts 1 and 2 have no region
    of_all, of_some = (
        model.model(TEXTS[:4], IMAGES[:4, 0], (TEXTS[:4] != 0).long(), regions=regions).selection_losses
        for regions in (BOXES[:4], some)
    )
    torch.testing.assert_close(of_some[[0, 3]], of_all[[0, 3]])
    assert of_some[1:3].tolist() == [0, 0] and (of_all > 0).all()


def test_a_statement_is_taught_in_each_of_its_images():
    model = make_model(TripsForImagesAndTextClassification)
    regions, labels = BOXES.view(3, 2, 4), torch.tensor([0, 1, -100])
    inputs = {"input_ids": TEXTS[:3], "attention_mask": (TEXTS[:3] != 0).long(), "pixel_values": IMAGES[:3]}
    outputs = model(**inputs, labels=labels, regions=regions)
    targets = region_targets(regions.flatten(0, 1), (8, 8))
    losses = [selection_loss(layer.scores, layer.candidate_indices, targets) for layer in outputs.selection]
    by_text = torch.stack(losses).mean(dim=0).view(3, 2).mean(dim=1)
    torch.testing.assert_close(outputs.selection_loss, by_text[:2].mean())  # the third has no label
    plain = model(**inputs, labels=labels)
    torch.testing.assert_close(outputs.loss, plain.loss + 0.5 * outputs.selection_loss)
    assert plain.selection_loss is None


def make_box_model(coefficient=2.0, **fields):
    torch.manual_seed(0)
    config = make_config(**fields)
    config.attention_loss_weight = coefficient
    return TripsForVisualGrounding._from_config(config, attn_implementation="sdpa").train()


def boxes(rows=slice(0, 4)):
    inputs = {"input_ids": TEXTS, "attention_mask": (TEXTS != 0).long(), "pixel_values": IMAGES[:, 0], "labels": BOXES}
    return {name: value[rows] for name, value in inputs.items()}


@pytest.mark.parametrize("keep_rate", [0.5, 1.0])
def test_attention_loss_of_boxes_is_a_part_of_the_loss_in_training_alone(keep_rate):
    supervised, unsupervised = (
        make_box_model(coefficient, keep_rate=keep_rate)(**boxes()) for coefficient in (2.0, 0.0)
    )
    assert unsupervised.attention_loss is None and supervised.attention_loss > 0
    torch.testing.assert_close(supervised.loss - unsupervised.loss, 2 * supervised.attention_loss)
    assert make_box_model(keep_rate=keep_rate).eval()(**boxes()).attention_loss is None
    assert make_config().attention_loss_weight == 0


def make_reader(coefficient=2.0, attn_implementation="sdpa", **fields):
    """Return a question answering model in training mode."""
    torch.manual_seed(0)
    config = make_config(**fields)
    config.attention_loss_weight = coefficient
    return TripsForQuestionAnswering._from_config(config, attn_implementation=attn_implementation).train()


@pytest.mark.parametrize("fusion_type", ["cross_attention", "skip_connected"])
@pytest.mark.parametrize("mode", [{}, {"keep_rate": 1.0}], ids=str)
def test_where_cls_looks_is_what_eager_attention_tells(mode, fusion_type):
    model = make_reader(fusion_type=fusion_type, **mode).eval()
    eager = make_reader(attn_implementation="eager", fusion_type=fusion_type, **mode).eval()
    inputs = {**boxes(), "image_index": torch.tensor([0, 0, 2, 3])}
    del inputs["labels"]
    looks = model.model(**inputs, output_cls_attention=True).cls_attention
    expected = eager.model(**inputs, output_attentions=True)
    torch.testing.assert_close(looks, expected.cross_attentions[-1][:, :, 0], atol=1e-6, rtol=1e-5)
    assert model.model(**inputs).cls_attention is None


@pytest.mark.parametrize("fields", [{"keep_rate": 0.5}, {"keep_rate": 1.0}], ids=str)
def test_questions_have_it_in_training_where_regions_are_known(fields):
    supervised, unsupervised = (make_reader(coefficient, **fields)(**batch()) for coefficient in (2.0, 0.0))
    assert unsupervised.attention_loss is None and supervised.attention_loss > 0
    torch.testing.assert_close(supervised.loss - unsupervised.loss, 2 * supervised.attention_loss)
    nowhere = torch.zeros(4, 4)
    assert make_reader(**fields)(**{**batch(), "regions": nowhere}).attention_loss == 0
    assert make_reader(**fields)(**{**batch(), "regions": None}).attention_loss is None
    assert make_reader(**fields).eval()(**batch()).attention_loss is None


def test_questions_apart_and_together_have_the_same_loss():
    """Each question has the weight of its label tokens."""
    model, num_tokens = make_reader(patch_embedding_type="linear"), int((ANSWERS[:4] != -100).sum())
    rows = (slice(row, row + 1) for row in range(4))
    parts = [model(**batch(row), num_items_in_batch=num_tokens).attention_loss for row in rows]
    torch.testing.assert_close(sum(parts), model(**batch()).attention_loss)


def test_answers_to_one_question_share_where_it_looks():
    model = make_reader(patch_embedding_type="linear")
    inputs = {**batch(slice(0, 2)), "labels": ANSWERS[:3], "text_index": torch.tensor([0, 0, 1])}
    apart = {name: value[[0, 0, 1]] for name, value in batch(slice(0, 2)).items()}
    torch.testing.assert_close(
        model(**inputs).attention_loss, model(**{**apart, "labels": ANSWERS[:3]}).attention_loss
    )


def test_a_question_learns_to_look_into_its_region():
    model = make_reader()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(60):
        output = model(**batch())
        losses.append(output.attention_loss.item())
        optimizer.zero_grad()
        output.attention_loss.backward()
        optimizer.step()
    assert losses[0] > 1 and losses[-1] < 0.2, (losses[0], losses[-1])


@pytest.mark.parametrize("fusion_type", ["cross_attention", "skip_connected"])
def test_attention_loss_with_gradient_checkpointing_is_the_same(fusion_type):
    gradients = []
    for checkpointing in (False, True):
        model = make_reader(fusion_type=fusion_type)
        if checkpointing:
            enable_checkpointing(model)
        model(**batch()).attention_loss.backward()
        layer = model.model.fusion_model.encoder.layer[0]
        gradients.append(layer.crossattention.self.query.weight.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("fusion_type", ["cross_attention", "skip_connected"])
def test_dropped_patches_that_run_for_the_gate_get_no_attention(fusion_type, monkeypatch):
    monkeypatch.setattr(patch_selection, "draw_kept", patch_selection.keep_topk)
    outputs = []
    for gate in (0.0, 0.5):
        model = make_reader(fusion_type=fusion_type, selection_gate=gate)
        outputs.append(model(**batch()))
        outputs[-1].loss.backward()
        assert all(value.isfinite().all() for value in gradients_of(model).values())
    assert outputs[0].attention_loss > 0
    assert torch.equal(outputs[0].attention_loss, outputs[1].attention_loss)
    assert torch.equal(outputs[0].loss, outputs[1].loss)


@pytest.mark.slow
def test_training_with_it_is_one_graph():
    model = make_reader(patch_embedding_type="linear")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**batch()).attention_loss, model(**batch()).attention_loss)
