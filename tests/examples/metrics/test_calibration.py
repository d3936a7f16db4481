"""The confidence in answers: the expected calibration error, and the temperature that makes it small."""

import pytest
import torch

from trips_examples.metrics.calibration import TEMPERATURES, best_temperature, calibration_error


@pytest.mark.parametrize(
    "confidences, scores, expected",
    [
        ([0.75, 0.75, 0.75, 0.75], [1, 1, 1, 0], 0.0),
        ([1.0, 1.0], [1, 0], 0.5),
        # two bins: |0.15 - 0.5| for two rows, |0.95 - 1| for two others
        ([0.1, 0.2, 0.95, 0.95], [0.0, 1.0, 1.0, 1.0], (0.1 + 0.8 + 2 * 0.05) / 4),
        ([0.11, 0.19, 0.95, 0.95], [0.0, 1.0, 1.0, 1.0], (2 * 0.35 + 2 * 0.05) / 4),
    ],
)
def test_the_calibration_error_is_that_by_hand(confidences, scores, expected):
    error = calibration_error(torch.tensor(confidences), torch.tensor(scores).float())
    assert error == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_of_too_large_or_too_small_logits_is_found(temperature):
    """Answers are drawn from the probabilities of logits, which a model then gives `temperature` times as large."""
    logits = 2 * torch.randn(4000, 5, generator=torch.Generator().manual_seed(0))
    drawn = torch.distributions.Categorical(logits=logits).sample()
    answer = logits.argmax(dim=-1)
    scores = (answer == drawn).float()
    scaled = temperature * logits[:, None] / TEMPERATURES[:, None]  # (num_rows, num_temperatures, 5)
    confidences = scaled.softmax(dim=-1).max(dim=-1).values
    chosen = best_temperature(confidences, scores)
    assert TEMPERATURES[chosen].item() == pytest.approx(temperature, rel=0.15)
    error = calibration_error(confidences[:, chosen], scores)
    assert error < 0.03
    few = best_temperature(confidences[:3, :31], torch.ones(3))
    assert confidences[:3, few].mean() < 0.97  # all three are right
    if temperature != 1.0:
        assert error < calibration_error(confidences[:, 30], scores) / 2
