"""The loss that teaches the head of boxes where to look: by hand, as a part of the loss, and the head learns it."""

import math

import pytest
import torch
from tiny_models import BOXES, IMAGES, TEXTS, make_config

from modeling_trips import TripsForVisualGrounding
from modeling_trips.losses_trips import region_targets
from modeling_trips.modeling_trips_grounding import pointing_losses


def make_model(coefficient=2.0, **fields):
    torch.manual_seed(0)
    config = make_config(**fields)
    config.pointing_loss_coefficient = coefficient
    return TripsForVisualGrounding._from_config(config, attn_implementation="sdpa").train()


def batch(rows=slice(0, 4)):
    inputs = {"input_ids": TEXTS, "attention_mask": (TEXTS != 0).long(), "pixel_values": IMAGES[:, 0], "labels": BOXES}
    return {name: value[rows] for name, value in inputs.items()}


def test_the_loss_by_hand():
    """A grid of 2 x 2, of which patch 3, a fused token and patch 0 are left."""
    right, top_right = [0.75, 0.5, 0.5, 1.0], [0.75, 0.25, 0.5, 0.5]
    looks, indices = torch.tensor([[0.2, 0.3, 0.5]]), torch.tensor([[3, -1, 0]])
    losses = pointing_losses(looks.expand(2, 3), indices, torch.tensor([right, top_right]), (2, 2))
    # Of the right half patch 3 is there. Of the top right nothing is: the fused token, which has it, is no place.
    assert losses.tolist() == pytest.approx([-math.log(0.2), 0.0])
    # Unpruned, one row of indices is all texts': 0.4 and 0.1 of the right half are pulled to 2 to 1.
    looks = torch.tensor([[0.3, 0.4, 0.2, 0.1]])
    loss = pointing_losses(looks, torch.arange(4)[None], torch.tensor([right]), (2, 2))
    assert loss.item() == pytest.approx(2 / 3 * math.log(2 / 3 / 0.4) + 1 / 3 * math.log(1 / 3 / 0.1))


@pytest.mark.parametrize("keep_rate", [0.5, 1.0])
def test_it_is_a_part_of_the_loss_in_training_alone(keep_rate):
    taught, untaught = (make_model(coefficient, keep_rate=keep_rate)(**batch()) for coefficient in (2.0, 0.0))
    assert untaught.pointing_loss is None and taught.pointing_loss > 0
    torch.testing.assert_close(taught.loss - untaught.loss, 2 * taught.pointing_loss)
    assert make_model(keep_rate=keep_rate).eval()(**batch()).pointing_loss is None
    assert make_config().pointing_loss_coefficient == 0


def test_parts_of_a_batch_add_up_to_its_loss():
    model = make_model()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    parts = [model(**batch(rows), num_items_in_batch=4 * 4).pointing_loss for rows in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(sum(parts), model(**batch()).pointing_loss)


@pytest.mark.parametrize("keep_rate", [0.5, 1.0])
def test_the_head_learns_to_look_into_the_box(keep_rate):
    model = make_model(keep_rate=keep_rate)
    model.config.bbox_loss_coefficient = model.config.giou_loss_coefficient = 0
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    seen = []
    model.box_head.register_forward_hook(lambda module, args, output: seen.append(output[1]))
    inside = (region_targets(BOXES[:4], (8, 8)) > 0).float()
    shares = []
    for _ in range(60):
        output = model(**batch())
        kept = output.selection[-1].kept_indices if output.selection else torch.arange(64).expand(4, 64)
        looks = torch.zeros(4, 64).scatter_add(1, kept.clamp(min=0), seen[-1][:, : kept.shape[1]] * (kept >= 0))
        shares.append((looks * inside).sum(dim=1).mean().item())
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert shares[0] < 0.5 and shares[-1] > 0.85, (shares[0], shares[-1])
