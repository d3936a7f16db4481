"""The single stream against its definition, and errors of unsupported options."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from naive_reference import NaiveVisionTower
from random_models import make_random
from tiny_models import TEXTS, kept_by, make_config
from tiny_retrieval import images

from modeling_trips import (
    TripsConfig,
    TripsForPreTraining,
    TripsForRetrieval,
    TripsModel,
)


@pytest.mark.parametrize("schedule", ["1:text:0.5,3:text:0.5", "1:image:0.5,3:image:0.5", "1:image:0.5,3:text:0.5"])
@torch.no_grad()
def test_selection_follows_the_formula_for_each_pair_alone(schedule):
    fields = {"schedule": schedule, "image_size": 16, "patch_embedding_type": "linear"}
    model = make_random(TripsModel(make_config(fusion_type="single_stream", **fields))).double()
    tower = NaiveVisionTower(model.vision_model.state_dict(), model.config.vision_config)
    mask = (TEXTS != 0).long()
    output = model(TEXTS, images(6).double(), mask)
    for row, length in enumerate(mask.sum(dim=1).tolist()):
        text = model.text_model(TEXTS[row : row + 1, :length]).last_hidden_state[0]
        states, selections = tower.run_image(images(6)[row].double(), None, joined=list(text))
        torch.testing.assert_close(output.last_hidden_state[row, :length], states[:length])
        assert [entry[row] for entry in kept_by(output)] == [kept for kept, *_ in selections]


@pytest.mark.parametrize(
    "fields", [{"text_config": {"hidden_size": 384}}, {"vision_config": {"use_pre_layernorm": True}}]
)
def test_parts_that_cannot_be_joined_are_refused(fields):
    with pytest.raises(StrictDataclassError):
        TripsConfig(**fields, fusion_type="single_stream")


def test_two_towers_do_not_become_one_stream_by_chance(tmp_path):
    TripsModel(TripsConfig.from_preset("tiny")).save_pretrained(tmp_path)
    with pytest.raises(StrictDataclassError, match="num_hidden_layers"):
        TripsModel.from_pretrained(tmp_path, fusion_type="single_stream")
    no_layers = {"fusion_type": "single_stream", "text_config": {"num_hidden_layers": 0}}
    model, report = TripsModel.from_pretrained(tmp_path, **no_layers, output_loading_info=True)
    assert report["missing_keys"] == {"vision_model.modality_embeddings.weight"}


@pytest.mark.parametrize("model_class", [TripsForRetrieval, TripsForPreTraining])
def test_features_of_an_image_alone_are_refused(model_class):
    with pytest.raises(ValueError, match=model_class.__name__):
        model_class(make_config(fusion_type="single_stream"))
