"""Tiny versions of all models, with inputs. Shared tests run over `CASES`."""

from typing import NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_trips import (
    TripsConfig,
    TripsForImagesAndTextClassification,
    TripsForPreTraining,
    TripsForQuestionAnswering,
    TripsForRetrieval,
    TripsForVisualGrounding,
    TripsModel,
    TripsPreTrainedModel,
)


TEXTS = torch.tensor(
    [[1, 5, 7, 9, 2], [1, 8, 2, 0, 0], [1, 4, 6, 2, 0], [1, 9, 9, 2, 0], [1, 3, 5, 8, 2], [1, 6, 2, 0, 0]]
)
IMAGES = torch.randn(6, 2, 3, 32, 32, generator=torch.Generator().manual_seed(1))  # two for each text

ANSWERS = torch.tensor([[5, 6, 2], [8, 2, -100], [4, 4, 2], [7, 2, -100], [3, 9, 2], [5, 2, -100]])
DECODER_INPUT_IDS = torch.tensor([[1, 5, 6], [1, 8, 0], [1, 4, 4], [1, 7, 0], [1, 3, 9], [1, 5, 0]])
CLASSES = torch.tensor([0, 1, 1, 0, 1, 0])
BOXES = torch.tensor([[0.2, 0.3, 0.2, 0.1], [0.5, 0.5, 0.9, 0.4], [0.4, 0.6, 0.1, 0.3]]).repeat(2, 1)
IMAGE_IDS = torch.arange(6)
MASKED_TEXTS = TEXTS.where(torch.arange(5) != 1, 19)
MASKED_WORDS = TEXTS.where(torch.arange(5) == 1, -100)
BEGINNINGS = TEXTS[:, :2]


class Case(NamedTuple):
    """A model class, and its inputs and labels besides a text and an image per row."""

    model_class: type[TripsPreTrainedModel]
    inputs: dict[str, torch.Tensor] = {}
    training_inputs: dict[str, torch.Tensor] = {}
    draws: bool = False  # whether its losses draw random rows of the batch
    fusion_type: str = "cross_attention"

    def __str__(self):
        form = "" if self.fusion_type == "cross_attention" else f"-{self.fusion_type}"
        return self.model_class.__name__ + form

    def make_model(self, attn_implementation="sdpa", **fields):
        """Return a model in evaluation mode with the same random weights each time; `fields` as in `make_config`."""
        torch.manual_seed(0)
        config = make_config(**{"fusion_type": self.fusion_type, **fields})
        return self.model_class._from_config(config, attn_implementation=attn_implementation).eval()

    def make_inputs(self, num_texts=4, training=False):
        """Return up to 6 padded texts, each with its own image. Sets the seed."""
        torch.manual_seed(0)
        inputs = {
            "input_ids": TEXTS,
            "attention_mask": (TEXTS != 0).long(),
            "pixel_values": IMAGES[:, 0],
            **(self.training_inputs if training else self.inputs),
        }
        return {name: tensor[:num_texts].clone() for name, tensor in inputs.items()}


CASES = [
    Case(TripsModel),
    Case(TripsForQuestionAnswering, {"decoder_input_ids": DECODER_INPUT_IDS}, {"labels": ANSWERS}),
    Case(
        TripsForImagesAndTextClassification,
        {"pixel_values": IMAGES},
        {"pixel_values": IMAGES, "labels": CLASSES},
    ),
    Case(TripsForVisualGrounding, {}, {"labels": BOXES}),
    Case(TripsForRetrieval, {}, {"image_ids": IMAGE_IDS}, draws=True),
    Case(
        TripsForPreTraining,
        {},
        {
            "mlm_input_ids": MASKED_TEXTS,
            "mlm_labels": MASKED_WORDS,
            "prompt_input_ids": BEGINNINGS,
            "prompt_attention_mask": torch.ones_like(BEGINNINGS),
            "labels": ANSWERS,
        },
        draws=True,
    ),
    Case(TripsModel, fusion_type="skip_connected"),
    Case(
        TripsForQuestionAnswering,
        {"decoder_input_ids": DECODER_INPUT_IDS},
        {"labels": ANSWERS},
        fusion_type="single_stream",
    ),
]


class NoNumbers(TorchDispatchMode):
    """Mode that raises on host syncs."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("the device was asked for a number")
        return function(*args, **(kwargs or {}))


class LargestSquare(TorchDispatchMode):
    """Mode that records the sizes of results whose last two dimensions equal a number of tokens."""

    def __init__(self, num_tokens):
        super().__init__()
        self.num_tokens, self.found = num_tokens, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.shape[-2:] == (self.num_tokens, self.num_tokens):
            self.found.append(str(function))
        return result


each_model = pytest.mark.parametrize("case", CASES, ids=str)
each_generator = pytest.mark.parametrize("case", [case for case in CASES if case.model_class.can_generate()], ids=str)


def make_config(dropout=0.0, fusion_type="cross_attention", **vision):
    """
    Return a configuration with 64 patches -> ceil(.6 * 64) = 39 and 1 fused -> ceil(.6 * 40) = 24 and 1 fused.

    Vision and text differ in width, so that there is a `selection_projection` (except in a single stream). The stem
    has BatchNorm's buffers. `vision` are fields of the vision part.
    """
    single_stream = fusion_type == "single_stream"
    return TripsConfig(
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "image_size": 32,
            "patch_size": 4,
            "patch_embedding_type": "convolutional",
            "initializer_range": 0.2,
            "attention_probs_dropout_prob": dropout,
            "schedule": "1:text:0.6,3:text:0.6",
            **vision,
        },
        text_config={
            "vocab_size": 20,
            "hidden_size": 32 if single_stream else 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2 if single_stream else 3,
            "intermediate_size": 64,
            "max_position_embeddings": 16,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": dropout,
            "initializer_range": 0.2,
        },
        fusion_encoder_config={
            "num_hidden_layers": 2 if fusion_type == "skip_connected" else 1,
            "fusion_type": fusion_type,
            "skip_stride": 1,
        },
        decoder_config={"num_hidden_layers": 1, "bos_token_id": 1, "eos_token_id": 2},
        initializer_range=0.2,
    )


def main_output(outputs):
    names = ("logits", "pred_boxes", "logits_per_text", "last_hidden_state")
    return next(outputs[name] for name in names if name in outputs)


def loss_of(outputs):
    return outputs.loss if "loss" in outputs else outputs.last_hidden_state.sin().mean()


def kept_by(outputs):
    """Return the kept patches by selection layer and row."""
    return [layer.kept_indices.tolist() for layer in outputs.selection]


def assert_same_outputs(model, expected_model, case, rtol=0, atol=0):
    outputs = model(**case.make_inputs())
    expected = expected_model(**case.make_inputs())
    torch.testing.assert_close(main_output(outputs), main_output(expected), rtol=rtol, atol=atol)
    assert kept_by(outputs) == kept_by(expected)


def share_of_kept(outputs, expected):
    """Return the share of the kept patches of `expected` that `outputs` also kept."""
    pairs = [
        (set(row), set(row_expected))
        for layer, layer_expected in zip(kept_by(outputs), kept_by(expected))
        for row, row_expected in zip(layer, layer_expected)
    ]
    return sum(len(row & expected) for row, expected in pairs) / sum(len(expected) for _, expected in pairs)


def enable_checkpointing(model, **kwargs):
    """Enable activation checkpointing, whose method Transformers 5.24 renamed."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{name}_checkpointing_enable")(kwargs or None)


def compile_and_count(model):
    """Return the model compiled without Inductor, and the list of its graphs."""
    graphs = []

    def count_graphs(graph_module, example_inputs):
        graphs.append(graph_module)
        return graph_module.forward

    return torch.compile(model, backend=count_graphs, fullgraph=True), graphs


def gradients_of(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
