"""`benchmarks/choices.py`: other choices of patches."""

import math
from itertools import permutations

import PIL.Image
import pytest
import torch
from choices import Given, Gumbel, Perturbed, Reinforce, by_color, by_region, main
from places import EXAMPLES

from trips_examples.data.busy_scenes import COLORS


SCORES = torch.tensor([[0.5, 0.3, 0.2]])


def test_a_drawn_patch_is_weighted_by_one_with_the_gradient_of_its_share():
    scores = SCORES.clone().requires_grad_()
    estimator = Gumbel(1.0)
    choice = estimator.choose(scores, 1 / 3)
    states = estimator.shorten(torch.ones(1, 4, 2), scores, choice, fuse=False)
    assert torch.equal(states, torch.ones(1, 2, 2))
    states[:, 1].sum().backward()  # two values of the kept patch, whose share falls with the other scores
    assert (scores.grad[0] > 0).nonzero().tolist() == choice.kept.tolist()


def test_the_log_probability_of_a_draw_is_that_of_drawing_without_repetition():
    for order in permutations(range(3), 2):
        estimator = Reinforce(1.0)
        estimator.noisy = torch.zeros(1, 3)
        estimator.noisy[0, order] = torch.tensor([2.0, 1.0])
        estimator.kept = torch.tensor([sorted(order)])
        first, second = SCORES[0, order].tolist()
        expected = math.log(first * second / (1 - first))
        assert estimator.log_probability(SCORES).item() == pytest.approx(expected, abs=1e-5)


def test_patches_of_a_perturbed_choice_have_the_gradient_of_their_mean():
    torch.manual_seed(0)
    scores = torch.full((400, 2), 0.5, requires_grad=True)
    tokens = torch.tensor([[[0.0], [1.0], [0.0]]]).expand(400, -1, -1)
    estimator = Perturbed(1.0)
    choice = estimator.choose(scores, 0.5)
    states = estimator.shorten(tokens, scores, choice, fuse=False)
    assert states[:, 1].mean().item() == pytest.approx(0.5, abs=0.02)
    states[:, 1].sum().backward()
    # The first patch wins where log(a / b) exceeds a normal variable of variance 2; a is 0.5.
    slope = 1 / math.sqrt(4 * math.pi) / 0.5
    assert scores.grad.mean(dim=0).tolist() == pytest.approx([slope, -slope], rel=0.1)


@pytest.mark.parametrize("scores_of", [by_color, by_region])
def test_given_scores_find_the_patch_of_a_question(scores_of):
    image = PIL.Image.new("RGB", (16, 16), (235, 235, 235))
    image.paste(COLORS["red"], (8, 0, 16, 8))
    row = {"question": "what shape is red?", "region": [8, 0, 16, 8]}
    assert scores_of(image, row, (2, 2)).argmax() == 1
    assert not scores_of(image, {"question": "what?", "region": None}, (2, 2)).any()


def test_given_scores_choose():
    selector = Given(by_color)
    selector.scores = torch.tensor([[0.1, 0.7, 0.1, 0.1]])
    assert selector.choose(torch.ones(1, 4), 0.25).kept.tolist() == [[1]]


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["reinforce", "color"])
def test_a_training_and_its_evaluation_choose_in_this_way(choice, tmp_path):
    options = [
        f"--choice={choice}",
        f"--model={EXAMPLES / 'trips-tiny-scenes-unpruned'}",
        "--schedule=2:text:0.02",
        "--train_scenes=24",
        "--validation_scenes=8",
        "--test_scenes=8",
        "--max_steps=1",
        "--per_device_train_batch_size=8",
        f"--output_dir={tmp_path}",
    ]
    metrics = main(options)
    assert math.isfinite(metrics["train_loss"])
    assert 0 <= metrics["eval_accuracy"] <= 1
