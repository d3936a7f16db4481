"""From a model to a folder of graphs, with Transformers' exporters."""

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
    OnnxRuntimeDynamicConfig,
    OnnxRuntimeQuantizer,
    OpenVINOConfig,
    OpenVINOExporter,
)
from transformers.exporters.configs import DynamoConfig

from modeling_trips import TripsConfig, TripsForRetrieval, TripsModel, TripsPreTrainedModel

from ..configuration_trips import remove_code_references
from .graphs import Graph, graphs_of, trunk_of
from .running import HEAD_FILE, assemble


# The precisions of each backend. ONNX Runtime has no bfloat16 on CPUs.
BACKENDS = {"onnx": ("fp32", "int8"), "openvino": ("fp32", "bf16", "int8")}

# The parts of a model whose weights are in graphs.
IN_GRAPHS = ("model.", "decoder.", "lm_head.")


def check_options(backend: str, dtype: str, is_calibrated: bool = False):
    """Raises a `ValueError` if a backend has not this precision, or has no use for data."""
    if dtype not in BACKENDS.get(backend, ()):
        known = "; ".join(f"{name}: {', '.join(dtypes)}" for name, dtypes in BACKENDS.items())
        raise ValueError(f"There is no backend {backend!r} with the dtype {dtype!r}. There are {known}.")
    if is_calibrated and (backend, dtype) != ("openvino", "int8"):
        raise ValueError(f"Calibration is for openvino with int8: leave it out for {backend} with {dtype}.")


def check_folder(folder: str | Path):
    """Raises a `ValueError` if there is something in a folder to write to."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty. Choose another folder, or remove it first.")


def make_exporter(backend: str, dtype: str, is_calibrated: bool) -> tuple[HfExporter, DynamoConfig]:
    """Transformers' exporter of a backend, and its options for a precision."""
    if backend == "onnx":
        quantizer = None
        if dtype == "int8":
            # Scales of weights are found by column, those of activations as they come: no data is needed.
            options = OnnxRuntimeDynamicConfig(op_types_to_quantize=["MatMul", "Gemm"], per_channel=True)
            quantizer = OnnxRuntimeQuantizer(options)
        return OnnxExporter(), OnnxConfig(ort_fusions="cpu", quantizer=quantizer)
    quantizer = None
    if dtype == "int8":
        quantizer = NNCFOpenVINOQuantizer(None if is_calibrated else NNCFWeightCompressionConfig())
    return OpenVINOExporter(), OpenVINOConfig(stateful=False, quantizer=quantizer)


def export_model(
    model: TripsPreTrainedModel,
    folder: str | Path,
    backend: str = "openvino",
    dtype: str = "fp32",
    calibration: Iterable[Mapping[str, torch.Tensor]] | None = None,
):
    """
    Writes the graphs of a model to a folder, which [`load_exported`] loads.

    The schedule and the size of images are those of the model's configuration; how many texts and images there are and
    how long the texts are is free. Graphs are taken of [`TripsModel`] and of the models for tasks, but not of
    [`TripsForPreTraining`].

    Args:
        model (`TripsPreTrainedModel`): it is left as it was.
        folder (`str` or `Path`): to write to. It must be empty, or not exist yet.
        backend (`str`, *optional*, defaults to `"openvino"`): what is to run the graphs: `"openvino"`, or `"onnx"` for
            ONNX Runtime.
        dtype (`str`, *optional*, defaults to `"fp32"`): what they compute in: `"fp32"`; `"bf16"` (OpenVINO); or
            `"int8"`: weights of 8 bits, and activations that are rounded to 8 bits as they come, each batch by its own
            scale.
        calibration (`Iterable[Mapping[str, torch.Tensor]]`, *optional*): some inputs of the model, as the processor
            makes them, for OpenVINO with `"int8"`: activations are rounded by scales that suit these, and stay in 8
            bits from layer to layer, which is faster.

    Raises:
        ValueError: if the backend has not this dtype, there are no graphs of such a model, or the folder is not empty.
        ImportError: if a package of the extra `export` is missing.
    """
    check_options(backend, dtype, calibration is not None)
    check_folder(folder)
    trunk_of(model)
    exporter, options = make_exporter(backend, dtype, calibration is not None)
    config = describe(model, torch.bfloat16 if dtype == "bf16" else torch.float32)
    generation_config = copy.deepcopy(model.generation_config) if model.can_generate() else None
    remove_code_references(generation_config)
    model = copy.deepcopy(model).to("cpu", torch.float32).eval()
    head = head_of(model)
    graphs, components = graphs_of(model), {}
    calls = {} if calibration is None else record(graphs, config, head, generation_config, calibration)
    for name, graph in tqdm(graphs.items(), desc="graphs"):
        quantizer = options.quantizer
        if name in calls:
            quantizer = quantizer.with_calibration(calls[name])
        exported = exporter.export(
            graph.module, graph.inputs, replace(options, dynamic_shapes=graph.dynamic_shapes, quantizer=quantizer)
        )
        components[name] = exported.components["model"]
    ExportedModel(components, exporter.export_format, config, generation_config).save_pretrained(folder)
    save_file(head, Path(folder) / HEAD_FILE)


def head_of(model: TripsPreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights that stay in PyTorch."""
    if isinstance(model, TripsModel):
        return {}
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(IN_GRAPHS)}


def describe(model: TripsPreTrainedModel, dtype: torch.dtype = torch.float32) -> TripsConfig:
    """
    The configuration of an export. It names the class and what graphs compute in, but no code: the folder has none.
    """
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], dtype
    remove_code_references(config)
    return config


class Recorder:
    """Runs a part in PyTorch, in place of its graph, and keeps what it is given."""

    def __init__(self, module: nn.Module):
        self.module, self.calls = module, []

    def __call__(self, **inputs):
        self.calls.append(inputs)
        return self.module(**inputs)


@torch.no_grad()
def record(
    graphs: dict[str, Graph], config: TripsConfig, head: dict, generation_config, calibration: Iterable[Mapping]
) -> dict[str, list[dict]]:
    """What each part is given while the model does what it is for."""
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
