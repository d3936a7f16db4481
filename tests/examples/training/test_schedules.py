"""The schedule of a run: the choice of the default one, and what it costs."""

import pytest

from modeling_trips import TripsConfig
from trips_examples.training.recipe import FEW, MANY_TEXTS
from trips_examples.training.schedules import settle_schedule


@pytest.mark.parametrize("guidance, texts, warns", [("text", 1, False), ("text", 4, True), ("image", 4, False)])
def test_a_schedule_that_costs_more_than_no_pruning_has_a_warning(guidance, texts, warns, caplog):
    """Text scores in an early layer make the layers behind it compute an image once for each of its texts."""
    config = TripsConfig.from_preset("tiny", schedule=f"2:{guidance}:0.5,3:{guidance}:0.5")
    settle_schedule(config, 2 * texts, texts, text_length=6, is_default=False)
    assert any(record.levelname == "WARNING" for record in caplog.records) == warns


@pytest.mark.parametrize("texts, chosen", [(1, FEW), (30, MANY_TEXTS)])
def test_the_cheaper_default_for_the_texts_of_an_image_is_taken(texts, chosen):
    config = TripsConfig.from_preset("base", schedule=FEW)
    settle_schedule(config, texts, texts, text_length=9, is_default=True)
    assert str(config.vision_config.schedule) == chosen
