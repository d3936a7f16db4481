"""A step of pre-training against loops over pairs: four losses and the gradient of every weight."""

import pytest
import torch
from naive_reference import NaiveVisionTower
from schedules import guidances_of, rates_of
from test_modeling_trips_pretraining import WEIGHTS, make_batch
from tiny_retrieval import make_config
from torch.nn.functional import cross_entropy, log_softmax, normalize

from modeling_trips import TripsForPreTraining
from modeling_trips.modeling_trips_pretraining import matching_pairs


SCHEDULES = {
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
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
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
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    actual_gradients, expected_gradients = gradients(model, losses), gradients(model, expected)
    assert all(gradient is not None for gradient in actual_gradients.values())
    torch.testing.assert_close(actual_gradients, expected_gradients, rtol=1e-4, atol=1e-5)
