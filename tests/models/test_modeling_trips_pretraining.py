"""Pre-training: sum of the objectives, shared cached image states, weights of 0, and a step against loops."""

import pytest
import torch
from naive_reference import NaiveVisionTower
from tiny_models import gradients_of
from tiny_pretraining import SCHEDULES, WEIGHTS, make_batch, make_model
from tiny_retrieval import images, make_config
from torch.nn.functional import cross_entropy, log_softmax, normalize
from torch.testing import assert_close
from two_processes import results_of

from modeling_trips import TripsForPreTraining
from modeling_trips.modeling_trips_pretraining import matching_pairs


@pytest.mark.parametrize(
    "off, unused",
    [
        (None, set()),
        ("itc_weight", {"vision_proj", "temp"}),
        ("itm_weight", {"itm_head"}),
        ("mlm_weight", {"mlm_score"}),
        ("prefix_lm_weight", {"decoder", "lm_head"}),
    ],
)
def test_a_weight_of_zero_skips_an_objective_and_images_are_encoded_once(off, unused):
    model = make_model() if off is None else make_model(**{off: 0.0})
    heads = ("decoder", "mlm_score", "itm_head", "vision_proj")
    parts = {name: getattr(model, name) for name in heads}
    parts["embeddings"] = model.model.vision_model.embeddings
    called = []
    for name, part in parts.items():
        part.register_forward_hook(lambda *_, name=name: called.append(name))
    model(**make_batch()).loss.backward()
    assert called.count("embeddings") == 1
    assert set(called) == parts.keys() - unused
    without_gradient = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without_gradient - {"text_proj"} == unused


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_every_parameter_has_a_gradient(schedule):
    model = make_model(text_width=48, **schedule)  # text and vision differ in width
    model(**make_batch()).loss.backward()
    missing = [name for name, value in model.named_parameters() if value.grad is None]
    assert missing == []


@torch.no_grad()
def test_captions_that_are_too_short_to_be_cut_add_nothing():
    model, batch = make_model(), make_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    assert model(**batch).prefix_lm_loss == 0


def part_of(batch, rank):
    """Return two captions of image 0 with three masked words, or the three others with two masked words."""
    texts = (slice(2), slice(2, None))[rank]
    images = (slice(1), slice(1, None))[rank]
    part = {name: value[images if name in ("pixel_values", "image_ids") else texts] for name, value in batch.items()}
    part["image_index"] = part["image_index"] - rank
    return part


def losses_and_gradients(rank=None):
    """Return those of a whole batch or of its half, with an image that both halves hold and with unnamed images."""
    results = {}
    for image_ids in (torch.tensor([4, 9, 4]), None):
        batch = make_batch()
        del batch["image_ids"]
        if image_ids is not None:
            batch["image_ids"] = image_ids
        if rank is not None:
            batch = part_of(batch, rank)
        model = make_model(itm_weight=0.0)  # whose negatives are drawn among those of a process
        outputs = model(**batch)
        outputs.loss.backward()
        for name in ("itc_loss", "mlm_loss", "prefix_lm_loss"):
            results[f"{name}, {image_ids}"] = outputs[name].detach()
        for name, gradient in gradients_of(model).items():
            results[f"{name}, {image_ids}"] = gradient
    return results


@pytest.mark.slow
def test_two_processes_with_unequal_numbers_of_words_give_the_losses_and_gradients_of_one(tmp_path):
    first, second = results_of(losses_and_gradients, tmp_path)
    expected = losses_and_gradients()
    assert first.keys() == second.keys() == expected.keys()
    for name, value in expected.items():
        mean = (first[name] + second[name]) / 2  # as data parallel training takes it
        assert_close(mean, value, rtol=1e-3, atol=1e-5, msg=name)


SCHEDULES_OF_LOOPS = {
    "text": {"schedule": "2:text:0.5,3:text:0.5"},
    "image_then_text": {"schedule": "2:image:0.7,3:text:0.3"},
}


def naive_losses(model, batch):
    """
    Compute the losses of each text and pair alone, without padding, with the naive tower. All images are distinct.
    """
    trips = model.model
    tower = NaiveVisionTower(dict(trips.vision_model.named_parameters()), model.config.vision_config)
    images = batch["pixel_values"]
    index = batch["image_index"].tolist()

    def rows_of(ids, mask):
        return [row[: int(length)] for row, length in zip(batch[ids], batch[mask].sum(1))]

    def fused(text, image):
        states = trips.text_model(text[None]).last_hidden_state
        ((image_states, _),) = tower(images[image : image + 1], states[:, 0])
        return trips.fusion_model(states, image_states[None]).last_hidden_state

    texts = rows_of("input_ids", "attention_mask")
    text_states = torch.cat([trips.text_model(text[None]).last_hidden_state[:, 0] for text in texts])
    image_states = torch.stack([states[0] for states, _ in tower(images)])
    text_features = normalize(model.text_proj(text_states), dim=-1)
    image_features = normalize(model.vision_proj(image_states), dim=-1)
    logits = text_features @ image_features.T / model.temp()
    per_text = torch.stack([-log_softmax(row, dim=0)[image] for row, image in zip(logits, index)])
    per_image = []
    for image, column in enumerate(logits.T):
        captions = [text for text in range(len(texts)) if index[text] == image]
        per_image.append(-log_softmax(column, dim=0)[captions].mean())
    itc_loss = (per_text.mean() + torch.stack(per_image).mean()) / 2

    torch.manual_seed(0)
    pairs = matching_pairs(logits[:, index], batch["image_ids"][index])
    matched = []
    for text, pair in zip(pairs.text_index.tolist(), pairs.image_index.tolist()):
        matched.append(model.itm_head(fused(texts[text], index[pair])[0, 0]))
    itm_loss = cross_entropy(torch.stack(matched), pairs.labels)

    words = []
    for text, image, labels in zip(rows_of("mlm_input_ids", "attention_mask"), index, batch["mlm_labels"]):
        guesses = model.mlm_score(fused(text, image))[0]
        words += [cross_entropy(guesses[i], labels[i]) for i in range(len(text)) if labels[i] != -100]

    continued = []
    for text, image, labels in zip(rows_of("prompt_input_ids", "prompt_attention_mask"), index, batch["labels"]):
        labels = labels[labels != -100]
        inputs = torch.cat((torch.tensor([model.config.decoder_start_token_id]), labels[:-1]))
        states = model.decoder(inputs[None], encoder_hidden_states=fused(text, image), use_cache=False)
        guesses = model.lm_head(states.last_hidden_state)[0]
        continued += [cross_entropy(guess, label) for guess, label in zip(guesses, labels)]
    return {
        "itc_loss": itc_loss,
        "itm_loss": itm_loss,
        "mlm_loss": torch.stack(words).mean(),
        "prefix_lm_loss": torch.stack(continued).mean(),
    }


def total_of(losses):
    return sum(WEIGHTS[name.replace("loss", "weight")] * loss for name, loss in losses.items())


def gradients(model, losses):
    names, parameters = zip(*model.named_parameters())
    return dict(zip(names, torch.autograd.grad(total_of(losses), parameters, allow_unused=True)))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES_OF_LOOPS.values(), ids=SCHEDULES_OF_LOOPS)
def test_losses_and_gradients_equal_those_of_loops(schedule):
    torch.manual_seed(0)
    config = make_config(**schedule, **WEIGHTS)
    config.vision_config.image_size = 12
    model = TripsForPreTraining(config).eval().double()
    batch = make_batch()
    batch["pixel_values"] = images(3, size=12).double()
    torch.manual_seed(0)
    outputs = model(**batch)
    expected = naive_losses(model, batch)
    losses = {name: outputs[name].double() for name in expected}  # that of words is computed in full precision
    assert_close(outputs.loss.double(), total_of(losses), rtol=1e-5, atol=1e-6)
    assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    actual_gradients = gradients(model, losses)
    assert all(gradient is not None for gradient in actual_gradients.values())
    assert_close(actual_gradients, gradients(model, expected), rtol=1e-4, atol=1e-5)
