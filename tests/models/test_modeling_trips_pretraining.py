"""Pre-training: sum of the objectives, shared cached image states, weights of 0, and a step against loops."""

from itertools import combinations

import pytest
import torch
from naive_reference import NaiveVisionTower
from schedules import guidances_of, rates_of
from tiny_pretraining import SCHEDULES, WEIGHTS, make_batch, make_model
from tiny_retrieval import make_config
from torch.nn.functional import cross_entropy, log_softmax, normalize
from two_processes import results_of

from modeling_trips import TripsForPreTraining
from modeling_trips.modeling_trips_pretraining import matching_pairs


@pytest.mark.parametrize(
    ("off", "unused"),
    [
        (None, set()),
        ("itc_weight", {"vision_proj", "temp"}),
        ("itm_weight", {"itm_head"}),
        ("mlm_weight", {"mlm_score"}),
        ("prefix_lm_weight", {"decoder", "lm_head"}),
    ],
)
def test_a_weight_of_zero_skips_an_objective_and_images_are_encoded_once(off, unused):
    model, batch = make_model(**({off: 0.0} if off else {})), make_batch()
    parts = {"embeddings": model.model.vision_model.embeddings, "decoder": model.decoder}
    parts |= {"mlm_score": model.mlm_score, "itm_head": model.itm_head, "vision_proj": model.vision_proj}
    called = []
    for name, part in parts.items():
        part.register_forward_hook(lambda *_, name=name: called.append(name))
    model(**batch).loss.backward()
    assert called.count("embeddings") == 1 and {*called} == parts.keys() - unused
    without_gradient = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without_gradient - {"text_proj"} == unused


@pytest.mark.parametrize("on", [subset for size in (1, 2, 3, 4) for subset in combinations(sorted(WEIGHTS), size)])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_with_the_unused_parameters_frozen_every_parameter_has_a_gradient(on, schedule):
    weights = {name: 0.0 for name in WEIGHTS if name not in on}
    model = make_model(text_width=48, **weights, **schedule)
    projection = model.model.vision_model.selection_projection  # text and vision differ in width
    text_selects = set(on) != {"itc_weight"}
    assert text_selects == all(projection.weight is not parameter for parameter in model.unused_parameters())
    for parameter in model.unused_parameters():
        parameter.requires_grad_(False)
    model(**make_batch()).loss.backward()
    missing = [name for name, value in model.named_parameters() if value.requires_grad and value.grad is None]
    assert missing == []


@torch.no_grad()
def test_captions_that_are_too_short_to_be_cut_add_nothing():
    model, batch = make_model(), make_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    assert model(**batch).prefix_lm_loss == 0


def part_of(batch: dict[str, torch.Tensor], first_half: bool) -> dict[str, torch.Tensor]:
    """Return two captions of image 0 with three masked words, or the three others with two masked words."""
    texts, images = (slice(2), slice(1)) if first_half else (slice(2, None), slice(1, None))
    part = {name: value[images if name in ("pixel_values", "image_ids") else texts] for name, value in batch.items()}
    return {**part, "image_index": part["image_index"] - (0 if first_half else 1)}


def losses_and_gradients(rank: int | None = None) -> dict[str, torch.Tensor]:
    """Return those of a whole batch or of its half, with an image that both halves hold and with unnamed images."""
    results = {}
    for image_ids in (torch.tensor([4, 9, 4]), None):
        batch = {name: value for name, value in make_batch().items() if name != "image_ids"}
        batch |= {} if image_ids is None else {"image_ids": image_ids}
        model = make_model(itm_weight=0.0)  # whose negatives are drawn among those of a process
        outputs = model(**(batch if rank is None else part_of(batch, rank == 0)))
        outputs.loss.backward()
        values = {name: outputs[name].detach() for name in ("itc_loss", "mlm_loss", "prefix_lm_loss")}
        values |= {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        results |= {f"{name}, {image_ids}": value for name, value in values.items()}
    return results


@pytest.mark.slow
def test_two_processes_with_unequal_numbers_of_words_give_the_losses_and_gradients_of_one(tmp_path):
    first, second = results_of(losses_and_gradients, tmp_path)
    expected = losses_and_gradients()
    assert first.keys() == second.keys() == expected.keys()
    for name, value in expected.items():
        mean = (first[name] + second[name]) / 2  # as data parallel training takes it
        torch.testing.assert_close(mean, value, rtol=1e-3, atol=1e-5, msg=name)


SCHEDULES_OF_LOOPS = {
    "text": {"selection_guidance": "text", "keep_rate": 0.5},
    "image_then_text": {"selection_guidance": ["image", "text"], "keep_rate": [0.7, 0.3]},
}


def naive_losses(model: TripsForPreTraining, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Compute the losses of each text and pair alone, without padding, with the naive tower. All images are distinct.
    """
    trips, vision = model.model, model.config.vision_config
    tower = NaiveVisionTower(
        dict(trips.vision_model.named_parameters()),
        rates_of(vision),
        vision.num_hidden_layers,
        vision.num_attention_heads,
        vision.patch_shape,
        vision.grid_size,
        guidance=guidances_of(vision),
    )
    images, index = batch["pixel_values"], batch["image_index"].tolist()

    def rows_of(ids: str, mask: str) -> list[torch.Tensor]:
        return [row[: int(length)] for row, length in zip(batch[ids], batch[mask].sum(1))]

    def fused(text: torch.Tensor, image: int) -> torch.Tensor:
        states = trips.text_model(text[None]).last_hidden_state
        ((image_states, _),) = tower(images[image : image + 1], states[:, 0])
        return trips.fusion_model(states, image_states[None]).last_hidden_state

    texts = rows_of("input_ids", "attention_mask")
    text_states = torch.cat([trips.text_model(text[None]).last_hidden_state[:, 0] for text in texts])
    image_states = torch.stack([states[0] for states, _ in tower(images)])
    text_features, image_features = (
        normalize(projection(states), dim=-1)
        for projection, states in ((model.text_proj, text_states), (model.vision_proj, image_states))
    )
    logits = text_features @ image_features.T / model.temp()
    per_text = torch.stack([-log_softmax(row, dim=0)[image] for row, image in zip(logits, index)])
    per_image = []
    for image, column in enumerate(logits.T):
        captions = [text for text in range(len(texts)) if index[text] == image]
        per_image.append(-log_softmax(column, dim=0)[captions].mean())
    itc_loss = (per_text.mean() + torch.stack(per_image).mean()) / 2

    torch.manual_seed(0)
    pairs = matching_pairs(logits[:, index], batch["image_ids"][index])
    matched = [
        model.itm_head(fused(texts[text], index[pair])[0, 0])
        for text, pair in zip(pairs.text_index.tolist(), pairs.image_index.tolist())
    ]
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
    means = torch.stack(words).mean(), torch.stack(continued).mean()
    return dict(zip(("itc_loss", "itm_loss", "mlm_loss", "prefix_lm_loss"), (itc_loss, itm_loss, *means)))


def gradients(model: TripsForPreTraining, losses: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | None]:
    total = sum(weight * loss for weight, loss in zip(WEIGHTS.values(), losses.values()))
    names, parameters = zip(*model.named_parameters())
    return dict(zip(names, torch.autograd.grad(total, parameters, allow_unused=True)))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES_OF_LOOPS.values(), ids=SCHEDULES_OF_LOOPS)
def test_losses_and_gradients_equal_those_of_loops(schedule):
    torch.manual_seed(0)
    config = make_config(**schedule, **WEIGHTS)
    config.vision_config.image_size = 12
    model = TripsForPreTraining(config).eval().double()
    images = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    batch = {**make_batch(), "pixel_values": images}
    torch.manual_seed(0)
    outputs = model(**batch)
    expected = naive_losses(model, batch)
    losses = {name: outputs[name].double() for name in expected}  # that of words is computed in full precision
    weighted = sum(weight * loss for weight, loss in zip(WEIGHTS.values(), losses.values()))
    torch.testing.assert_close(outputs.loss.double(), weighted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    actual_gradients, expected_gradients = gradients(model, losses), gradients(model, expected)
    assert all(gradient is not None for gradient in actual_gradients.values())
    torch.testing.assert_close(actual_gradients, expected_gradients, rtol=1e-4, atol=1e-5)
