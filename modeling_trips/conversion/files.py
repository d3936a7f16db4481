"""Reading of untrusted weight files without running their code."""

import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from .rules import ConversionError, printable


WEIGHT_FILES = (".pth", ".pt", ".bin", ".safetensors")


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """
    Read the state dict of a PyTorch or safetensors file, or its entry `model`. The content, not the name, determines
    the format. No code in the file is run.

    Raises:
        ConversionError: The file is damaged, has no state dict, or has anything but dense weights.
    """
    path = Path(path)
    with path.open("rb") as file:
        start = file.read(9)
    try:
        # A safetensors file begins with the length of its JSON header in 8 bytes.
        content = load_file(path) if start[8:] == b"{" else _read_pytorch(path)
    except Exception as error:  # a damaged file can raise anything
        reason = printable(str(error).partition("WeightsUnpickler error: ")[2] or str(error))[:300]
        raise ConversionError(
            f"{path} cannot be read ({type(error).__name__}: {reason}). Download it again. If it has more than "
            "weights and you trust it, load it with `torch.load(..., weights_only=False)` and save its weights alone."
        ) from error
    content = content.get("model", content) if isinstance(content, dict) else content
    size = path.stat().st_size
    if not isinstance(content, dict) or not content:
        raise ConversionError(f"{path} is not a state dict and has no entry `model`. Give a file of ALBEF.")
    others = [printable(str(name)) for name, value in content.items() if not _is_weight(name, value, size)]
    if others:
        raise ConversionError(f"{path} has entries that are not dense weights of the file: {', '.join(others[:10])}.")
    return content


def _read_pytorch(path: Path):
    """Load a file with `torch.load` after checking its checksums."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"{damaged} has a wrong checksum")
    with path.open("rb") as file:  # `torch.load` may choose another format by the name
        return torch.load(file, map_location="cpu", weights_only=True)


def _is_weight(name, value, size: int) -> bool:
    if not isinstance(name, str) or not isinstance(value, torch.Tensor) or value.is_nested or value.is_quantized:
        return False
    return (
        value.layout == torch.strided and value.device.type == "cpu" and value.numel() * value.element_size() <= size
    )
