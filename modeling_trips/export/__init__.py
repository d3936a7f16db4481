"""Export of models to graphs of ONNX Runtime and OpenVINO for CPUs."""

import sys

import transformers
from packaging.version import Version


if Version(transformers.__version__) < Version("5.24"):
    raise ImportError(f"Exported graphs need transformers>=5.24, got {transformers.__version__}.")

# OpenVINO's tools send telemetry unless this package is missing at their import.
sys.modules.setdefault("openvino_telemetry", None)

from .exporting import BACKENDS, export_model  # noqa: E402
from .running import load_exported  # noqa: E402


__all__ = ["BACKENDS", "export_model", "load_exported"]
