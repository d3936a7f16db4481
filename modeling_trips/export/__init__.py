"""Models as graphs of ONNX Runtime and OpenVINO, which run on CPUs without PyTorch's eager mode."""

from .exporting import BACKENDS, export_model
from .running import load_exported


__all__ = ["BACKENDS", "export_model", "load_exported"]
