"""Models with random weights, and tolerances for converted models."""

import torch


LAYERS = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "initializer_range": 0.3}
IMAGES = {"image_size": 16, "patch_size": 4, "num_hidden_layers": 3}


def make_random(model):
    """Return the model in evaluation mode, with random weights that are neither zero nor one."""
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def assert_close(actual, expected):
    assert expected.std() > 0.05, "the reference is flat: the comparison would prove nothing"
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
