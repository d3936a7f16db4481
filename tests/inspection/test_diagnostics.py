"""Diagnostics of the selection: examples by hand."""

import pytest
import torch

from modeling_trips import SelectionSchedule, TripsSelection
from modeling_trips.inspection.diagnostics import (
    advice,
    describe_sensitivities,
    image_sensitivity,
    kept_patches,
    patch_precision,
    region_recall,
    score_entropy,
    text_sensitivity,
)


def selection_of(*kept):
    return TripsSelection(torch.tensor(kept), scores=None, candidate_indices=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entropy_is_one_for_equal_scores_and_zero_for_a_single_winner(dtype):
    scores = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.0, 1.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]])
    candidates = torch.arange(4).expand(3, 4)
    selection = TripsSelection(candidates[:, :1], scores=scores.to(dtype), candidate_indices=candidates)
    torch.testing.assert_close(score_entropy(selection), torch.tensor([1.0, 0.0, 0.5]))  # float32


def test_fused_tokens_are_not_kept_patches():
    mask = kept_patches(selection_of([0, 3], [2, -1]), num_patches=4)
    assert mask.tolist() == [[True, False, False, True], [False, False, True, False]]


def test_sensitivity_compares_the_texts_of_an_image_only():
    # Image 0: {0, 1} and {1, 2} share 1 of 3; image 1: {3, 4} alone; image 2: {0, 1} twice.
    selection = selection_of([0, 1], [3, 4], [1, 2], [0, 1], [0, 1])
    sensitivity = text_sensitivity(selection, torch.tensor([0, 1, 0, 2, 2]), num_patches=5)
    assert sensitivity == pytest.approx(1 - (1 / 3 + 1) / 2)


def test_patch_precision_uses_centers_and_region_recall_uses_areas():
    patches = torch.tensor([[0.0, 0, 8, 8], [8, 0, 16, 8], [16, 0, 24, 8], [0, 8, 8, 16]])
    # Centers at x = 4, 12, 20 in the first row; the region begins right after the first and ends at the third.
    assert patch_precision(patches, torch.tensor([5.0, 0.0, 20.0, 8.0])) == 0.25
    # Of the region of 16 x 8 pixels, 12 x 8 are in kept patches.
    assert region_recall(patches, torch.tensor([12.0, 0.0, 28.0, 8.0])) == 0.75
    nothing = patches[:0]
    assert patch_precision(nothing, patches[0]) == 0.0
    assert region_recall(nothing, patches[0]) == 0.0


def test_sensitivity_to_the_image_compares_rows_of_different_images():
    selection = selection_of([0, 1], [2, 3], [0, 1])
    assert image_sensitivity(selection, torch.tensor([0, 0, 1]), num_patches=4) == 0.5
    assert image_sensitivity(selection, torch.tensor([0, 1, 0]), num_patches=4) == 1.0
    with pytest.raises(ValueError, match="image"):
        image_sensitivity(selection, torch.tensor([0, 0, 0]), num_patches=4)


@pytest.mark.parametrize("value, words", [(0.03, "the same"), (0.2, "nearly the same"), (0.66, "different")])
def test_sensitivities_are_said_in_words(value, words):
    (text,) = describe_sensitivities(value, None)
    assert text == f"Two texts about one image keep {words} patches ({value:.2f})."
    assert len(describe_sensitivities(value, value)) == 2
    assert describe_sensitivities(None, None) == []


def test_a_text_that_is_ignored_has_an_advice():
    by_text = SelectionSchedule.parse("6:image:0.5,9:text:0.25")
    (line,) = advice(by_text, 0.03)
    assert "0.03" in line
    assert "--schedule 6:image:0.5,9:image:0.25 " in line
    assert advice(by_text, 0.2) == []
    assert advice(SelectionSchedule.parse("9:image:0.25"), 0.0) == []
