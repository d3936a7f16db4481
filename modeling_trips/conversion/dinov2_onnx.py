# Copyright 2026 The TRIPS for Transformers authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Conversion of a DINOv2 inside an ONNX file, exported as part of a larger model, to `Dinov2Model`."""

import re
from pathlib import Path

import numpy as np
import torch
from transformers import Dinov2Config, Dinov2Model

from .rules import ConversionError, printable


PREFIX = "backbone."  # of the names of DINOv2's weights
HEAD_SIZE = 64  # of every DINOv2; the file lacks the number of heads


def read_dinov2_onnx(path: str | Path) -> Dinov2Model:
    """
    Read a `Dinov2Model` from an ONNX file. Exports rename and transpose the matrices of linear layers, so they are
    found by the biases that are added to their products. Positions are found by their shapes.

    Args:
        path (`str`): ONNX file.

    Returns:
        The model in evaluation mode.

    Raises:
        ImportError: The package onnx is not installed.
        ConversionError: The file has no complete DINOv2 whose names begin with `PREFIX`.
    """
    import onnx.numpy_helper  # an extra

    graph = onnx.load(path).graph
    arrays = {each.name: torch.from_numpy(onnx.numpy_helper.to_array(each).copy()) for each in graph.initializer}
    weights = {name: array for name, array in arrays.items() if name.startswith(PREFIX)}
    factors = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        products = [factors[name] for name in node.input if factors.get(name) in arrays]
        biases = [name for name in node.input if name in weights and name.endswith(".bias")]
        if node.op_type == "Add" and products and biases:
            weights[f"{biases[0].removesuffix('bias')}weight"] = arrays[products[0]].T.contiguous()
    weights = {name.removeprefix(PREFIX): array for name, array in weights.items()}
    nameless = [array for name, array in arrays.items() if not re.match(r"\w+\.", name)]
    return _model_of({**weights, "embeddings.position_embeddings": _positions(weights, nameless, path)}, path)


def onnx_states(path: str | Path, pixel_values: np.ndarray) -> np.ndarray:
    """
    Compute the last hidden states of the DINOv2 in an ONNX file with onnxruntime.

    Args:
        path (`str`): ONNX file.
        pixel_values (`np.ndarray` of shape `(batch_size, 3, height, width)`, float32): Images.

    Returns:
        `np.ndarray` of shape `(batch_size, 1 + num_patches, hidden_size)`.

    Raises:
        ImportError: The packages onnx and onnxruntime are not installed.
    """
    import onnx.helper  # an extra
    import onnxruntime

    model = onnx.load(path)
    (states,) = [node.output[0] for node in model.graph.node if f"{PREFIX}layernorm.bias" in node.input]
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(states))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run([states], {model.graph.input[0].name: pixel_values})[0]


def _positions(weights: dict[str, torch.Tensor], nameless: list[torch.Tensor], path: str | Path) -> torch.Tensor:
    """
    Return the positions of [CLS], `(1, 1, hidden_size)`, and of the patches, `(1, num_patches, hidden_size)`, joined.
    An export splits them into the only nameless arrays of these shapes.
    """
    width = len(weights.get("embeddings.patch_embeddings.projection.bias", ()))
    tables = [array for array in nameless if array.ndim == 3 and array.shape[::2] == (1, width)]
    of_class, of_patches = ([table for table in tables if (table.shape[1] == 1) is single] for single in (True, False))
    if len(of_class) != 1 or len(of_patches) != 1:
        raise ConversionError(
            f"{path} must have one array for the position of [CLS] and one for those of the patches, got "
            f"{len(of_class)} and {len(of_patches)}."
        )
    return torch.cat((of_class[0], of_patches[0]), dim=1)


def _model_of(weights: dict[str, torch.Tensor], path: str | Path) -> Dinov2Model:
    projection, expansion = "embeddings.patch_embeddings.projection.weight", "encoder.layer.0.mlp.fc1.bias"
    if absent := [name for name in (projection, expansion) if name not in weights]:
        raise ConversionError(f"{path} has no complete DINOv2: {', '.join(absent)} is missing.")
    hidden_size, num_channels, patch_size, _ = weights[projection].shape
    layers = {int(match[1]) for name in weights if (match := re.match(r"encoder\.layer\.(\d+)\.", name))}
    grid = round((weights["embeddings.position_embeddings"].shape[1] - 1) ** 0.5)
    config = Dinov2Config(
        hidden_size=hidden_size,
        num_hidden_layers=len(layers),
        num_attention_heads=hidden_size // HEAD_SIZE,
        mlp_ratio=len(weights[expansion]) // hidden_size,
        image_size=grid * patch_size,
        patch_size=patch_size,
        num_channels=num_channels,
        use_mask_token=False,
    )
    model, loading = Dinov2Model.from_pretrained(None, config=config, state_dict=weights, output_loading_info=True)
    wrong = {kind: sorted(map(str, keys)) for kind, keys in loading.items() if keys}
    if wrong:
        listed = "; ".join(f"{kind}: {', '.join(map(printable, keys[:5]))}" for kind, keys in wrong.items())
        raise ConversionError(f"{path} has no complete DINOv2: {listed}.")
    return model.eval()
