"""Checkpoints of strangers are refused before they take memory or time."""

import json

import pytest
from random_checkpoint import save_random_checkpoint

from modeling_trips import TripsForQuestionAnswering
from modeling_trips.inspection.checkpoints import load_checkpoint, load_processor


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_random_checkpoint(tmp_path_factory.mktemp("model"), TripsForQuestionAnswering, ["what is it?"])


def changed(saved, folder, name: str, parent: str | None, field: str, value):
    """Link a checkpoint into a folder with another value of a field."""
    for path in saved.iterdir():
        (folder / path.name).symlink_to(path)
    content = json.loads((saved / name).read_text())
    (content[parent] if parent else content)[field] = value
    (folder / name).unlink()
    (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "name, parent, field, value",
    [
        ("config.json", "vision_config", "num_hidden_layers", 3000),
        ("config.json", "decoder_config", "num_hidden_layers", 10**5),
        ("config.json", "vision_config", "intermediate_size", 2**40),
        ("config.json", None, "num_labels", 10**7),
        ("config.json", None, "num_images", 10**6),
        ("config.json", "vision_config", "schedule", ",".join(map(str, range(1, 10**6)))),
        ("generation_config.json", None, "num_beams", 10**5),
    ],
)
def test_larger_than_the_weights_is_refused(saved, tmp_path, name, parent, field, value):
    with pytest.raises(ValueError, match="weights" if field == "intermediate_size" else field):
        load_checkpoint(changed(saved, tmp_path, name, parent, field, value))


@pytest.mark.parametrize(
    "field, value",
    [
        ("size", {"height": 40_000, "width": 40_000}),
        ("size", {"shortest_edge": 10**6}),
        ("crop_size", {"height": 10**5, "width": 10**5}),
    ],
)
def test_images_larger_than_the_model_s_are_refused(saved, tmp_path, field, value):
    config = load_checkpoint(saved).config
    load_processor(saved, config)
    with pytest.raises(ValueError, match=field):
        load_processor(changed(saved, tmp_path, "processor_config.json", "image_processor", field, value), config)
