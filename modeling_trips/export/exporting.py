"""Export of a model to a folder of graphs with Transformers' exporters."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm
from transformers.exporters import (
    ExportedModel,
    HfExporter,
    NNCFOpenVINOQuantizer,
    NNCFWeightCompressionConfig,
    OnnxConfig,
    OnnxExporter,
    OpenVINOConfig,
    OpenVINOExporter,
)
from transformers.exporters.configs import DynamoConfig

from modeling_trips import TripsConfig, TripsForRetrieval, TripsModel, TripsPreTrainedModel, TripsProcessor

from ..inspection.files import whole_folder
from .graphs import Graph, graphs_of
from .running import HEAD_FILE, assemble


BACKENDS = {"onnx": ("fp32",), "openvino": ("fp32", "bf16", "int8")}

# Prefixes of weights in graphs.
IN_GRAPHS = ("model.", "decoder.", "lm_head.")


def export_model(
    model: TripsPreTrainedModel,
    folder: str | Path,
    backend: str = "openvino",
    dtype: str = "fp32",
    calibration: Iterable[Mapping[str, torch.Tensor]] | None = None,
    processor: TripsProcessor | None = None,
):
    """
    Export a model to a folder of graphs, which [`load_exported`] loads. The folder is whole or absent.

    The schedule and the image size of the model's configuration are fixed. Numbers of texts and images and the length
    of texts are dynamic.

    Args:
        model (`TripsPreTrainedModel`): [`TripsModel`] or a model with a head, but not [`TripsForPreTraining`].
        folder (`str` or `Path`): Output folder, empty or new.
        backend (`str`, *optional*, defaults to `"openvino"`): `"openvino"`, or `"onnx"` for ONNX Runtime.
        dtype (`str`, *optional*, defaults to `"fp32"`): `"fp32"`; with OpenVINO also `"bf16"`, or `"int8"`: 8-bit
            weights, and activations that are quantized to 8 bits with a scale per batch.
        calibration (`Iterable[Mapping[str, torch.Tensor]]`, *optional*): Inputs of the model, for `"int8"`. They
            determine fixed scales, so activations stay in 8 bits between layers, which is faster.
        processor ([`TripsProcessor`], *optional*): Processor to save with the graphs.

    Raises:
        ValueError: The backend does not support the dtype, the model is not supported, or the folder is not empty.
        ImportError: A package of the extra `export` is not installed.
    """
    if dtype not in BACKENDS.get(backend, ()):
        known = "; ".join(f"{name}: {', '.join(dtypes)}" for name, dtypes in BACKENDS.items())
        raise ValueError(f"`backend` and `dtype` must be one of {known}, got {backend!r} and {dtype!r}.")
    if calibration is not None and dtype != "int8":
        raise ValueError(f"Calibration is only supported for openvino with int8, got {backend} with {dtype}.")
    if Path(folder).is_dir() and any(Path(folder).iterdir()):
        raise ValueError(f"{folder} is not empty. Choose another folder or remove it.")
    exporter: HfExporter = OnnxExporter() if backend == "onnx" else OpenVINOExporter()
    quantizer = None
    if dtype == "int8":
        quantizer = NNCFOpenVINOQuantizer(None if calibration is not None else NNCFWeightCompressionConfig())
    options: DynamoConfig = OnnxConfig(ort_fusions="cpu") if backend == "onnx" else OpenVINOConfig(stateful=False)
    config = describe(model, torch.bfloat16 if dtype == "bf16" else torch.float32)
    generation_config = copy.deepcopy(model.generation_config) if model.can_generate() else None
    model = copy.deepcopy(model).to("cpu", torch.float32).eval()
    head = head_of(model)
    graphs = graphs_of(model)
    calls = {} if calibration is None else record(graphs, config, head, generation_config, calibration)
    components = {}
    for name, graph in tqdm(graphs.items(), desc="graphs"):
        graph_quantizer = quantizer
        if name in calls:
            graph_quantizer = quantizer.with_calibration(calls[name])
        options = replace(options, dynamic_shapes=graph.dynamic_shapes, quantizer=graph_quantizer)
        components[name] = exporter.export(graph.module, graph.inputs, options).components["model"]
    exported = ExportedModel(components, exporter.export_format, config, generation_config)
    with whole_folder(folder) as partial:
        exported.save_pretrained(partial)
        save_file(head, partial / HEAD_FILE)
        if processor is not None:
            processor.save_pretrained(partial)


def head_of(model: TripsPreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the weights that stay in PyTorch."""
    if isinstance(model, TripsModel):
        return {}
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(IN_GRAPHS)}


def describe(model: TripsPreTrainedModel, dtype: torch.dtype = torch.float32) -> TripsConfig:
    """
    Return the configuration of an export, with the class and the dtype of the graphs, but without references to code.
    """
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    for name in ("auto_map", "custom_pipelines"):
        config.__dict__.pop(name, None)
    return config


class Recorder:
    """Part that runs in PyTorch instead of its graph and records its inputs."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.calls = []

    def __call__(self, **inputs):
        self.calls.append(inputs)
        return self.module(**inputs)


@torch.no_grad()
def record(
    graphs: dict[str, Graph], config: TripsConfig, head: dict, generation_config, calibration: Iterable[Mapping]
) -> dict[str, list[dict]]:
    """Record the inputs of each part while the model processes the calibration data."""
    recorders = {name: Recorder(graph.module) for name, graph in graphs.items()}
    model = assemble(config, recorders, head, generation_config)
    for inputs in calibration:
        if model.can_generate():
            model.generate(**inputs)
        elif isinstance(model, TripsForRetrieval):
            model.match(**inputs)
            model.get_image_features(inputs["pixel_values"])
        else:
            model(**inputs)
    return {name: recorder.calls for name, recorder in recorders.items()}
