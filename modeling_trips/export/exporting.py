"""From a model to a folder of graphs, with Transformers' exporters."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
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
from transformers.exporters.base import EXPORT_MANIFEST_FILE
from transformers.exporters.configs import DynamoConfig

from modeling_trips import TripsConfig, TripsModel, TripsPreTrainedModel

from .graphs import graphs_of, trunk_of


# What a folder holds besides graphs and configurations: the few weights of a head that stay in PyTorch.
HEAD_FILE = "head.safetensors"
# The parts of a model whose weights are in graphs.
IN_GRAPHS = ("model.", "decoder.", "lm_head.")


def onnx_exporter(dtype: str) -> tuple[HfExporter, DynamoConfig]:
    quantizer = None
    if dtype == "int8":
        # Each activation's scale is found as it comes, each weight's by column: no data is needed.
        config = OnnxRuntimeDynamicConfig(op_types_to_quantize=["MatMul", "Gemm"], per_channel=True)
        quantizer = OnnxRuntimeQuantizer(config)
    return OnnxExporter(), OnnxConfig(ort_fusions="cpu", quantizer=quantizer)


def openvino_exporter(dtype: str) -> tuple[HfExporter, DynamoConfig]:
    quantizer = NNCFOpenVINOQuantizer(NNCFWeightCompressionConfig()) if dtype == "int8" else None
    return OpenVINOExporter(), OpenVINOConfig(stateful=False, quantizer=quantizer)


MAKERS: dict[str, Callable[[str], tuple[HfExporter, DynamoConfig]]] = {
    "onnx": onnx_exporter,
    "openvino": openvino_exporter,
}
# The precisions of each backend. ONNX Runtime has no bfloat16 on CPUs.
BACKENDS = {"onnx": ("fp32", "int8"), "openvino": ("fp32", "bf16", "int8")}


def check_dtype(backend: str, dtype: str):
    """Raises a `ValueError` if a backend has not this precision."""
    if dtype not in BACKENDS.get(backend, ()):
        known = "; ".join(f"{name}: {', '.join(dtypes)}" for name, dtypes in BACKENDS.items())
        raise ValueError(f"There is no backend {backend!r} with the dtype {dtype!r}. There are {known}.")


def export_model(model: TripsPreTrainedModel, folder: str | Path, backend: str = "openvino", dtype: str = "fp32"):
    """
    Writes the graphs of a model to a folder, which [`load_exported`] loads.

    The schedule and the size of images are those of the model's configuration; how many texts and images there are and
    how long the texts are is free. Graphs are taken of [`TripsModel`] and of the models for tasks, but not of
    [`TripsForPreTraining`].

    Args:
        model (`TripsPreTrainedModel`): in float32, on the CPU. It is left as it was.
        folder (`str` or `Path`): to write to. Files of an earlier export are replaced.
        backend (`str`, *optional*, defaults to `"openvino"`): what is to run the graphs: `"openvino"`, or `"onnx"` for
            ONNX Runtime.
        dtype (`str`, *optional*, defaults to `"fp32"`): what they compute in: `"fp32"`; `"bf16"` (OpenVINO); or
            `"int8"`, weights of 8 bits. ONNX Runtime then rounds activations to 8 bits, too, each batch by its own
            scale; no data is needed.

    Raises:
        ValueError: if the backend has not this dtype, or there are no graphs of such a model.
        ImportError: if a package of the extra `export` is missing.
    """
    check_dtype(backend, dtype)
    trunk_of(model)
    exporter, options = MAKERS[backend](dtype)
    config = describe(model)
    head = {name: tensor for name, tensor in model.state_dict().items() if is_of_head(model, name)}
    model = copy.deepcopy(model).eval()
    if dtype == "bf16":
        model = model.to(torch.bfloat16)
    components = {}
    for name, graph in tqdm(graphs_of(model).items(), desc="graphs"):
        exported = exporter.export(graph.module, graph.inputs, replace(options, dynamic_shapes=graph.dynamic_shapes))
        components[name] = exported.components["model"]
    generation_config = model.generation_config if model.can_generate() else None
    ExportedModel(components, exporter.export_format, config, generation_config).save_pretrained(folder)
    save_file(head, Path(folder) / HEAD_FILE)


def is_of_head(model: TripsPreTrainedModel, name: str) -> bool:
    """Whether a weight of this name stays in PyTorch."""
    return not isinstance(model, TripsModel) and not name.startswith(IN_GRAPHS)


def describe(model: TripsPreTrainedModel) -> TripsConfig:
    """The configuration of an export: it names the class, and no code, which there is none of in the folder."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    for name in ("auto_map", "custom_pipelines"):
        if hasattr(config, name):
            delattr(config, name)
    return config


def runner_options(folder: Path, num_threads: int) -> dict:
    """How the runtime of an export is to run it, as `ExportedModel.from_pretrained` takes it."""
    manifest = json.loads((folder / EXPORT_MANIFEST_FILE).read_text(encoding="utf-8"))
    if manifest["export_format"] == "onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        return {"session_options": options}
    dtype = manifest["components"]["text"]["metadata"]["export_dtype"]
    # OpenVINO would compute in bfloat16 wherever the processor can, if it were not told.
    precision = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    return {"config": {"INFERENCE_NUM_THREADS": num_threads, "INFERENCE_PRECISION_HINT": precision}}
